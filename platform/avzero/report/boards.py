"""Leaderboards: what may stand in one table, what may be ranked, and what a reader must know.

A board is one content of one benchmark; a block of it is one protocol, to the last option. Only
rows of one block are ranked against each other. Published rows of the same dataset and features
stand beside, never in, a ranking: they are single runs under rules of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from avzero.canon import ID_LENGTH
from avzero.report.published import Reference, base_features, references
from avzero.report.records import Records, SweepFacts
from avzero.report.rows import Row, departures, rows_of
from avzero.report.standing import Standing, standing


@dataclass(frozen=True)
class Block:
    """Rows of one benchmark under one protocol, best HM first."""

    rows: tuple[Row, ...]

    @property
    def text(self) -> str:
        """Its text set of class vectors."""
        return self.rows[0].text

    @property
    def preset(self) -> str:
        """Its preset."""
        return self.rows[0].preset

    @property
    def title(self) -> str:
        """The protocol in words."""
        protocol = self.rows[0].protocol
        marks = [f"text {self.text}", f"preset {self.preset}", *departures(protocol)]
        return ", ".join(marks)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """A name per row; the sweep is part of it where two rows are of one system."""
        models = [row.model for row in self.rows]
        return tuple(
            row.model if models.count(row.model) == 1 else f"{row.model} ({row.sweep})"
            for row in self.rows
        )

    def standing(self, score: str) -> Standing:
        """Return which rows can be told apart in a score."""
        if score not in self._standings:  # a test for every pair takes a while
            values = {n: r.scores[score] for n, r in zip(self.names, self.rows, strict=True)}
            self._standings[score] = standing(values, score)
        return self._standings[score]

    @functools.cached_property
    def _standings(self) -> dict[str, Standing]:
        return {}

    def mark(self, place: int, score: str) -> Literal["", "best", "tied"]:
        """Return how a row stands in a score: told apart from all others as their best, or not
        told apart from the best. One seed tells nothing, so a row of one is not marked."""
        equals = self.standing(score).equals
        top = self.rows[self.names.index(equals[0])]
        if self.names[place] not in equals or len(self.rows) == 1:
            return ""
        if min(len(top.seeds), len(self.rows[place].seeds)) == 1:
            return ""
        return "best" if len(equals) == 1 else "tied"


@dataclass(frozen=True)
class Board:
    """One benchmark's content with all its protocols, and the published rows beside them."""

    dataset: str
    feature_set: str
    simulated: bool
    blocks: tuple[Block, ...] = ()
    published: tuple[Reference, ...] = ()

    @property
    def benchmark(self) -> str:
        """Name in the store; empty where there are published rows only."""
        return self.blocks[0].rows[0].benchmark if self.blocks else ""

    @property
    def digest(self) -> str:
        """Of the benchmark's content; empty where there are published rows only."""
        return self.blocks[0].rows[0].digest if self.blocks else ""

    @property
    def title(self) -> str:
        """Name for a heading."""
        return self.benchmark or f"{self.dataset}, {self.feature_set} features"

    @property
    def anchor(self) -> str:
        """Name for links, unique on a page."""
        return f"{self.title}-{self.digest[:8]}".replace(", ", "-").replace(" ", "-").strip("-")

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows of all blocks."""
        return tuple(row for block in self.blocks for row in block.rows)


def boards(rows: Sequence[Row], published: Sequence[Reference] | None = None) -> list[Board]:
    """Return rows as boards: real data, simulated data, what is published and nothing of ours.

    Args:
        rows: of ``rows.leaderboard``.
        published: rows to set beside them; all that are known.
    """
    printed = references() if published is None else published
    grounds: dict[tuple[bool, str, str, str], dict[str, list[Row]]] = {}
    for row in rows:
        key = (row.simulated, row.benchmark, row.digest, row.feature_set)
        board = grounds.setdefault(key, {})
        board.setdefault(row.ground[1], []).append(row)
    made, used = [], set()
    for protocols in (grounds[key] for key in sorted(grounds)):
        blocks = [Block(tuple(sorted(b, key=lambda r: -r.mean("HM")))) for b in protocols.values()]
        blocks.sort(key=lambda block: (block.preset != "paper", block.text, block.title))
        first = blocks[0].rows[0]
        place = (first.dataset.casefold(), base_features(first.feature_set))
        beside = () if first.simulated else tuple(_of(printed, place))
        used |= {place} if beside else set()
        made.append(Board(first.dataset, first.feature_set, first.simulated, tuple(blocks), beside))
    for dataset, features in dict.fromkeys((p.row.dataset, p.row.feature_set) for p in printed):
        if (dataset.casefold(), features) not in used:
            alone = tuple(_of(printed, (dataset.casefold(), features)))
            made.append(Board(dataset, features, False, (), alone))
    return made


def _of(printed: Sequence[Reference], place: tuple[str, str]) -> Iterator[Reference]:
    """Yield published rows of a (dataset, feature set), best HM first."""
    found = [p for p in printed if (p.row.dataset.casefold(), p.row.feature_set) == place]
    yield from sorted(found, key=lambda p: -(p.row.scores["HM"] or 0.0))


# -- what a reader must know --------------------------------------------------------------------


def notices(records: Records, rows: Sequence[Row] | None = None) -> list[str]:
    """Return what is missing, half-finished or must not be compared; a sentence each."""
    rows = rows_of(records) if rows is None else rows
    found = list(records.problems)
    for sweep in records.sweeps:
        found += _unfinished(records, sweep)
    ends = [f"{row.sweep}/{row.group}" for row in rows if row.at_grid_end]
    if ends:
        found.append(
            f"Beta lies at an end of its grid in {_listed(ends)}; widen protocol.beta_grid there."
        )
    for row in rows:
        found += _of_row(row)
    digests: dict[str, set[str]] = {}
    for row in rows:
        digests.setdefault(row.benchmark, set()).add(row.digest)
    for name, several in sorted(digests.items()):
        if len(several) > 1:
            short = " and ".join(sorted(d[:ID_LENGTH] for d in several))
            found.append(
                f"{name} stands for {len(several)} contents ({short}): they are kept apart, and "
                "their scores must not be compared."
            )
    return found


def _unfinished(records: Records, sweep: SweepFacts) -> Iterator[str]:
    """Yield what a sweep lacks, groups with the same lack together."""
    done = _count(records.trials["group"].to_pylist(), records.trials["sweep"].to_pylist(), sweep)
    tested: dict[str, set[int]] = {}
    others: set[str] = set()
    columns = ("sweep", "group", "winner", "seed")
    for name, group, winner, seed in zip(
        *(records.results[c].to_pylist() for c in columns), strict=True
    ):
        if name == sweep.name:
            if winner == sweep.frozen.get(group, {}).get("trial"):
                tested.setdefault(group, set()).add(seed)
            else:
                others.add(group)
    lacks: dict[str, list[str]] = {}
    for group, wanted in sweep.groups.items():
        have, seeds = done.get(group, 0), len(tested.get(group, ()))
        if have < wanted:
            lack = f"half-finished, {have} of {wanted} trials have ended; run avzero sweep again"
        elif seeds == 0:
            lack = "searched, but TEST has not been scored; run avzero test"
        elif seeds < sweep.seeds:
            lack = f"TEST of {seeds} of {sweep.seeds} seeds is scored; run avzero test again"
        else:
            continue
        lacks.setdefault(lack, []).append(group)
    for lack, groups in lacks.items():
        yield f"Sweep {sweep.name}, {_listed(groups)}: {lack}."
    if others:
        yield (
            f"Sweep {sweep.name}, {_listed(sorted(others))}: results of an earlier winner are in "
            "the store; they are not shown, but they count as looks at TEST."
        )


def _count(groups: Sequence[str], sweeps: Sequence[str], sweep: SweepFacts) -> dict[str, int]:
    """Return trials per group of a sweep."""
    found: dict[str, int] = {}
    for group, name in zip(groups, sweeps, strict=True):
        if name == sweep.name:
            found[group] = found.get(group, 0) + 1
    return found


def _of_row(row: Row) -> Iterator[str]:
    """Yield what a reader of a row must know."""
    where = f"Sweep {row.sweep}, {row.group}"
    if row.openings > len(row.seeds):
        yield (
            f"{where}: TEST has been opened {row.openings} times, {len(row.seeds)} of them for "
            "these scores."
        )
    revisions = sorted({record["revision"] for record in row.records})
    if len(revisions) > 1:
        yield f"{where}: seeds were scored by different code ({', '.join(revisions)})."
    lost = [str(r["seed"]) for r in row.records if not r["recall"]]
    if lost:
        yield f"{where}: the run's own record is missing for seed {', '.join(lost)}; no curve."


def _listed(groups: Sequence[str], most: int = 4) -> str:
    """Return groups as people list them, not more than a few."""
    shown = ", ".join(groups[:most])
    return shown + (f" and {len(groups) - most} more" if len(groups) > most else "")
