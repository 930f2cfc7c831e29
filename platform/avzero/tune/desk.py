"""The desk between Ray Tune and the studies: which array trains which trials.

Ray Tune places arrays and restarts those whose process died; what they train comes from here. An
array is given up to ``slots`` trials, the most urgent ones that may train now, preferably those it
had and those of their structure, and is refilled after every epoch.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from avzero.errors import UserError
from avzero.spec import Task
from avzero.train.records import Epoch
from avzero.tune.listener import Listener, TrialView
from avzero.tune.study import Event, GroupStudy, Report

Orders = list[dict[str, Any]]
"""``task``: JSON of the run; ``known``: how many of its epochs have been reported."""


class Desk:
    """Hands trials to arrays and takes their reports; lives in the driver.

    Whatever goes wrong in here must not be lost in Tune's event loop: the first trouble is kept,
    no more trials are handed out, and ``raise_trouble`` speaks up once Tune has returned.

    Args:
        studies: the groups' studies; those not begun yet are begun when there is room.
        record: keeps the line of a trial that has ended.
        listeners: are told what happens.
        slots: trials an array trains at once.
        arrays: how many arrays there will be.
        single: whether an array keeps its one trial to the end (``execution: trial``).
        most_deaths: a trial may be in so many arrays that die before it has failed.
    """

    def __init__(
        self,
        studies: Mapping[str, GroupStudy],
        record: Callable[[TrialView], None],
        listeners: Sequence[Listener],
        slots: int,
        arrays: int,
        single: bool = False,
        most_deaths: int = 0,
    ) -> None:
        self._studies = studies
        self._single, self._most_deaths = single, most_deaths
        self._rounds = self._epochs = 0
        self._record = record
        self._listeners = listeners
        self._slots = slots
        waiting = sum(study.remaining > 0 for study in studies.values())
        self._seats = slots * max(1, arrays // max(1, waiting))
        self._trouble: BaseException | None = None
        self._held: dict[str, dict[str, TrialView]] = {}
        """Array -> the trials it was given last, by run."""
        self._deaths: Counter[str] = Counter()
        """Run -> how many arrays have died with it."""
        self._suspects: set[str] = set()
        """Runs in arrays that died too often: each is trained alone."""
        self._heard: set[str] = set()
        """Arrays that run; others wait for a place."""

    def raise_trouble(self) -> None:
        """Raise the first thing that went wrong, if anything did."""
        if self._trouble is not None:
            raise self._trouble

    @property
    def over(self) -> bool:
        """Whether there is nothing more to hand out."""
        return self._trouble is not None or not any(s.remaining for s in self._studies.values())

    @property
    def use(self) -> float:
        """Share of the slots of all rounds in which an epoch was trained."""
        return self._epochs / max(1, self._rounds * self._slots)

    def orders(self, array: str) -> Orders:
        """Return what an array trains in its next epoch; nothing where all has to wait."""
        try:
            return self._orders(array)
        except Exception as error:  # noqa: BLE001 - kept, and raised after Tune returns
            self._trouble = self._trouble or error
            return []

    def _orders(self, array: str) -> Orders:
        mine = self._held.pop(array, {})
        if self._single and mine:
            self._held[array] = mine
            able = {view.task.id for view in self._runnable()}
            return [self._order(view) for task, view in mine.items() if task in able]
        taken = {task for held in self._held.values() for task in held}
        chosen: dict[str, TrialView] = {}
        while not self.over:
            ready = [view for view in self._runnable() if view.task.id not in taken]
            chosen = self._choose(ready, mine)
            if len(chosen) == self._slots or not self._begin_another():
                break
        self._held[array] = chosen
        return [self._order(view) for view in chosen.values()]

    def _order(self, view: TrialView) -> dict[str, Any]:
        known = self._studies[view.group.key].known(view.task.id)
        return {"task": view.task_json, "known": known}

    def ended(self, array: str) -> bool:
        """Return whether a single trial has ended, or waits while another could be trained."""
        mine = self._held.get(array, {})
        ready = {view.task.id for view in self._runnable()}
        # What an array holds that waits for a place could be waiting for this one's.
        taken = {task for one in self._heard for task in self._held.get(one, {})}
        running = any(self._studies[v.group.key].runs(task) for task, v in mine.items())
        return not running or (not ready & mine.keys() and bool(ready - taken))

    def release(self, array: str) -> None:
        """Take back the trials of an array that has ended."""
        self._held.pop(array, None)
        self._heard.discard(array)

    def fell(self, array: str) -> None:
        """Take back the trials of an array whose worker died and that will be started again."""
        self._deaths.update(list(self._held.get(array, {})))
        self.release(array)

    def _runnable(self) -> list[TrialView]:
        return [view for study in self._studies.values() for view in study.runnable()]

    def _choose(
        self, ready: Sequence[TrialView], mine: Mapping[str, TrialView]
    ) -> dict[str, TrialView]:
        """Return the trials for an array: those it had, then those that stack with them."""
        # What arrays died with again and again is trained alone: it may be what kills them.
        safe = [view for view in ready if view.task.id not in self._suspects]
        if not safe:
            return {view.task.id: view for view in ready[:1]}
        kept = [view for view in safe if view.task.id in mine]
        like = Counter(view.likeness for view in kept or safe[:1])
        rest = [view for view in safe if view.task.id not in mine]
        rest.sort(key=lambda view: -like[view.likeness])
        return {view.task.id: view for view in [*kept, *rest][: self._slots]}

    def _begin_another(self) -> bool:
        """Begin the next group; return whether there was one."""
        for study in self._studies.values():
            if not study.open and study.remaining:
                self._tell(study.begin(self._seats))
                self._advance(study)
                return True
        return False

    def take(self, array: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take an array's reports."""
        changed: dict[str, GroupStudy] = {}
        self._rounds += bool(self._held.get(array))
        self._heard.add(array)
        try:
            for row in rows:
                if "trouble" in row:
                    raise UserError(row["trouble"])
                epoch = None
                if row["epoch"] is not None:
                    epoch = Epoch.from_dict(row["epoch"], replayed=row["replayed"])
                    self._epochs += not epoch.replayed
                for key, study in self._studies.items():
                    if study.open and study.runs(row["task"]):
                        study.receive(row["task"], Report(epoch, row["finished"], row["failed"]))
                        changed[key] = study
            for study in changed.values():
                self._advance(study)
        except Exception as error:  # noqa: BLE001 - kept, and raised after Tune returns
            self._trouble = self._trouble or error

    def lost(self, array: str, reason: str) -> None:
        """Take back the trials of an array that died too often.

        A trial that was alone in it has failed, if it was in as many; several are tried one by one.
        """
        held = dict(self._held.get(array, {}))
        self.fell(array)
        self._suspects.update(held)
        if len(held) == 1 and self._deaths[next(iter(held))] > self._most_deaths:
            row = {"task": next(iter(held)), "epoch": None, "finished": False, "failed": reason}
            self.take(array, [row])

    def _advance(self, study: GroupStudy) -> None:
        self._tell(study.advance())

    def _tell(self, events: Iterable[Event]) -> None:
        """Tell the listeners what happened; keep the lines of trials that have ended."""
        for trial, epoch in events:
            ended = epoch is None and trial.state != "running"
            if ended:
                self._record(trial)
            for listener in self._listeners:
                if epoch is not None:
                    listener.epoch_ended(trial, epoch)
                elif ended:
                    listener.trial_ended(trial)
                else:
                    listener.trial_started(trial)


def as_row(task: str, epoch: Epoch | None, finished: bool, failed: str) -> dict[str, Any]:
    """Return a report as JSON values."""
    return {
        "task": task,
        "epoch": None if epoch is None else epoch.as_dict(),
        "replayed": epoch is not None and epoch.replayed,
        "finished": finished,
        "failed": failed,
    }


class Mailbox:
    """A Ray actor that carries orders from the desk to the arrays."""

    def __init__(self) -> None:
        self._orders: dict[str, str] = {}

    def put(self, array: str, orders: str) -> None:
        """Leave an array's orders."""
        self._orders[array] = orders

    def get(self, array: str) -> str | None:
        """Return an array's last orders."""
        return self._orders.get(array)


def pack(orders: Orders) -> str:
    """Return orders as text."""
    return json.dumps(orders)


def unpack(orders: Orders) -> list[tuple[Task, int]]:
    """Return the runs that orders name, and how many of their epochs are known."""
    return [(_read(order["task"]), int(order["known"])) for order in orders]


@functools.lru_cache(maxsize=256)
def _read(task: str) -> Task:
    """Read a run; it is ordered again for every epoch."""
    return Task.model_validate_json(task)
