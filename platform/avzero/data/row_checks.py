"""What is checked once all rows of a release are read: rows without numbers, repeated rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from avzero.data.benchmark import MODALITIES, Bool, Part, Role, Samples
from avzero.data.class_files import read_class_file
from avzero.data.class_lists import STAGE_2_TRAIN
from avzero.data.release import Reading, class_files
from avzero.data.sequences import Features, bad_rows, differing_rows, take, zeroed
from avzero.errors import UserError


def handle_nonfinite(reading: Reading, part: Part) -> Part:
    """Apply the ``nonfinite`` rule to rows with NaN or infinity (data_formats.md 2.6).

    Sequences without a step are the same case: a clip nobody could read.

    Raises:
        UserError: there are such rows and the rule is ``fail``, or dropping them empties a role.
    """
    bad: dict[str, Bool] = {m: bad_rows(table) for m, table in part.features.items()}
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
            f"{reading.feature_root}: {len(rows)} rows hold NaN or infinity, or nothing: "
            f"{'; '.join(found[:5])}{' …' if len(found) > 5 else ''}. "
            "Repair them, or choose --nonfinite drop or --nonfinite zero"
        )
    reading.nonfinite.extend(found)
    if reading.options.nonfinite == "zero":
        return Part(part.samples, {m: zeroed(a, bad[m]) for m, a in part.features.items()})
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
    _note_dropped(reading, part.samples, samples)
    return Part(samples, {m: take(a, keep) for m, a in part.features.items()})


def _note_dropped(reading: Reading, before: Samples, after: Samples) -> None:
    """Refuse roles that lost all their rows; tell the audit of the rest."""
    lost: dict[str, int] = {}
    for role in Role:
        if len(before.rows(role)) and not len(after.rows(role)):
            raise UserError(
                f"{reading.feature_root}: all {len(before.rows(role))} {role} rows hold NaN or "
                "infinity, or nothing: dropping them leaves no benchmark. Repair them, or get the "
                "release again"
            )
        lost[role] = int((before.role == role.code).sum() - (after.role == role.code).sum())
    counts = ", ".join(f"{role} {count}" for role, count in lost.items() if count)
    reading.notes.append(f"dropped rows that hold NaN or infinity, or nothing: {counts}")
    for role in Role:
        classes = before.class_id[before.role == role.code]
        for class_id in np.setdiff1d(classes, after.class_id[after.role == role.code]):
            name = reading.table.classes.names[class_id]
            reading.notes.append(
                f"warning: {role}: class {name!r} lost all its {(classes == class_id).sum()} rows"
            )


def check_stage_2_train(reading: Reading, part: Part) -> None:
    """Check that the folder ``stage_2_train`` repeats the stage-1 rows bit for bit (D-14)."""
    row_of = {name: row for row, name in enumerate(part.samples.sample_id)}
    lost = {class_id for role, class_id in reading.lost if not role.sealed}
    folders = {m: reading.feature_root / m / STAGE_2_TRAIN for m in MODALITIES}
    missing = [str(folder) for folder in folders.values() if not folder.is_dir()]
    if missing:
        reading.notes.append(f"{STAGE_2_TRAIN} is missing: its rows could not be compared")
        return
    found, nameless = 0, 0
    for modality in MODALITIES:
        files = class_files(reading, modality, STAGE_2_TRAIN)
        for done, (class_id, path) in enumerate(sorted(files.items())):
            reading.progress(f"{modality} {STAGE_2_TRAIN}", done, len(files))
            reading.hash_source(path)
            facts, data = read_class_file(path)
            if facts.lost or class_id in lost:
                nameless += 1
                continue
            _check_copy(path, modality, facts.names, data, part, row_of)
            found += facts.count
    if nameless:
        reading.notes.append(
            f"warning: {STAGE_2_TRAIN}: {nameless} files of classes that lost their rows' names "
            "could not be compared"
        )
    elif found != len(MODALITIES) * len(row_of):
        reading.notes.append(f"{STAGE_2_TRAIN} holds {found // 2} of {len(row_of)} stage-1 rows")


def _check_copy(
    path: Path,
    modality: str,
    names: list[str],
    data: Features,
    part: Part,
    row_of: Mapping[str, int],
) -> None:
    """Compare one class file of ``stage_2_train`` with the rows of the open part."""
    table = part.features[modality]
    if data.shape[1] != table.shape[1] and data.shape[1]:
        raise UserError(
            f"{path}: {data.shape[1]} columns where the stage_1 files have {table.shape[1]}; "
            "get it again"
        )
    strangers = [name for name in names if name not in row_of]
    if strangers:
        raise UserError(
            f"{path}: video {strangers[0]!r} is in none of the stage_1 folders; "
            "the release is inconsistent, get it again"
        )
    theirs = take(table, np.array([row_of[name] for name in names], np.int64))
    # A file whose rows are all empty has no width: nothing says of which kind it would be.
    differs = differing_rows(data, theirs) if data.shape[1] else ~bad_rows(theirs)
    if differs.any():
        raise UserError(
            f"{path}: the {modality} row of {names[int(np.argmax(differs))]!r} differs "
            "from its stage_1 copy; the release is inconsistent, get it again"
        )
