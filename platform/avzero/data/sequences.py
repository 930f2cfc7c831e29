"""Features that vary in time: N sequences of vectors, stored end to end.

Beside the plain [N, d] array of an averaged feature set stands ``Sequences``: the same ``len``,
``shape`` (N, d) and ``nbytes``, so that whatever only counts rows, widths and bytes need not ask
which of the two it has. Values are float32 also where the release has 8-bit audio: the audio is
3 % of a temporal feature set, and one type keeps one way through the store.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

SPILL_BYTES = 2 << 30
"""Arrays above this size are memory-mapped scratch files: VGGSound's sequences are 25 GB."""
_BLOCK = 1 << 15

STEP_SECONDS: Mapping[str, Mapping[str, float]] = {"cls": {"audio": 0.96, "video": 0.64}}
"""Seconds per step of a release's sequences; 1 (SeLaVi's windows) where nothing is listed."""


@dataclass(frozen=True)
class Sequences:
    """``values`` [sum T, d] float32; row i is ``values[starts[i]:starts[i + 1]]``, starts [N + 1].

    A released sequence may have no step at all; a stored one has at least one.
    """

    values: Float32
    starts: Int64

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.starts[0] != 0 or self.starts[-1] != len(self.values):
            raise ValueError(f"values {self.values.shape} do not end where the last row ends")

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def ndim(self) -> int:
        """2, as an averaged feature set has."""
        return 2

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and width; the number of steps differs from row to row."""
        return len(self), int(self.values.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return int(self.values.nbytes)

    @property
    def lengths(self) -> Int64:
        """Steps of every row [N]."""
        return np.diff(self.starts)

    def take(self, rows: npt.NDArray[np.integer]) -> Sequences:
        """Return the sequences of ``rows``, in that order."""
        starts = starts_of(self.lengths[rows])
        shift = np.repeat(self.starts[:-1][rows] - starts[:-1], np.diff(starts))
        out = allocate((int(starts[-1]), self.shape[1]))
        # "clip" only spares numpy a buffer as large as the result: no index is out of range.
        np.take(self.values, shift + np.arange(starts[-1]), axis=0, out=out, mode="clip")
        return Sequences(out, starts)

    def row_of(self, steps: npt.NDArray[np.integer]) -> Int64:
        """Return the row each step (position in ``values``) belongs to."""
        return np.searchsorted(self.starts, steps, side="right") - 1


Features = Float32 | Sequences
"""One modality: a contiguous [N, d] array, or N sequences."""


def starts_of(lengths: npt.NDArray[np.integer]) -> Int64:
    """Return where sequences of these lengths [N] start, and where the last one ends [N + 1]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def values_of(features: Features) -> Float32:
    """Return the matrix of all vectors: [N, d], or [sum T, d] of sequences."""
    return features.values if isinstance(features, Sequences) else features


def take(features: Features, rows: npt.NDArray[np.integer]) -> Features:
    """Return some rows of either kind, in the order given."""
    return features.take(rows) if isinstance(features, Sequences) else features[rows]


def allocate(shape: tuple[int, int]) -> Float32:
    """Return an uninitialised float32 array; a large one lies in a scratch file of the cache.

    Raises:
        UserError: the device of the cache is too full for it.
    """
    size = 4 * math.prod(shape)
    if size <= SPILL_BYTES:
        return np.empty(shape, dtype=np.float32)
    from avzero.data.cache import cache_root
    from avzero.data.storage import disk_errors, require_space

    with disk_errors(cache_root()):
        cache_root().mkdir(parents=True, exist_ok=True)
        require_space(cache_root(), size)  # writing to a map on a full device ends the process
        with tempfile.TemporaryFile(dir=cache_root()) as file:
            return np.memmap(file, np.float32, "w+", shape=shape)


def bad_rows(features: Features) -> Bool:
    """Return which rows [N] hold NaN or infinity, or (sequences) no step at all."""
    values = values_of(features)
    finite: Bool = np.ones(len(values), np.bool_)
    for block in blocks(len(values)):
        finite[block] = np.isfinite(values[block]).all(axis=1)
    if not isinstance(features, Sequences):
        return ~finite
    bad: Bool = features.lengths == 0
    bad[features.row_of(np.flatnonzero(~finite))] = True
    return bad


def zeroed(features: Features, rows: Bool) -> Features:
    """Return features with some rows [N] replaced by zeros; a sequence becomes one step of zeros.

    One step, not none: attention over an empty sequence is NaN, and one step of zeros is also
    what a system gets for a withheld modality.
    """
    if not isinstance(features, Sequences):
        return np.where(rows[:, None], np.float32(0), features)
    starts = starts_of(np.where(rows, 1, features.lengths))
    out = allocate((int(starts[-1]), features.shape[1]))
    out[starts[:-1][rows]] = 0
    kept = np.flatnonzero(~rows)
    for run in np.split(kept, np.flatnonzero(np.diff(kept) > 1) + 1) if len(kept) else ():
        source = features.values[features.starts[run[0]] : features.starts[run[-1] + 1]]
        out[starts[run[0]] : starts[run[-1] + 1]] = source
    return Sequences(out, starts)


def differing_rows(mine: Features, theirs: Features) -> Bool:
    """Return which rows [N] are not bit-identical (NaN equals NaN) or differ in kind or length."""
    if isinstance(mine, Sequences) != isinstance(theirs, Sequences):
        return np.ones(len(mine), np.bool_)
    if not isinstance(mine, Sequences) or not isinstance(theirs, Sequences):
        return _differ(values_of(mine), values_of(theirs))
    differs: Bool = mine.lengths != theirs.lengths
    if not differs.any() and len(mine.values):
        differs[mine.row_of(np.flatnonzero(_differ(mine.values, theirs.values)))] = True
    return differs


def _differ(a: Float32, b: Float32) -> Bool:
    """Return which rows of two matrices of one shape differ."""
    same: Bool = ((a == b) | (np.isnan(a) & np.isnan(b))).all(axis=1)
    return ~same


def blocks(count: int) -> Iterator[slice]:
    """Yield slices that cover ``count`` rows without a large temporary array."""
    for start in range(0, count, _BLOCK):
        yield slice(start, min(start + _BLOCK, count))
