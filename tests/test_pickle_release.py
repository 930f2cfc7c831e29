"""The pickled releases: sequences (TCaF) and CLIP/CLAP vectors (ClipClap), with every quirk."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avzero.data.audit import audit_lines
from avzero.data.avca import read_avca
from avzero.data.benchmark import AUDIO, MODALITIES, VIDEO, RawBenchmark, Role, text_rows
from avzero.data.class_lists import FOLDER_OF_ROLE, STAGE_2_TRAIN
from avzero.data.release import ReadOptions
from avzero.data.simulate import simulate
from avzero.errors import UserError
from avzero.spec import TextAlignment
from tests.conftest import LAYOUTS
from tests.pickles import FOLDER, change, class_file, expect, load, row


@pytest.fixture(scope="module")
def temporal(releases: dict[str, Path]) -> RawBenchmark:
    return read_avca(releases["temporal"], FOLDER, "cls")


@pytest.fixture(scope="module")
def clipclap(releases: dict[str, Path]) -> RawBenchmark:
    return read_avca(releases["clipclap"], FOLDER, "cls")


# -- what a whole release gives -------------------------------------------------------------------


def test_averaged_benchmarks_keep_their_digest(release: Path) -> None:
    """Computed before sequences existed: results stored under this digest stay reachable."""
    raw = read_avca(release, "tiny", "main", name="tiny")
    assert raw.digest() == "89b2d3a3a2181841fc3cd68930302df8c999feb302e960959a8f6240470abb1f"


def test_kind_is_found_from_the_files(temporal: RawBenchmark, clipclap: RawBenchmark) -> None:
    assert (temporal.name, temporal.feature_set) == ("tiny-cls_temporal-sim", "cls_temporal")
    assert temporal.step_seconds == {AUDIO: 0.96, VIDEO: 0.64}
    assert temporal.dims == {AUDIO: 32, VIDEO: 48} and list(temporal.text) == ["w2v"]
    assert (clipclap.name, clipclap.feature_set) == ("tiny-clipclap-cls-sim", "clipclap")
    assert not clipclap.step_seconds and clipclap.open.features[AUDIO].shape == (304, 32)
    for raw in (temporal, clipclap):
        assert raw.counts()["test_unseen"] == 56 and sum(raw.counts().values()) == 424
        assert raw.audit["notes"] == []
    lengths = {m: temporal.open.features[m].lengths for m in MODALITIES}  # type: ignore[union-attr]
    assert set(lengths[VIDEO]) == set(range(4, 13)) and (lengths[AUDIO] < lengths[VIDEO]).all()
    text = "\n".join(audit_lines(temporal.audit))
    assert "steps 4 / " in text and "of 0.64 s" in text


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_row_is_joined_by_name(layout: str, releases: dict[str, Path]) -> None:
    root = releases[layout]
    raw = read_avca(root, FOLDER, "cls")
    for role in Role:
        part = raw.test if role.sealed else raw.open
        row_of = {name: i for i, name in enumerate(part.samples.sample_id)}
        for modality in MODALITIES:
            value = load(class_file(root, modality, role, 3))
            for name, array in zip(value["video_names"], value["features"], strict=True):
                mine = row(part.features[modality], row_of[name.decode()])
                np.testing.assert_array_equal(mine, array.astype(np.float32))


def test_eight_bit_audio_keeps_its_values(releases: dict[str, Path]) -> None:
    value = load(class_file(releases["temporal"], AUDIO, Role.TRAIN))
    assert value["features"][0].dtype == np.uint8
    assert load(class_file(releases["temporal"], VIDEO, Role.TRAIN))["fps"][0] == 25


def test_clipclap_text_is_joined_by_key(clipclap: RawBenchmark, releases: dict[str, Path]) -> None:
    assert sorted(clipclap.text) == ["clip", "clipclap", "wavcaps"]
    both = clipclap.text["clipclap"]
    folder = releases["clipclap"] / "features" / FOLDER / "text"
    clip, wavcaps = (
        np.load(folder / f"{prefix}word_embeddings_ucf_normed.npy", allow_pickle=True).item()
        for prefix in ("", "wavcaps_")
    )
    assert list(clip) != list(wavcaps), "the files must not lie in one order"
    for key, vector in zip(both.keys, both.vectors, strict=True):
        np.testing.assert_array_equal(vector, np.concatenate([clip[key], wavcaps[key]]))
    assert both.vectors.shape[1] == 512 + 1024
    # UCF's keys are those of ucf_clip_class_names.csv, not of the word vectors' name map.
    assert sum(key.endswith(" sport") for key in both.key_of_class.values()) == 4
    assert None not in text_rows(both, clipclap.classes, TextAlignment.BY_CLASS)


@pytest.mark.parametrize("style", ["VGGSound", "ActivityNet"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_styles(
    style: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a CLIP name map the word vectors' names are the keys."""
    from dataclasses import replace

    from avzero.data.simulate import SHAPES

    shape = replace(SHAPES["tiny"](), style=style)
    monkeypatch.setitem(SHAPES, "styled", lambda: shape)
    raw = read_avca(simulate(tmp_path / "STYLED", "styled", layout=layout), FOLDER, "main")
    assert sum(raw.counts().values()) == 432
    sets = {"temporal": ["w2v"], "clipclap": ["clip", "clipclap", "wavcaps"]}
    assert sorted(raw.text) == sets[layout]


def test_clip_text_without_its_partner_is_refused(clips: Path) -> None:
    """Named by its file it would be called word vectors, in a benchmark without two text sets."""
    text = clips / "features" / FOLDER / "text"
    (text / "wavcaps_word_embeddings_ucf_normed.npy").unlink()
    path = text / "word_embeddings_ucf_normed.npy"
    missing = "wavcaps_word_embeddings_ucf_normed.npy is missing"
    expect(clips, str(path), "512 wide", missing, f"--text clip={path}")
    for names in (["clip"], ["w2v"], ["clip", "clipclap", "wavcaps"]):
        named = ReadOptions(text={name: path for name in names if name != "clipclap"})
        assert sorted(read_avca(clips, FOLDER, "cls", options=named).text) == names


def test_word_vectors_beside_clip_features_keep_their_name(clips: Path) -> None:
    text = clips / "features" / FOLDER / "text"
    (text / "wavcaps_word_embeddings_ucf_normed.npy").unlink()
    path = text / "word_embeddings_ucf_normed.npy"
    vectors = {k: v[:300] for k, v in np.load(path, allow_pickle=True).item().items()}
    np.save(path, np.array(vectors, dtype=object), allow_pickle=True)
    assert list(read_avca(clips, FOLDER, "cls").text) == ["w2v"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_default_name_is_that_of_the_feature_set(
    layout: str, releases: dict[str, Path], tmp_path: Path
) -> None:
    """The folder is called ``cls_features_non_averaged``, the benchmark is not."""
    suffix = {"clipclap": "-clipclap-cls-sim", "temporal": "-cls_temporal-sim"}[layout]
    fits = "t" * (63 - len(suffix))
    for name in (fits, fits + "t", "t" * 60):
        root = Path(shutil.copytree(releases[layout], tmp_path / name))
        if name == fits:
            assert read_avca(root, FOLDER, "cls").name == name + suffix
        else:
            expect(root, "benchmark name", "set it with --name")


def test_a_name_that_cannot_fit_is_refused_before_reading(
    releases: dict[str, Path], tmp_path: Path
) -> None:
    root = Path(shutil.copytree(releases["temporal"], tmp_path / "not plain"))
    class_file(root, AUDIO, Role.TRAIN).write_bytes(b"")
    expect(root, "benchmark name 'not plain-cls_temporal-sim'", "set it with --name")


def test_simulation_is_reproducible(releases: dict[str, Path], tmp_path: Path) -> None:
    for layout in LAYOUTS:
        again = simulate(tmp_path / layout / "TINY", "tiny", layout=layout)
        digests = {read_avca(r, FOLDER, "main").digest() for r in (again, releases[layout])}
        assert len(digests) == 1
        assert simulate(again, "tiny", layout=layout) == again
        with pytest.raises(UserError, match="is not this simulation"):
            simulate(again, "tiny")
    with pytest.raises(UserError, match="no layout 'npz'; choose one of hdf5, clipclap, temporal"):
        simulate(tmp_path / "X", "tiny", layout="npz")


# -- quirks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [str, np.bytes_])
def test_names_of_every_type(kind: type, copy: Path) -> None:
    before = read_avca(copy, FOLDER, "cls").digest()
    for modality in MODALITIES:
        path = class_file(copy, modality, Role.TRAIN)

        def edit(value: dict[str, Any]) -> None:
            decode = kind is str
            value["video_names"] = [n.decode() if decode else kind(n) for n in value["video_names"]]

        change(path, edit)
    assert read_avca(copy, FOLDER, "cls").digest() == before


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_every_age(protocol: int, copy: Path) -> None:
    """Protocol 2 writes bytes as encoded text; numpy 1 spells its modules numpy.core."""
    before = read_avca(copy, FOLDER, "cls").digest()
    for modality in MODALITIES:
        path = class_file(copy, modality, Role.TRAIN)
        change(path, lambda value: None, protocol)
        data = path.read_bytes()
        if protocol == 2:
            assert b"_codecs" in data
            path.write_bytes(data.replace(b"numpy._core", b"numpy.core"))
    assert read_avca(copy, FOLDER, "cls").digest() == before


def lose(root: Path, stem: str | Role, modality: str, count: int = 1, index: int = 0) -> None:
    """Do what ClipClap's writer does: skip rows of a class file and keep their names."""

    def edit(value: dict[str, Any]) -> None:
        value["features"] = value["features"][count:]
        value["fps"] = value["fps"][count:]

    change(class_file(root, modality, stem, index), edit)


def same_order(root: Path, stem: str | Role) -> None:
    """Give both files of a class one order of rows, as the real writer does."""
    names = sorted(load(class_file(root, AUDIO, stem))["video_names"])
    for modality in MODALITIES:

        def edit(value: dict[str, Any]) -> None:
            order = [value["video_names"].index(name) for name in names]
            value["video_names"] = names
            value["features"] = [value["features"][i] for i in order]

        change(class_file(root, modality, stem), edit)


@pytest.mark.parametrize("role", [Role.TRAIN, Role.TEST_SEEN])
def test_more_names_than_rows(role: Role, copy: Path) -> None:
    """Names are unusable then: rows get made-up names and are joined by position, with a note."""
    same_order(copy, role)
    whole = read_avca(copy, FOLDER, "cls")
    for modality in MODALITIES:
        lose(copy, role, modality)
    raw = read_avca(copy, FOLDER, "cls")
    assert raw.counts()[role] == whole.counts()[role] - 1
    part, name = (raw.test if role.sealed else raw.open), class_file(copy, AUDIO, role).stem
    # The class is written in another case in the files; made-up names use its own spelling.
    name = next(n for n in raw.classes.names if n.casefold() == name.casefold())
    value = {m: load(class_file(copy, m, role))["features"] for m in MODALITIES}
    for i in range(len(value[AUDIO])):
        at = list(part.samples.sample_id).index(f"{name}#{role}-{i}")
        assert part.samples.source_id[at] == f"{name}#{role}-{i}"
        for modality in MODALITIES:
            np.testing.assert_array_equal(row(part.features[modality], at), value[modality][i])
    (note, *more) = raw.audit["notes"]
    assert note.startswith("warning") and f"{FOLDER_OF_ROLE[role]}/" in note and "1 of " in note
    assert bool(more) == (role is Role.TRAIN) and all(STAGE_2_TRAIN in m for m in more)


def test_lost_names_that_cannot_be_joined(copy: Path) -> None:
    same_order(copy, Role.VAL_UNSEEN)
    lose(copy, Role.VAL_UNSEEN, AUDIO)
    path = class_file(copy, AUDIO, Role.VAL_UNSEEN)
    expect(copy, str(path), "8 video_names but 7 features", "nor by position")
    lose(copy, Role.VAL_UNSEEN, VIDEO, count=2)
    expect(copy, str(path), "has 8 and 6")


def test_lost_names_still_belong_to_the_class(copy: Path) -> None:
    for modality in MODALITIES:
        lose(copy, Role.VAL_UNSEEN, modality)

        def edit(value: dict[str, Any]) -> None:
            value["video_names"] = [f"v_Other_{i}".encode() for i in range(8)]

        change(class_file(copy, modality, Role.VAL_UNSEEN), edit)
    expect(copy, "'v_Other_0' is not listed", "stage_1_val_unseen.csv")


def test_lost_names_in_the_repeated_folder(copy: Path) -> None:
    for modality in MODALITIES:
        lose(copy, STAGE_2_TRAIN, modality)
    raw = read_avca(copy, FOLDER, "cls")
    assert sum(raw.counts().values()) == 424
    (note,) = raw.audit["notes"]
    assert "2 files" in note and "could not be compared" in note


def test_skipped_clips_of_an_official_dataset(tmp_path: Path) -> None:
    """Counts must match apart from what the release itself skipped."""
    root = simulate(tmp_path / "UCF", "UCF-cls", layout="clipclap")
    same_order(root, Role.TEST_UNSEEN)
    for modality in MODALITIES:
        lose(root, Role.TEST_UNSEEN, modality, count=2)
    raw = read_avca(root, FOLDER, "cls")
    assert raw.counts()["test_unseen"] == 843 and raw.dims == {AUDIO: 1024, VIDEO: 512}
    assert raw.audit["official_counts"] == "match, with 2 videos the release skipped"
    assert raw.name == "ucf-clipclap-cls-sim"
    assert raw.test.samples.source_id[-1].count("_") == 2, "a real name loses its clip number"
    for modality in MODALITIES:
        path = class_file(root, modality, Role.TEST_UNSEEN)
        change(path, lambda v: v | {"video_names": v["video_names"][2:]})
    (root / "class-split" / "cls_split" / "stage_2_test_unseen.csv").unlink()
    expect(root, "843 samples, the official split has 845")


def empty(value: dict[str, Any], at: int = 0) -> str:
    """Take all values from a row, as for a clip nobody could read; return its name."""
    array = value["features"][at]
    value["features"][at] = array[:0]
    return str(value["video_names"][at].decode())


def damage(root: Path, modality: str, how: Callable[[Any], Any]) -> None:
    """Damage one video in val_unseen, the same in stage_2_train, and one in test_seen."""
    for role in (Role.VAL_UNSEEN, Role.TEST_SEEN):
        path = class_file(root, modality, role)
        name = load(path)["video_names"][1]
        files = [path] + [path.parents[1] / STAGE_2_TRAIN / path.name] * (not role.sealed)
        for file in files:

            def edit(value: dict[str, Any], name: bytes = name) -> None:
                at = value["video_names"].index(name)
                value["features"][at] = how(value["features"][at])

            change(file, edit)


def with_nan(array: Any) -> Any:
    array = array.astype(np.float32)
    array[..., -1] = np.nan
    return array


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("how", [lambda a: a[:0], with_nan, lambda a: np.empty(0)])
def test_rows_without_numbers(modality: str, how: Callable[[Any], Any], copy: Path) -> None:
    damage(copy, modality, how)
    expect(copy, "1 rows hold NaN or infinity, or nothing", f", {modality})", "--nonfinite drop")
    dropped = read_avca(copy, FOLDER, "cls", options=ReadOptions(nonfinite="drop"))
    assert sum(dropped.counts().values()) == 422 and len(dropped.audit["nonfinite_rows"]) == 2
    said = "dropped rows that hold NaN or infinity, or nothing:"
    assert dropped.audit["notes"] == [f"{said} val_unseen 1", f"{said} test_seen 1"]
    zero = read_avca(copy, FOLDER, "cls", options=ReadOptions(nonfinite="zero"))
    assert sum(zero.counts().values()) == 424
    other = VIDEO if modality == AUDIO else AUDIO
    for part, kept in ((zero.open, dropped.open), (zero.test, dropped.test)):
        names = list(part.samples.sample_id)
        gone = set(names) - set(kept.samples.sample_id)
        (at,) = (names.index(name) for name in gone)
        value = row(part.features[modality], at)
        assert not value.any() and value.shape[:-1] in ((), (1,)), "a vector or one step of zeros"
        assert row(part.features[other], at).any()
        for m in MODALITIES:
            rest = [i for i in range(len(names)) if i != at]
            for i, j in zip(rest, range(len(rest)), strict=True):
                np.testing.assert_array_equal(row(part.features[m], i), row(kept.features[m], j))


def test_a_class_without_any_numbers(copy: Path) -> None:
    """A file whose rows are all empty does not say of which kind it is, and needs not."""
    for stem in (Role.TEST_UNSEEN, STAGE_2_TRAIN):
        path = class_file(copy, AUDIO, stem)
        change(path, lambda v: v | {"features": [np.empty(0)] * len(v["features"])})
    expect(copy, "differs from its stage_1 copy")
    shutil.rmtree(copy / "features" / FOLDER / AUDIO / STAGE_2_TRAIN)
    expect(copy, "8 rows hold NaN")
    raw = read_avca(copy, FOLDER, "cls", options=ReadOptions(nonfinite="drop"))
    assert raw.counts()["test_unseen"] == 48
    count, warning = raw.audit["notes"][-2:]
    assert count == "dropped rows that hold NaN or infinity, or nothing: test_unseen 8"
    assert warning.startswith("warning: test_unseen: class ") and "lost all its 8 rows" in warning


@pytest.mark.parametrize("role", Role)
def test_dropping_may_not_empty_a_role(role: Role, copy: Path) -> None:
    for path in class_file(copy, AUDIO, role).parent.glob("*.pkl"):
        change(path, lambda v: v | {"features": [with_nan(a) for a in v["features"]]})
    for modality in MODALITIES:
        shutil.rmtree(copy / "features" / FOLDER / modality / STAGE_2_TRAIN)
    dropping = ReadOptions(nonfinite="drop")
    expect(copy, f"{role} rows hold NaN", "leaves no benchmark", options=dropping)


def test_stage_2_copy_must_agree(copy: Path) -> None:
    path = class_file(copy, VIDEO, STAGE_2_TRAIN, 4)
    value = load(path)
    name = value["video_names"][2].decode()
    value["features"][2] = value["features"][2] + 1
    path.write_bytes(pickle.dumps(value))
    expect(copy, path.name, name, "differs from its stage_1 copy")


def test_stage_2_copy_of_another_length(steps: Path) -> None:
    path = class_file(steps, VIDEO, STAGE_2_TRAIN, 4)
    value = load(path)
    value["features"][2] = value["features"][2][:-1]
    path.write_bytes(pickle.dumps(value))
    expect(steps, path.name, value["video_names"][2].decode(), "differs from its stage_1 copy")
