"""What a sweep took, beside what was planned (``avzero plan``)."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from avzero.canon import canonical
from avzero.data.storage import Storage
from avzero.report.console import duration
from avzero.report.plan import size
from avzero.spec import Job
from avzero.train.calibrate import size_of
from avzero.train.records import Epoch
from avzero.tune.listener import Listener, TrialView
from avzero.tune.plan import load_plan
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
        self._key = _key(job.name)
        need, room = job.resources, fits(job.resources)
        arrays = min(room, job.resources.concurrent or room)
        earlier = _load(self._storage, job.name)
        self._before = {k: earlier.get(k, 0.0) for k in ("wall", "core_hours", "gpu_hours")}
        self._rates = {
            "wall": 1.0,
            "core_hours": arrays * need.workers * need.cpus / 3600,
            "gpu_hours": arrays * need.workers * need.gpus / 3600,
        }
        self._spent = earlier | ({"arrays": arrays} if arrays else {})  # without Ray: nothing to do
        self._planned = load_plan(self._storage, job.name) is not None
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


def _key(sweep: str) -> str:
    return f"sweeps/{sweep}/spent.json"


def _load(storage: Storage, sweep: str) -> dict[str, Any]:
    try:
        return dict(json.loads(storage.read(_key(sweep))))
    except KeyError:
        return {}


def comparison(storage: Storage, sweeps: Sequence[str]) -> Iterator[str]:
    """Yield a line for every sweep that has a plan and has been run: planned / actual.

    Core- and GPU-hours are those the arrays were held for; ``training`` counts optimiser steps
    alone, which the records of the epochs add up to.
    """
    for sweep in sweeps:
        plan, spent = load_plan(storage, sweep), _load(storage, sweep)
        if plan is None or "epochs" not in spent:
            continue
        parts = [
            f"trials {plan['trials']} / {spent['trials']}",
            f"config-epochs {plan['epochs']:,.0f} / {spent['epochs']:,} "
            f"(at most {plan['most_epochs']:,})",
        ]
        for name, key in (("core-hours", "core_hours"), ("GPU-hours", "gpu_hours")):
            if plan[key] or spent[key]:
                parts.append(f"{name} {plan[key]:.3g} / {spent[key]:.3g}")
        parts.append(
            f"training {duration(3600 * plan['training_hours'])} / "
            f"{duration(3600 * spent['training_hours'])}"
        )
        if plan["arrays"] != spent["arrays"]:
            parts.append(f"arrays {plan['arrays']} / {spent['arrays']}")
        parts.append(f"wall {duration(plan['wall'])} / {duration(spent['wall'])}")
        if "bytes" in spent:
            parts.append(f"storage {size(plan['bytes'])} / {size(spent['bytes'])}")
        yield f"Sweep {sweep}, planned / actual: {', '.join(parts)}"
