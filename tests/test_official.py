"""Facts about the official class lists, name maps and word vectors (needs ../shared)."""

from __future__ import annotations

from pathlib import Path

import pytest

from avzero.data.audit import wrong_if_positional
from avzero.data.benchmark import ClassRole, Role
from avzero.data.class_lists import FOLDER_OF_ROLE, read_classes, read_sample_list
from avzero.data.official import OFFICIAL
from avzero.data.text_sets import read_text_sets

FILES = {
    "UCF": "word_embeddings_ucf_normed.npy",
    "VGGSound": "word_embeddings_vggsound_normed.npy",
    "ActivityNet": "word_embeddings_activity_normed.npy",
}
# data_formats.md D-01: classes that positional pairing gives another class's vector.
WRONG = {
    ("UCF", "main"): {"all": "79/101", "test_unseen": "5/9", "val_unseen": "8/12"},
    ("UCF", "cls"): {"test_unseen": "4/6"},
    ("VGGSound", "main"): {"all": "205/309", "test_unseen": "42/69", "val_unseen": "51/69"},
    ("VGGSound", "cls"): {"test_unseen": "38/64"},
    ("ActivityNet", "main"): {"all": "8/200", "test_unseen": "1/50", "val_unseen": "2/51"},
    ("ActivityNet", "cls"): {"test_unseen": "1/48"},
}


@pytest.mark.parametrize(("dataset", "split"), sorted(OFFICIAL))
def test_class_lists_and_word_vectors(shared: Path, dataset: str, split: str) -> None:
    split_root = shared / "data" / "official" / dataset / "class-split"
    table = read_classes(split_root, f"{split}_split")
    official = OFFICIAL[dataset, split]
    assert len(table.classes) == official.n_classes
    assert len(table.classes.ids(ClassRole.TRAIN)) == official.classes[Role.TRAIN]
    assert len(table.classes.ids(ClassRole.TEST_UNSEEN)) == official.classes[Role.TEST_UNSEEN]
    path = shared / "data" / "official" / "w2v_features" / FILES[dataset]
    text = read_text_sets({"w2v": path}, split_root, table)["w2v"]
    wrong = wrong_if_positional(table.classes, text)
    assert {key: wrong[key] for key in WRONG[dataset, split]} == WRONG[dataset, split]


@pytest.mark.parametrize(("dataset", "split"), sorted(OFFICIAL))
def test_sample_lists(shared: Path, dataset: str, split: str) -> None:
    """Every csv is read by its header; labels and codes agree in all rows."""
    split_root = shared / "data" / "official" / dataset / "class-split"
    table = read_classes(split_root, f"{split}_split")
    read = 0
    for role, stem in FOLDER_OF_ROLE.items():
        rows = read_sample_list(split_root / f"{split}_split" / f"{stem}.csv", table)
        if rows is None:  # VGGSound's train lists are over the size limit of our copy
            assert (dataset, role) == ("VGGSound", Role.TRAIN)
            continue
        used = table.classes.ids(ClassRole.TEST_UNSEEN)
        mine = [r for r in rows if role is not Role.TEST_UNSEEN or r.class_id in used]
        assert len(mine) == OFFICIAL[dataset, split].samples[role]
        read += 1
    assert read >= 4


def test_shaving_beard_gets_shotput(shared: Path) -> None:
    """The example of D-01: every public loader gives ShavingBeard the vector of Shotput."""
    from avzero.data.benchmark import text_rows
    from avzero.spec import TextAlignment

    split_root = shared / "data" / "official" / "UCF" / "class-split"
    table = read_classes(split_root, "main_split")
    path = shared / "data" / "official" / "w2v_features" / FILES["UCF"]
    text = read_text_sets({"w2v": path}, split_root, table)["w2v"]
    class_id = table.classes.names.index("ShavingBeard")
    row = text_rows(text, table.classes, TextAlignment.LEGACY_SORTED)[class_id]
    assert row is not None and text.keys[row] == "Shotput"
