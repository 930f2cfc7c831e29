"""Scores of generalised zero-shot recognition from one pass over the distances.

For every sample only three facts matter: the distance gap between its nearest unseen and its
nearest seen class, and whether the true class is the nearest of its own group. With calibrated
stacking (Chao et al., ECCV 2016) a sample is called seen iff beta is below its gap, so S(beta)
and U(beta) are step functions whose steps are the gaps: one sort gives every beta, the exact
optimum and the area under the seen-unseen curve (protocol.md section 4).

All scores are fractions in 0 … 1. S and U are unweighted means of per-class recalls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]
_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Scores:
    """The four numbers of the field at one calibration value."""

    seen: float
    unseen: float
    hm: float
    zsl: float
    beta: float

    def as_dict(self) -> dict[str, float]:
        """Return the scores under the field's names."""
        return {"S": self.seen, "U": self.unseen, "HM": self.hm, "ZSL": self.zsl, "beta": self.beta}


@dataclass(frozen=True)
class Curve:
    """The whole seen-unseen curve: after beta passes ``beta[i]`` the scores are ``seen[i]`` and
    ``unseen[i]``; the first point is beta = -infinity, where every sample is called seen."""

    beta: Float64
    seen: Float64
    unseen: Float64
    area: float
    """Area under seen as a function of unseen (AUSUC)."""
    best: Scores
    """The exact optimum of HM over all real beta; beta in the middle of the optimal interval."""


@dataclass(frozen=True)
class PerClass:
    """Recalls of each class at one beta, and among unseen classes only (``zsl``, P-21)."""

    class_id: Int64
    recall: Float64
    zsl: Float64
    """NaN for seen classes."""
    count: Int64

    def as_dict(self) -> dict[str, list[Any]]:
        """Return plain lists, NaN as None."""
        return {
            key: [None if np.isnan(v) else v for v in column.tolist()]
            for key, column in asdict(self).items()
        }


@dataclass(frozen=True)
class Nearest:
    """What scoring needs of N samples; all arrays have N entries.

    ``limit``: the sample is called seen iff beta < limit. ``hit``: the true class is the nearest
    of its own group. ``target``: class id. ``seen``: whether the true class is seen. ``alone``:
    the true class is the nearest where only its group is a candidate, which is ``hit`` but for
    systems that use a second classifier then.
    """

    limit: Float64
    hit: Bool
    target: Int64
    seen: Bool
    alone: Bool

    @classmethod
    def of(
        cls,
        seen_distances: Tensor,
        unseen_distances: Tensor,
        target: Tensor,
        seen_ids: Tensor,
        unseen_ids: Tensor,
        zsl_distances: Tensor | None = None,
    ) -> Nearest:
        """Reduce distances to what scoring needs.

        Args:
            seen_distances: [N, K_s], column = ascending seen class id.
            unseen_distances: [N, K_u], likewise.
            target: int64 [N], true class id.
            seen_ids: int64 [K_s] ascending.
            unseen_ids: int64 [K_u] ascending.
            zsl_distances: [N, K_u] of a classifier of unseen classes alone, where there is one.

        Raises:
            FloatingPointError: a distance is NaN: the model diverged.
        """
        a, s = seen_distances.min(dim=1)
        b, u = unseen_distances.min(dim=1)
        gap = b.to(torch.float64) - a.to(torch.float64)
        if torch.isnan(gap).any():
            raise FloatingPointError("a distance to a class is NaN")
        nearest_seen, nearest_unseen = seen_ids[s], unseen_ids[u]
        is_seen = torch.isin(target, seen_ids)
        hit = torch.where(is_seen, nearest_seen == target, nearest_unseen == target)
        # At beta equal to the gap the two distances tie, and a tie goes to the smaller class id:
        # if that is the seen one, beta must exceed the gap to change the decision.
        seen_wins_tie = nearest_seen < nearest_unseen
        infinity = torch.tensor(torch.inf, dtype=torch.float64, device=gap.device)
        limit = torch.where(seen_wins_tie, torch.nextafter(gap, infinity), gap)
        alone = hit
        if zsl_distances is not None:
            if torch.isnan(zsl_distances).any():
                raise FloatingPointError("a distance to a class is NaN")
            alone = torch.where(is_seen, hit, unseen_ids[zsl_distances.argmin(dim=1)] == target)
        return cls(*(x.cpu().numpy() for x in (limit, hit, target, is_seen, alone)))

    @staticmethod
    def concatenate(blocks: Sequence[Nearest]) -> Nearest:
        """Join blocks of samples."""
        columns = [[getattr(block, f.name) for block in blocks] for f in fields(Nearest)]
        return Nearest(*(np.concatenate(column) for column in columns))

    def subset(self, keep: Bool) -> Nearest:
        """Return the samples where ``keep`` holds."""
        return Nearest(*(getattr(self, f.name)[keep] for f in fields(Nearest)))

    def _weights(self) -> Float64:
        """Return each sample's share in the mean of per-class recalls of its group."""
        weights = np.zeros(len(self.target), dtype=np.float64)
        for group in (self.seen, ~self.seen):
            _, inverse, counts = np.unique(
                self.target[group], return_inverse=True, return_counts=True
            )
            if len(counts):
                weights[group] = 1.0 / (counts[inverse] * len(counts))
        return weights

    def _steps(self, seen: bool) -> tuple[Float64, Float64]:
        """Return the sorted limits of a group's hits and the running sum of their weights."""
        mine = self.hit & (self.seen == seen)
        order = np.argsort(self.limit[mine], kind="stable")
        running = np.cumsum(self._weights()[mine][order])
        return self.limit[mine][order], np.concatenate([[0.0], running])

    @property
    def zsl(self) -> float:
        """Mean recall of unseen classes when only unseen classes are candidates."""
        return float(self._weights()[self.alone & ~self.seen].sum())

    def at_many(self, betas: Sequence[float] | Float64) -> tuple[Float64, Float64]:
        """Return S and U at each of ``betas``."""
        values = np.asarray(betas, dtype=np.float64)
        limits, running = self._steps(True)
        seen = running[-1] - running[np.searchsorted(limits, values, side="right")]
        limits, running = self._steps(False)
        unseen = running[np.searchsorted(limits, values, side="right")]
        return np.maximum(seen, 0.0), unseen

    def at(self, beta: float) -> Scores:
        """Return the scores at one calibration value; TEST is scored only through this."""
        seen, unseen = self.at_many([beta])
        return Scores(
            float(seen[0]),
            float(unseen[0]),
            float(harmonic_mean(seen, unseen)[0]),
            self.zsl,
            float(beta),
        )

    def sweep(self, grid: Sequence[float]) -> Scores:
        """Return the scores at the first grid value with the highest HM (for VAL only)."""
        seen, unseen = self.at_many(grid)
        return self.at(float(grid[int(np.argmax(harmonic_mean(seen, unseen)))]))

    def curve(self) -> Curve:
        """Return the whole seen-unseen curve, its area and the exact optimum."""
        beta = np.unique(self.limit[self.hit])
        points = np.concatenate([[-np.inf], beta])
        seen, unseen = self.at_many(points)
        hm = harmonic_mean(seen, unseen)
        best = int(np.argmax(hm))
        # The state after step i holds on [beta_i, beta_(i+1)): report the middle of it.
        low = beta[best - 1] if best > 0 else (beta[0] - 1.0 if len(beta) else 0.0)
        high = beta[best] if best < len(beta) else low
        middle = float(low + (high - low) / 2)
        middle = middle if middle < high else float(low)
        area = float(np.trapezoid(seen, unseen))
        top = Scores(float(seen[best]), float(unseen[best]), float(hm[best]), self.zsl, middle)
        return Curve(points, seen, unseen, area, top)

    def per_class(self, beta: float) -> PerClass:
        """Return the recall of every class at ``beta`` and the ZSL recalls."""
        correct = self.hit & np.where(self.seen, beta < self.limit, beta >= self.limit)
        ids, inverse, counts = np.unique(self.target, return_inverse=True, return_counts=True)
        recall = np.bincount(inverse, weights=correct, minlength=len(ids)) / counts
        zsl = np.bincount(inverse, weights=self.alone, minlength=len(ids)) / counts
        zsl[np.isin(ids, self.target[self.seen])] = np.nan
        return PerClass(ids.astype(np.int64), recall, zsl, counts.astype(np.int64))


def harmonic_mean(seen: Float64, unseen: Float64) -> Float64:
    """Return 2 S U / (S + U), 0 where both are 0."""
    return np.asarray(2 * seen * unseen / (seen + unseen + _EPS), dtype=np.float64)
