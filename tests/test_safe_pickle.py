"""Text vector files: the released form is read, everything else ends in one clear line."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avzero.data.safe_pickle import load_text_vectors
from avzero.errors import UserError


def save(path: Path, value: Any) -> Path:
    np.save(path, np.array(value, dtype=object), allow_pickle=True)
    return path


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
    path = tmp_path / "hostile.npy"
    with path.open("wb") as out:
        header = {"descr": "|O", "fortran_order": False, "shape": ()}
        np.lib.format.write_array_header_1_0(out, header)
        out.write(pickle.dumps(payload))
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
