"""The rows of a release in the AVCA layout: joined by name, checked, loaded part by part.

Rows are joined by name: audio to video by the file name each row carries, features to classes by
the file's stem. Positions are never trusted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
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
    Classes,
    ClassRole,
    Part,
    Progress,
    Role,
    Samples,
)
from avzero.data.class_files import SUFFIXES, Rows, list_rows, read_class_file
from avzero.data.class_lists import (
    FOLDER_OF_ROLE,
    ClassTable,
    ListedSample,
    read_sample_list,
)
from avzero.data.official import OFFICIAL_DATASETS
from avzero.data.sequences import Features, Sequences, allocate, starts_of, take, values_of
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
    """The rows of one class in one split folder: names in order, and where each row lies.

    ``lost`` counts videos without a row in a file whose names are therefore unusable; ``names``
    are then made up.
    """

    class_id: int
    names: tuple[str, ...]
    order: Mapping[str, npt.NDArray[np.int64]]
    files: Mapping[str, Path]
    rows: Mapping[str, Rows]
    lost: int = 0


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
    lost: dict[tuple[Role, int], int] = field(default_factory=dict)
    """Videos without a row by (role, class id), where the release skipped some (D-13)."""

    @property
    def dataset(self) -> str:
        """The root's name; an official dataset's in its own spelling, however the root is."""
        return next(
            (name for name in OFFICIAL_DATASETS if name.lower() == self.root.name.lower()),
            self.root.name,
        )

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
    files = {m: class_files(reading, m, stem) for m in MODALITIES}
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
        if block.lost:
            block = _made_up(reading, role, block)
        if listed is not None:
            _check_listed(block, by_class.get(class_id, set()), stem)
        yield block


def class_files(reading: Reading, modality: str, stem: str) -> dict[int, Path]:
    """Return {class id: file} of one modality and split folder."""
    folder = reading.feature_root / modality / stem
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; the release is incomplete")
    found: dict[int, Path] = {}
    paths = sorted(path for suffix in SUFFIXES for path in folder.glob(f"*{suffix}"))
    kinds = sorted({path.suffix for path in paths})
    if len(kinds) > 1:
        raise UserError(
            f"{folder}: holds {' and '.join(kinds)} files; a feature set has one kind. "
            "Move one elsewhere"
        )
    for path in paths:
        class_id = reading.table.find(path.stem, str(path))
        if class_id in found:
            raise UserError(f"{path}: same class as {found[class_id]}; remove one of the two")
        found[class_id] = path
    if not found:
        raise UserError(f"{folder}: no {' or '.join(SUFFIXES)} files; the release is incomplete")
    return found


def _join(class_id: int, files: Mapping[str, Path]) -> Block:
    """Join one class's audio and video rows by the name each row carries."""
    rows = {m: list_rows(path) for m, path in files.items()}
    if any(facts.lost for facts in rows.values()):
        return _join_by_position(class_id, files, rows)
    row_of: dict[str, dict[str, int]] = {}
    for modality, facts in rows.items():
        row_of[modality] = {}
        for row, sample in enumerate(facts.names):
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
    return Block(class_id, tuple(ordered), order, files, rows)


def _join_by_position(class_id: int, files: Mapping[str, Path], rows: Mapping[str, Rows]) -> Block:
    """Join rows that lost their names: allowed only where both files skipped the same clips.

    The writer of such files walks audio and video together, so equal name lists and equal numbers
    of rows say that row i is the same video in both (data_formats.md 2.6).
    """
    audio, video = rows[AUDIO], rows[VIDEO]
    if audio.count != video.count or audio.names != video.names:
        here, other = (AUDIO, VIDEO) if audio.lost else (VIDEO, AUDIO)
        raise UserError(
            f"{files[here]}: {len(rows[here].names)} video_names but {rows[here].count} features, "
            f"and {files[other]} has {len(rows[other].names)} and {rows[other].count}: its rows "
            "cannot be told apart by name nor by position; get both files again"
        )
    order = {m: np.arange(audio.count, dtype=np.int64) for m in files}
    return Block(class_id, (), order, files, rows, audio.lost)


def _made_up(reading: Reading, role: Role, block: Block) -> Block:
    """Name the rows of a block that lost its names, and say so in the audit.

    The role is part of the name: a class may lose its names in several split folders.
    """
    name = reading.table.classes.names[block.class_id]
    names = tuple(f"{name}#{role}-{row}" for row in range(block.rows[AUDIO].count))
    reading.lost[role, block.class_id] = block.lost
    span = f"{names[0]} to {names[-1]}" if names else "nothing"
    reading.notes.append(
        f"warning: {FOLDER_OF_ROLE[role]}/{block.files[AUDIO].name}: {block.lost} of "
        f"{len(block.rows[AUDIO].names)} videos have no features, so no row's name is known; rows "
        f"are joined by position and called {span}"
    )
    return replace(block, names=names)


def _check_listed(block: Block, listed: set[str], stem: str) -> None:
    """Refuse feature rows the sample list does not know, and listed samples without features."""
    # Of a block that lost its rows' names, the file still lists all videos of the class.
    difference = set(block.rows[AUDIO].names) ^ listed
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
    features = {modality: _load_modality(reading, flat, modality) for modality in MODALITIES}
    return Part(_samples_table(reading, flat, listed), features)


def _load_modality(reading: Reading, flat: list[tuple[Role, Block]], modality: str) -> Features:
    """Read one modality of a part into one contiguous array, or end to end as sequences."""
    width, temporal = _one_kind(flat, modality)
    lengths = [
        facts.lengths[block.order[modality]]
        if temporal and facts.lengths is not None
        else np.ones(facts.count, np.int64)
        for _, block in flat
        for facts in (block.rows[modality],)
    ]
    starts = starts_of(np.concatenate(lengths))
    values = allocate((int(starts[-1]), width))
    at = 0
    for done, (role, block) in enumerate(flat):
        path = block.files[modality]
        reading.progress(f"{modality} {FOLDER_OF_ROLE[role]}", done, len(flat))
        reading.hash_source(path)
        rows = take(read_class_file(path)[1], block.order[modality])
        if isinstance(rows, Sequences) and not temporal:  # every row of the file is empty
            values[at : at + len(rows)] = np.nan
            at += len(rows)
            continue
        part = values_of(rows)
        if len(part):
            values[at : at + len(part)] = part
        at += len(part)
    return Sequences(values, starts) if temporal else values


def _one_kind(flat: list[tuple[Role, Block]], modality: str) -> tuple[int, bool]:
    """Return a modality's width and whether its rows are sequences; all files must agree."""
    first: Block | None = None
    for _, block in flat:
        mine = block.rows[modality]
        if not mine.width and mine.lengths is not None:
            continue  # every row is empty: it could be either kind
        first = first or block
        other = first.rows[modality]
        if mine.width != other.width:
            raise UserError(
                f"{block.files[modality]}: {mine.width} columns where the other classes "
                f"have {other.width}; a feature set has one width"
            )
        if (mine.lengths is None) != (other.lengths is None):
            kinds = ("vectors", "sequences")
            raise UserError(
                f"{block.files[modality]}: holds {kinds[mine.lengths is not None]} where "
                f"{first.files[modality]} holds {kinds[other.lengths is not None]}; a feature set "
                "has one kind"
            )
    if first is None:
        raise UserError(f"{flat[0][1].files[modality].parent}: no file has features")
    return first.rows[modality].width, first.rows[modality].lengths is not None


def _samples_table(
    reading: Reading,
    flat: list[tuple[Role, Block]],
    listed: Mapping[Role, list[ListedSample] | None],
) -> Samples:
    """Build the samples table of a part from its blocks."""
    classes = reading.table.classes
    official = reading.dataset in OFFICIAL_DATASETS
    used = {role: used_classes(classes, role) for role in Role}
    names = [name for _, block in flat for name in block.names]
    made_up = {name for _, block in flat if block.lost for name in block.names}
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
        source_id=tuple(
            name.rsplit("_", 1)[0] if official and name not in made_up else name for name in names
        ),
        source_split=tuple(source_split.get(name, "") for name in names),
        evaluated=np.repeat([block.class_id in used[role] for role, block in flat], sizes).astype(
            np.bool_
        ),
    )


def used_classes(classes: Classes, role: Role) -> frozenset[int]:
    """Return the classes whose samples count in ``role``, from the class lists."""
    wanted = {
        Role.TRAIN: (ClassRole.TRAIN,),
        Role.VAL_SEEN: (ClassRole.TRAIN,),
        Role.VAL_UNSEEN: (ClassRole.VAL_UNSEEN,),
        Role.TEST_SEEN: (ClassRole.TRAIN, ClassRole.VAL_UNSEEN),
        Role.TEST_UNSEEN: (ClassRole.TEST_UNSEEN,),
    }[role]
    return frozenset(classes.ids(*wanted).tolist())
