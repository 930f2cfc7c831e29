"""Class lists, name maps and sample lists of the AVCA layout (data_formats.md sections 2.1-2.3).

Everything here is small text; features are read by ``data.avca``.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from avzero.data.benchmark import Classes, ClassRole, Role
from avzero.errors import UserError

FOLDER_OF_ROLE: Mapping[Role, str] = {
    Role.TRAIN: "stage_1_train",
    Role.VAL_SEEN: "stage_1_val_seen",
    Role.VAL_UNSEEN: "stage_1_val_unseen",
    Role.TEST_SEEN: "stage_2_test_seen",
    Role.TEST_UNSEEN: "stage_2_test_unseen",
}
STAGE_2_TRAIN = "stage_2_train"
"""The folder that repeats the stage-1 rows; it is checked against them and not stored."""


@dataclass(frozen=True)
class ClassTable:
    """Classes plus the look-up that forgives letter case (UCF writes one class two ways, D-04)."""

    classes: Classes
    id_of_name: Mapping[str, int]
    id_of_folded: Mapping[str, int]

    def find(self, name: str, where: str) -> int:
        """Return the class id of ``name``.

        Raises:
            UserError: the class is not in ``all_class.txt``.
        """
        found = self.id_of_name.get(name)
        if found is None:
            found = self.id_of_folded.get(name.casefold())
        if found is None:
            raise UserError(
                f"{where}: unknown class {name!r}; it is not in all_class.txt. "
                "Correct the spelling or add the class there"
            )
        return found


@dataclass(frozen=True)
class ListedSample:
    """One row of a ``stage_*.csv``."""

    sample_id: str
    class_id: int
    source_split: str | None


def read_lines(path: Path) -> list[str]:
    """Return the stripped, non-empty lines of a class list.

    Raises:
        UserError: the file is missing, not UTF-8, or names a class twice.
    """
    lines = [line.strip() for line in _read_text(path).splitlines()]
    lines = [line for line in lines if line]
    seen: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if line in seen:
            raise UserError(f"{path}:{number}: class {line!r} is listed twice; remove one")
        seen.add(line)
    if not lines:
        raise UserError(f"{path}: empty; expected one class name per line")
    return lines


def read_classes(split_root: Path, split_folder: str) -> ClassTable:
    """Read ``all_class.txt`` and the six stage lists; check how they relate (section 3.3).

    Args:
        split_root: the ``class-split`` folder.
        split_folder: ``main_split``, ``cls_split`` or another folder with the same file names.
    """
    names = sorted(read_lines(split_root / "all_class.txt"))
    id_of_name = {name: i for i, name in enumerate(names)}
    table = ClassTable(
        Classes(tuple(names), (ClassRole.UNUSED,) * len(names), (None,) * len(names)),
        id_of_name,
        {name.casefold(): i for i, name in enumerate(names)},
    )
    folder = split_root / split_folder
    if not folder.is_dir():
        have = sorted(path.name for path in split_root.iterdir() if path.is_dir())
        raise UserError(
            f"{folder}: no such split; {split_root} has {', '.join(have) or 'none'}. "
            "Choose one with --split"
        )
    lists = {
        stem: _class_ids(table, folder / f"{stem}.txt")
        for stem in (*FOLDER_OF_ROLE.values(), STAGE_2_TRAIN)
    }
    _check_relations(lists, folder, names)
    roles = [ClassRole.UNUSED] * len(names)
    for role, stem in (
        (ClassRole.TRAIN, "stage_1_train"),
        (ClassRole.VAL_UNSEEN, "stage_1_val_unseen"),
        (ClassRole.TEST_UNSEEN, "stage_2_test_unseen"),
    ):
        for class_id in lists[stem]:
            roles[class_id] = role
    categories = _read_categories(split_root, id_of_name)
    return ClassTable(
        Classes(tuple(names), tuple(roles), tuple(categories.get(n) for n in names)),
        id_of_name,
        table.id_of_folded,
    )


def _class_ids(table: ClassTable, path: Path) -> frozenset[int]:
    """Return the ids of the classes a stage list names."""
    return frozenset(table.find(name, str(path)) for name in read_lines(path))


def _check_relations(lists: Mapping[str, frozenset[int]], folder: Path, names: list[str]) -> None:
    """Refuse class lists that would make the evaluation meaningless."""
    train, val_unseen = lists["stage_1_train"], lists["stage_1_val_unseen"]
    for left, right in (
        ("stage_1_train", "stage_1_val_unseen"),
        ("stage_1_train", "stage_2_test_unseen"),
        ("stage_1_val_unseen", "stage_2_test_unseen"),
    ):
        both = lists[left] & lists[right]
        if both:
            raise UserError(
                f"{folder}: class {names[min(both)]!r} is in {left}.txt and in {right}.txt; "
                "an unseen class must not be trained on. Remove it from one list"
            )
    expected = {
        "stage_1_val_seen": train,
        STAGE_2_TRAIN: train | val_unseen,
        "stage_2_test_seen": train | val_unseen,
    }
    for stem, want in expected.items():
        wrong = lists[stem] ^ want
        if wrong:
            raise UserError(
                f"{folder / stem}.txt: class {names[min(wrong)]!r} is "
                f"{'missing' if min(wrong) in want else 'extra'}; the list must be "
                f"{'stage_1_train' if stem == 'stage_1_val_seen' else 'train plus val_unseen'}"
            )


def read_sample_list(path: Path, table: ClassTable) -> list[ListedSample] | None:
    """Read a ``stage_*.csv`` by its header; None when the file does not exist.

    Raises:
        UserError: a needed column is missing, a label is unknown, its code contradicts the class
            id, or a file name occurs twice.
    """
    if not path.exists():
        return None
    rows: list[ListedSample] = []
    seen: set[str] = set()
    for number, row in read_csv(path, ("filename", "label", "label_code")):
        class_id = table.find(row["label"], f"{path}:{number}")
        if row["label_code"] != str(class_id):
            raise UserError(
                f"{path}:{number}: label_code {row['label_code']} but {row['label']!r} has class "
                f"id {class_id} (its place in the sorted all_class.txt); correct the row"
            )
        if row["filename"] in seen:
            raise UserError(f"{path}:{number}: file name {row['filename']!r} occurs twice")
        seen.add(row["filename"])
        rows.append(ListedSample(row["filename"], class_id, row.get("split")))
    return rows


def read_csv(path: Path, needed: Iterable[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line number, row by column name) of a CSV file with a header.

    Raises:
        UserError: the file cannot be read, a column in ``needed`` is missing, or a row is short.
    """
    reader = csv.DictReader(_read_text(path).splitlines(keepends=True), strict=True)
    try:
        header = reader.fieldnames or []
        missing = [column for column in needed if column not in header]
        if missing:
            raise UserError(
                f"{path}:1: no column {missing[0]!r}; the header has "
                f"{', '.join(header) or 'nothing'}"
            )
        for row in reader:
            if None in row or None in row.values():
                raise UserError(f"{path}:{reader.line_num}: {len(header)} columns expected")
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not a CSV row ({error})") from error


def read_name_map(split_root: Path, column: str) -> tuple[Path, dict[str, str]]:
    """Read the name map ``original -> text key`` from ``*_class_names.csv``.

    Args:
        split_root: the ``class-split`` folder.
        column: ``manual`` (word vectors) or ``clip_class_name`` (CLIP and CLAP text).

    Returns:
        The file used and the map.

    Raises:
        UserError: no file has the column, or the map is not one-to-one.
    """
    # UCF has a second file that repeats the "manual" column; the word-vector map is the original.
    for path in sorted(
        split_root.glob("*_class_names.csv"), key=lambda p: ("w2v" not in p.name, p.name)
    ):
        header = _read_text(path).split("\n", 1)[0].strip().split(",")
        if column in header:
            break
    else:
        raise UserError(
            f"{split_root}: no *_class_names.csv with a column {column!r}; without it class names "
            "cannot be joined to text vectors. Copy the file from the release"
        )
    result: dict[str, str] = {}
    used: dict[str, str] = {}
    for number, row in read_csv(path, ("original", column)):
        original, key = row["original"], row[column]
        if original in result:
            raise UserError(f"{path}:{number}: class {original!r} is mapped twice")
        if key in used:
            raise UserError(
                f"{path}:{number}: text key {key!r} is given to {used[key]!r} and {original!r}"
            )
        result[original] = key
        used[key] = original
    return path, result


def _read_categories(split_root: Path, id_of_name: Mapping[str, int]) -> dict[str, str]:
    """Return the coarse category per class where the name map has that column (VGGSound)."""
    found: dict[str, str] = {}
    for path in sorted(split_root.glob("*_w2v_class_names.csv")):
        for _, row in read_csv(path, ("original",)):
            if "category" in row and row["original"] in id_of_name:
                found[row["original"]] = row["category"]
    return found


def _read_text(path: Path) -> str:
    """Return a UTF-8 file's text (a byte-order mark is dropped)."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; is this the root of an AVCA release?") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
