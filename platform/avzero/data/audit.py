"""The validation report of an import (data_formats.md section 5, item 6): facts, not opinions.

``make_audit`` runs once, while the release is read and every row is at hand; the report is stored
beside the benchmark, so that it can be shown later without opening TEST.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from avzero.data.benchmark import (
    Classes,
    ClassRole,
    Part,
    RawBenchmark,
    Role,
    Samples,
    TextSet,
    text_rows,
)
from avzero.data.official import OFFICIAL
from avzero.data.sequences import Features, Sequences, values_of
from avzero.errors import UserError
from avzero.spec import TextAlignment


def make_audit(
    raw: RawBenchmark,
    sources: Mapping[str, str],
    notes: Sequence[str],
    nonfinite: Sequence[str],
    lost: int = 0,
) -> dict[str, Any]:
    """Return the audit of a release as plain JSON values.

    Args:
        raw: the release as read.
        sources: SHA-256 of each source file by relative path.
        notes: what the reader had to say.
        nonfinite: rows with NaN or infinity that were dropped or zeroed.
        lost: videos the release lists without features.
    """
    official = OFFICIAL.get((raw.dataset, raw.split))
    match = f"match, with {lost} videos the release skipped" if lost else "match"
    audit = {
        "dataset": raw.dataset,
        "feature_set": raw.feature_set,
        "split": raw.split,
        "simulated": raw.simulated,
        "official_counts": "not an official dataset" if official is None else match,
        "roles": {role.value: _role_facts(raw, role) for role in Role},
        "classes": {role.value: len(raw.classes.ids(role)) for role in ClassRole},
        "features": {
            modality: _norm_facts(raw.open.features[modality], raw.test.features[modality])
            for modality in raw.open.features
        },
        "text": {name: _text_facts(raw, name) for name in sorted(raw.text)},
        "source_overlap": _source_overlap(raw),
        "nonfinite_rows": list(nonfinite),
        "notes": list(notes),
        "sources": dict(sorted(sources.items())),
    }
    return audit | ({"step_seconds": dict(raw.step_seconds)} if raw.step_seconds else {})


def _part_of(raw: RawBenchmark, role: Role) -> Part:
    """Return the part that holds a role."""
    return raw.test if role.sealed else raw.open


def _role_facts(raw: RawBenchmark, role: Role) -> dict[str, int]:
    """Counts of one role: used samples and classes, smallest and largest class, rows left out."""
    samples = _part_of(raw, role).samples
    rows = samples.rows(role)
    _, per_class = np.unique(samples.class_id[rows], return_counts=True)
    return {
        "samples": len(rows),
        "classes": len(per_class),
        "smallest_class": int(per_class.min()) if len(per_class) else 0,
        "largest_class": int(per_class.max()) if len(per_class) else 0,
        "left_out": int(((samples.role == role.code) & ~samples.evaluated).sum()),
    }


def _norm_facts(*tables: Features) -> dict[str, float | int]:
    """Width, value range and norms of one modality's rows (of sequences: steps), both parts."""
    used = [values_of(table) for table in tables if len(table)]
    # einsum keeps no squared copy of the array, which may be larger than half the memory.
    norms = np.sqrt(np.concatenate([np.einsum("ij,ij->i", array, array) for array in used]))
    facts = {
        "width": int(used[0].shape[1]),
        "min": float(min(array.min() for array in used)),
        "max": float(max(array.max() for array in used)),
        "norm_min": float(norms.min()),
        "norm_mean": float(norms.mean()),
        "norm_max": float(norms.max()),
        "zero_rows": int((norms == 0).sum()),
    }
    lengths = [table.lengths for table in tables if isinstance(table, Sequences)]
    if lengths:
        steps = np.concatenate(lengths)
        facts |= {
            "steps_min": int(steps.min()),
            "steps_mean": float(steps.mean()),
            "steps_max": int(steps.max()),
        }
    return facts


def _text_facts(raw: RawBenchmark, name: str) -> dict[str, Any]:
    """Width, norms and the D-01 check: which classes positional pairing would mislabel."""
    text = raw.text[name]
    norms = np.linalg.norm(text.vectors, axis=1)
    return {
        "keys": len(text.keys),
        "width": int(text.vectors.shape[1]),
        "unit_norm": bool(np.allclose(norms, 1.0, atol=1e-5)),
        "wrong_if_positional": wrong_if_positional(raw.classes, text),
    }


def wrong_if_positional(classes: Classes, text: TextSet) -> dict[str, str]:
    """Count, per class role, the classes that ``legacy_sorted`` pairs with another's vector."""
    by_class = text_rows(text, classes, TextAlignment.BY_CLASS)
    try:
        legacy = text_rows(text, classes, TextAlignment.LEGACY_SORTED)
    except UserError as error:
        return {"all": f"impossible ({error})"}
    groups = {"all": list(range(len(classes)))} | {
        role.value: classes.ids(role).tolist() for role in ClassRole if role is not ClassRole.UNUSED
    }
    return {
        group: f"{sum(by_class[i] != legacy[i] for i in ids)}/{len(ids)}"
        for group, ids in groups.items()
    }


def _source_overlap(raw: RawBenchmark) -> dict[str, str]:
    """Count seen evaluation samples that share their source video with training (D-02, P-16)."""

    def sources(samples: Samples, *roles: Role) -> list[str]:
        return [samples.source_id[i] for i in samples.rows(*roles)]

    train_1 = set(sources(raw.open.samples, Role.TRAIN))
    train_2 = set(sources(raw.open.samples, Role.TRAIN, Role.VAL_SEEN, Role.VAL_UNSEEN))
    result = {}
    for role, train in (
        (Role.VAL_SEEN, train_1),
        (Role.VAL_UNSEEN, train_1),
        (Role.TEST_SEEN, train_2),
        (Role.TEST_UNSEEN, train_2),
    ):
        mine = sources(_part_of(raw, role).samples, role)
        result[role.value] = f"{sum(source in train for source in mine)}/{len(mine)}"
    return result


def audit_lines(audit: Mapping[str, Any]) -> list[str]:
    """Return the audit as lines of plain text for a terminal."""
    lines = [
        f"{audit['dataset']}  features {audit['feature_set']}  split {audit['split']}"
        f"{'  (SIMULATED)' if audit['simulated'] else ''}",
        f"official counts: {audit['official_counts']}",
        "",
        f"{'role':<12}{'samples':>9}{'classes':>9}{'per class':>12}{'left out':>10}"
        f"{'source also in training':>26}",
    ]
    for role, facts in audit["roles"].items():
        spread = f"{facts['smallest_class']}-{facts['largest_class']}"
        lines.append(
            f"{role:<12}{facts['samples']:>9}{facts['classes']:>9}{spread:>12}"
            f"{facts['left_out']:>10}{audit['source_overlap'].get(role, ''):>26}"
        )
    lines.append("")
    for modality, facts in audit["features"].items():
        lines.append(
            f"{modality}: {facts['width']} wide, values {facts['min']:.4g} to {facts['max']:.4g}, "
            f"row norm {facts['norm_min']:.4g} / {facts['norm_mean']:.4g} / "
            f"{facts['norm_max']:.4g} (min/mean/max), {facts['zero_rows']} zero rows"
        )
        if "steps_min" in facts:
            lines[-1] += (
                f", steps {facts['steps_min']} / {facts['steps_mean']:.4g} / {facts['steps_max']} "
                f"of {audit['step_seconds'][modality]:g} s"
            )
    for name, facts in audit["text"].items():
        wrong = ", ".join(
            f"{group} {count}" for group, count in facts["wrong_if_positional"].items()
        )
        lines.append(
            f"text {name}: {facts['keys']} keys, {facts['width']} wide, "
            f"{'unit norm' if facts['unit_norm'] else 'not unit norm'}; "
            f"positional pairing would be wrong for {wrong}"
        )
    lines.append(f"non-finite rows changed: {len(audit['nonfinite_rows'])}")
    lines.extend(f"note: {note}" for note in audit["notes"])
    lines.append(f"source files: {len(audit['sources'])} (SHA-256 of each in the JSON form)")
    return lines
