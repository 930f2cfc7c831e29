"""What tests of sweeps share: a tiny job and a listener that counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from avzero.data.store import FeatureStore
from avzero.spec import Job
from avzero.train.records import Epoch
from avzero.tune.listener import Listener, TrialView
from avzero.tune.sweep import Sweep

SETTINGS: dict[str, Any] = {
    "name": "tiny-sweep",
    "benchmarks": ["tiny"],
    "models": ["avca"],
    "train": {"epochs": 4, "batches_per_epoch": 6, "batch_size": 32},
    "fixed": {"avca": {"encoder_hidden": 32, "proj_hidden": 32, "depth": 1, "heads": "3x100"}},
    "search": {"trials": 5, "min_epochs": 2, "sampler": "random"},
    "test": {"seeds": 2, "workers": 2},
}


class Recorder(Listener):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.ended: list[tuple[int, str]] = []
        self.run_epochs = 0

    def trial_started(self, trial: TrialView) -> None:
        self.started.append(trial.number)

    def epoch_ended(self, trial: TrialView, epoch: Epoch) -> None:
        self.run_epochs += not epoch.replayed

    def trial_ended(self, trial: TrialView) -> None:
        self.ended.append((trial.number, trial.state))


def sweep(place: Path, listeners: Sequence[Listener] = (), **changes: Any) -> Sweep:
    job = Job.model_validate(SETTINGS | changes)
    return Sweep(job, FeatureStore(str(place / "store")), listeners)
