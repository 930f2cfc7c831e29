"""Ray Tune's side of a sweep: it places arrays, and asks the desk what becomes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from avzero.tune.desk import Desk, pack

METRIC = "hm"


class _AtDesk:
    """Ray Tune pickles searcher and scheduler for a restore we never do: leave the desk out."""

    _desk: Desk

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_desk", "_mailbox")}


class ArraySearcher(_AtDesk, Searcher):
    """Proposes arrays as long as there are trials.

    Args:
        desk: knows what is to be trained.
        names: names of arrays, by Tune's trial id; the scheduler shares them.
        single: whether an array ends with its first trial (``execution: trial``).
    """

    def __init__(self, desk: Desk, names: dict[str, str], single: bool) -> None:
        super().__init__(metric=METRIC, mode="max")
        self._desk, self._names, self._single = desk, names, single
        self._errors: dict[str, str] = {}
        self._started = 0

    def suggest(self, trial_id: str) -> Any:
        """Return the next array, or that there is none."""
        if self._desk.over:
            return Searcher.FINISHED
        name = f"array-{self._started}"
        # An array asks for its first orders when it runs: it may wait long for a place, and what
        # it held meanwhile would wait with it.
        orders = self._desk.orders(name) if self._single else []
        if self._desk.over:
            return Searcher.FINISHED
        if self._single and not orders:
            return None  # every trial is running or waits; ask again later
        self._started += 1
        self._names[trial_id] = name
        return {"id": name, "orders": pack(orders)}

    def note_error(self, trial_id: str, error: object) -> None:
        """Keep why an array failed; Tune tells it apart from the end of the trial."""
        lines = [line for line in str(error).splitlines() if line.strip()]
        self._errors[trial_id] = lines[-1].strip() if lines else "its worker died"

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Take back what an array was training."""
        name = self._names.pop(trial_id, None)
        if name is not None and error:
            self._desk.lost(name, self._errors.pop(trial_id, "its worker died"))
        elif name is not None:
            self._desk.release(name)

    def save(self, checkpoint_path: str) -> None:
        """Keep nothing: the studies are the truth."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing: a sweep continues from its studies."""


class ArrayScheduler(_AtDesk, FIFOScheduler):
    """Passes an array's reports to the desk and its next orders back.

    Args:
        desk: see ``ArraySearcher``.
        searcher: is told of errors.
        mailbox: handle of the actor that carries orders.
        names: see ``ArraySearcher``.
        single: see ``ArraySearcher``.
    """

    def __init__(
        self, desk: Desk, searcher: ArraySearcher, mailbox: Any, names: dict[str, str], single: bool
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._desk, self._searcher, self._mailbox = desk, searcher, mailbox
        self._names, self._single = names, single

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Take one epoch of an array."""
        import ray

        name = self._names[trial.trial_id]
        self._desk.take(name, json.loads(result["rows"]))
        if self._desk.over or (self._single and self._desk.ended(name)):
            return str(TrialScheduler.STOP)
        ray.get(self._mailbox.put.remote(name, pack(self._desk.orders(name))))
        return str(TrialScheduler.CONTINUE)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Keep the error for the trials' records; others take up what the array was training.

        Tune starts it again, where and when there is a place, and it asks for new orders.
        """
        import ray

        self._searcher.note_error(trial.trial_id, trial.get_error())
        if trial.should_recover():
            name = self._names[trial.trial_id]
            self._desk.fell(name)
            ray.get(self._mailbox.put.remote(name, pack([])))
