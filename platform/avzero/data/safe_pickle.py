"""Reading released pickles without trusting them.

A pickle may name any importable object and have it called. The released text files need three
names (data_formats.md section 2.4), the class files of the temporal and CLIP releases three more
(section 2.6); ``data.inert_pickle`` knows these and calls functions of its own for them.
Everything else ends in one clear line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from avzero.data.benchmark import Float32
from avzero.data.inert_pickle import DAMAGED, ForbiddenName, loads
from avzero.errors import UserError


def load_class_pickle(path: Path) -> Any:
    """Return what a class file of the temporal or CLIP release holds.

    Raises:
        UserError: the file is missing or damaged, or asks for a forbidden name.
    """
    try:
        return loads(path.read_bytes())
    except ForbiddenName as error:
        raise _forbidden(path, error) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except DAMAGED as error:
        raise UserError(
            f"{path}: not a readable class pickle, truncated or damaged ({error}); get it again"
        ) from error


def _forbidden(path: Path, error: ForbiddenName) -> UserError:
    """Return the refusal of a file that asks for a forbidden name."""
    return UserError(
        f"{path}: the pickle asks for {str(error)!a}, which no released file needs; refused. "
        "Get the file again from its authors, or do not use it"
    )


def load_text_vectors(path: Path) -> tuple[tuple[str, ...], Float32]:
    """Read a 0-d object array that holds ``dict[str, vector]`` (``word_embeddings_*.npy``).

    Args:
        path: the ``.npy`` file.

    Returns:
        The keys in file order and the vectors [T, d] as float32.

    Raises:
        UserError: not such a file, a forbidden name in the pickle, or vectors that are not
            1-d, finite, and of one length.
    """
    value = _unpickle_object_array(path)
    if not isinstance(value, dict) or not value:
        raise UserError(f"{path}: holds {type(value).__name__}, not a dict of class vectors")
    keys: list[str] = []
    rows: list[Float32] = []
    width: int | None = None
    for key, vector in value.items():
        if not isinstance(key, str):
            raise UserError(
                f"{path}: a key of type {type(key).__name__} is not text; the keys must be class "
                "names"
            )
        if not key.isprintable():
            raise UserError(f"{path}: key {key!r} is not printable text; correct the file")
        array = _array(vector)
        if array.ndim != 1 or array.dtype.kind != "f":
            raise UserError(
                f"{path}: vector of {key!r} has shape {array.shape} and type {array.dtype}; "
                "expected a 1-d float vector"
            )
        if width is not None and len(array) != width:
            raise UserError(
                f"{path}: vector of {key!r} has {len(array)} values, earlier ones {width}"
            )
        with np.errstate(over="ignore"):  # values past the float32 range become infinite
            row = array.astype(np.float32)
        if not np.isfinite(row).all():
            raise UserError(f"{path}: vector of {key!r} contains NaN or infinity")
        width = len(array)
        keys.append(str(key))
        rows.append(row)
    return tuple(keys), np.stack(rows)


def _array(vector: Any) -> npt.NDArray[Any]:
    """Return a vector as an array; what is none becomes one of objects, which is refused."""
    try:
        return np.asarray(vector)
    except ValueError:  # lists in lists, of different lengths
        return np.empty((), object)


def _unpickle_object_array(path: Path) -> Any:
    """Return the single element of a 0-d object ``.npy`` file."""
    remedy = "expected the released 0-d object array; get the file again"
    try:
        with path.open("rb") as handle:
            version = np.lib.format.read_magic(handle)
            if version != (1, 0):
                raise UserError(f"{path}: numpy format {version}; {remedy}")
            shape, _, dtype = np.lib.format.read_array_header_1_0(handle)
            if shape != () or dtype != np.dtype(object):
                raise UserError(f"{path}: array of shape {shape} and type {dtype}; {remedy}")
            body = handle.read()
        array = loads(body)
        return array.item() if isinstance(array, np.ndarray) and array.shape == () else array
    except ForbiddenName as error:
        raise _forbidden(path, error) from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except DAMAGED as error:
        raise UserError(f"{path}: truncated or damaged ({error}); {remedy}") from error
