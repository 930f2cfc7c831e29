"""What a sweep has reached, in a few numbers, for its heartbeat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from avzero.spec import Job
from avzero.train.records import Epoch
from avzero.tune.listener import Listener, TrialView
from avzero.tune.space import Group


class Pulse(Listener):
    """Counts trials and epochs; another thread may read the counts."""

    def __init__(self) -> None:
        self._ended = self._wanted = self._epochs = 0
        self._best: dict[str, float] = {}

    def numbers(self) -> dict[str, Any]:
        """Return ``ended`` and ``wanted`` trials, ``epochs`` of this driver, ``best`` VAL HM."""
        return {
            "ended": self._ended,
            "wanted": self._wanted,
            "epochs": self._epochs,
            "best": dict(self._best),
        }

    def sweep_started(self, job: Job, groups: Sequence[Group], done: Sequence[TrialView]) -> None:
        """Begin with what earlier drivers reached."""
        self._wanted = max(sum(group.trials for group in groups), len(done))
        self._ended = len(done)
        for trial in done:
            self._note(trial)

    def epoch_ended(self, trial: TrialView, epoch: Epoch) -> None:
        """Count an epoch that was trained now."""
        self._epochs += not epoch.replayed
        self._note(trial)

    def trial_ended(self, trial: TrialView) -> None:
        """Count a trial."""
        self._ended += 1

    def _note(self, trial: TrialView) -> None:
        key = trial.group.key
        if trial.best is not None:
            self._best[key] = max(trial.hm, self._best.get(key, trial.hm))
