"""A class file of the temporal or CLIP release: a pickled dict (data_formats.md section 2.6).

``features`` is a list of n arrays, (T, d) in the temporal release, (d,) in the CLIP release;
``video_names`` a list of bytes, which may be longer than ``features``: a writer skipped unreadable
clips and kept their names. An array without values stands for a clip without features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from avzero.data.safe_pickle import load_class_pickle
from avzero.data.sequences import Features, Int64, Sequences, starts_of
from avzero.errors import UserError

PICKLE = ".pkl"


@dataclass(frozen=True)
class ClassPickle:
    """Names and rows of a class file, as they lie in it.

    ``width`` is that of a vector or step, 0 where every row is empty; ``lengths`` the steps per
    row [n] of sequences.
    """

    names: list[str]
    arrays: list[npt.NDArray[Any]]
    width: int
    lengths: Int64 | None

    def features(self) -> Features:
        """Return the rows as float32: [n, d], or sequences.

        A clip without features is a row of NaN, or a sequence without steps; what becomes of it
        is decided where NaN rows are.
        """
        full = [(row, array) for row, array in enumerate(self.arrays) if array.size]
        # Values past the float32 range become infinite here and are reported as such later.
        with np.errstate(over="ignore"):
            if self.lengths is not None:
                parts = [a.astype(np.float32, copy=False) for _, a in full]
                none = np.empty((0, self.width), np.float32)
                return Sequences(np.concatenate(parts or [none]), starts_of(self.lengths))
            out = np.full((len(self.arrays), self.width), np.nan, dtype=np.float32)
            for row, array in full:
                out[row] = array
        return out


def read_class_pickle(path: Path) -> ClassPickle:
    """Read a class file and check that its rows agree.

    Raises:
        UserError: damaged, or not such a dict; names the file and the row.
    """
    value = load_class_pickle(path)
    if not isinstance(value, dict):
        raise UserError(
            f"{path}: holds {type(value).__name__}, not a dict with features and video_names"
        )
    names = [
        video_name(f"{path}: video_names row {i}", name)
        for i, name in enumerate(_list(path, value, "video_names"))
    ]
    arrays = [_array(path, i, a) for i, a in enumerate(_list(path, value, "features"))]
    if len(names) < len(arrays):
        raise UserError(
            f"{path}: {len(arrays)} features but only {len(names)} video_names; "
            "the file is incomplete, get it again"
        )
    return ClassPickle(names, arrays, *_sizes(path, arrays))


def _list(path: Path, value: dict[Any, Any], key: str) -> Sequence[Any]:
    """Return a list of the dict."""
    entry = value.get(key)
    if isinstance(entry, list | tuple) or (isinstance(entry, np.ndarray) and entry.ndim):
        return entry  # type: ignore[return-value]
    keys = sorted(k for k in value if isinstance(k, str) and k.isprintable())
    have = ", ".join(keys) or "nothing"
    raise UserError(
        f"{path}: no list {key!r}; it holds {have}. Is this a class file of the release?"
    )


def video_name(where: str, name: Any) -> str:
    """Return a video name as text; the releases store bytes.

    Raises:
        UserError: not text that can be printed: samples are listed and digested line by line.
    """
    if isinstance(name, bytes):
        try:
            name = name.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 ({name!r})") from error
    if not isinstance(name, str):
        raise UserError(f"{where}: {type(name).__name__}, expected a name")
    if not name.isprintable():  # a lone surrogate, which UTF-8 cannot hold, is not printable
        raise UserError(f"{where}: {name!r} holds characters that cannot be printed; rename it")
    return str(name)


def _array(path: Path, row: int, value: Any) -> npt.NDArray[Any]:
    """Return a row's array: numbers, (d,) or (T, d), or of any shape without values."""
    if not isinstance(value, np.ndarray):
        raise UserError(f"{path}: features row {row}: {type(value).__name__}, expected an array")
    if value.dtype.kind not in "fiu" or (value.size and value.ndim not in (1, 2)):
        raise UserError(
            f"{path}: features row {row}: shape {value.shape} and type {value.dtype}; expected "
            "numbers, (d,) or (steps, d)"
        )
    return value


def _sizes(path: Path, arrays: list[npt.NDArray[Any]]) -> tuple[int, Int64 | None]:
    """Return width and steps per row of a file's arrays; they must agree in kind and width."""
    full = [(row, array) for row, array in enumerate(arrays) if array.size]
    if not full:
        return 0, np.zeros(len(arrays), np.int64)
    first, width = full[0][1].ndim, full[0][1].shape[-1]
    for row, array in full:
        if array.ndim != first:
            raise UserError(
                f"{path}: features row {row}: shape {array.shape} where row {full[0][0]} has "
                f"{full[0][1].shape}; a file holds vectors or sequences, not both"
            )
        if array.shape[-1] != width:
            raise UserError(
                f"{path}: features row {row}: {array.shape[-1]} columns where row {full[0][0]} "
                f"has {width}; a feature set has one width"
            )
    if first != 2:
        return width, None
    return width, np.array([len(a) if a.size else 0 for a in arrays], np.int64)
