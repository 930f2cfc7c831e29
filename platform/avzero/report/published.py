"""Published results as rows that say where they come from, and whether they can be right.

The rows lie beside this file in ``published.csv``: numbers as printed (percent, two decimals), the
feature set a source *claims* and the one its numbers belong to. What is wrong with a row is
computed here from the numbers, never taken from the column ``flags``, which keeps what people
noticed when they read the sources.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib import resources
from typing import Literal, get_args

from avzero.errors import UserError

SCORES = ("S", "U", "HM", "ZSL")
_FILE = "published.csv"
_HALF = Fraction(1, 200)
"""What rounding to two decimals can hide, in percent."""

Kind = Literal["hm", "zsl", "mixed", "contradicted", "repeated", "unverified", "saturated"]
"""``hm``: HM does not follow from S and U, or is higher than ZSL allows. ``zsl``: ZSL is below U.
``mixed``: printed under another feature set than the one its numbers belong to. ``contradicted``:
another source prints other numbers for the same thing. ``repeated``: another source prints the
same numbers. ``unverified``: quoted from memory. ``saturated``: U equals ZSL, so beta has
suppressed every seen class on unseen samples."""

IMPOSSIBLE: tuple[Kind, ...] = ("hm", "zsl")
"""Kinds that no single system can produce: such a row cannot be right as printed."""


@dataclass(frozen=True)
class Published:
    """One printed result; scores in percent, None where the source prints none."""

    system: str
    model: str
    """The name of the system here; empty where it is not implemented."""
    variant: str
    """An ablation or a single modality; empty for the system itself."""
    venue: str
    year: int | None
    dataset: str
    feature_set: str
    """Which features the numbers belong to; where it differs from ``claimed``, our attribution."""
    claimed: str
    """Which features the source prints the row under."""
    scores: Mapping[str, float | None]
    source: str
    """Document and table."""
    two_classifiers: bool
    """Whether ZSL comes from another classifier than U, so that ZSL may be below U."""
    verified: bool
    """Read in the source; False: quoted from memory."""
    flags: str
    """What a reader of the source noticed; for people, nothing is computed from it."""
    note: str

    @property
    def benchmark(self) -> str:
        """The benchmark of its numbers, named as ``avzero ingest`` begins it (``ucf-main``)."""
        return f"{self.dataset}-{self.feature_set}".lower()

    @property
    def name(self) -> str:
        """System and variant."""
        return f"{self.system} {self.variant}" if self.variant else self.system

    @property
    def mixed(self) -> bool:
        """Whether it is printed under another feature set than its numbers belong to."""
        return self.feature_set != self.claimed

    def score(self, name: str) -> float | None:
        """Return a score in percent, None where it is not printed."""
        return self.scores[name]


@dataclass(frozen=True)
class Finding:
    """Something about a published row that its reader must know."""

    kind: Kind
    text: str

    @property
    def impossible(self) -> bool:
        """Whether the row cannot be right as printed."""
        return self.kind in IMPOSSIBLE


@dataclass(frozen=True)
class Judged:
    """A published row with everything the arithmetic says about it."""

    row: Published
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> Literal["cannot be right", "holds", "not checkable"]:
        """``holds``: S and U are printed and HM and ZSL agree with them."""
        if any(finding.impossible for finding in self.findings):
            return "cannot be right"
        printed = self.row.scores["S"] is not None and self.row.scores["U"] is not None
        return "holds" if printed else "not checkable"

    def text(self, *kinds: Kind) -> str:
        """Return what was found as one line; only of some kinds where any are named."""
        wanted = kinds or get_args(Kind)
        return "; ".join(f.text for f in self.findings if f.kind in wanted)


@functools.cache
def published_rows() -> tuple[Published, ...]:
    """Return all published rows, in the order of the file.

    Raises:
        UserError: the file is damaged; the message names the line.
    """
    text = resources.files(__package__).joinpath(_FILE).read_text(encoding="utf-8")
    return read_rows(text)


def read_rows(text: str) -> tuple[Published, ...]:
    """Return the rows of a CSV with the header of ``published.csv``.

    Raises:
        UserError: a column is missing or a number is none; the message names the line.
    """
    rows = []
    for line, cells in enumerate(csv.DictReader(text.splitlines()), start=2):
        try:
            rows.append(_row(cells))
        except (KeyError, ValueError) as error:
            raise UserError(f"{_FILE}, line {line}: {error}; see report/published.py") from error
    return tuple(rows)


def _row(cells: Mapping[str, str]) -> Published:
    """Return one row of the file."""
    words = ("system", "model", "variant", "venue", "dataset", "feature_set", "claimed", "source")
    return Published(
        **{name: cells[name] for name in (*words, "flags", "note")},
        year=int(cells["year"]) if cells["year"] else None,
        scores={name: _percent(cells[name]) for name in SCORES},
        two_classifiers=_yes(cells["two_classifiers"]),
        verified=_yes(cells["verified"]),
    )


def _percent(cell: str) -> float | None:
    if not cell:
        return None
    value = float(cell)
    if not 0 <= value <= 100 or cell != f"{value:.2f}":
        raise ValueError(f"{cell} is no percentage with two decimals")
    return value


def _yes(cell: str) -> bool:
    if cell not in ("yes", "no"):
        raise ValueError(f"{cell!r} is neither yes nor no")
    return cell == "yes"


# -- what the arithmetic says -------------------------------------------------------------------


@functools.cache
def judged_rows() -> tuple[Judged, ...]:
    """Return all published rows with what is found about each, in the order of the file."""
    rows = published_rows()
    return tuple(Judged(row, judge(row, rows)) for row in rows)


def judge(row: Published, others: Sequence[Published] = ()) -> tuple[Finding, ...]:
    """Return what can be said about a row, from its numbers and from the other rows.

    A printed 12.34 stands for anything in [12.335, 12.345]; a row is only called impossible when
    no numbers that round to the printed ones fit together.
    """
    found = [*_arithmetic(row), *_beside(row, others)]
    if not row.verified:
        found.append(Finding("unverified", "S and U are quoted from memory"))
    return tuple(found)


def _arithmetic(row: Published) -> list[Finding]:
    """Return what S, U, HM and ZSL say about each other."""
    found = []
    seen, unseen, hm, zsl = (row.scores[name] for name in SCORES)
    if seen is not None and unseen is not None and hm is not None:
        low, high = hm_range(seen, unseen)
        if _high(hm) < low or _low(hm) > high:
            text = f"HM {hm:.2f} does not follow from S and U, which give {_hm(seen, unseen):.2f}"
            found.append(Finding("hm", text))
    if zsl is None or row.two_classifiers:
        return found
    if unseen is not None and _high(zsl) < _low(unseen):
        text = f"ZSL {zsl:.2f} is below U {unseen:.2f}, impossible for one model"
        found.append(Finding("zsl", text))
    if unseen is not None and unseen == zsl:
        found.append(Finding("saturated", "U equals ZSL: beta suppresses every seen class"))
    if unseen is None and hm is not None and _low(hm) > hm_range(100, zsl)[1]:
        text = f"HM {hm:.2f} is more than S = 100 and U = ZSL {zsl:.2f} would give"
        found.append(Finding("hm", text))
    return found


def hm_range(seen: float, unseen: float) -> tuple[Fraction, Fraction]:
    """Return the lowest and highest HM of any S and U that round to the printed ones.

    HM grows with S and with U, so the ends come from the ends. Exact: binary fractions would
    decide rows that lie on the edge.
    """
    return _exact_hm(_low(seen), _low(unseen)), _exact_hm(_high(seen), _high(unseen))


def _exact_hm(seen: Fraction, unseen: Fraction) -> Fraction:
    return 2 * seen * unseen / (seen + unseen) if seen + unseen else Fraction(0)


def _hm(seen: float, unseen: float) -> float:
    """Return the HM of the printed S and U."""
    return float(_exact_hm(_printed(seen), _printed(unseen)))


def _printed(value: float) -> Fraction:
    """Return a printed percentage exactly."""
    return Fraction(round(100 * value), 100)


def _low(value: float) -> Fraction:
    return max(Fraction(0), _printed(value) - _HALF)


def _high(value: float) -> Fraction:
    return min(Fraction(100), _printed(value) + _HALF)


def _beside(row: Published, others: Sequence[Published]) -> list[Finding]:
    """Return what the other rows of the same system and dataset say about this one."""
    same = [
        other
        for other in others
        if other.source != row.source
        and (other.system, other.variant, other.dataset) == (row.system, row.variant, row.dataset)
    ]
    found = [
        Finding(
            "repeated" if agree(row, other) else "contradicted",
            f"also in {other.source}"
            if agree(row, other)
            else f"{other.source} prints {_shown(other)}",
        )
        for other in same
        if other.feature_set == row.feature_set
    ]
    return ([Finding("mixed", _why_mixed(row, same))] if row.mixed else []) + found


def _why_mixed(row: Published, same: Sequence[Published]) -> str:
    """Return why a row is taken to belong to another feature set than its source claims."""
    text = f"printed under {row.claimed}"
    twins = [o for o in same if o.claimed == row.feature_set and agree(row, o)]
    if not twins:
        return f"{text}; {row.feature_set} is our attribution: {row.note}"
    text += f", yet its numbers are those of {row.feature_set} in {twins[0].source}"
    real = [o for o in same if o.claimed == row.claimed and not o.mixed]
    return text + (f"; {row.claimed} is {_shown(real[0])} in {real[0].source}" if real else "")


def agree(one: Published, other: Published) -> bool:
    """Return whether two rows print the same value for every score that both print."""
    both = [(one.scores[name], other.scores[name]) for name in SCORES]
    return all(a == b for a, b in both if a is not None and b is not None)


def _shown(row: Published) -> str:
    """Return a row's printed scores as text."""
    return ", ".join(f"{k} {v:.2f}" for k, v in row.scores.items() if v is not None)


# -- tables as a whole --------------------------------------------------------------------------


def mixed_sources(rows: Sequence[Published] | None = None) -> dict[str, dict[str, list[str]]]:
    """Return the tables that print several feature sets side by side.

    Returns:
        {source: {feature set: its systems, in the table's order}}, only sources with several.
    """
    tables: dict[str, dict[str, list[str]]] = {}
    for row in published_rows() if rows is None else rows:
        systems = tables.setdefault(row.source, {}).setdefault(row.feature_set, [])
        if row.name not in systems:
            systems.append(row.name)
    return {source: sets for source, sets in tables.items() if len(sets) > 1}


@dataclass(frozen=True)
class Reference:
    """A published result once, however many sources print it."""

    judged: Judged
    """The row with the most scores, a verified one before one from memory."""
    sources: tuple[str, ...]
    """All sources that print these numbers, the row's own first."""

    @property
    def row(self) -> Published:
        """The row."""
        return self.judged.row


def references(judged: Sequence[Judged] | None = None) -> list[Reference]:
    """Return every published result once: rows that agree are one, rows that differ stay apart."""
    groups: list[list[Judged]] = []
    for one in judged_rows() if judged is None else judged:
        for group in groups:
            if all(_same(one.row, other.row) and agree(one.row, other.row) for other in group):
                group.append(one)
                break
        else:
            groups.append([one])
    return [_reference(group) for group in groups]


def _same(one: Published, other: Published) -> bool:
    """Return whether two rows are about the same thing."""
    names = ("system", "variant", "dataset", "feature_set")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def _reference(group: Sequence[Judged]) -> Reference:
    """Return a group's fullest row with everything the group says."""

    def worth(judged: Judged) -> tuple[int, bool]:
        return sum(v is not None for v in judged.row.scores.values()), judged.row.verified

    best = max(group, key=worth)
    sources = [best.row.source, *(one.row.source for one in group if one is not best)]
    return Reference(best, tuple(sources))


def published_for(dataset: str, feature_set: str) -> list[Judged]:
    """Return all rows a leaderboard of a benchmark can show beside its own, every source.

    Args:
        dataset: as the benchmark's manifest names it (``UCF``).
        feature_set: as the manifest names it; ``cls_temporal`` has the rows of ``cls``.
    """
    wanted = dataset.casefold(), base_features(feature_set)
    return [
        judged
        for judged in judged_rows()
        if (judged.row.dataset.casefold(), judged.row.feature_set) == wanted
    ]


def base_features(feature_set: str) -> str:
    """Return the name published tables use: sequences and their averages are not told apart."""
    return feature_set.removesuffix("_temporal")
