"""Reduce the learning rate when VAL HM stops rising (protocol.md section 3)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

_THRESHOLD = 1e-4


@dataclass
class Plateau:
    """The plateau rule, mode max, relative threshold 1e-4, stepped once per epoch.

    Behaves as ``torch.optim.lr_scheduler.ReduceLROnPlateau`` (a test compares them); kept as four
    plain numbers so that a checkpoint carries it as JSON.
    """

    lr: float
    patience: int
    factor: float
    best: float = -math.inf
    waited: int = 0

    def step(self, score: float) -> float:
        """Take an epoch's score; return the learning rate of the next epoch."""
        if score > self.best * (1 + _THRESHOLD) or self.best == -math.inf:
            self.best, self.waited = score, 0
        else:
            self.waited += 1
        if self.waited > self.patience:
            self.waited = 0
            reduced = self.lr * self.factor
            # Torch ignores a reduction smaller than 1e-8.
            self.lr = reduced if self.lr - reduced > 1e-8 else self.lr
        return self.lr

    def as_dict(self) -> dict[str, float | int | None]:
        """Return the state as JSON values (minus infinity as None)."""
        return asdict(self) | {"best": None if self.best == -math.inf else self.best}

    @classmethod
    def from_dict(cls, data: dict[str, float | int | None]) -> Plateau:
        """Rebuild what ``as_dict`` wrote."""
        best = data["best"]
        return cls(
            float(data["lr"] or 0.0),
            int(data["patience"] or 0),
            float(data["factor"] or 0.0),
            -math.inf if best is None else float(best),
            int(data["waited"] or 0),
        )
