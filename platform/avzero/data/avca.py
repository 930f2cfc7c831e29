"""Reader of the AVCA layout: one file per class, modality and split folder.

The files of the AVCA release are HDF5 with averaged features, those of the TCaF release pickles
with sequences, those of the ClipClap release pickles with CLIP and CLAP vectors. Which of them a
feature folder holds is found from its files.

Layout and every quirk: data_formats.md sections 1 to 3. Rows are joined by name: audio to video
by the file name each row carries, features to classes by the file's stem, classes to text vectors
through the name map. Positions are never trusted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from avzero.data.audit import make_audit
from avzero.data.benchmark import AUDIO, VIDEO, Part, Progress, RawBenchmark, Role, TextSet
from avzero.data.class_lists import FOLDER_OF_ROLE, read_classes
from avzero.data.class_pickles import PICKLE
from avzero.data.official import OFFICIAL
from avzero.data.release import (
    Reading,
    ReadOptions,
    class_files,
    load_parts,
    used_classes,
)
from avzero.data.row_checks import check_stage_2_train, handle_nonfinite
from avzero.data.sequences import STEP_SECONDS, Sequences
from avzero.data.text_sets import CLIPCLAP, check_clip_text, find_text_files, read_text_sets
from avzero.errors import UserError
from avzero.spec import PLAIN_NAME, PLAIN_NAME_RULE


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
        features: ``main``, ``cls`` or a folder name below ``features/``, for the temporal and the
            CLIP release ``cls_features_non_averaged`` or ``main_features_non_averaged``.
        split: ``main``, ``cls`` or a folder name below ``class-split/``.
        name: what the store calls the benchmark; default ``<dataset>-<features>[-<split>]``.
        options: see ``ReadOptions``.
        progress: called while files are read.

    Raises:
        UserError: anything a person must correct in the files or the arguments.
    """
    reading = _start(root.resolve(), features, split, options or ReadOptions(), progress)
    short_split = split.removesuffix("_split")
    _require_plain(*([name] if name else _possible_names(reading, short_split)))
    parts = load_parts(reading, reading.root / "class-split" / f"{short_split}_split")
    # Counts are compared before rows are dropped: the option may not look like a bad download.
    lost = _check_official(reading, short_split, parts)
    temporal = _temporal(reading, parts)
    check_stage_2_train(reading, parts[0])
    vectors = not temporal and _pickled(reading)
    base = _base_name(reading.feature_root.name)
    feature_set = f"{base}_temporal" if temporal else CLIPCLAP if vectors else base
    name = name or _default_name(reading, feature_set, short_split)
    _require_plain(name)
    open_part, test_part = (handle_nonfinite(reading, part) for part in parts)
    seconds = STEP_SECONDS.get(base, {})
    raw = RawBenchmark(
        name=name,
        dataset=reading.dataset,
        feature_set=feature_set,
        split=short_split,
        simulated=reading.simulated,
        classes=reading.table.classes,
        text=_read_text(reading, vectors),
        open=open_part,
        test=test_part,
        step_seconds={m: seconds.get(m, 1.0) for m in open_part.features} if temporal else {},
    )
    audit = make_audit(raw, reading.sources, reading.notes, reading.nonfinite, lost)
    return replace(raw, audit=audit)


def _read_text(reading: Reading, vectors: bool) -> dict[str, TextSet]:
    """Read and hash the text files given, or those found; ``vectors``: of CLIP and CLAP."""
    given = dict(reading.options.text)
    files = given or find_text_files(reading.feature_root, vectors)
    text = read_text_sets(files, reading.root / "class-split", reading.table)
    if vectors and not given:
        check_clip_text(text, files)
    for path in files.values():
        reading.hash_source(path)
    return text


def _start(
    root: Path, features: str, split: str, options: ReadOptions, progress: Progress
) -> Reading:
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
    split_folder = f"{split.removesuffix('_split')}_split"
    table = read_classes(split_root, split_folder)
    reading = Reading(root, feature_root, table, options, progress)
    for path in (*split_root.glob("*.*"), *(split_root / split_folder).glob("*.txt")):
        reading.hash_source(path)
    return reading


def _default_name(reading: Reading, feature_set: str, split: str) -> str:
    """Return ``ucf-main``, or ``ucf-tiny-main-sim`` where more must be said."""
    parts = [reading.dataset, feature_set]
    parts += [split] if split != feature_set.removesuffix("_temporal") else []
    return "-".join(parts + (["sim"] if reading.simulated else [])).lower()


def _possible_names(reading: Reading, split: str) -> list[str]:
    """Return the default names that are still possible before any feature file is read."""
    base = _base_name(reading.feature_root.name)
    sets = [f"{base}_temporal", CLIPCLAP] if _pickled(reading) else [base]
    return [_default_name(reading, feature_set, split) for feature_set in sets]


def _require_plain(*names: str) -> None:
    """Refuse names of which the store can take none."""
    if not any(PLAIN_NAME.fullmatch(name) for name in names):
        raise UserError(f"benchmark name {names[0]!r}: {PLAIN_NAME_RULE}; set it with --name")


def _base_name(folder: str) -> str:
    """Return a feature folder's name without its suffix; both spellings of the third exist."""
    return re.sub(r"_features(_non_averaged|_no_averaged)?$", "", folder)


def _temporal(reading: Reading, parts: Sequence[Part]) -> bool:
    """Return whether the features are sequences; audio, video and both parts must agree."""
    kinds = {isinstance(table, Sequences) for part in parts for table in part.features.values()}
    if len(kinds) > 1:
        what = {
            m: "sequences" if isinstance(table, Sequences) else "vectors"
            for part in parts
            for m, table in part.features.items()
        }
        raise UserError(
            f"{reading.feature_root}: {AUDIO} holds {what[AUDIO]}, {VIDEO} {what[VIDEO]}; both "
            "must be of one kind. Choose a complete release"
        )
    return kinds == {True}


def _pickled(reading: Reading) -> bool:
    """Return whether the class files are pickles."""
    files = class_files(reading, AUDIO, FOLDER_OF_ROLE[Role.TRAIN])
    return any(path.suffix == PICKLE for path in files.values())


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


def _check_official(reading: Reading, split: str, parts: Sequence[Part]) -> int:
    """Refuse a benchmark that claims an official name with other counts.

    Returns:
        How many videos the release itself lists without features; these are forgiven.
    """
    lost = {
        role: sum(
            count
            for (r, class_id), count in reading.lost.items()
            if r is role and class_id in used_classes(reading.table.classes, role)
        )
        for role in Role
    }
    official = OFFICIAL.get((reading.dataset, split))
    if official is None:
        return sum(lost.values())
    if len(reading.table.classes) != official.n_classes:
        raise UserError(
            f"{reading.dataset}: {len(reading.table.classes)} classes in all_class.txt, the "
            f"official dataset has {official.n_classes}; rename the root folder if this is another "
            "benchmark"
        )
    for role in Role:
        samples = parts[role.sealed].samples
        rows = samples.rows(role)
        n_classes = len(np.unique(samples.class_id[rows]))
        for what, have, want in (
            ("samples", len(rows) + lost[role], official.samples[role]),
            ("classes", n_classes, official.classes[role]),
        ):
            if have != want:
                raise UserError(
                    f"{reading.dataset} {split}_split {FOLDER_OF_ROLE[role]}: {have} {what}, the "
                    f"official split has {want}; complete the download, or rename the root folder "
                    "if this is another benchmark"
                )
    return sum(lost.values())
