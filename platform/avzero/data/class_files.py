"""One class file of an averaged release: HDF5 with ``data`` (n, d) and ``video_urls`` (n,)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from avzero.data.benchmark import Float32
from avzero.errors import UserError

_DAMAGED = (OSError, RuntimeError, ValueError, TypeError, LookupError, MemoryError)
"""What the HDF5 library raises on damaged files (found by flipping bytes)."""


def read_features(path: Path) -> Float32:
    """Return the ``data`` of a class file as float32 (VGGish averages come as float64)."""
    with _opened(path) as (data, _):
        if data.dtype.kind not in "fiu":
            raise UserError(f"{path}: data has type {data.dtype}; expected numbers")
        # Values past the float32 range become infinite here and are reported as such later.
        with np.errstate(over="ignore"):
            return np.asarray(data[:]).astype(np.float32, copy=False)


def row_names(path: Path) -> list[str]:
    """Return the ``video_urls`` of a class file; text and fixed-width bytes are both accepted."""
    with _opened(path) as (data, urls):
        if urls.ndim != 1 or data.ndim != 2 or len(urls) != len(data):
            raise UserError(
                f"{path}: data {data.shape} and video_urls {urls.shape} do not fit; "
                "expected (n, d) and (n,)"
            )
        return [
            value.decode("utf-8") if isinstance(value, bytes) else str(value) for value in urls[:]
        ]


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
