"""Adding up what a sweep takes while it runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from avzero.canon import canonical
from avzero.data.storage import Storage
from avzero.report.spent import PLAN, SPENT, kept
from avzero.spec import Job
from avzero.train.calibrate import size_of
from avzero.train.records import Epoch
from avzero.tune.listener import Listener, TrialView
from avzero.tune.space import Group
from avzero.tune.sweep import fits

_BETWEEN = 10.0
"""Seconds between two notes: so much of a killed driver's time may be missing."""


class Bookkeeper(Listener):
    """Adds up what all calls of a sweep have taken, in ``sweeps/<name>/spent.json``.

    A call in which nothing is trained leaves it as it is.

    Args:
        storage: the sweep's.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._spent: dict[str, Any] = {}
        self._key = ""
        self._begun = self._noted = 0.0
        self._trained = False

    def sweep_started(self, job: Job, groups: Sequence[Group], done: Sequence[TrialView]) -> None:
        """Take up what earlier calls took."""
        self._key = f"sweeps/{job.name}/{SPENT}"
        need, room = job.resources, fits(job.resources)
        arrays = min(room, job.resources.concurrent or room)
        earlier = kept(self._storage, job.name, SPENT)
        self._before = {k: earlier.get(k, 0.0) for k in ("wall", "core_hours", "gpu_hours")}
        self._rates = {
            "wall": 1.0,
            "core_hours": arrays * need.workers * need.cpus / 3600,
            "gpu_hours": arrays * need.workers * need.gpus / 3600,
        }
        self._spent = earlier | ({"arrays": arrays} if arrays else {})  # without Ray: nothing to do
        self._planned = bool(kept(self._storage, job.name, PLAN))
        self._begun = self._noted = time.monotonic()
        self._trained = False

    def epoch_ended(self, trial: TrialView, epoch: Epoch) -> None:
        """Note the time, now and then."""
        self._trained |= not epoch.replayed
        if self._trained and time.monotonic() - self._noted > _BETWEEN:
            self._note()

    def sweep_ended(self, trials: Sequence[TrialView], interrupted: bool) -> None:
        """Add up the trials that have ended."""
        if not self._trained and self._spent.get("trials") == len(trials):
            return
        own = [trial for trial in trials if trial.twin_of is None]
        self._spent |= {
            "trials": len(trials),
            "epochs": sum(len(trial.epochs) for trial in own),
            "training_hours": sum(e.seconds for trial in own for e in trial.epochs) / 3600,
        }
        if self._planned:  # asks the store once per file
            self._spent["bytes"] = sum(size_of(trial.folder) for trial in own)
        self._note()

    def _note(self) -> None:
        self._noted = time.monotonic()
        lasted = self._noted - self._begun
        self._spent |= {k: self._before[k] + lasted * rate for k, rate in self._rates.items()}
        self._storage.write(self._key, canonical(self._spent).encode())
