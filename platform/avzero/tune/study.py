"""One Optuna study per group: the truth about a sweep's trials, kept in a journal file.

The journal is written before anything acts on it, so after any kill the same command finds every
trial with its values, its reported epochs and its state, hands out unfinished ones first (they
resume from their checkpoints) and asks the sampler only for what is still missing.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from avzero.canon import identity
from avzero.data.cache import cache_root
from avzero.data.storage import Storage, disk_errors
from avzero.errors import UserError
from avzero.protocol.counter import fold
from avzero.train.folder import RunFolder
from avzero.train.records import Epoch
from avzero.tune.listener import TrialView
from avzero.tune.space import Group, make_pruner, make_sampler

optuna.logging.set_verbosity(optuna.logging.WARNING)

_STATE_NAMES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}
_STATES = {name: state for state, name in _STATE_NAMES.items()}


class Journal:
    """The journal file of a sweep; for object storage a local copy that is mirrored.

    One driver writes a sweep at a time (``exclusive``); the mirror is replaced whole after every
    change.
    """

    def __init__(self, storage: Storage, sweep: str) -> None:
        self._storage = storage
        self._key = f"sweeps/{sweep}/study.journal"
        own = storage.local_path(self._key)
        self._mirrored = own is None
        self.path = own or cache_root() / "sweeps" / identity([storage.url, sweep]) / "journal"
        self._sweep = sweep
        if self._mirrored:
            self._fetch()

    def _fetch(self) -> None:
        """Bring the local copy up to date with object storage."""
        with disk_errors(self.path, "set AVZERO_CACHE to another folder"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._storage.download(self._key, self.path)
        except KeyError:
            self.path.unlink(missing_ok=True)

    def load(self, group: Group) -> optuna.Study | None:
        """Return a group's study for reading; None when there is none yet."""
        if not self.path.exists():
            return None
        storage = self._open()
        if group.key not in {s.study_name for s in optuna.get_all_study_summaries(storage)}:
            return None
        return optuna.load_study(study_name=group.key, storage=storage)

    def create(self, group: Group) -> optuna.Study:
        """Return a group's study for writing, made if needed."""
        return optuna.create_study(
            study_name=group.key,
            storage=self._open(),
            direction="maximize",
            load_if_exists=True,
            pruner=make_pruner(group.job),
        )

    def _open(self) -> JournalStorage:
        return JournalStorage(JournalFileBackend(str(self.path)))

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Be the sweep's only driver on this machine.

        Raises:
            UserError: another process is.
        """
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = self.path.with_name("driver.lock").open("w")
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"sweep {self._sweep}: another avzero is running it on this machine; wait for "
                    "it, or stop it"
                ) from error
            if self._mirrored:
                self._fetch()
            self._repair()
            yield

    def _repair(self) -> None:
        """Undo what a driver leaves that was killed while it wrote: its lock, half a line."""
        for stale in self.path.parent.glob(f"{self.path.name}*.lock"):
            stale.unlink(missing_ok=True)
        if self.path.exists():
            data = self.path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole != len(data):
                self.path.write_bytes(data[:whole])

    def publish(self) -> None:
        """Copy the journal to object storage."""
        if self._mirrored and self.path.exists():
            self._storage.upload(self._key, self.path)


class GroupStudy:
    """The trials of one group. Reading needs nothing; ``begin`` comes before handing out."""

    def __init__(self, group: Group, journal: Journal, storage: Storage) -> None:
        self.group = group
        self._journal = journal
        self._storage = storage
        self._study = journal.load(group)
        self._unfinished: list[FrozenTrial] = []
        self._live: dict[int, optuna.trial.Trial] = {}
        self._twins: dict[int, list[tuple[optuna.trial.Trial, TrialView]]] = {}
        self._closed_twins: list[TrialView] = []

    def begin(self) -> None:
        """Prepare to hand out trials; the journal must be held exclusively."""
        self._study = self._journal.create(self.group)
        for point in self.group.start_points:
            self._study.enqueue_trial(point, skip_if_exists=True)
        self._unfinished = [t for t in self._trials() if t.state is TrialState.RUNNING]

    def _trials(self) -> list[FrozenTrial]:
        return [] if self._study is None else self._study.get_trials(deepcopy=False)

    def done(self) -> list[TrialView]:
        """Return the trials that have ended."""
        return [self._ended_view(t) for t in self._trials() if t.state.is_finished()]

    @property
    def remaining(self) -> int:
        """Number of trials that have neither ended nor been handed out by this object."""
        ended = sum(t.state.is_finished() for t in self._trials())
        waiting = sum(len(several) for several in self._twins.values())
        return max(0, self.group.job.search.trials - ended - len(self._live) - waiting)

    def next(self) -> TrialView | None:
        """Return the next trial to run: an unfinished one, a start point, or a proposal.

        A configuration that another trial has already is not run twice: it takes over that
        trial's outcome (``take_twins``).
        """
        while self.remaining:
            trial = self._take()
            values = {
                # Also completes a trial whose driver was killed half-way through proposing it.
                name: trial._suggest(name, distribution)
                for name, distribution in self.group.distributions.items()
            }
            view = self._view(trial.number, values)
            earlier = {
                t.user_attrs["task"]: t
                for t in reversed(self._trials())
                if "task" in t.user_attrs and t.number != trial.number
            }.get(view.task.id)
            trial.set_user_attr("task", view.task.id)
            if earlier is None:
                self._live[trial.number] = trial
                self._journal.publish()
                return view
            view.twin_of = earlier.number
            trial.set_user_attr("twin_of", earlier.number)
            if earlier.state.is_finished():
                self._close_twin(trial, view, self._ended_view(earlier))
            else:
                self._twins.setdefault(earlier.number, []).append((trial, view))
        return None

    def _take(self) -> optuna.trial.Trial:
        """Return an unfinished trial of an earlier driver, or a new one."""
        study = self._for_writing()
        if self._unfinished:
            # Optuna has no public way to take up a running trial by its number.
            return optuna.trial.Trial(study, self._unfinished.pop(0)._trial_id)
        # A sampler per trial, seeded by the trial's number: what is proposed depends on the
        # history alone, not on when the sweep was stopped and resumed.
        search = self.group.job.search
        study.sampler = make_sampler(search.sampler, fold(search.seed, len(self._trials())) >> 33)
        return study.ask(self.group.distributions)

    def report(self, view: TrialView, epoch: Epoch) -> bool:
        """Record an epoch; return whether the trial should be stopped early."""
        view.epochs.append(epoch)
        if not epoch.val:
            return False
        trial = self._live[view.number]
        step = epoch.epoch + 1
        if step not in self._trials()[view.number].intermediate_values:
            trial.report(view.hm, step)
        if step >= view.task.train.epochs:
            return False
        return bool(trial.should_prune())

    def close(self, view: TrialView) -> None:
        """Tell the study how a trial ended, and its twins with it."""
        trial = self._live.pop(view.number)
        self._tell(trial, view)
        for twin, twin_view in self._twins.pop(view.number, []):
            self._close_twin(twin, twin_view, view)
        self._journal.publish()

    def release(self, view: TrialView) -> None:
        """Let go of a trial without ending it: the next driver takes it up."""
        del self._live[view.number]
        self._twins.pop(view.number, None)

    def take_twins(self) -> list[TrialView]:
        """Return the twins that have ended since the last call."""
        taken, self._closed_twins = self._closed_twins, []
        return taken

    def _close_twin(self, trial: optuna.trial.Trial, view: TrialView, original: TrialView) -> None:
        """End a trial with the outcome of the one that has the same configuration."""
        view.state, view.reason = original.state, original.reason
        view.epochs, view.result = original.epochs, original.result
        self._tell(trial, view)
        self._closed_twins.append(view)

    def _tell(self, trial: optuna.trial.Trial, view: TrialView) -> None:
        trial.set_user_attr("reason", view.reason)
        value = view.hm if view.state == "complete" else None
        self._for_writing().tell(trial, value, state=_STATES[view.state])

    def winner(self) -> TrialView | None:
        """Return the complete trial with the highest VAL HM; the earliest of equals."""
        complete = [t for t in self._trials() if t.state is TrialState.COMPLETE]
        if not complete:
            return None
        return self._ended_view(max(complete, key=lambda t: (t.value or 0.0, -t.number)))

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
