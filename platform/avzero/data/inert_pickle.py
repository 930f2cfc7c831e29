"""A pickle machine that builds plain values, arrays of numbers and arrays of text; nothing else.

The standard unpickler with an allow-list is not enough for files nobody vouches for: numpy's own
dtype takes its flags from the file, after which raw bytes pass for object pointers, and a dict
key of deeply nested tuples overflows the C stack when it is hashed. This machine decodes the
opcodes with ``pickletools.genops`` and knows only those the released files use. The names they
ask for stand for functions of this module that check every size; no object of numpy or Python
ever receives a state that comes from the file.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Mapping
from enum import Enum, auto
from pickletools import genops
from typing import Any

import numpy as np
import numpy.typing as npt

_DTYPE = re.compile(r"[<>|=]?(?:[fiu][1248]|[SU][0-9]{1,6}|(O)[48]?)")
_KEYS = (str, bytes, int, float, type(None))
"""Types of dict keys: their hash does not walk into other values."""
_DEPTH = 16
"""How deep lists, tuples and dicts may nest; the released files need four levels."""
_LARGEST_CHARACTER = 0x10FFFF


class ForbiddenName(Exception):
    """The pickle asks for a name no released file needs; the message is that name."""


class _Name(Enum):
    """What the allowed names stand for."""

    NDARRAY = auto()
    DTYPE = auto()
    RECONSTRUCT = auto()
    SCALAR = auto()
    FROMBUFFER = auto()
    ENCODE = auto()
    BYTES = auto()


# numpy renamed numpy.core to numpy._core in 2.0; files of both ages exist.
_NAMES: Mapping[str, _Name] = {
    "numpy ndarray": _Name.NDARRAY,
    "numpy dtype": _Name.DTYPE,
    "_codecs encode": _Name.ENCODE,
    "__builtin__ bytes": _Name.BYTES,
    **{
        f"numpy.{core}.{name}": meaning
        for core in ("core", "_core")
        for name, meaning in (
            ("multiarray _reconstruct", _Name.RECONSTRUCT),
            ("multiarray scalar", _Name.SCALAR),
            ("numeric _frombuffer", _Name.FROMBUFFER),
        )
    },
}


class _Dtype:
    """Stands for ``numpy.dtype``: numbers, text or objects, and of its state the byte order."""

    def __init__(self, name: Any, align: Any = False, copy: Any = True) -> None:
        found = _DTYPE.fullmatch(name) if isinstance(name, str) else None
        if found is None:
            raise pickle.UnpicklingError(f"arrays of type {_brief(name)}; expected numbers or text")
        self.real = np.dtype(object) if found[1] else np.dtype(name)

    def set_state(self, state: Any) -> None:
        """Take the byte order; everything else follows from the name, whatever the file says."""
        _, order, *_ = state
        if isinstance(order, str) and order in ("<", ">"):
            self.real = self.real.newbyteorder(order)  # type: ignore[arg-type]


class _Array:
    """Stands for an ``ndarray`` between its making and its state; ``real`` is set at the end."""

    real: npt.NDArray[Any] | None = None
    items: list[Any] | None = None
    """The elements of an array of objects, still to be completed."""

    def set_state(self, state: Any) -> None:
        """Take (version, shape, dtype, fortran, raw); raw is bytes, or the list of objects."""
        _, shape, dtype, fortran, raw = state
        order = "F" if isinstance(fortran, int) and fortran else "C"
        if not isinstance(dtype, _Dtype) or not dtype.real.hasobject:
            self.real, self.items = _values(raw, dtype, shape, order), None
            return
        if type(raw) is not list or len(raw) != _count(shape):
            raise pickle.UnpicklingError("an array of objects without its elements")
        self.items = list(raw)
        self.real = np.empty(len(raw), object).reshape(shape, order=order)  # type: ignore[call-overload]


def _brief(value: Any) -> str:
    """Return a short, printable account of a value of the file."""
    return ascii(value[:40]) if isinstance(value, str | bytes) else type(value).__name__


def _count(shape: Any) -> int:
    """Return how many elements a shape has, if it is one."""
    fits = isinstance(shape, tuple) and len(shape) <= 32
    if not fits or not all(type(n) is int and 0 <= n < 1 << 62 for n in shape):
        raise pickle.UnpicklingError("an array without a shape")
    return math.prod(shape)


def _values(raw: Any, dtype: Any, shape: Any, order: str) -> npt.NDArray[Any]:
    """Return an array of numbers or text over the bytes of the file, after checking their size."""
    if not isinstance(dtype, _Dtype) or dtype.real.hasobject:
        raise pickle.UnpicklingError("an array of bytes without a type of numbers or text")
    real, count = dtype.real, _count(shape)
    if not isinstance(raw, bytes | bytearray) or len(raw) != count * real.itemsize:
        size = f"{len(raw)} bytes" if isinstance(raw, bytes | bytearray) else _brief(raw)
        raise pickle.UnpicklingError(f"{size} for an array of {count} x {real}")
    if not real.itemsize:
        raise pickle.UnpicklingError(f"an array of type {real}")
    flat = np.frombuffer(raw, real) if raw else np.empty(0, real)
    if real.kind == "U":
        codes = flat.view(np.dtype(np.uint32).newbyteorder(real.byteorder))
        if codes.size and codes.max() > _LARGEST_CHARACTER:
            raise pickle.UnpicklingError("text with a code that is no character")
    return flat.reshape(shape, order=order)  # type: ignore[call-overload,no-any-return]


def _reconstruct(kind: Any, *_: Any) -> _Array:
    """Stand in for ``_reconstruct``, which makes the empty array that its state then fills."""
    if kind is not _Name.NDARRAY:
        raise pickle.UnpicklingError(f"makes an array of {_brief(kind)}")
    return _Array()


def _scalar(dtype: Any, raw: Any) -> Any:
    """Stand in for numpy's ``scalar``: one number, or one text (``numpy.bytes_``)."""
    if isinstance(dtype, _Dtype) and not dtype.real.itemsize and not raw:
        return dtype.real.type()
    return _values(raw, dtype, (), "C")[()]


def _frombuffer(raw: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> Any:
    """Stand in for ``_frombuffer``, which protocol 5 uses for arrays in one piece."""
    if order == "K" and axes is not None:
        return _values(raw, dtype, shape, "C").transpose(axes)
    return _values(raw, dtype, shape, "F" if order == "F" else "C")


def _encode(text: Any, encoding: Any) -> bytes:
    """Stand in for ``_codecs.encode``: old pickles write bytes as Latin-1 text, nothing else."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"encodes as {_brief(encoding)}; expected latin1")
    return text.encode("latin-1")


def _no_bytes() -> bytes:
    """Stand in for ``bytes``, which old pickles call, without arguments, for those of no length."""
    return b""


_CALLS: Mapping[_Name, Callable[..., Any]] = {
    _Name.DTYPE: _Dtype,
    _Name.RECONSTRUCT: _reconstruct,
    _Name.SCALAR: _scalar,
    _Name.FROMBUFFER: _frombuffer,
    _Name.ENCODE: _encode,
    _Name.BYTES: _no_bytes,
}


class _Machine:
    """The stack, the marks in it, the memo, and one step per opcode."""

    def __init__(self, size: int) -> None:
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        # Every name call makes at most as much as the file holds; a memo could multiply that.
        self._left = 2 * size
        push = self._stack.append
        # genops has decoded these; what they carry (or None) is the value.
        values = (
            "NONE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE BINUNICODE "
            "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8"
        )
        self._steps: dict[str, Callable[[Any], Any]] = {
            **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda _: None),
            **dict.fromkeys(values.split(), push),
            **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), self._eight_bit),
            "NEWTRUE": lambda _: push(True),
            "NEWFALSE": lambda _: push(False),
            "EMPTY_LIST": lambda _: push([]),
            "EMPTY_TUPLE": lambda _: push(()),
            "EMPTY_DICT": lambda _: push({}),
            "MARK": lambda _: self._marks.append(len(self._stack)),
            "LIST": lambda _: push(self._to_mark()),
            "TUPLE": lambda _: push(tuple(self._to_mark())),
            "DICT": lambda _: self._fill({}, self._to_mark()),
            "TUPLE1": lambda _: push(tuple(self._last(1))),
            "TUPLE2": lambda _: push(tuple(self._last(2))),
            "TUPLE3": lambda _: push(tuple(self._last(3))),
            "APPEND": lambda _: self._extend(self._last(1)),
            "APPENDS": lambda _: self._extend(self._to_mark()),
            "SETITEM": lambda _: self._fill(None, self._last(2)),
            "SETITEMS": lambda _: self._fill(None, self._to_mark()),
            "POP": lambda _: self._last(1),
            "POP_MARK": lambda _: self._to_mark(),
            "DUP": lambda _: push(self._stack[-1]),
            "MEMOIZE": lambda _: self._put(len(self._memo)),
            **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), self._put),
            **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda i: push(self._memo[i])),
            "GLOBAL": self._name,
            "STACK_GLOBAL": lambda _: self._name(" ".join(self._last(2))),
            "REDUCE": self._reduce,
            "BUILD": self._build,
        }

    def run(self, data: bytes) -> Any:
        """Run all opcodes; return the one value left."""
        for opcode, argument, _ in genops(data):
            step = self._steps.get(opcode.name)
            if step is None:
                raise pickle.UnpicklingError(f"uses {opcode.name}, which no released file does")
            step(argument)
        (value,) = self._stack
        return value

    def _last(self, count: int) -> list[Any]:
        """Take the last ``count`` values from the stack."""
        if len(self._stack) < count:
            raise pickle.UnpicklingError("too few values")
        taken = self._stack[-count:]
        del self._stack[-count:]
        return taken

    def _to_mark(self) -> list[Any]:
        """Take all values above the last mark from the stack."""
        start = self._marks.pop()
        taken = self._stack[start:]
        del self._stack[start:]
        return taken

    def _eight_bit(self, text: str) -> None:
        """Push text of Python 2, whose encoding is unknown beyond ASCII."""
        if not text.isascii():
            raise pickle.UnpicklingError("8-bit text of Python 2")
        self._stack.append(text)

    def _extend(self, items: list[Any]) -> None:
        """Append to the list on top of the stack."""
        target = self._stack[-1]
        if type(target) is not list:
            raise pickle.UnpicklingError(f"appends to {_brief(target)}")
        target.extend(items)

    def _fill(self, made: dict[Any, Any] | None, items: list[Any]) -> None:
        """Put keys and values, in turn, into a new dict or the one on top of the stack."""
        if made is not None:
            self._stack.append(made)
        target = self._stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise pickle.UnpicklingError(f"sets items of {_brief(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, _KEYS):
                raise pickle.UnpicklingError(f"a dict key of type {type(key).__name__}")
            target[key] = value

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _name(self, name: str) -> None:
        """Push what a name (module and name, with a space between) stands for."""
        if name not in _NAMES:
            raise ForbiddenName(".".join(name[:80].split(" ")))
        self._stack.append(_NAMES[name])

    def _reduce(self, _: None) -> None:
        """Replace a name and its arguments by what the call returns."""
        name, arguments = self._last(2)
        call = _CALLS.get(name) if isinstance(name, _Name) else None
        if call is None or type(arguments) is not tuple:
            raise pickle.UnpicklingError(f"calls {getattr(name, 'name', _brief(name))}")
        made = call(*arguments)
        if isinstance(made, str | bytes):
            self._left -= len(made)
            if self._left < 0:
                raise pickle.UnpicklingError("repeats itself without end")
        self._stack.append(made)

    def _build(self, _: None) -> None:
        """Give an array or its type the state that follows it."""
        target, state = self._last(2)
        if not isinstance(target, _Dtype | _Array) or type(state) is not tuple:
            raise pickle.UnpicklingError(f"sets the state of {_brief(target)}")
        target.set_state(state)
        self._stack.append(target)


def _finished(value: Any, done: dict[int, Any], depth: int = 0) -> Any:
    """Return a value with every stand-in for an array replaced by the array.

    ``done`` holds what is finished, by identity: a memo may name one value many times.
    """
    if not isinstance(value, list | tuple | dict | _Array):
        return value
    if id(value) in done:
        return done[id(value)]
    if depth > _DEPTH:
        raise pickle.UnpicklingError(f"nested deeper than {_DEPTH} levels")
    if isinstance(value, list):
        items: list[Any] = []
        done[id(value)] = items
        items.extend(_finished(item, done, depth + 1) for item in value)
    elif isinstance(value, dict):
        table: dict[Any, Any] = {}
        done[id(value)] = table
        table.update((key, _finished(item, done, depth + 1)) for key, item in value.items())
    elif isinstance(value, tuple):
        done[id(value)] = tuple(_finished(item, done, depth + 1) for item in value)
    else:
        if value.real is None:
            raise pickle.UnpicklingError("an array without content")
        done[id(value)] = value.real
        for at, item in zip(np.ndindex(value.real.shape), value.items or (), strict=False):
            value.real[at] = _finished(item, done, depth + 1)
    return done[id(value)]


def loads(data: bytes) -> Any:
    """Return what a pickle of plain values and numpy arrays holds (protocols 0 to 5).

    Raises:
        ForbiddenName: it asks for a name no released file needs.
        Exception: of the types in ``DAMAGED``, for whatever else is wrong with it.
    """
    return _finished(_Machine(len(data)).run(data), {})


DAMAGED = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    ImportError,
    MemoryError,
    OverflowError,
    RuntimeError,
)
"""Everything damaged or hostile bytes raise, here and in the header of an ``.npy`` file."""
