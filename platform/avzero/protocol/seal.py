"""The seal on TEST: rows come out only for a frozen trial, and every opening leaves a line.

A trial is frozen when everything that could still be chosen has been chosen on VAL: its
hyperparameters, the epoch, the learning-rate sequence and the calibration. The digest of all that
goes into the ledger before the first row is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from avzero.canon import canonical, sha256_hex
from avzero.data.benchmark import Benchmark
from avzero.data.ledger import Opening
from avzero.data.store import FeatureStore
from avzero.protocol.calibration import Calibration
from avzero.spec import Task


@dataclass(frozen=True)
class Frozen:
    """A stage-1 trial with nothing left to choose."""

    task: Task
    best_epoch: int
    lr_plan: tuple[float, ...]
    """Learning rate of every stage-1 epoch."""
    calibration: Calibration
    val: dict[str, float]
    """VAL scores of the best epoch."""

    def as_dict(self) -> dict[str, Any]:
        """Return the frozen choices as plain JSON values."""
        return {
            "task": self.task.model_dump(mode="json"),
            "trial": self.task.id,
            "best_epoch": self.best_epoch,
            "lr_plan": list(self.lr_plan),
            "betas": dict(self.calibration.betas),
            "scale": self.calibration.scale,
            "at_grid_end": self.calibration.at_grid_end,
            "val": dict(self.val),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Frozen:
        """Rebuild what ``as_dict`` wrote."""
        return cls(
            Task.model_validate(data["task"]),
            data["best_epoch"],
            tuple(data["lr_plan"]),
            Calibration(data["betas"], data["scale"], data["at_grid_end"]),
            data["val"],
        )

    @property
    def digest(self) -> str:
        """SHA-256 of the frozen choices."""
        return sha256_hex(canonical(self.as_dict()).encode())

    def stage_2_task(self, seed: int) -> Task:
        """Return the stage-2 run: same hyperparameters, fresh weights, epochs 0 … best epoch."""
        task = self.task
        length = self.best_epoch + 1
        replay = task.protocol.stage2_lr == "replay"
        return Task(
            benchmark=task.benchmark,
            model=task.model,
            config=task.config,
            train=task.train.model_copy(update={"epochs": length}),
            protocol=task.protocol,
            seed=seed,
            stage=2,
            lr_plan=self.lr_plan[:length] if replay else None,
        )


def open_test(
    store: FeatureStore, frozen: Frozen, stage_2: Task, beta: float, sweep: str, revision: str
) -> Benchmark:
    """Open TEST for the stage-2 run of a frozen trial, leaving a line in the ledger first."""
    opening = Opening(
        benchmark=frozen.task.benchmark,
        model=frozen.task.model,
        text=frozen.task.protocol.text,
        trial=frozen.task.id,
        run=stage_2.id,
        frozen=frozen.digest,
        beta=beta,
        seed=stage_2.seed,
        sweep=sweep,
        revision=revision,
    )
    return store.open_test(opening)
