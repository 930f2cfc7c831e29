"""Reading released pickles without trusting them: an unpickler with an allow-list.

A pickle may name any importable object and have it called. The released text files need three
names (data_formats.md section 2.4), the class files of the temporal and CLIP releases three more
(section 2.6); everything else ends in one clear line.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from avzero.data.benchmark import Float32
from avzero.errors import UserError

# numpy renamed numpy.core to numpy._core in 2.0; files of both ages exist.
_TEXT_GLOBALS = frozenset(
    {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
    }
)

_CLASS_FILE_GLOBALS = _TEXT_GLOBALS | {
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
}

_DAMAGED = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    ImportError,
    MemoryError,
    OverflowError,
)
"""Everything the standard unpickler raises on damaged or hostile bytes."""


class _AllowList(pickle.Unpickler):
    """An unpickler that resolves only the names it was given."""

    def __init__(self, file: BinaryIO, allowed: frozenset[tuple[str, str]], source: Path) -> None:
        super().__init__(file)
        self._allowed = allowed
        self._source = source

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise UserError(
                f"{self._source}: the pickle asks for {module}.{name}, which no released file "
                "needs; refused. Get the file again from its authors, or do not use it"
            )
        if module == "_codecs":
            return _latin1
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _latin1(text: str, encoding: str) -> bytes:
    """Stand in for ``_codecs.encode``: old pickles write bytes as Latin-1 text, nothing else."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"encodes as {encoding!r}; expected latin1")
    return text.encode("latin-1")


def load_class_pickle(path: Path) -> Any:
    """Return what a class file of the temporal or CLIP release holds, through the allow-list.

    Raises:
        UserError: the file is missing or damaged, or asks for a forbidden name.
    """
    try:
        with path.open("rb") as handle:
            return _AllowList(handle, _CLASS_FILE_GLOBALS, path).load()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except _DAMAGED as error:
        raise UserError(
            f"{path}: not a readable class pickle, truncated or damaged ({error}); get it again"
        ) from error


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
            raise UserError(f"{path}: key {key!r} is not text; the keys must be class names")
        array = np.asarray(vector)
        if array.ndim != 1 or array.dtype.kind != "f":
            raise UserError(
                f"{path}: vector of {key!r} has shape {array.shape} and type {array.dtype}; "
                "expected a 1-d float vector"
            )
        if width is not None and len(array) != width:
            raise UserError(
                f"{path}: vector of {key!r} has {len(array)} values, earlier ones {width}"
            )
        if not np.isfinite(array).all():
            raise UserError(f"{path}: vector of {key!r} contains NaN or infinity")
        width = len(array)
        keys.append(key)
        rows.append(array.astype(np.float32))
    return tuple(keys), np.stack(rows)


def _unpickle_object_array(path: Path) -> Any:
    """Return the single element of a 0-d object ``.npy`` file, through the allow-list."""
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
        array = _AllowList(io.BytesIO(body), _TEXT_GLOBALS, path).load()
        return array.item() if isinstance(array, np.ndarray) and array.shape == () else array
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except _DAMAGED as error:
        raise UserError(f"{path}: truncated or damaged ({error}); {remedy}") from error
