"""Reader of the AVCA-style release: averaged features, one HDF5 file per class and split.

Layout and every quirk: data_formats.md sections 1 to 3. Rows are joined by name: audio to video
by the file name each row carries, features to classes by the file's stem, classes to text vectors
through the name map. Positions are never trusted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from avzero.data.audit import make_audit
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
    RawBenchmark,
    Role,
    Samples,
)
from avzero.data.class_files import read_features, row_names
from avzero.data.class_lists import (
    FOLDER_OF_ROLE,
    STAGE_2_TRAIN,
    ClassTable,
    ListedSample,
    read_classes,
    read_sample_list,
)
from avzero.data.official import OFFICIAL, OFFICIAL_DATASETS
from avzero.data.text_sets import find_text_files, read_text_sets
from avzero.errors import UserError

SIMULATED_MARKER = "SIMULATED.json"
Progress = Callable[[str, int, int], None]
"""Called with (what, done, total) while a release is read."""


@dataclass(frozen=True)
class ReadOptions:
    """Choices of an import; every one is recorded in the audit.

    ``nonfinite``: what to do with rows that hold NaN or infinity: ``fail``, ``drop`` or ``zero``.
    ``text``: text files to use instead of those found, as {text set name: path}.
    """

    nonfinite: str = "fail"
    text: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class _Block:
    """The rows of one class in one split folder: names in order, and where each row lies."""

    class_id: int
    names: tuple[str, ...]
    order: Mapping[str, npt.NDArray[np.int64]]
    files: Mapping[str, Path]


@dataclass
class _Reading:
    """State of one import: paths, class table, and what the audit will want to know."""

    root: Path
    feature_root: Path
    table: ClassTable
    options: ReadOptions
    progress: Progress
    sources: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    nonfinite: list[str] = field(default_factory=list)

    def hash_source(self, path: Path) -> None:
        """Record the SHA-256 of a source file under its path relative to the root."""
        with path.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        name = path.relative_to(self.root) if path.is_relative_to(self.root) else path
        self.sources[str(name)] = digest


def read_avca(
    root: Path,
    features: str,
    split: str,
    *,
    name: str | None = None,
    options: ReadOptions | None = None,
    progress: Progress = lambda what, done, total: None,
) -> RawBenchmark:
    """Read one dataset, feature set and split of a release in the AVCA layout.

    Args:
        root: the dataset's folder (``.../UCF``); its name is the dataset's name, and a name of an
            official dataset claims to be it.
        features: ``main``, ``cls`` or a folder name below ``features/``.
        split: ``main``, ``cls`` or a folder name below ``class-split/``.
        name: what the store calls the benchmark; default ``<dataset>-<features>[-<split>]``.
        options: see ``ReadOptions``.
        progress: called while files are read.

    Raises:
        UserError: anything a person must correct in the files or the arguments.
    """
    reading = _start(root.resolve(), features, split, options or ReadOptions(), progress)
    root, table = reading.root, reading.table
    split_root = root / "class-split"
    short_split = split.removesuffix("_split")
    listed = {
        role: read_sample_list(split_root / f"{short_split}_split" / f"{stem}.csv", table)
        for role, stem in FOLDER_OF_ROLE.items()
    }
    blocks = {role: list(_blocks(reading, role, listed[role])) for role in Role}
    _check_unique(blocks)
    open_part = _load_part(reading, {role: blocks[role] for role in OPEN_ROLES}, listed)
    test_part = _load_part(reading, {role: blocks[role] for role in TEST_ROLES}, listed)
    _check_stage_2_train(reading, open_part)
    open_part, test_part = (_handle_nonfinite(reading, part) for part in (open_part, test_part))
    text_files = dict(reading.options.text) or find_text_files(reading.feature_root)
    text = read_text_sets(text_files, split_root, table)
    for path in text_files.values():
        reading.hash_source(path)
    short_features = reading.feature_root.name.removesuffix("_features")
    raw = RawBenchmark(
        name=name or _default_name(root, short_features, short_split),
        dataset=root.name,
        feature_set=short_features,
        split=short_split,
        simulated=(root / SIMULATED_MARKER).exists(),
        classes=table.classes,
        text=text,
        open=open_part,
        test=test_part,
    )
    _check_official(raw)
    audit = make_audit(raw, reading.sources, reading.notes, reading.nonfinite)
    return RawBenchmark(**{**raw.__dict__, "audit": audit})


def _start(
    root: Path, features: str, split: str, options: ReadOptions, progress: Progress
) -> _Reading:
    """Check the arguments and the class lists before any feature file is opened."""
    if options.nonfinite not in ("fail", "drop", "zero"):
        raise UserError(f"nonfinite {options.nonfinite!r}: choose fail, drop or zero")
    split_root = root / "class-split"
    if not split_root.is_dir():
        raise UserError(
            f"{root}: no folder class-split; give the root of one dataset (…/UCF), "
            "with class-split/ and features/ below it"
        )
    feature_root = _feature_folder(root, features)
    table = read_classes(split_root, f"{split.removesuffix('_split')}_split")
    return _Reading(root, feature_root, table, options, progress)


def _default_name(root: Path, features: str, split: str) -> str:
    """Return ``ucf-main``, or ``ucf-tiny-main-sim`` where more must be said."""
    parts = [root.name, features] + ([split] if split != features else [])
    return "-".join(parts + (["sim"] if (root / SIMULATED_MARKER).exists() else [])).lower()


def _feature_folder(root: Path, features: str) -> Path:
    """Return the feature folder called ``features`` or ``<features>_features``."""
    for candidate in (root / "features" / features, root / "features" / f"{features}_features"):
        if (candidate / AUDIO).is_dir() and (candidate / VIDEO).is_dir():
            return candidate
    base = root / "features"
    have = sorted(path.name for path in base.iterdir() if path.is_dir()) if base.is_dir() else []
    raise UserError(
        f"{base}: no feature set {features!r} with audio/ and video/ below it; there is "
        f"{', '.join(have) or 'none'}. Choose one with --features"
    )


def _blocks(reading: _Reading, role: Role, listed: list[ListedSample] | None) -> Iterator[_Block]:
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


def _class_files(reading: _Reading, modality: str, stem: str) -> dict[int, Path]:
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


def _join(class_id: int, files: Mapping[str, Path]) -> _Block:
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
    return _Block(class_id, tuple(ordered), order, files)


def _check_listed(block: _Block, listed: set[str], stem: str) -> None:
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


def _check_unique(blocks: Mapping[Role, list[_Block]]) -> None:
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
    reading: _Reading,
    blocks: Mapping[Role, list[_Block]],
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
    reading: _Reading,
    flat: list[tuple[Role, _Block]],
    listed: Mapping[Role, list[ListedSample] | None],
) -> Samples:
    """Build the samples table of a part from its blocks."""
    classes = reading.table.classes
    official = reading.root.name in OFFICIAL_DATASETS
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


def _handle_nonfinite(reading: _Reading, part: Part) -> Part:
    """Apply the ``nonfinite`` rule to rows with NaN or infinity (data_formats.md 2.6)."""
    bad: dict[str, Bool] = {
        modality: np.asarray(~np.isfinite(array).all(axis=1))
        for modality, array in part.features.items()
    }
    any_bad: Bool = np.asarray(np.stack(list(bad.values())).any(axis=0))
    rows = np.flatnonzero(any_bad).tolist()
    if not rows:
        return part
    found = [
        f"{part.samples.sample_id[row]} ({reading.table.classes.names[part.samples.class_id[row]]},"
        f" {' and '.join(m for m in bad if bad[m][row])})"
        for row in rows
    ]
    if reading.options.nonfinite == "fail":
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


def _check_stage_2_train(reading: _Reading, part: Part) -> None:
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


def _check_official(raw: RawBenchmark) -> None:
    """Refuse a benchmark that claims an official name with other counts."""
    official = OFFICIAL.get((raw.dataset, raw.split))
    if official is None:
        return
    if len(raw.classes) != official.n_classes:
        raise UserError(
            f"{raw.dataset}: {len(raw.classes)} classes in all_class.txt, the official dataset has "
            f"{official.n_classes}; rename the root folder if this is another benchmark"
        )
    counts = raw.counts()
    for role in Role:
        part = raw.test if role.sealed else raw.open
        n_classes = len(np.unique(part.samples.class_id[part.samples.rows(role)]))
        for what, have, want in (
            ("samples", counts[role.value], official.samples[role]),
            ("classes", n_classes, official.classes[role]),
        ):
            if have != want:
                raise UserError(
                    f"{raw.dataset} {raw.split}_split {FOLDER_OF_ROLE[role]}: {have} {what}, the "
                    f"official split has {want}; complete the download, or rename the root folder "
                    "if this is another benchmark"
                )
