"""What runs inside a Ray Tune actor: an array of trials, one epoch of each per step."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator
from typing import Any

from ray import tune

from avzero.data.storage import open_storage
from avzero.data.store import FeatureStore
from avzero.errors import UserError
from avzero.spec import Resources, Task
from avzero.train.drive import drive
from avzero.train.folder import RunFolder
from avzero.train.outcome import conclude_stage_1
from avzero.train.records import Epoch, TrainingFailed
from avzero.train.slots import Outcome, Slots
from avzero.tune.desk import as_row, unpack

_IDLE_SECONDS = 0.05


class ArrayRunner(tune.Trainable):
    """A Tune trainable that trains the trials its orders name; the actor is reused.

    A diverging configuration ends with a ``failed`` row, trouble in the surroundings (store
    unreachable, disk full) with a ``trouble`` row; neither is an exception, because Tune would
    retry those.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Get ready; nothing is trained before the first step."""
        self._take(config)
        self._slots: Slots | None = None
        self._workers = _Split(self._store, self._need)

    def _take(self, config: dict[str, Any]) -> None:
        self._name, self._first = config["id"], config["orders"]
        self._mailbox = config["mailbox"]
        self._store = FeatureStore(open_storage(config["store"], check=False))
        self._need = Resources.model_validate(config["resources"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin as another array."""
        self.cleanup()
        self._take(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Train one epoch of every ordered trial."""
        import ray

        mailbox: Any = ray.get_actor(self._mailbox)
        said = ray.get(mailbox.get.remote(self._name))
        orders = json.loads(said or self._first)
        if not orders:
            time.sleep(_IDLE_SECONDS)  # all trials wait for decisions that others' reports bring
        try:
            rows = [as_row(*outcome) for outcome in self._round(orders)]
        except UserError as error:
            rows = [{"trouble": str(error)}]
        # Tune flattens nested results; a text stays whole.
        return {"rows": json.dumps(rows), "hm": 0.0, "done": False}

    def _round(self, orders: list[dict[str, Any]]) -> Iterator[Outcome]:
        runs = unpack(orders)
        if self._need.workers > 1:
            return self._workers.round(runs)
        if self._slots is None:
            self._slots = Slots(self._store, self._need)
        return self._slots.round(runs)

    def cleanup(self) -> None:
        """Stop the trial's workers, if it has any."""
        self._workers.stop()


class _Split:
    """One trial at a time, split over Ray Train workers."""

    def __init__(self, store: FeatureStore, need: Resources) -> None:
        self._store, self._need = store, need
        self._task = ""
        self._epochs: Generator[Epoch, None, None] | None = None
        self._stored = 0
        """Epochs the run had when it was taken up."""

    def round(self, runs: list[tuple[Task, int]]) -> Iterator[Outcome]:
        """Train one epoch of the one run that is named; see ``Slots.round``."""
        for task, known in runs:
            if task.id != self._task or self._epochs is None:
                self.stop()
                state = RunFolder(self._store.storage, task).load_state()
                self._stored = 0 if state is None else len(state.history)
                self._task, self._epochs = task.id, drive(self._store, task, self._need)
            try:
                for epoch in self._epochs:
                    last = epoch.epoch + 1 == task.train.epochs
                    if last:
                        self._conclude(task)
                    if epoch.epoch >= known or last:
                        yield Outcome(task.id, epoch if epoch.epoch >= known else None, last)
                    if not epoch.replayed or known <= epoch.epoch == self._stored - 1:
                        return
            except TrainingFailed as error:
                yield Outcome(task.id, failed=str(error))

    def _conclude(self, task: Task) -> None:
        """Let the workers finish, then score."""
        for _ in self._epochs or ():
            pass
        conclude_stage_1(RunFolder(self._store.storage, task), self._store.open(task.benchmark))

    def stop(self) -> None:
        """Stop the workers."""
        if self._epochs is not None:
            self._epochs.close()
        self._epochs = None
