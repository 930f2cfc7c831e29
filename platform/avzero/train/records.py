"""What a run produces, as plain records: the loop yields them, listeners and storage keep them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Epoch:
    """One epoch of training.

    ``losses``: mean of each term over the epoch. ``val``: S, U, HM, ZSL and beta on VAL (empty in
    stage 2 with replayed learning rates). ``replayed``: read back from a checkpoint, not run now.
    """

    epoch: int
    losses: dict[str, float]
    lr: float
    val: dict[str, float]
    best: bool
    seconds: float
    samples_per_second: float
    replayed: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        data = asdict(self)
        del data["replayed"]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any], replayed: bool = False) -> Epoch:
        """Rebuild what ``as_dict`` wrote."""
        return cls(**data, replayed=replayed)

    @property
    def loss(self) -> float:
        """The objective: the sum of the terms."""
        return sum(self.losses.values())


@dataclass(frozen=True)
class Result:
    """The outcome of a finished run.

    ``scores``: per modality S, U, HM, ZSL, beta at the calibrated value. ``exact``: the optimum
    over all beta and the area under the curve (VAL only; on TEST the optimum would be a choice
    made on TEST, so only the area is kept). ``extra``: further scores: S on source-disjoint
    samples (P-16), mean average precisions of retrieval (keys: ``protocol.retrieval``).
    """

    task: str
    stage: int
    kind: str
    """``val`` or ``test``."""
    epoch: int
    scores: dict[str, dict[str, float]]
    area: float
    exact: dict[str, float]
    at_grid_end: bool
    per_class: dict[str, Any]
    curve: dict[str, list[float]]
    parameters: int
    seconds: float
    revision: str
    """The code that scored it."""
    frozen: str = ""
    """TEST: digest of the frozen trial."""
    extra: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Result:
        """Rebuild what ``as_dict`` wrote."""
        return cls(**data)


class TrainingFailed(Exception):
    """A run cannot go on because of its configuration (a non-finite loss); trying again is vain."""
