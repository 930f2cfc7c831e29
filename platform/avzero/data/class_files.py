"""One class file of an averaged release: HDF5 with ``data`` (n, d) and ``video_urls`` (n,)."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt

from avzero.data.benchmark import Float32
from avzero.errors import UserError


def read_features(path: Path) -> Float32:
    """Return the ``data`` of a class file as float32 (VGGish averages come as float64)."""
    with _open_h5(path) as file:
        data = file["data"]
        if data.dtype.kind not in "fiu":
            raise UserError(f"{path}: data has type {data.dtype}; expected numbers")
        # Values past the float32 range become infinite here and are reported as such later.
        with np.errstate(over="ignore"):
            return _read_dataset(path, data).astype(np.float32, copy=False)


def row_names(path: Path) -> list[str]:
    """Return the ``video_urls`` of a class file; text and fixed-width bytes are both accepted."""
    with _open_h5(path) as file:
        urls, data = file["video_urls"], file["data"]
        if urls.ndim != 1 or data.ndim != 2 or len(urls) != len(data):
            raise UserError(
                f"{path}: data {data.shape} and video_urls {urls.shape} do not fit; "
                "expected (n, d) and (n,)"
            )
        try:
            return [
                value.decode("utf-8") if isinstance(value, bytes) else str(value)
                for value in _read_dataset(path, urls)
            ]
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: video_urls is not UTF-8 text ({error})") from error


def _open_h5(path: Path) -> h5py.File:
    """Open a class file and make sure that it holds the two datasets."""
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"{path}: not a readable HDF5 file (truncated?); get it again") from error
    for key in ("data", "video_urls"):
        if not isinstance(file.get(key), h5py.Dataset):
            have = ", ".join(sorted(file)) or "nothing"
            file.close()
            raise UserError(f"{path}: no dataset {key!r}; it holds {have}")
    return file


def _read_dataset(path: Path, dataset: h5py.Dataset) -> npt.NDArray[np.generic]:
    """Read a whole dataset; damage inside the file becomes one clear line."""
    try:
        return np.asarray(dataset[:])
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{path}: dataset {dataset.name} is damaged ({error}); get the file again"
        ) from error
