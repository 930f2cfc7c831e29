"""Counts of the official UCF-, VGGSound- and ActivityNet-GZSL splits (data_formats.md 3.1).

A root folder named like one of these claims to be it; when its counts differ, ingesting fails,
because a benchmark that silently lost samples gives numbers nobody can compare.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from avzero.data.benchmark import Role


@dataclass(frozen=True)
class Official:
    """Evaluated samples and class counts per role, and the size of the class list."""

    n_classes: int
    samples: Mapping[Role, int]
    classes: Mapping[Role, int]


def _official(n_classes: int, samples: tuple[int, ...], classes: tuple[int, ...]) -> Official:
    """Build an entry from numbers in the order of ``Role``."""
    return Official(
        n_classes,
        dict(zip(Role, samples, strict=True)),
        dict(zip(Role, classes, strict=True)),
    )


OFFICIAL: Mapping[tuple[str, str], Official] = {
    ("UCF", "main"): _official(101, (3174, 353, 1467, 555, 1267), (30, 30, 12, 42, 9)),
    ("UCF", "cls"): _official(101, (3174, 353, 1467, 555, 845), (30, 30, 12, 42, 6)),
    ("VGGSound", "main"): _official(309, (70351, 7817, 3102, 9032, 3450), (138, 138, 69, 207, 69)),
    ("VGGSound", "cls"): _official(309, (70351, 7817, 3102, 9032, 3200), (138, 138, 69, 207, 64)),
    ("ActivityNet", "main"): _official(200, (9204, 1023, 4307, 1615, 4199), (99, 99, 51, 150, 50)),
    ("ActivityNet", "cls"): _official(200, (9204, 1023, 4307, 1615, 4052), (99, 99, 51, 150, 48)),
}
"""Keyed by (dataset, split name without ``_split``)."""

OFFICIAL_DATASETS = tuple(sorted({dataset for dataset, _ in OFFICIAL}))
