"""The rows of a release in the AVCA layout: joined by name, checked, loaded part by part.

Rows are joined by name: audio to video by the file name each row carries, features to classes by
the file's stem. Positions are never trusted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from avzero.canon import sha256_file
from avzero.data.benchmark import (
    AUDIO,
    MODALITIES,
    OPEN_ROLES,
    TEST_ROLES,
    VIDEO,
    Bool,
    Classes,
    ClassRole,
    Float32,
    Part,
    Progress,
    Role,
    Samples,
)
from avzero.data.class_files import read_features, row_names
from avzero.data.class_lists import (
    FOLDER_OF_ROLE,
    STAGE_2_TRAIN,
    ClassTable,
    ListedSample,
    read_sample_list,
)
from avzero.data.official import OFFICIAL_DATASETS
from avzero.errors import UserError

SIMULATED_MARKER = "SIMULATED.json"


@dataclass(frozen=True)
class ReadOptions:
    """Choices of an import; every one is recorded in the audit.

    ``nonfinite``: what to do with rows that hold NaN or infinity: ``fail``, ``drop`` or ``zero``.
    ``text``: text files to use instead of those found, as {text set name: path}.
    """

    nonfinite: str = "fail"
    text: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Block:
    """The rows of one class in one split folder: names in order, and where each row lies."""

    class_id: int
    names: tuple[str, ...]
    order: Mapping[str, npt.NDArray[np.int64]]
    files: Mapping[str, Path]


@dataclass
class Reading:
    """State of one import: paths, class table, and what the audit will want to know."""

    root: Path
    feature_root: Path
    table: ClassTable
    options: ReadOptions
    progress: Progress
    sources: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    nonfinite: list[str] = field(default_factory=list)

    @property
    def dataset(self) -> str:
        """The root's name; an official dataset's in its own spelling, however the root is."""
        return next(
            (name for name in OFFICIAL_DATASETS if name.lower() == self.root.name.lower()),
            self.root.name,
        )

    @property
    def feature_set(self) -> str:
        """The feature folder's name without its suffix."""
        return self.feature_root.name.removesuffix("_features")

    @property
    def simulated(self) -> bool:
        """Whether the root was written by ``data.simulate``."""
        return (self.root / SIMULATED_MARKER).exists()

    def hash_source(self, path: Path) -> None:
        """Record the SHA-256 of a source file under its path relative to the root."""
        name = path.relative_to(self.root) if path.is_relative_to(self.root) else path
        self.sources[str(name)] = sha256_file(path)


def load_parts(reading: Reading, split_folder: Path) -> list[Part]:
    """Read the open and the test part: sample lists, then names, then features."""
    listed = {
        role: _listed(reading, split_folder / f"{stem}.csv")
        for role, stem in FOLDER_OF_ROLE.items()
    }
    blocks = {role: list(_blocks(reading, role, listed[role])) for role in Role}
    _check_unique(blocks)
    return [
        _load_part(reading, {role: blocks[role] for role in roles}, listed)
        for roles in (OPEN_ROLES, TEST_ROLES)
    ]


def _listed(reading: Reading, path: Path) -> list[ListedSample] | None:
    """Read a sample list and record its digest."""
    rows = read_sample_list(path, reading.table)
    if rows is not None:
        reading.hash_source(path)
    return rows


def _blocks(reading: Reading, role: Role, listed: list[ListedSample] | None) -> Iterator[Block]:
    """Yield the classes of one split folder in class-id order, with audio and video joined."""
    stem = FOLDER_OF_ROLE[role]
    files = {m: _class_files(reading, m, stem) for m in MODALITIES}
    for here, other in ((AUDIO, VIDEO), (VIDEO, AUDIO)):
        for class_id in sorted(files[here].keys() - files[other].keys()):
            path = files[here][class_id]
            raise UserError(
                f"{path}: has no partner {reading.feature_root / other / stem / path.name}; "
                "every class needs an audio and a video file"
            )
    if listed is None:
        reading.notes.append(f"{stem}.csv is missing: sample names come from the feature files")
    else:
        for class_id in sorted({sample.class_id for sample in listed} - files[AUDIO].keys()):
            raise UserError(
                f"{reading.feature_root / AUDIO / stem}: no file for class "
                f"{reading.table.classes.names[class_id]!r}, which {stem}.csv lists; "
                "download it again"
            )
    by_class: dict[int, set[str]] = {}
    for sample in listed or ():
        by_class.setdefault(sample.class_id, set()).add(sample.sample_id)
    for done, class_id in enumerate(sorted(files[AUDIO])):
        reading.progress(stem, done, len(files[AUDIO]))
        pair = {m: files[m][class_id] for m in MODALITIES}
        block = _join(class_id, pair)
        if listed is not None:
            _check_listed(block, by_class.get(class_id, set()), stem)
        yield block


def _class_files(reading: Reading, modality: str, stem: str) -> dict[int, Path]:
    """Return {class id: file} of one modality and split folder."""
    folder = reading.feature_root / modality / stem
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; the release is incomplete")
    found: dict[int, Path] = {}
    for path in sorted(folder.glob("*.h5")):
        class_id = reading.table.find(path.stem, str(path))
        if class_id in found:
            raise UserError(f"{path}: same class as {found[class_id]}; remove one of the two")
        found[class_id] = path
    if not found:
        raise UserError(f"{folder}: no .h5 files; the release is incomplete")
    return found


def _join(class_id: int, files: Mapping[str, Path]) -> Block:
    """Join one class's audio and video rows by the name each row carries."""
    names = {m: row_names(path) for m, path in files.items()}
    row_of: dict[str, dict[str, int]] = {}
    for modality, column in names.items():
        row_of[modality] = {}
        for row, sample in enumerate(column):
            if sample in row_of[modality]:
                raise UserError(
                    f"{files[modality]}: row {row}: video {sample!r} occurs twice "
                    f"(also row {row_of[modality][sample]}); keep one"
                )
            row_of[modality][sample] = row
    lonely = row_of[AUDIO].keys() ^ row_of[VIDEO].keys()
    if lonely:
        sample = min(lonely)
        has, lacks = (AUDIO, VIDEO) if sample in row_of[AUDIO] else (VIDEO, AUDIO)
        raise UserError(
            f"{files[has]}: row {row_of[has][sample]}: video {sample!r} is not in {files[lacks]}; "
            "audio and video must name the same videos"
        )
    ordered = sorted(row_of[AUDIO])
    order = {m: np.array([row_of[m][s] for s in ordered], dtype=np.int64) for m in files}
    return Block(class_id, tuple(ordered), order, files)


def _check_listed(block: Block, listed: set[str], stem: str) -> None:
    """Refuse feature rows the sample list does not know, and listed samples without features."""
    difference = set(block.names) ^ listed
    if difference:
        sample = min(difference)
        if sample in listed:
            raise UserError(
                f"{block.files[AUDIO]}: no row for video {sample!r}, which {stem}.csv lists; "
                "download the file again"
            )
        raise UserError(
            f"{block.files[AUDIO]}: video {sample!r} is not listed under this class in {stem}.csv; "
            "the features belong to another release"
        )


def _check_unique(blocks: Mapping[Role, list[Block]]) -> None:
    """Refuse a video that occurs in two roles or in two classes."""
    seen: dict[str, Path] = {}
    for role in Role:
        for block in blocks[role]:
            for sample in block.names:
                if sample in seen:
                    raise UserError(
                        f"{block.files[AUDIO]}: video {sample!r} is also in {seen[sample]}; "
                        "a video may be in one split and one class only"
                    )
                seen[sample] = block.files[AUDIO]


def _load_part(
    reading: Reading,
    blocks: Mapping[Role, list[Block]],
    listed: Mapping[Role, list[ListedSample] | None],
) -> Part:
    """Read the features of a part into contiguous arrays, in the order (role, class, name)."""
    flat = [(role, block) for role, several in blocks.items() for block in several]
    total = sum(len(block.names) for _, block in flat)
    arrays: dict[str, Float32] = {}
    for modality in MODALITIES:
        at = 0
        for done, (role, block) in enumerate(flat):
            reading.progress(f"{modality} {FOLDER_OF_ROLE[role]}", done, len(flat))
            rows = read_features(block.files[modality])
            if modality not in arrays:
                arrays[modality] = np.empty((total, rows.shape[1]), dtype=np.float32)
            width = arrays[modality].shape[1]
            if rows.shape[1] != width:
                raise UserError(
                    f"{block.files[modality]}: {rows.shape[1]} columns where the other classes "
                    f"have {width}; a feature set has one width"
                )
            arrays[modality][at : at + len(rows)] = rows[block.order[modality]]
            reading.hash_source(block.files[modality])
            at += len(rows)
    return Part(_samples_table(reading, flat, listed), arrays)


def _samples_table(
    reading: Reading,
    flat: list[tuple[Role, Block]],
    listed: Mapping[Role, list[ListedSample] | None],
) -> Samples:
    """Build the samples table of a part from its blocks."""
    classes = reading.table.classes
    official = reading.dataset in OFFICIAL_DATASETS
    used = {role: _used_classes(classes, role) for role in Role}
    names = [name for _, block in flat for name in block.names]
    source_split = {
        sample.sample_id: sample.source_split or ""
        for role in {role for role, _ in flat}
        for sample in listed[role] or ()
    }
    sizes = [len(block.names) for _, block in flat]
    return Samples(
        sample_id=tuple(names),
        class_id=np.repeat([block.class_id for _, block in flat], sizes).astype(np.int32),
        role=np.repeat([role.code for role, _ in flat], sizes).astype(np.int8),
        # In the official datasets a video is cut into clips named <source>_<number>.
        source_id=tuple(name.rsplit("_", 1)[0] if official else name for name in names),
        source_split=tuple(source_split.get(name, "") for name in names),
        evaluated=np.repeat([block.class_id in used[role] for role, block in flat], sizes).astype(
            np.bool_
        ),
    )


def _used_classes(classes: Classes, role: Role) -> frozenset[int]:
    """Return the classes whose samples count in ``role``, from the class lists."""
    wanted = {
        Role.TRAIN: (ClassRole.TRAIN,),
        Role.VAL_SEEN: (ClassRole.TRAIN,),
        Role.VAL_UNSEEN: (ClassRole.VAL_UNSEEN,),
        Role.TEST_SEEN: (ClassRole.TRAIN, ClassRole.VAL_UNSEEN),
        Role.TEST_UNSEEN: (ClassRole.TEST_UNSEEN,),
    }[role]
    return frozenset(classes.ids(*wanted).tolist())


def handle_nonfinite(reading: Reading, part: Part) -> Part:
    """Apply the ``nonfinite`` rule to rows with NaN or infinity (data_formats.md 2.6)."""
    bad: dict[str, Bool] = {
        modality: np.asarray(~np.isfinite(array).all(axis=1))
        for modality, array in part.features.items()
    }
    any_bad: Bool = np.asarray(np.stack(list(bad.values())).any(axis=0))
    rows = np.flatnonzero(any_bad).tolist()
    if not rows:
        return part
    unused = not part.samples.evaluated[rows].any()
    found = [
        f"{part.samples.sample_id[row]} ({reading.table.classes.names[part.samples.class_id[row]]},"
        f" {' and '.join(m for m in bad if bad[m][row])})"
        for row in rows
    ]
    if reading.options.nonfinite == "fail" and not unused:
        raise UserError(
            f"{reading.feature_root}: {len(rows)} rows hold NaN or infinity: "
            f"{'; '.join(found[:5])}{' …' if len(found) > 5 else ''}. "
            "Repair them, or choose --nonfinite drop or --nonfinite zero"
        )
    reading.nonfinite.extend(found)
    if reading.options.nonfinite == "zero":
        features = {
            m: np.where(bad[m][:, None], np.float32(0), a) for m, a in part.features.items()
        }
        return Part(part.samples, features)
    keep = np.flatnonzero(~any_bad)
    kept = keep.tolist()
    samples = Samples(
        tuple(part.samples.sample_id[i] for i in kept),
        part.samples.class_id[keep],
        part.samples.role[keep],
        tuple(part.samples.source_id[i] for i in kept),
        tuple(part.samples.source_split[i] for i in kept),
        part.samples.evaluated[keep],
    )
    return Part(samples, {m: a[keep] for m, a in part.features.items()})


def check_stage_2_train(reading: Reading, part: Part) -> None:
    """Check that the folder ``stage_2_train`` repeats the stage-1 rows bit for bit (D-14)."""
    row_of = {name: row for row, name in enumerate(part.samples.sample_id)}
    folders = {m: reading.feature_root / m / STAGE_2_TRAIN for m in MODALITIES}
    missing = [str(folder) for folder in folders.values() if not folder.is_dir()]
    if missing:
        reading.notes.append(f"{STAGE_2_TRAIN} is missing: its rows could not be compared")
        return
    found = 0
    for modality in MODALITIES:
        files = _class_files(reading, modality, STAGE_2_TRAIN)
        for done, (_, path) in enumerate(sorted(files.items())):
            reading.progress(f"{modality} {STAGE_2_TRAIN}", done, len(files))
            names, data = row_names(path), read_features(path)
            reading.hash_source(path)
            if data.shape[1] != part.features[modality].shape[1]:
                raise UserError(
                    f"{path}: {data.shape[1]} columns where the stage_1 files have "
                    f"{part.features[modality].shape[1]}; get it again"
                )
            strangers = [name for name in names if name not in row_of]
            if strangers:
                raise UserError(
                    f"{path}: video {strangers[0]!r} is in none of the stage_1 folders; "
                    "the release is inconsistent, get it again"
                )
            theirs = part.features[modality][[row_of[name] for name in names]]
            differs = ~((data == theirs) | (np.isnan(data) & np.isnan(theirs))).all(axis=1)
            if differs.any():
                raise UserError(
                    f"{path}: the {modality} row of {names[int(np.argmax(differs))]!r} differs "
                    "from its stage_1 copy; the release is inconsistent, get it again"
                )
            found += len(names)
    if found != len(MODALITIES) * len(row_of):
        reading.notes.append(f"{STAGE_2_TRAIN} holds {found // 2} of {len(row_of)} stage-1 rows")
