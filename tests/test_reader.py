"""The reader of the AVCA layout: every quirk of the releases, and joins that never use position."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from avzero.data.audit import audit_lines
from avzero.data.avca import read_avca
from avzero.data.benchmark import AUDIO, VIDEO, ClassRole, RawBenchmark, Role
from avzero.data.class_lists import FOLDER_OF_ROLE
from avzero.data.release import ReadOptions
from avzero.data.simulate import SHAPES, simulate
from avzero.errors import UserError
from avzero.spec import TextAlignment


@pytest.fixture(scope="module")
def raw(release: Path) -> RawBenchmark:
    return read_avca(release, "tiny", "main", name="tiny")


@pytest.fixture
def copy(release: Path, tmp_path: Path) -> Path:
    """A copy of the tiny release that a test may damage."""
    target = tmp_path / "TINY"
    shutil.copytree(release, target)
    return target


def class_file(root: Path, modality: str, role: Role, index: int = 0) -> Path:
    folder = root / "features" / "tiny_features" / modality / FOLDER_OF_ROLE[role]
    return sorted(folder.glob("*.h5"))[index]


def rewrite(path: Path, **changes: object) -> None:
    """Replace datasets of a class file."""
    with h5py.File(path, "a") as file:
        for key, value in changes.items():
            del file[key]
            if isinstance(value, list):
                file.create_dataset(key, data=value, dtype=h5py.string_dtype())
            elif value is not None:
                file.create_dataset(key, data=value)


def test_counts_and_order(raw: RawBenchmark) -> None:
    assert raw.counts() == {
        "train": 192,
        "val_seen": 48,
        "val_unseen": 64,
        "test_seen": 64,
        "test_unseen": 64,
    }
    for part in (raw.open, raw.test):
        s = part.samples
        keys = list(zip(s.role.tolist(), s.class_id.tolist(), s.sample_id, strict=True))
        assert keys == sorted(keys)
    assert list(raw.classes.names) == sorted(raw.classes.names)


def test_every_row_is_joined_by_name(release: Path, raw: RawBenchmark) -> None:
    """Audio and video rows lie in different orders in the files, and must meet in the result."""
    for role in Role:
        part = raw.test if role.sealed else raw.open
        row_of = {name: i for i, name in enumerate(part.samples.sample_id)}
        for modality in (AUDIO, VIDEO):
            with h5py.File(class_file(release, modality, role)) as file:
                names = [name.decode() for name in file["video_urls"][:]]
                data = file["data"][:]
            rows = [row_of[name] for name in names]
            np.testing.assert_array_equal(part.features[modality][rows], data.astype(np.float32))


def test_class_written_in_another_case_is_one_class(release: Path, raw: RawBenchmark) -> None:
    written = {p.stem for p in class_file(release, AUDIO, Role.TRAIN).parent.glob("*.h5")}
    assert any(name not in raw.classes.names for name in written), "the simulation lost the quirk"
    assert len(raw.classes.ids(ClassRole.TRAIN)) == len(written)


def test_text_by_class_and_legacy(release: Path, raw: RawBenchmark) -> None:
    text = raw.text["w2v"]
    with (release / "class-split" / "ucf_w2v_class_names.csv").open() as handle:
        manual = {row["original"]: row["manual"] for row in csv.DictReader(handle)}
    from avzero.data.benchmark import align_text

    by_class = align_text(text, raw.classes, TextAlignment.BY_CLASS)
    legacy = align_text(text, raw.classes, TextAlignment.LEGACY_SORTED)
    row_of = {key: i for i, key in enumerate(text.keys)}
    in_key_order = sorted(text.keys)
    for class_id, name in enumerate(raw.classes.names):
        np.testing.assert_array_equal(by_class[class_id], text.vectors[row_of[manual[name]]])
        np.testing.assert_array_equal(
            legacy[class_id], text.vectors[row_of[in_key_order[class_id]]]
        )
    assert (by_class != legacy).any(axis=1).mean() > 0.9


def test_reading_twice_gives_the_same_digest(release: Path, raw: RawBenchmark) -> None:
    again = read_avca(release, "tiny_features", "main_split", name="other-name")
    assert again.digest() == raw.digest()


def test_cls_split_leaves_out_classes_but_keeps_their_rows(release: Path) -> None:
    raw = read_avca(release, "tiny", "cls")
    left_out = ~raw.test.samples.evaluated
    assert left_out.sum() == 8
    assert raw.counts()["test_unseen"] == 56
    assert set(raw.test.samples.role[left_out]) == {Role.TEST_UNSEEN.code}


@pytest.mark.parametrize("style", ["VGGSound", "ActivityNet"])
def test_other_styles(style: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Column orders, fixed-width bytes, names with commas, the ActivityNet text file's name."""
    from dataclasses import replace

    shape = replace(SHAPES["tiny"](), style=style)
    monkeypatch.setitem(SHAPES, "styled", lambda: shape)  # type: ignore[arg-type]
    raw = read_avca(simulate(tmp_path / "STYLED", "styled"), "tiny", "main")
    assert sum(raw.counts().values()) == 432
    assert list(raw.text) == ["w2v"]
    if style == "VGGSound":
        assert "," in raw.classes.names[0]
        assert set(raw.open.samples.source_split) == {"train", "test"}


def test_float64_features_become_float32(copy: Path) -> None:
    path = class_file(copy, AUDIO, Role.VAL_UNSEEN)
    with h5py.File(path) as file:
        data = file["data"][:].astype(np.float64)
    rewrite(path, data=data)
    raw = read_avca(copy, "tiny", "main")
    assert raw.open.features[AUDIO].dtype == np.float32


def test_simulation_is_reproducible_and_refuses_other_folders(tmp_path: Path) -> None:
    a, b, c = (simulate(tmp_path / n, "tiny", seed) for n, seed in (("A", 0), ("B", 0), ("C", 1)))
    digests = [read_avca(p, "tiny", "main", name="x").open.features[AUDIO] for p in (a, b, c)]
    np.testing.assert_array_equal(digests[0], digests[1])
    assert not np.array_equal(digests[0], digests[2])
    assert simulate(a, "tiny", 0) == a
    with pytest.raises(UserError, match="is not this simulation"):
        simulate(a, "tiny", 5)
    with pytest.raises(UserError, match="choose one of tiny"):
        simulate(tmp_path / "D", "huge")


@pytest.mark.parametrize("size", ["UCF-main", "UCF-cls"])
def test_real_sizes_match_the_official_table(size: str, tmp_path: Path) -> None:
    """A root called UCF claims to be it, so the reader itself checks the counts."""
    root = simulate(tmp_path / "UCF", size)
    features = size.split("-")[1]
    for split in ("main", "cls"):
        raw = read_avca(root, features, split)
        assert raw.audit["official_counts"] == "match"
        assert raw.name == f"ucf-{features}{'' if split == features else '-' + split}-sim"
    assert raw.dims == (
        {"audio": 512, "video": 512} if features == "main" else {"audio": 128, "video": 4096}
    )


def test_audit_reports_the_facts(raw: RawBenchmark) -> None:
    audit = raw.audit
    assert audit["roles"]["train"]["samples"] == 192
    assert audit["text"]["w2v"]["wrong_if_positional"]["train"] == "24/24"
    assert audit["features"]["audio"]["width"] == 32
    files = 2 * (24 + 24 + 8 + 32 + 8 + 32)
    assert len(audit["sources"]) == files + 5 + 6 + 2 + 1  # csv, txt, name map and list, text
    assert "class-split/main_split/stage_1_train.csv" in audit["sources"]
    text = "\n".join(audit_lines(audit))
    assert "SIMULATED" in text and "positional pairing" in text


# -- bad input: one clear line that names file, row or field, and the remedy ----------------------


def expect(root: Path, *parts: str, options: ReadOptions | None = None) -> None:
    with pytest.raises(UserError) as caught:
        read_avca(root, "tiny", "main", options=options)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_missing_and_unknown_folders(copy: Path, tmp_path: Path) -> None:
    expect(tmp_path / "nowhere", "no folder class-split", "root of one dataset")
    with pytest.raises(UserError, match=r"no feature set 'cls'.*tiny_features.*--features"):
        read_avca(copy, "cls", "main")
    with pytest.raises(UserError, match=r"no such split.*cls_split, main_split"):
        read_avca(copy, "tiny", "other")
    shutil.rmtree(copy / "features" / "tiny_features" / "video" / "stage_1_val_seen")
    expect(copy, "stage_1_val_seen", "no such folder")


def test_missing_class_file(copy: Path) -> None:
    audio = class_file(copy, AUDIO, Role.TRAIN)
    audio.unlink()
    expect(copy, audio.name, "has no partner")
    class_file(copy, VIDEO, Role.TRAIN).unlink()
    expect(copy, "no file for class", "stage_1_train.csv")


def test_truncated_class_file(copy: Path) -> None:
    path = class_file(copy, VIDEO, Role.VAL_SEEN, 3)
    path.write_bytes(path.read_bytes()[:700])
    expect(copy, path.name, "not a readable HDF5 class file")


def test_wrong_datasets(copy: Path) -> None:
    path = class_file(copy, AUDIO, Role.TRAIN)
    rewrite(path, data=None)
    expect(copy, path.name, "no dataset 'data'", "video_urls")


def test_names_and_rows_differ_in_number(copy: Path) -> None:
    path = class_file(copy, AUDIO, Role.TRAIN)
    rewrite(path, video_urls=["a", "b"])
    expect(copy, path.name, "do not fit")


def test_audio_and_video_name_other_videos(copy: Path) -> None:
    path = class_file(copy, VIDEO, Role.TRAIN)
    with h5py.File(path) as file:
        names = [name.decode() for name in file["video_urls"][:]]
    names[2] = "v_Stranger_g01_c01"
    rewrite(path, video_urls=names)
    expect(copy, "audio and video must name the same videos", ".h5", "row")


def test_duplicate_video(copy: Path) -> None:
    path = class_file(copy, AUDIO, Role.TRAIN)
    with h5py.File(path) as file:
        names = [name.decode() for name in file["video_urls"][:]]
    names[1] = names[0]
    rewrite(path, video_urls=names)
    expect(copy, path.name, "row 1", "occurs twice")


def test_video_in_two_splits(copy: Path) -> None:
    """A test video that is a training video too would make the score worthless."""
    train, seen = (class_file(copy, AUDIO, role) for role in (Role.TRAIN, Role.TEST_SEEN))
    with h5py.File(train) as file:
        stolen = file["video_urls"][0].decode()
    for modality in (AUDIO, VIDEO):
        path = class_file(copy, modality, Role.TEST_SEEN)
        with h5py.File(path) as file:
            names = sorted(name.decode() for name in file["video_urls"][:])
        rewrite(path, video_urls=[stolen, *names[1:]])
    listing = copy / "class-split" / "main_split" / "stage_2_test_seen.csv"
    listing.write_text(listing.read_text().replace(names[0], stolen))
    expect(copy, stolen, "one split and one class only", seen.name)


def test_wrong_width(copy: Path) -> None:
    path = class_file(copy, VIDEO, Role.TRAIN, 5)
    with h5py.File(path) as file:
        data = file["data"][:, :-1]
    rewrite(path, data=data)
    expect(copy, path.name, "47 columns", "48")


def test_nan_rows(copy: Path) -> None:
    for role in (Role.VAL_UNSEEN, Role.TEST_SEEN):
        path = class_file(copy, AUDIO, role)
        with h5py.File(path) as file:
            data = file["data"][:]
            name = file["video_urls"][1]
        data[1, 3] = np.nan
        rewrite(path, data=data)
        if role is Role.VAL_UNSEEN:  # the same row lies in stage_2_train as well
            second = path.parents[1] / "stage_2_train" / path.name
            with h5py.File(second, "a") as file:
                file["data"][file["video_urls"][:].tolist().index(name), 3] = np.nan
    expect(copy, "1 rows hold NaN", "--nonfinite drop")
    zeroed = read_avca(copy, "tiny", "main", options=ReadOptions(nonfinite="zero"))
    assert sum(zeroed.counts().values()) == 432
    assert len(zeroed.audit["nonfinite_rows"]) == 2
    dropped = read_avca(copy, "tiny", "main", options=ReadOptions(nonfinite="drop"))
    assert sum(dropped.counts().values()) == 430
    assert np.isfinite(dropped.test.features[AUDIO]).all()
    expect(copy, "choose fail, drop or zero", options=ReadOptions(nonfinite="ignore"))


def test_unknown_class(copy: Path) -> None:
    path = class_file(copy, AUDIO, Role.TRAIN)
    path.rename(path.with_name("Juggling.h5"))
    expect(copy, "Juggling", "not in all_class.txt")


def test_class_lists(copy: Path) -> None:
    folder = copy / "class-split" / "main_split"
    train = (folder / "stage_1_train.txt").read_text()
    unseen = folder / "stage_2_test_unseen.txt"
    before = unseen.read_text()
    unseen.write_text(before + "\n" + train.splitlines()[0])
    expect(copy, "must not be trained on", "stage_1_train.txt")
    unseen.write_text(before + "\n" + before.splitlines()[0])
    expect(copy, "listed twice", "stage_2_test_unseen.txt:9")
    unseen.write_text(before)
    (folder / "stage_2_train.txt").write_text(train)
    expect(copy, "stage_2_train.txt", "missing", "train plus val_unseen")
    (folder / "stage_2_train.txt").unlink()
    expect(copy, "stage_2_train.txt", "no such file")


def test_sample_list(copy: Path) -> None:
    path = copy / "class-split" / "main_split" / "stage_1_train.csv"
    lines = path.read_text().splitlines()
    header, first = lines[0], lines[1].split(",")
    for bad, parts in (
        ([header, ",".join([first[0], first[1], "999"])], [":2", "label_code 999"]),
        ([header, ",".join([first[0], "Nonsense", first[2]])], [":2", "unknown class"]),
        ([header, *lines[1:], lines[1]], ["occurs twice"]),
        (["file,label", "a,b"], [":1", "no column 'filename'"]),
        ([header, first[0]], [":2", "3 columns expected"]),
        (lines[:-1], ["is not listed under this class"]),
        ([*lines, f"v_New_g01_c01,{first[1]},{first[2]}"], ["no row for video", "v_New"]),
    ):
        path.write_text("\n".join(bad) + "\n")
        expect(copy, "stage_1_train", *parts)


def test_missing_sample_list_is_noted(copy: Path) -> None:
    (copy / "class-split" / "main_split" / "stage_1_train.csv").unlink()
    raw = read_avca(copy, "tiny", "main")
    assert any("stage_1_train.csv is missing" in note for note in raw.audit["notes"])


def test_stage_2_copy_must_agree(copy: Path) -> None:
    folder = copy / "features" / "tiny_features" / "audio" / "stage_2_train"
    path = sorted(folder.glob("*.h5"))[4]
    with h5py.File(path) as file:
        data = file["data"][:]
    data[0, 0] += 1
    rewrite(path, data=data)
    expect(copy, path.name, "differs from its stage_1 copy")
    shutil.rmtree(folder)
    raw = read_avca(copy, "tiny", "main")
    assert any("stage_2_train is missing" in note for note in raw.audit["notes"])


def test_text_vectors_missing_for_a_class(copy: Path) -> None:
    path = copy / "features" / "tiny_features" / "text" / "word_embeddings_ucf_normed.npy"
    vectors = np.load(path, allow_pickle=True).item()
    gone = read_avca(copy, "tiny", "main").text["w2v"].key_of_class
    name = sorted(p.stem for p in class_file(copy, AUDIO, Role.VAL_UNSEEN).parent.glob("*.h5"))[0]
    del vectors[gone[name]]
    np.save(path, np.array(vectors, dtype=object), allow_pickle=True)
    expect(copy, "no text vector for class", name, gone[name])
    path.unlink()
    expect(copy, "no .npy text vectors", "--text NAME=FILE")


def test_name_map_missing_or_ambiguous(copy: Path) -> None:
    path = copy / "class-split" / "ucf_w2v_class_names.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[1]]) + "\n")
    expect(copy, "is mapped twice", path.name)
    path.write_text("\n".join([*lines[:2], lines[2].split(",")[0] + "," + lines[1].split(",")[1]]))
    expect(copy, "is given to", path.name)
    path.unlink()
    expect(copy, "class names", "manual")


def test_official_name_with_other_counts(copy: Path) -> None:
    root = copy.rename(copy.with_name("UCF"))
    expect(root, "UCF", "the official dataset has 101", "rename the root folder")


def test_official_names_in_any_case(copy: Path) -> None:
    expect(copy.rename(copy.with_name("vggsound")), "VGGSound", "the official dataset has 309")


def test_dropping_rows_of_an_official_dataset_is_not_a_bad_download(tmp_path: Path) -> None:
    root = simulate(tmp_path / "UCF", "UCF-main")
    folder = root / "features" / "main_features" / "audio" / "stage_2_test_seen"
    with h5py.File(sorted(folder.glob("*.h5"))[0], "a") as file:
        file["data"][0, 0] = np.inf
    raw = read_avca(root, "main", "main", options=ReadOptions(nonfinite="drop"))
    assert raw.counts()["test_seen"] == 554 and len(raw.audit["nonfinite_rows"]) == 1


def test_benchmark_names_are_plain(release: Path) -> None:
    for name in ("a@b", "a/b", "../x", "Tiny"):
        with pytest.raises(UserError, match="set it with --name"):
            read_avca(release, "tiny", "main", name=name)


@pytest.mark.parametrize("name", ["v_a\nb", "v_a\x1b[2J", "v_a\u2028b"])
def test_names_that_cannot_be_printed(name: str, copy: Path) -> None:
    path = class_file(copy, AUDIO, Role.TRAIN)
    with h5py.File(path) as file:
        names = [name.decode() for name in file["video_urls"][:]]
    names[2] = name
    rewrite(path, video_urls=names)
    expect(copy, path.name, "video_urls row 2", "cannot be printed")


@pytest.mark.parametrize("name", ["W2V", "a b", "../w2v", "", "w2v\n", "x" * 64])
def test_names_of_text_sets_are_plain(name: str, copy: Path) -> None:
    path = copy / "features" / "tiny_features" / "text" / "word_embeddings_ucf_normed.npy"
    options = ReadOptions(text={name: path})
    expect(copy, path.name, f"name {name!r}", "--text NAME=FILE", options=options)
    assert list(read_avca(copy, "tiny", "main", options=ReadOptions(text={"w_2.v-x": path})).text)
    shutil.move(path, path.with_name("My Words_embeddings.npy"))
    expect(copy, "My Words_embeddings.npy", "name 'My Words'", "--text NAME=FILE")


def test_dropping_may_not_empty_a_role(copy: Path) -> None:
    for role in (Role.TEST_SEEN, Role.TEST_UNSEEN):
        for path in class_file(copy, AUDIO, role).parent.glob("*.h5"):
            with h5py.File(path, "a") as file:
                file["data"][:] = np.nan
    drop = ReadOptions(nonfinite="drop")
    expect(copy, "all 64 test_seen rows", "leaves no benchmark", options=drop)


def test_two_files_for_one_text_set(copy: Path) -> None:
    text = copy / "features" / "tiny_features" / "text"
    shutil.copy(text / "word_embeddings_ucf_normed.npy", text / "word_embeddings_ucf_old.npy")
    expect(copy, "text set 'w2v'", "--text w2v=FILE")
    expect(copy, "cannot be read", options=ReadOptions(text={"w2v": copy}))


def test_stage_2_of_another_width(copy: Path) -> None:
    folder = copy / "features" / "tiny_features" / "video" / "stage_2_train"
    path = sorted(folder.glob("*.h5"))[0]
    with h5py.File(path) as file:
        data = file["data"][:, :-1]
    rewrite(path, data=data)
    expect(copy, path.name, "47 columns", "48")


def test_damaged_bytes_anywhere_are_one_line(copy: Path) -> None:
    """Flip bytes of an HDF5 file: it is read, or refused in one line, never a crash."""
    import random

    path = class_file(copy, AUDIO, Role.VAL_SEEN)
    whole = path.read_bytes()
    rng = random.Random(3)
    refused = 0
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 8, 64])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            read_avca(copy, "tiny", "main")
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 20


def test_broken_csv_header(copy: Path) -> None:
    path = copy / "class-split" / "main_split" / "stage_1_train.csv"
    path.write_text('filename,"label,label_code\n')
    expect(copy, "stage_1_train.csv", "not a CSV row")
