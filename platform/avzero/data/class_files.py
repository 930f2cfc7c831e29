"""One class file of a release, whichever of the two kinds it is.

Averaged features come as HDF5 with ``data`` (n, d) and ``video_urls`` (n,); temporal and CLIP
features as a pickled dict with ``features``, a list of n arrays (``data.class_pickles``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from avzero.data.class_pickles import PICKLE, ClassPickle, read_class_pickle, video_name
from avzero.data.sequences import Features, Float32, Int64
from avzero.errors import UserError

HDF5 = ".h5"
SUFFIXES = (HDF5, PICKLE)

_DAMAGED = (OSError, RuntimeError, ValueError, TypeError, LookupError, MemoryError)
"""What the HDF5 library raises on damaged files (found by flipping bytes)."""


@dataclass(frozen=True)
class Rows:
    """What a class file says of its rows.

    ``names``: of the videos, one per row, or more (see ``lost``). ``count``: rows. ``width``: of
    a vector or step; 0 where every row is empty. ``lengths``: steps per row of sequences.
    """

    names: list[str]
    count: int
    width: int
    lengths: Int64 | None = None

    @property
    def lost(self) -> int:
        """How many names have no row; when any, nobody can tell which row has which name."""
        return len(self.names) - self.count


def list_rows(path: Path) -> Rows:
    """Return names and sizes of a class file's rows, before their values are needed."""
    if path.suffix == PICKLE:
        return _rows(read_class_pickle(path))
    with _opened(path) as (data, urls):
        if urls.ndim != 1 or data.ndim != 2 or len(urls) != len(data):
            raise UserError(
                f"{path}: data {data.shape} and video_urls {urls.shape} do not fit; "
                "expected (n, d) and (n,)"
            )
        names = [
            video_name(f"{path}: video_urls row {i}", value) for i, value in enumerate(urls[:])
        ]
        return Rows(names, len(data), int(data.shape[1]))


def read_class_file(path: Path) -> tuple[Rows, Features]:
    """Return names, sizes and values of a class file's rows, in the file's order."""
    if path.suffix != PICKLE:
        return list_rows(path), _read_data(path)
    pickled = read_class_pickle(path)
    return _rows(pickled), pickled.features()


def _rows(pickled: ClassPickle) -> Rows:
    """Return what a pickled class file says of its rows; their values are not converted."""
    return Rows(pickled.names, len(pickled.arrays), pickled.width, pickled.lengths)


def _read_data(path: Path) -> Float32:
    """Return the ``data`` of an HDF5 class file as float32 (VGGish averages come as float64)."""
    with _opened(path) as (data, _):
        if data.dtype.kind not in "fiu":
            raise UserError(f"{path}: data has type {data.dtype}; expected numbers")
        # Values past the float32 range become infinite here and are reported as such later.
        with np.errstate(over="ignore"):
            return np.asarray(data[:]).astype(np.float32, copy=False)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[h5py.Dataset, h5py.Dataset]]:
    """Open a class file and yield its two datasets; damage anywhere becomes one clear line."""
    try:
        with h5py.File(path, "r") as file:
            for key in ("data", "video_urls"):
                if not isinstance(file.get(key), h5py.Dataset):
                    have = ", ".join(sorted(file)) or "nothing"
                    raise UserError(f"{path}: no dataset {key!r}; it holds {have}")
            yield file["data"], file["video_urls"]
    except _DAMAGED as error:
        raise UserError(
            f"{path}: not a readable HDF5 class file, truncated or damaged ({error}); get it again"
        ) from error
