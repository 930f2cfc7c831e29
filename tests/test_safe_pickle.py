"""Text vector files: the released form is read, everything else ends in one clear line."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avzero.data.safe_pickle import load_class_pickle, load_text_vectors
from avzero.errors import UserError


def save(path: Path, value: Any) -> Path:
    np.save(path, np.array(value, dtype=object), allow_pickle=True)
    return path


def as_text(path: Path, data: bytes) -> Path:
    """Write a pickle as the body of a 0-d object array."""
    with path.open("wb") as out:
        header = {"descr": "|O", "fortran_order": False, "shape": ()}
        np.lib.format.write_array_header_1_0(out, header)
        out.write(data)
    return path


def refused(folder: Path, data: bytes) -> list[str]:
    """Read a pickle as either kind of file; return the two refusals."""
    (folder / "c.pkl").write_bytes(data)
    as_text(folder / "t.npy", data)
    lines = []
    for load, name in ((load_class_pickle, "c.pkl"), (load_text_vectors, "t.npy")):
        with pytest.raises(UserError) as caught:
            load(folder / name)
        lines.append(str(caught.value))
        assert name in lines[-1] and "\n" not in lines[-1] and len(lines[-1]) < 600
    return lines


def test_reads_the_released_form(tmp_path: Path) -> None:
    vectors = {"b c": np.ones(4, np.float32), "a": np.arange(4, dtype=np.float32)}
    keys, array = load_text_vectors(save(tmp_path / "t.npy", vectors))
    assert keys == ("b c", "a")
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, [[1, 1, 1, 1], [0, 1, 2, 3]])


class Hostile:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


class HostileBuild:
    """Abuses an allowed global with a forbidden one hidden in its state."""

    def __reduce__(self) -> Any:
        return (np.ndarray, ((1,),), {"x": eval})


@pytest.mark.parametrize("payload", [Hostile(), HostileBuild()])
def test_refuses_to_execute(
    tmp_path: Path, payload: object, capsys: pytest.CaptureFixture[str]
) -> None:
    path = as_text(tmp_path / "hostile.npy", pickle.dumps(payload))
    with pytest.raises(UserError, match=r"hostile\.npy.*refused|hostile\.npy.*damaged"):
        load_text_vectors(path)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "not a dict"),
        (["a"], "not a dict"),
        ({1: np.ones(3, np.float32)}, "not text"),
        ({"a": np.ones((2, 2), np.float32)}, "1-d float vector"),
        ({"a": np.ones(3, np.int64)}, "1-d float vector"),
        ({"a": np.ones(3, np.float32), "b": np.ones(4, np.float32)}, "4 values, earlier ones 3"),
        ({"a": np.array([1.0, np.nan], np.float32)}, "NaN"),
        ({"a": np.array([1.0, 1e300])}, "NaN or infinity"),
        ({"a": [1.0, [2.0]]}, "1-d float vector"),
        ({"a\nb": np.ones(3, np.float32)}, r"'a\\nb' is not printable"),
        ({"\ud800": np.ones(3, np.float32)}, "is not printable"),
    ],
)
def test_refuses_wrong_content(tmp_path: Path, value: Any, message: str) -> None:
    boxed = np.empty((), dtype=object)
    boxed[()] = value
    np.save(tmp_path / "t.npy", boxed, allow_pickle=True)
    with pytest.raises(UserError, match=message):
        load_text_vectors(tmp_path / "t.npy")


def test_refuses_truncated_and_foreign_files(tmp_path: Path) -> None:
    whole = save(tmp_path / "t.npy", {"a": np.ones(8, np.float32)}).read_bytes()
    for size in (0, 5, 60, 128, 140, len(whole) - 3):
        (tmp_path / "cut.npy").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut\.npy"):
            load_text_vectors(tmp_path / "cut.npy")
    np.save(tmp_path / "plain.npy", np.ones(3))
    with pytest.raises(UserError, match="object array"):
        load_text_vectors(tmp_path / "plain.npy")
    with pytest.raises(UserError, match="no such file"):
        load_text_vectors(tmp_path / "absent.npy")


# -- pickles: what the released files hold is read, everything else ends in one line ---------------


class Made:
    """Pickles as a call of ``function``, and a state to set on what it returns."""

    def __init__(self, function: object, arguments: tuple[Any, ...], state: Any = None) -> None:
        self.parts = (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.parts if self.parts[2] is not None else self.parts[:2]


multiarray = np._core.multiarray  # type: ignore[attr-defined]
numeric = np._core.numeric  # type: ignore[attr-defined]


def dtype(name: str, flags: int, order: str = "|") -> Made:
    return Made(np.dtype, (name, False, True), (3, order, None, None, None, 8, 8, flags))


def array(kind: object, shape: Any, raw: object) -> Made:
    return Made(multiarray._reconstruct, (np.ndarray, (0,), b"b"), (1, shape, kind, False, raw))


NAMES = [b"v_a", b"v_b"]
LEGITIMATE: list[Callable[[], Any]] = [
    lambda: {"features": [np.eye(3, dtype=np.float32)], "video_names": NAMES, "fps": [25]},
    lambda: [np.arange(6, dtype=t).reshape(2, 3) for t in ("u1", "i2", ">i4", "f2", ">f8", "u8")],
    lambda: [np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.arange(8.0)[::2]],
    lambda: [np.empty(0), np.empty((0, 4), np.float32), np.array(2.5), np.empty((2, 0))],
    lambda: [np.bytes_(b"v_a"), np.bytes_(b""), np.str_("\u00e4b"), np.float32(2), np.int64(-3)],
    lambda: [np.array(NAMES), np.array(["\u00e4", "bc"]), np.array(["a"]).astype(">U3")],
    lambda: np.array([*NAMES, "c", None], dtype=object),
    lambda: {"b": [np.array([np.ones(2), None, np.ones(3)], dtype=object)] * 2},
    lambda: np.asfortranarray(np.array([[b"a", b"b"], [b"c", b"d"]], dtype=object)),
    lambda: [
        True,
        False,
        None,
        1,
        300,
        70_000,
        -1,
        1 << 40,
        2.5,
        "\u00e4",
        b"\xff",
        (),
        (1, 2, 3, 4),
    ],
]


def same(mine: Any, theirs: Any) -> None:
    assert type(mine) is type(theirs)
    if isinstance(theirs, np.ndarray):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        mine, theirs = mine.tolist(), theirs.tolist()
        if not isinstance(theirs, list):
            assert mine == theirs
            return
    if isinstance(theirs, dict):
        assert list(mine) == list(theirs)
        mine, theirs = list(mine.values()), list(theirs.values())
    if isinstance(theirs, list | tuple):
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            same(a, b)
    else:
        assert mine == theirs


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("make", LEGITIMATE)
def test_legitimate_pickles(make: Callable[[], Any], protocol: int, tmp_path: Path) -> None:
    data = pickle.dumps(make(), protocol=protocol)
    path = tmp_path / "c.pkl"
    path.write_bytes(data)
    same(load_class_pickle(path), make())
    old = b"numpy._core", b"numpy.core"
    if protocol < 4:  # later protocols write how long a name is
        path.write_bytes(data.replace(*old))
        same(load_class_pickle(path), make())


@pytest.mark.parametrize("flags", [0, 1, 16, 17, 63])
@pytest.mark.parametrize("name", ["O", "O8", "|O8"])
def test_bytes_never_become_objects(name: str, flags: int, tmp_path: Path) -> None:
    """numpy takes these flags from the file, and then the bytes for pointers."""
    kind, raw = dtype(name, flags), b"\x41" * 8
    for hostile in (
        array(kind, (1,), raw),
        Made(multiarray.scalar, (kind, raw)),
        Made(numeric._frombuffer, (raw, kind, (1,), "C")),
        Made(np.ndarray, ((1,), kind, raw)),
    ):
        refused(tmp_path, pickle.dumps({"features": [hostile], "video_names": [b"x"]}))


@pytest.mark.parametrize(
    "hostile",
    [
        array(dtype("f4", 0, "<"), (3,), b"\0" * 8),
        array(dtype("f4", 0, "<"), (1,), b"\0" * 8),
        array(dtype("f4", 0, "<"), (-1,), b"\0" * 8),
        array(dtype("f4", 0, "<"), (1 << 61, 8), b""),
        array(dtype("f4", 0, "<"), 2, b"\0" * 8),
        array(dtype("S0", 0), (1 << 40,), b""),
        array(dtype("U1", 0, "<"), (1,), b"\xff" * 4),
        array(dtype("U1", 0, ">"), (1,), b"\x00\x11\x00\x00"),
        array(dtype("O8", 63), (3,), [1]),
        array(dtype("O8", 63), (1 << 40,), []),
        array(np.dtype([("a", "O")]), (1,), [1]),
        array(np.dtype("M8[s]"), (1,), b"\0" * 8),
        Made(multiarray._reconstruct, (np.dtype, (0,), b"b")),
        Made(multiarray._reconstruct, (np.ndarray, (0,), b"b")),
        Made(multiarray._reconstruct, (np.ndarray, (0,), b"b"), {"x": 1}),
        Made(multiarray.scalar, (np.dtype("V8"), b"\0" * 8)),
        Made(np.dtype, ({"names": ["a"], "formats": ["O"]},)),
        {(1, 2): 3},
        {1, 2},
        1j,
    ],
)
def test_states_that_do_not_fit(hostile: object, tmp_path: Path) -> None:
    for line in refused(tmp_path, pickle.dumps({"features": [hostile]})):
        assert "damaged" in line or "refused" in line


DEEP = 200_000


@pytest.mark.parametrize(
    "data",
    [
        b"}" + b")" + b"\x85" * DEEP + b"K\x01s.",  # a dict key of nested tuples
        b"})" + b"q\0h\0\x86" * 80 + b"K\x01s.",  # the same tuple twice in each of 80 tuples
        b"K\1" + b"\x85" * DEEP + b".",
        b"]" * DEEP + b"a" * (DEEP - 1) + b".",
        b"]q\0h\0\x85a.",  # a list in itself
        b"(" * DEEP + b"l" * DEEP + b".",
        b"].]",
        b"c__builtin__\nbytes\n(J\xff\xff\xff\x7ftR.",
        b"",
        b".",
        b"a.",
        b"0.",
        b"t.",
        b"(iposix\nsystem\n.",
        b"cposix\nsystem\n(Vls\ntR.",
        b"c_codecs\nencode\n}Vx\nK\1sb.",  # a state for an allowed name
        b"cnumpy\ndtype\n(dVx\nK\1sb.",
        b"(c_codecs\nencode\no.",
        b"c_codecs\nencode\n)\x81.",
        b"\x82\1.",
        b"Pname\n.",
        b"\x97.",
        b"V\\ud800\nVx\n\x93.",
        b"\x96\0\0\0\0\xff\0\0\0.",
        b"Nr\xff\xff\xff\x7f.",
        b"L" + b"9" * 10_000 + b"L\n.",
        b"]c_codecs\nencode\nq\0X\0\1\0\0" + b"x" * 256 + b"X\6\0\0\0latin1\x86q\1"
        b"0" + b"h\0h\1Ra" * 10_000 + b".",  # one text, encoded again and again
    ],
)
def test_hostile_opcodes(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "c.pkl"
    path.write_bytes(data)
    try:
        load_class_pickle(path)
    except UserError as error:
        assert "\n" not in str(error) and str(error).isprintable()
    else:
        assert data in (b"].]", b"]q\0h\0\x85a.", b"Nr\xff\xff\xff\x7f.")
    with pytest.raises(UserError):
        load_text_vectors(as_text(tmp_path / "t.npy", data))


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_damaged_pickles_never_crash(protocol: int, tmp_path: Path) -> None:
    whole = pickle.dumps([make() for make in LEGITIMATE], protocol=protocol)
    path = tmp_path / "c.pkl"
    rng = random.Random(protocol)
    bad = 0
    for _ in range(600):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 2, 8])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            load_class_pickle(path)
        except UserError as error:
            assert "\n" not in str(error)
            bad += 1
    assert bad > 150
