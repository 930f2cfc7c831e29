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
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]
_EPS = float(np.finfo(np.float64).eps)
_PER_SAMPLE = ("limit", "hit", "target", "alone")
_CELLS = 3 << 13
"""Distances searched at once on a CPU: numpy copies them, and the copy should stay in the cache.
In float32 that is below the 128 KiB from which on malloc asks the system for fresh memory."""


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
class _Classes:
    """The classes that have samples, ascending; all arrays have P entries."""

    id: Int64
    count: Int64
    seen: Bool
    groups: tuple[Int64, Int64]
    """Positions of the seen classes, and of the unseen ones."""
    end: int
    """One more than the largest id."""


@dataclass(frozen=True)
class Nearest:
    """What scoring needs of N samples; all arrays but ``seen_ids`` have N entries.

    ``limit``: the sample is called seen iff beta < limit. ``hit``: the true class is the nearest
    of its own group. ``target``: class id, a position in the benchmark's list of classes.
    ``alone``: the true class is the nearest where only its group is a candidate, which is ``hit``
    but for systems that use a second classifier then. ``seen_ids``: the seen classes.

    Scores come from counts of hits per class, so they do not depend on the order of the samples
    or on how they were cut into blocks, to the last bit. What several of them need is made once.
    """

    limit: Float64
    hit: Bool
    target: Int64
    alone: Bool
    seen_ids: Int64

    @classmethod
    def of(cls, distances: Tensor, target: Tensor, seen_ids: Tensor, unseen_ids: Tensor) -> Nearest:
        """Reduce distances to what scoring needs.

        Args:
            distances: [N, K_s + K_u]: to the seen classes, then to the unseen ones; columns that
                follow, [N, K_u], are of a classifier of unseen classes alone.
            target: int64 [N], true class id, of one of the two groups.
            seen_ids: int64 [K_s] ascending.
            unseen_ids: int64 [K_u] ascending.

        Raises:
            FloatingPointError: a distance is NaN: the model diverged.
        """
        (facts,) = cls.of_many(distances[None], target, seen_ids, unseen_ids)
        if facts is None:
            raise FloatingPointError("a distance to a class is NaN")
        return facts

    @classmethod
    def of_many(
        cls, distances: Tensor, target: Tensor, seen_ids: Tensor, unseen_ids: Tensor
    ) -> list[Nearest | None]:
        """Reduce the distances of M systems to the same samples and classes, in one pass.

        Args:
            distances: [M, N, K_s + K_u] or [M, N, K_s + 2 K_u], as in ``of``.
            target: int64 [N].
            seen_ids: int64 [K_s].
            unseen_ids: int64 [K_u].

        Returns:
            The facts of every system, equal to those it has alone; None where a distance is NaN,
            which says nothing of its neighbours.
        """
        true, seen, unseen = (x.cpu().numpy() for x in (target, seen_ids, unseen_ids))
        classes = np.concatenate([seen, unseen, unseen])
        n_seen, n = len(seen), len(seen) + len(unseen)
        groups = [slice(0, n_seen), slice(n_seen, n), slice(n, len(classes))]
        value, column = _smallest(distances, groups[: 3 if distances.shape[-1] > n else 2])
        found = classes[column]
        right = found == true
        alone = hit = right[0] | right[1]
        with np.errstate(invalid="ignore"):
            limit = np.subtract(value[1], value[0], dtype=np.float64)
        nan: Bool = np.isnan(limit.min(axis=1, initial=np.inf))  # a minimum with a NaN is NaN
        # At beta equal to the gap the two distances tie, and a tie goes to the smaller class id:
        # if that is the seen one, beta must exceed the gap to change the decision.
        np.nextafter(limit, np.inf, out=limit, where=found[0] < found[1])
        if len(right) == 3:
            nan |= np.isnan(value[2].min(axis=1, initial=np.inf))
            alone = np.where(np.isin(true, seen), hit, right[2])
        return [
            None if nan[m] else cls(limit[m], hit[m], true, alone[m], seen) for m in range(len(nan))
        ]

    def subset(self, keep: Bool) -> Nearest:
        """Return the samples where ``keep`` holds."""
        return replace(self, **{name: getattr(self, name)[keep] for name in _PER_SAMPLE})

    @cached_property
    def _classes(self) -> _Classes:
        """The classes of the samples."""
        count = np.bincount(self.target, minlength=self.seen_ids[-1] + 1)
        seen = np.zeros(len(count), dtype=np.bool_)
        seen[self.seen_ids] = True
        ids = count.nonzero()[0]
        is_seen = seen[ids]
        groups = (is_seen.nonzero()[0], (~is_seen).nonzero()[0])
        return _Classes(ids, count[ids], is_seen, groups, len(count))

    @cached_property
    def _zsl(self) -> Float64:
        """Share of each class's samples that are right where only its group is a candidate, [P]."""
        classes = self._classes
        right = np.bincount(self.target[self.alone], minlength=classes.end)
        return np.asarray(right[classes.id] / classes.count, dtype=np.float64)

    def _recall(self, betas: Float64) -> Float64:
        """Return the recall of every class at every value of an ascending list, [B, P]."""
        classes = self._classes
        # A hit of a seen class counts at the values below its limit, one of an unseen class at the
        # others: one table of how many values are below tells both.
        hits = self.hit.nonzero()[0]
        place = betas.searchsorted(self.limit[hits]) * classes.end + self.target[hits]
        table = np.bincount(place, minlength=(len(betas) + 1) * classes.end)
        reached = table.reshape(-1, classes.end)[:, classes.id].cumsum(axis=0)
        right = np.where(classes.seen, reached[-1] - reached[:-1], reached[:-1])
        return np.asarray(right / classes.count, dtype=np.float64)

    @cached_property
    def zsl(self) -> float:
        """Mean recall of unseen classes when only unseen classes are candidates."""
        return float(_mean(self._zsl[None], self._classes.groups[1])[0])

    def at_many(self, betas: Sequence[float] | Float64) -> tuple[Float64, Float64]:
        """Return S and U at each of ``betas``."""
        values = np.array(betas, dtype=np.float64)
        ascending = np.sort(values)
        recall, place = self._recall(ascending), ascending.searchsorted(values)
        seen, unseen = (_mean(recall, group)[place] for group in self._classes.groups)
        return seen, unseen

    def at(self, beta: float) -> Scores:
        """Return the scores at one calibration value; TEST is scored only through this."""
        return self.sweep([beta])

    def sweep(self, grid: Sequence[float]) -> Scores:
        """Return the scores at the first grid value with the highest HM (for VAL only)."""
        seen, unseen = self.at_many(grid)
        hm = harmonic_mean(seen, unseen)
        best = int(np.argmax(hm))
        return Scores(
            float(seen[best]), float(unseen[best]), float(hm[best]), self.zsl, float(grid[best])
        )

    def curve(self) -> Curve:
        """Return the whole seen-unseen curve, its area and the exact optimum."""
        classes, hits = self._classes, np.flatnonzero(self.hit)
        weight = np.zeros(classes.end)
        weight[classes.id] = 1.0 / classes.count
        hits = hits[np.argsort(self.limit[hits], kind="stable")]
        limit, share = self.limit[hits], weight[self.target[hits]]
        seen = np.isin(self.target[hits], self.seen_ids)
        last = np.flatnonzero(np.append(limit[1:] != limit[:-1], True)) if len(hits) else hits
        beta = limit[last]
        loss = _running(np.where(seen, share, 0.0), last, len(classes.groups[0]))
        gain = _running(np.where(seen, 0.0, share), last, len(classes.groups[1]))
        s, u = loss[-1] - loss, gain
        best = int(np.argmax(harmonic_mean(s, u)))
        # The state after step i holds on [beta_i, beta_(i+1)): report the middle of it.
        low = beta[best - 1] if best > 0 else (beta[0] - 1.0 if len(beta) else 0.0)
        high = beta[best] if best < len(beta) else low
        middle = float(low + (high - low) / 2)
        middle = middle if middle < high else float(low)
        points = np.concatenate([[-np.inf], beta])
        return Curve(points, s, u, float(np.trapezoid(s, u)), self.at(middle))

    def per_class(self, beta: float) -> PerClass:
        """Return the recall of every class at ``beta`` and the ZSL recalls."""
        classes = self._classes
        recall = self._recall(np.array([beta], dtype=np.float64))[0]
        return PerClass(
            classes.id, recall, np.where(classes.seen, np.nan, self._zsl), classes.count
        )


class Blocks:
    """The facts of the samples of one evaluation, put together block by block.

    Each block goes where it stays: thousands of small results, kept while large tables of distances
    come and go, would leave the heap full of holes (1 to 2 GB for a million samples).

    Args:
        count: how many samples there are.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._known = 0
        self._whole: Nearest | None = None

    def add(self, block: Nearest) -> None:
        """Take the next block."""
        end = self._known + len(block.target)
        columns = {name: getattr(block, name) for name in _PER_SAMPLE}
        if self._whole is None:
            room = {name: np.empty(self._count, c.dtype) for name, c in columns.items()}
            self._whole = replace(block, **room)
        for name, column in columns.items():
            getattr(self._whole, name)[self._known : end] = column
        self._known = end

    def whole(self) -> Nearest:
        """Return the facts of all samples.

        Raises:
            ValueError: some are missing.
        """
        if self._whole is None or self._known != self._count:
            raise ValueError(f"{self._known} of {self._count} samples")
        return self._whole


def _smallest(
    distances: Tensor, groups: Sequence[slice]
) -> tuple[npt.NDArray[np.floating[Any]], Int64]:
    """Return value and column of the first smallest entry of every row, among some columns.

    NaN counts as smallest. On a CPU numpy's argmin costs a third of torch's min with its place.

    Args:
        distances: [M, N, C].
        groups: G ranges of columns.

    Returns:
        Values and columns, [G, M, N].
    """
    if distances.device.type == "cpu":
        return _smallest_by_numpy(distances, groups)
    return _smallest_by_torch(distances, groups)


def _smallest_by_torch(
    distances: Tensor, groups: Sequence[slice]
) -> tuple[npt.NDArray[np.floating[Any]], Int64]:
    """See ``_smallest``; on the device the distances are on."""
    column = torch.stack([distances[..., g].argmin(dim=-1) + g.start for g in groups], dim=-1)
    value = distances.gather(-1, column)
    return value.movedim(-1, 0).cpu().numpy(), column.movedim(-1, 0).cpu().numpy()


def _smallest_by_numpy(
    distances: Tensor, groups: Sequence[slice]
) -> tuple[npt.NDArray[np.floating[Any]], Int64]:
    """See ``_smallest``; a few rows at a time."""
    rows = distances.detach().numpy().reshape(-1, distances.shape[-1])
    column = np.empty((len(groups), len(rows)), dtype=np.intp)
    step = max(1, _CELLS // rows.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        for g, columns in enumerate(groups):
            rows[part, columns].argmin(axis=1, out=column[g, part])
    column += np.array([[columns.start] for columns in groups])
    value = rows[np.arange(len(rows)), column]
    shape = (len(groups), *distances.shape[:-1])
    return value.reshape(shape), column.reshape(shape)


def _mean(recall: Float64, group: Int64) -> Float64:
    """Return the mean over some classes of recalls [B, P]; 0 over none."""
    # Contiguous rows, so that the order of summation does not depend on B.
    return np.asarray(recall.take(group, axis=1).sum(axis=1) / max(len(group), 1), np.float64)


def _running(share: Float64, last: Int64, classes: int) -> Float64:
    """Return the sums of the shares up to each of ``last``, over ``classes``, after a zero."""
    sums = np.cumsum(share)[last] / max(classes, 1)
    return np.concatenate([[0.0], sums])


def harmonic_mean(seen: Float64, unseen: Float64) -> Float64:
    """Return 2 S U / (S + U), 0 where both are 0."""
    return np.asarray(2 * seen * unseen / (seen + unseen + _EPS), dtype=np.float64)
