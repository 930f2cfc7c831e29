"""What happens during a sweep and its final run, for whoever wants to know.

Console and MLflow derive from ``Listener``; ``train`` and ``tune`` import neither.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from avzero.protocol.seal import Frozen
from avzero.spec import Job, Task
from avzero.train.folder import RunFolder
from avzero.train.records import Epoch, Result
from avzero.tune.space import Group


@dataclass
class TrialView:
    """One trial as a listener sees it."""

    group: Group
    number: int
    task: Task
    values: dict[str, Any]
    folder: RunFolder
    state: str = "running"
    """``running``, ``complete``, ``pruned`` or ``failed``."""
    epochs: list[Epoch] = field(default_factory=list)
    result: Result | None = None
    reason: str = ""
    """Why it failed."""
    twin_of: int | None = None
    """Number of an earlier trial with the same configuration, whose outcome this one takes."""

    @functools.cached_property
    def task_json(self) -> str:
        """The task as an array is told it."""
        return self.task.model_dump_json()

    @functools.cached_property
    def likeness(self) -> str:
        """What trials must agree in to be stacked: group and structure."""
        return f"{self.group.key} {self.group.structure(self.task)}"

    @property
    def best(self) -> Epoch | None:
        """The epoch with the best VAL HM so far."""
        return next((e for e in reversed(self.epochs) if e.best), None)

    @property
    def hm(self) -> float:
        """The objective so far: the best VAL HM, -1 before the first epoch."""
        return self.best.val["HM"] if self.best else -1.0


@dataclass(frozen=True)
class FinalView:
    """One run of the final phase: stage 2 of a frozen trial (or, with ``reseed: pipeline``, the
    winner's stage 1 repeated with another seed, before that)."""

    group: Group
    frozen: Frozen
    task: Task
    folder: RunFolder
    stored: bool
    """Whether its TEST result was there already; then nothing is trained and TEST stays shut."""


class Listener:
    """Hooks, in the order they are called; override what is needed."""

    def sweep_started(self, job: Job, groups: Sequence[Group], done: Sequence[TrialView]) -> None:
        """A sweep begins or goes on; ``done`` holds trials that ended in earlier calls."""

    def trial_started(self, trial: TrialView) -> None:
        """A trial begins or is taken up again."""

    def epoch_ended(self, trial: TrialView, epoch: Epoch) -> None:
        """An epoch is over (also called for epochs replayed from a checkpoint)."""

    def trial_ended(self, trial: TrialView) -> None:
        """A trial is complete, pruned or failed."""

    def sweep_ended(self, trials: Sequence[TrialView], interrupted: bool) -> None:
        """No trial of this call is running any more."""

    def final_started(self, final: FinalView) -> None:
        """A final run begins or is taken up again."""

    def final_epoch_ended(self, final: FinalView, epoch: Epoch) -> None:
        """An epoch of a final run is over (also called for replayed epochs)."""

    def test_scored(self, final: FinalView, result: Result) -> None:
        """TEST has been scored for a stage-2 run."""
