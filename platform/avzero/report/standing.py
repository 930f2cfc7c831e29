"""Which systems of a leaderboard can be told apart, and the sentence that says so.

The order of means is not a ranking: systems whose difference another training could undo share a
place. The rule: Welch's t-test over seeds between every two systems of one benchmark under one
protocol, Holm's correction over all pairs, 95 %. A system with one seed is told apart from none.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from avzero.report.statistics import LEVEL, Ranking, holm, welch

Values = Mapping[str, Sequence[float]]
"""{system: one value per seed, percent}; names are unique in a leaderboard."""


@dataclass(frozen=True)
class Standing:
    """What a leaderboard may say of its order."""

    order: tuple[str, ...]
    """By mean, highest first; equal means by name."""
    equals: tuple[str, ...]
    """The best by mean and all that cannot be separated from it."""
    places: Mapping[str, tuple[int, int]]
    """The best and the worst place a system can hold: 1 + those separately better, …."""
    groups: tuple[tuple[str, ...], ...]
    """Neighbours in order of which no two can be separated; groups may overlap."""
    p: Mapping[tuple[str, str], float]
    """Holm-corrected p of every tested pair, the higher mean first."""
    sentence: str

    def place(self, name: str) -> str:
        """Return a system's place as ``1`` or ``2-5``."""
        first, last = self.places[name]
        return str(first) if first == last else f"{first}-{last}"


def standing(values: Values, score: str = "HM", level: float = LEVEL) -> Standing:
    """Return which systems can be told apart.

    Args:
        values: of one benchmark, feature set and protocol; at least one value per system.
        score: its name, for the sentence.
        level: of all comparisons together.
    """
    means = {name: statistics.fmean(v) for name, v in values.items()}
    order = sorted(values, key=lambda name: (-means[name], name))
    # A single value cannot be tested, and what is not tested needs no correction.
    tested = [name for name in order if len(values[name]) > 1]
    pairs = list(itertools.combinations(tested, 2))
    corrected = holm([welch(values[a], values[b]) for a, b in pairs])
    p = dict(zip(pairs, corrected, strict=True))

    def separated(one: str, other: str) -> bool:
        return p.get((one, other), p.get((other, one), 1.0)) < 1 - level

    places = {}
    for i, name in enumerate(order):
        better = sum(separated(name, other) for other in order[:i])
        worse = sum(separated(name, other) for other in order[i + 1 :])
        places[name] = (1 + better, len(order) - worse)
    equals = tuple(n for n in order if n == order[0] or not separated(order[0], n))
    return Standing(
        tuple(order),
        equals,
        places,
        groups_of_equals(order, separated),
        p,
        _sentence(values, means, order, equals, score, level),
    )


def groups_of_equals(
    order: Sequence[str], separated: Callable[[str, str], bool]
) -> tuple[tuple[str, ...], ...]:
    """Return the longest runs of neighbours of which no two can be separated.

    Args:
        order: systems, best first.
        separated: whether two of them can be told apart.
    """
    runs: list[tuple[int, int]] = []
    for start in range(len(order)):
        end = start + 1
        while end < len(order) and not any(
            separated(order[i], order[end]) for i in range(start, end)
        ):
            end += 1
        if not runs or end > runs[-1][1]:
            runs.append((start, end))
    return tuple(tuple(order[start:end]) for start, end in runs)


def _sentence(
    values: Values,
    means: Mapping[str, float],
    order: Sequence[str],
    equals: Sequence[str],
    score: str,
    level: float,
) -> str:
    """Return what may be said of the best, in words."""
    if not order:
        return "No results."
    best = order[0]
    if len(order) == 1:
        return f"{best} is the only system: nothing to compare it with."
    single = [name for name in order if len(values[name]) < 2]
    rule = f"Welch's t-test over seeds, Holm's correction, {100 * level:.0f} %"
    if best in single:
        return (
            f"{best} has the highest {score} ({means[best]:.2f}), but from one seed: no interval "
            "over seeds, so nothing is ranked against it."
        )
    head = f"{best} has the highest mean {score} ({means[best]:.2f})"
    if len(equals) == 1:
        rest = order[1] if len(order) == 2 else "every other system"
        return f"{head} and is separated from {rest} ({rule})."
    others = [name for name in equals if name != best]
    text = (
        f"{head}, but {_listed(others)} cannot be separated from it ({rule})"
        if len(equals) < len(order) or len(order) <= 4
        else f"{head}, but none of the others can be separated from it ({rule})"
    )
    lonely = [name for name in others if name in single]
    return text + (f"; {_listed(lonely)} with one seed only." if lonely else ".")


def _listed(names: Sequence[str]) -> str:
    """Return names as people list them."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def ranking_lines(ranking: Ranking, level: float = LEVEL) -> list[str]:
    """Return what a ranking over benchmarks says, and what it cannot say, in sentences."""
    if len(ranking.systems) < 2 or not ranking.datasets:
        return ["No two systems share a benchmark: nothing to rank.", *ranking.notes]
    ranks = ", ".join(f"{name} {ranking.average_rank[name]:.2f}" for name in ranking.systems)
    lines = [f"Average rank over {', '.join(ranking.datasets)}: {ranks}."]
    if ranking.friedman is not None:
        lines.append(f"Friedman's test that all are alike: p = {ranking.friedman:.2g}.")
    if ranking.critical_difference is not None:
        lines.append(
            f"Average ranks closer than {ranking.critical_difference:.2f} are not told apart "
            f"(Nemenyi, {100 * level:.0f} %)."
        )
    apart = [pair for pair in ranking.pairs if ranking.separated(*pair, level)]
    told = "; ".join(f"{one} before {other}" for one, other in apart)
    rule = "Wilcoxon's test over benchmarks, Holm's correction"
    lines.append(f"Told apart ({rule}): {told or 'no two systems'}.")
    return [*lines, *ranking.notes]
