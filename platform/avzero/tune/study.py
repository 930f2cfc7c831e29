"""One Optuna study per group: the truth about a sweep's trials, ordered by a virtual clock.

A study has a fixed number of seats. A trial sits in a seat; every epoch it trains takes one tick,
and the seat's next trial starts when it ends. What is known at (tick, seat) is what happened at
earlier (tick, seat)s: reports are taken in that order, however the machines' real speeds mix them,
and stopping and proposing look at nothing else. So the same sweep comes out whatever was killed and
restarted in between, and on any number of machines. A trial that has trained up to a decision
which others' reports must precede is held until those have come in.

Everything is in the journal before anything acts on it: before listeners hear that a trial begins
or has ended, and before the next trials are handed out. An epoch is in its run's folder. After any
kill, the same reports taken again in the same order change nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import optuna
from optuna.trial import FrozenTrial, TrialState

from avzero.data.storage import Storage
from avzero.train.folder import RunFolder
from avzero.train.records import Epoch
from avzero.tune.cohorts import begun_with, cohort_size, shared_values, structural_names
from avzero.tune.journal import Journal
from avzero.tune.listener import TrialView
from avzero.tune.rungs import SEAT, START, decides, should_stop
from avzero.tune.samplers import make_sampler
from avzero.tune.space import Group

_STATE_NAMES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}
_STATES = {name: state for state, name in _STATE_NAMES.items()}
_END = "end"
"""User attribute: the virtual epoch at which a trial ended."""


class Report(NamedTuple):
    """What a worker says of a run: an epoch, its end, or its failure."""

    epoch: Epoch | None
    finished: bool = False
    failed: str = ""


class Event(NamedTuple):
    """What happened to a trial: it started, it ended, or an epoch of it is over."""

    trial: TrialView
    epoch: Epoch | None = None


@dataclass
class _Seat:
    """A place for one trial at a time."""

    free: int = 0
    """Virtual epoch from which it is free, while nobody sits in it."""
    trial: optuna.trial.Trial | None = None
    view: TrialView | None = None
    start: int = 0
    inbox: deque[Report] = field(default_factory=deque)
    """Reports that are not due yet."""
    trained: int = 0
    """Epochs reported, those in the inbox included."""
    over: bool = False
    """Whether the last report has come in."""

    def sit(self, trial: optuna.trial.Trial, view: TrialView, start: int) -> None:
        """Give the seat to a trial."""
        self.trial, self.view, self.start = trial, view, start
        self.inbox.clear()
        self.trained, self.over = 0, False

    @property
    def moment(self) -> int:
        """The virtual epoch of what happens next in this seat."""
        return self.free if self.view is None else self.start + len(self.view.epochs) + 1


class GroupStudy:
    """The trials of one group. Reading needs nothing; ``begin`` comes before running."""

    def __init__(self, group: Group, journal: Journal, storage: Storage) -> None:
        self.group = group
        self._journal = journal
        self._storage = storage
        self._study = journal.load(group)
        self._seats: list[_Seat] = []
        self._orphans: list[FrozenTrial] = []
        self._cohort = 1
        self._structural: tuple[str, ...] = ()
        """Names whose values a cohort shares."""
        self._twins: dict[int, list[tuple[optuna.trial.Trial, TrialView]]] = {}

    @property
    def open(self) -> bool:
        """Whether ``begin`` has been called."""
        return bool(self._seats)

    def begin(self, seats: int) -> list[Event]:
        """Prepare to run; the journal must be held exclusively.

        Args:
            seats: how many trials run side by side; a study keeps what it began with.
        """
        study = self._study = self._journal.create(self.group)
        search = self.group.job.search
        begun = begun_with(study)
        if begun is None:
            seats = search.seats or seats
            begun = seats, cohort_size(search, self.group.trials, seats)
            study.set_user_attr("cohort", begun[1])
            study.set_user_attr("seats", seats)  # the last: a study with seats is whole
        self._cohort = begun[1]
        if self._cohort > 1:
            self._structural = structural_names(self.group)
        for point in self.group.start_points[: self.group.trials]:
            study.enqueue_trial(point, skip_if_exists=True)
        events = self._take_seats(study)
        self._journal.commit()
        return events

    def _take_seats(self, study: optuna.Study) -> list[Event]:
        """Put unfinished trials of an earlier driver back into their seats."""
        self._seats = [_Seat() for _ in range(study.user_attrs["seats"])]
        placed = [t for t in self._trials() if SEAT in t.user_attrs]
        for trial in placed:
            seat = self._seats[trial.user_attrs[SEAT]]
            seat.free = max(seat.free, trial.user_attrs.get(_END, 0))
            if trial.state is TrialState.RUNNING:
                # Optuna has no public way to take up a running trial by its number.
                own = optuna.trial.Trial(study, trial._trial_id)
                seat.sit(own, self._view(trial.number, trial.params), trial.user_attrs[START])
        running = [t for t in self._trials() if t.state is TrialState.RUNNING]
        # Whoever sits down does so after everything that has begun; where all had ended and more
        # trials are asked for, after everything that has ended.
        latest = max((t.user_attrs[START] for t in placed), default=0)
        if not running:
            latest = max([latest, *(t.user_attrs.get(_END, 0) for t in placed)])
        for seat in self._seats:
            seat.free = max(seat.free, latest)
        unplaced = [t for t in running if SEAT not in t.user_attrs]
        self._orphans = [t for t in unplaced if "twin_of" not in t.user_attrs]
        events = [Event(seat.view) for seat in self._seats if seat.view is not None]
        for trial in unplaced:
            if "twin_of" in trial.user_attrs:
                own = optuna.trial.Trial(study, trial._trial_id)
                events += self._pair(own, self._view(trial.number, trial.params))
        return events

    def _trials(self) -> list[FrozenTrial]:
        return [] if self._study is None else self._study.get_trials(deepcopy=False)

    # -- what is known --------------------------------------------------------------------------

    def done(self) -> list[TrialView]:
        """Return the trials that have ended."""
        return [self._ended_view(t) for t in self._trials() if t.state.is_finished()]

    @property
    def remaining(self) -> int:
        """Number of trials that have not ended."""
        ended = sum(t.state.is_finished() for t in self._trials())
        return max(0, self.group.trials - ended)

    def winner(self) -> TrialView | None:
        """Return the complete trial best in the first objective; the earliest of equals."""
        complete = [t for t in self._trials() if t.state is TrialState.COMPLETE]
        if not complete:
            return None
        return self._ended_view(max(complete, key=lambda t: (t.values[0], -t.number)))

    # -- running --------------------------------------------------------------------------------

    def runnable(self) -> list[TrialView]:
        """Return the trials whose next epoch may be trained now, the most urgent first."""
        ready = [
            (seat.start + seat.trained, at, seat.view)
            for at, seat in enumerate(self._seats)
            if seat.view is not None and not seat.over and not self._held(seat)
        ]
        return [view for _, _, view in sorted(ready, key=lambda item: item[:2])]

    def known(self, task: str) -> int:
        """Return how many epochs of a running trial have been reported."""
        return next((s.trained for s in self._seats if s.view and s.view.task.id == task), 0)

    def runs(self, task: str) -> bool:
        """Return whether a trial of this run sits in a seat."""
        return any(seat.view is not None and seat.view.task.id == task for seat in self._seats)

    def _held(self, seat: _Seat) -> bool:
        """Return whether a decision about a seat's trial is still to be taken."""
        if seat.view is None:
            return False
        steps = [
            report.epoch.epoch + 1
            for report in seat.inbox
            if report.epoch is not None and report.epoch.val
        ]
        seen = [epoch.epoch + 1 for epoch in seat.view.epochs if epoch.val]
        search, epochs = self.group.job.search, seat.view.task.train.epochs
        return any(
            decides(before, step, search, epochs)
            for before, step in zip([max(seen, default=0), *steps], steps, strict=False)
        )

    def receive(self, task: str, report: Report) -> None:
        """Take a worker's report; it counts when its turn comes (``advance``)."""
        for seat in self._seats:
            if seat.view is not None and seat.view.task.id == task and not seat.over:
                # A restarted worker repeats what is known.
                if report.epoch is not None and report.epoch.epoch != seat.trained:
                    return
                seat.trained += report.epoch is not None
                seat.over = report.finished or bool(report.failed)
                seat.inbox.append(report)

    def advance(self) -> Iterator[Event]:
        """Process what is due, in the order of the virtual clock; yield what happened."""
        while True:
            more = any(seat.view is None for seat in self._seats) and self._more()
            due = [
                (seat.moment, at)
                for at, seat in enumerate(self._seats)
                if seat.view is not None or more
            ]
            if not due:
                break
            seat = self._seats[min(due)[1]]
            if seat.view is None:
                events = self._ask(seat, min(due)[1])
            elif seat.inbox:
                events = self._process(seat, seat.inbox.popleft())
            else:
                break
            for event in events:
                if event.epoch is None:  # an epoch is in its run's folder
                    self._journal.commit()
                yield event
        self._journal.publish()

    def _more(self) -> bool:
        """Return whether there are trials to begin; looks at all there have been."""
        asked = sum(t.state is not TrialState.WAITING for t in self._trials())
        return bool(self._orphans) or asked < self.group.trials

    def _ask(self, seat: _Seat, at: int) -> Iterator[Event]:
        """Give a free seat its next trial."""
        trial = self._next_trial()
        values = {
            # Also completes a trial whose driver was killed half-way through proposing it.
            name: trial._suggest(name, distribution)
            for name, distribution in self.group.distributions.items()
        }
        view = self._view(trial.number, values)
        earlier = {
            t.user_attrs["task"]: t.number
            for t in reversed(self._trials())
            if "task" in t.user_attrs and t.number != trial.number
        }.get(view.task.id)
        trial.set_user_attr("task", view.task.id)
        if earlier is not None:
            trial.set_user_attr("twin_of", earlier)
            yield from self._pair(trial, view)
            return
        start = seat.free
        trial.set_user_attr(START, start)
        trial.set_user_attr(SEAT, at)  # the last: a trial with a seat is whole
        seat.sit(trial, view, start)
        yield Event(view)

    def _next_trial(self) -> optuna.trial.Trial:
        """Return a trial whose proposal was interrupted, a start point, or a new proposal."""
        study = self._for_writing()
        number = self._orphans[0].number if self._orphans else len(self._trials())
        # A sampler per trial: what it proposes depends on the history alone, not on when the
        # sweep was stopped and resumed.
        shared = shared_values(self._trials(), number, self._cohort, self._structural)
        ranges = self.group.distributions
        study.sampler = make_sampler(self.group.job.search, number, ranges, shared)
        if self._orphans:
            # Only ``ask`` and ``tell`` drop what a sampler has read of the study before.
            study._thread_local.cached_all_trials = None
            return optuna.trial.Trial(study, self._orphans.pop(0)._trial_id)
        return study.ask(self.group.distributions)

    def _process(self, seat: _Seat, report: Report) -> Iterator[Event]:
        """Take a report whose turn has come."""
        view, epoch = seat.view, report.epoch
        if view is None:
            return
        if epoch is not None:
            view.epochs.append(epoch)
            if epoch.val and self._stops(seat, view, epoch.epoch + 1):
                view.state = "pruned"
            yield Event(view, epoch)
        if view.state == "running" and report.failed:
            view.state, view.reason = "failed", report.failed
        elif view.state == "running" and report.finished:
            view.state = "complete"
            view.result = view.folder.load_result("val")
        if view.state != "running":
            yield from self._close(seat, view, failed=bool(report.failed))

    def _stops(self, seat: _Seat, view: TrialView, step: int) -> bool:
        """Record a value; return whether the trial is stopped early."""
        trials = self._trials()
        own = trials[view.number]
        if step not in own.intermediate_values:
            # Not Trial.report, which refuses studies of several objectives.
            study = self._for_writing()
            study._storage.set_trial_intermediate_value(own._trial_id, step, view.hm)
        search = self.group.job.search
        return should_stop(own, step, view.hm, trials, search, view.task.train.epochs)

    def _close(self, seat: _Seat, view: TrialView, failed: bool) -> Iterator[Event]:
        """End a trial, and its twins with it; its seat is free from now on."""
        trial, seat.trial, seat.view = seat.trial, None, None
        seat.free = seat.start + len(view.epochs) + failed
        seat.inbox.clear()
        if trial is None:
            return
        trial.set_user_attr(_END, seat.free)
        self._tell(trial, view)
        yield Event(view)
        for twin, twin_view in self._twins.pop(view.number, []):
            yield self._close_twin(twin, twin_view, view)

    def _pair(self, trial: optuna.trial.Trial, view: TrialView) -> list[Event]:
        """Let a trial share the outcome of the earlier one with the same configuration."""
        view.twin_of = int(trial.user_attrs["twin_of"])
        original = self._trials()[view.twin_of]
        if original.state.is_finished():
            return [self._close_twin(trial, view, self._ended_view(original))]
        self._twins.setdefault(view.twin_of, []).append((trial, view))
        return []

    def _close_twin(self, trial: optuna.trial.Trial, view: TrialView, original: TrialView) -> Event:
        """End a trial with the outcome of the one that has the same configuration."""
        view.state, view.reason = original.state, original.reason
        view.epochs, view.result = original.epochs, original.result
        self._tell(trial, view)
        return Event(view)

    def _tell(self, trial: optuna.trial.Trial, view: TrialView) -> None:
        if view.reason:
            trial.set_user_attr("reason", view.reason)
        values = None
        if view.state == "complete" and view.best is not None:
            names = self.group.job.search.objectives
            values = [view.best.val[name.upper()] for name in names]
        self._for_writing().tell(trial, values, state=_STATES[view.state])

    def _for_writing(self) -> optuna.Study:
        if self._study is None:
            raise RuntimeError("begin() comes first")
        return self._study

    def _view(self, number: int, values: dict[str, Any]) -> TrialView:
        task = self.group.task(values)
        return TrialView(self.group, number, task, dict(values), RunFolder(self._storage, task))

    def _ended_view(self, trial: FrozenTrial) -> TrialView:
        """Return an ended trial with its history and result."""
        view = self._view(trial.number, trial.params)
        view.state = _STATE_NAMES[trial.state]
        view.reason = trial.user_attrs.get("reason", "")
        view.twin_of = trial.user_attrs.get("twin_of")
        stored = view.folder.load_state()
        view.epochs = stored.history if stored else []
        view.result = view.folder.load_result("val")
        return view
