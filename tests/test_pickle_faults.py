"""Bad files of the pickled releases: one clear line that names file, row or field."""

from __future__ import annotations

import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avzero.data.avca import read_avca
from avzero.data.benchmark import AUDIO, Role
from avzero.errors import UserError
from tests.conftest import Run
from tests.pickles import FOLDER, change, class_file, expect


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (lambda v: [v], ["holds list, not a dict"]),
        (lambda v: v.pop("features") and None, ["no list 'features'", "fps, video_names"]),
        (lambda v: v | {"video_names": b"x"}, ["no list 'video_names'"]),
        (lambda v: v | {"features": np.float32(1)}, ["no list 'features'"]),
        (
            lambda v: v["features"].__setitem__(3, [1.0]),
            ["features row 3", "expected an array"],
        ),
        (
            lambda v: v["features"].__setitem__(2, np.ones((2, 2, 2))),
            ["features row 2", "shape (2, 2, 2)"],
        ),
        (
            lambda v: v["features"].__setitem__(2, np.array(["a"])),
            ["features row 2", "type <U1"],
        ),
        (
            lambda v: v["features"].__setitem__(1, v["features"][1][..., :-1]),
            ["features row 1", "one width"],
        ),
        (
            lambda v: v["features"].__setitem__(1, np.ones((2,) * (3 - v["features"][1].ndim))),
            ["features row 1", "vectors or sequences, not both"],
        ),
        (lambda v: v["video_names"].pop() and None, ["features but only", "video_names"]),
        (lambda v: v["video_names"].__setitem__(1, b"\xff"), ["video_names row 1", "not UTF-8"]),
        (lambda v: v["video_names"].__setitem__(1, 7), ["video_names row 1", "int"]),
        (
            lambda v: v["video_names"].__setitem__(1, "v_\ud800"),
            ["video_names row 1", r"'v_\ud800'", "rename it"],
        ),
        (lambda v: v["video_names"].__setitem__(1, b"v\nw"), ["video_names row 1", r"'v\nw'"]),
        (lambda v: v["video_names"].__setitem__(1, b"v\0"), ["video_names row 1", r"'v\x00'"]),
        (lambda v: {"\ud800": 1, 10**5000: 2, "fps": 3}, ["no list 'video_names'", "holds fps."]),
        (
            lambda v: v["video_names"].__setitem__(1, v["video_names"][0]),
            ["row 1", "occurs twice"],
        ),
    ],
)
def test_bad_class_files(edit: Callable[[Any], Any], parts: list[str], copy: Path) -> None:
    path = class_file(copy, AUDIO, Role.VAL_UNSEEN, 2)
    change(path, edit)
    expect(copy, str(path), *parts)


class Hostile:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


def hidden_codec(value: object) -> bytes:
    """Return a pickle that asks the allowed ``_codecs.encode`` for another encoding."""
    return b"c_codecs\nencode\n(Vx\nVrot13\ntR."


@pytest.mark.parametrize("data", [pickle.dumps({"features": Hostile()}), hidden_codec(None)])
def test_refuses_to_execute(data: bytes, clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = class_file(clips, AUDIO, Role.TRAIN)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"\.pkl.*(refused|rot13)"):
        read_avca(clips, FOLDER, "cls")
    assert "executed" not in capsys.readouterr().out


def test_damaged_bytes_anywhere_are_one_line(steps: Path) -> None:
    path = class_file(steps, AUDIO, Role.VAL_SEEN)
    whole = path.read_bytes()
    for size in (0, 1, 20, len(whole) - 1):
        path.write_bytes(whole[:size])
        expect(steps, str(path), "not a readable class pickle")
    rng = random.Random(3)
    refused = 0
    for _ in range(40):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 8, 64])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            read_avca(steps, FOLDER, "cls")
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 10


def test_kinds_are_not_mixed(steps: Path, releases: dict[str, Path]) -> None:
    path = class_file(steps, AUDIO, Role.TRAIN, 5)
    mine = path.read_bytes()
    shutil.copy(class_file(releases["clipclap"], AUDIO, Role.TRAIN, 5), path)
    expect(steps, f"{path}: holds vectors where", "holds sequences", "one kind")
    path.write_bytes(mine)
    (path.parent / "Extra.h5").write_bytes(b"")
    expect(steps, "holds .h5 and .pkl files", str(path.parent))
    audio = Path("features") / FOLDER / AUDIO
    shutil.rmtree(steps / audio)
    shutil.copytree(releases["clipclap"] / audio, steps / audio)
    expect(steps, "audio holds vectors, video sequences", "both must be of one kind")


def test_text_keys_must_agree(clips: Path) -> None:
    path = clips / "features" / FOLDER / "text" / "wavcaps_word_embeddings_ucf_normed.npy"
    vectors = np.load(path, allow_pickle=True).item()
    vectors["Kind X"] = next(iter(vectors.values()))
    np.save(path, np.array(vectors, dtype=object), allow_pickle=True)
    expect(clips, path.name, "text key 'Kind X' is not in", "/word_embeddings_ucf_normed.npy")


def test_command_line(avzero: Run, releases: dict[str, Path], steps: Path, tmp_path: Path) -> None:
    """The commands of the README, and exit code 2 with one line for bad input."""
    store = ("--store", tmp_path / "store")
    made = tmp_path / "MADE"
    assert avzero("simulate", made, "--size", "tiny", "--layout", "temporal")[0] == 0
    for root, name in ((made, "made-cls_temporal-sim"), (releases["clipclap"], "tiny-clipclap")):
        ingest = ("ingest", "avca", root, "--features", FOLDER, "--split", "cls", *store)
        code, out, _ = avzero(*ingest)
        assert code == 0 and name in out and "test_unseen 56" in out
    code, out, _ = avzero("data", "list", *store)
    assert code == 0 and "audio T x 32, video T x 48" in out and "audio 32, video 48" in out
    assert "all digests match" in avzero("data", "verify", *store)[1]
    assert "of 0.96 s" in avzero("data", "audit", "made-cls_temporal-sim", *store)[1]
    path = class_file(steps, AUDIO, Role.TRAIN)
    change(path, lambda v: v["features"].__setitem__(3, None))
    code, _, err = avzero("ingest", "avca", steps, "--features", FOLDER, "--split", "cls", *store)
    assert code == 2 and err.count("\n") == 1 and str(path) in err and "row 3" in err
    assert avzero("simulate", tmp_path / "B", "--layout", "npz")[0] == 2
