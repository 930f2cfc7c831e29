"""How sure a number is, and whether two numbers differ: intervals and paired tests.

All scores are percent. Two things could have come out differently, and an interval says which of
them it means:

- **over classes**: another draw of classes from the same kind of classes, the weights unchanged.
  Classes are drawn again with replacement, seen and unseen ones separately, 4,000 times; S, U and
  ZSL are means over them and HM follows from S and U in every draw.
- **over seeds**: another training of the same configuration, the classes unchanged. Student's t of
  the values per seed: a bootstrap of three to five values covers far less than it promises.
- **over classes and seeds**: both at once.

Random draws follow from what is drawn (class ids), so an interval is the same in every report and
the systems of one benchmark are compared on the same draws.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from avzero.canon import sha256_hex

Float64 = npt.NDArray[np.float64]
Score = Literal["S", "U", "HM", "ZSL"]
Over = Literal["classes", "seeds", "classes and seeds"]

LEVEL = 0.95
_DRAWS = 4000
_GRAIN = 9
"""Decimals that count: two differences that agree to so many are tied."""


@dataclass(frozen=True)
class Interval:
    """A score and where it would lie if something had come out differently; percent.

    ``low`` and ``high`` are None where nothing can be said; ``note`` then says why.
    """

    estimate: float
    low: float | None
    high: float | None
    over: Over
    level: float = LEVEL
    note: str = ""

    @property
    def text(self) -> str:
        """The ends as ``[low, high]``, or why there are none."""
        if self.low is None or self.high is None:
            return self.note
        return f"[{self.low:.2f}, {self.high:.2f}]"

    @property
    def half(self) -> float | None:
        """Half its width."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


@dataclass(frozen=True)
class Recalls:
    """Recall of every class in every training of one configuration on one benchmark; percent.

    R seeds, S seen and U unseen classes, in ascending order of seed and class id.
    """

    seeds: tuple[int, ...]
    seen_ids: tuple[int, ...]
    unseen_ids: tuple[int, ...]
    seen: Float64
    """[R, S], among all classes."""
    unseen: Float64
    """[R, U], among all classes."""
    zsl: Float64
    """[R, U], among unseen classes."""

    @classmethod
    def of(cls, per_class: Mapping[int, Mapping[str, Sequence[Any]]]) -> Recalls:
        """Return the recalls of several seeds.

        Args:
            per_class: {seed: ``Result.per_class``}, at least one.

        Raises:
            ValueError: there is none, or the seeds were scored on different classes.
        """
        seeds = tuple(sorted(per_class))
        if not seeds:
            raise ValueError("no recalls per class")
        tables = [_by_id(per_class[seed]) for seed in seeds]
        ids, zsl = tables[0][0], tables[0][2][0]
        if any(not np.array_equal(other, ids) for other, _, _ in tables):
            raise ValueError(f"seeds {', '.join(map(str, seeds))}: scored on different classes")
        unseen = ~np.isnan(zsl)
        recall = 100 * np.concatenate([table[1] for table in tables])
        return cls(
            seeds,
            tuple(ids[~unseen].tolist()),
            tuple(ids[unseen].tolist()),
            recall[:, ~unseen],
            recall[:, unseen],
            100 * np.concatenate([table[2] for table in tables])[:, unseen],
        )

    def value(self, score: Score) -> float:
        """Return a score, the mean over seeds."""
        return float(
            self._of_means(self.seen.mean(1), self.unseen.mean(1), self.zsl.mean(1), score).mean()
        )

    def per_seed(self, score: Score) -> list[float]:
        """Return a score of every seed."""
        means = self.seen.mean(1), self.unseen.mean(1), self.zsl.mean(1)
        return [float(v) for v in self._of_means(*means, score)]

    def drawn(self, score: Score) -> Float64:
        """Return the score of every draw of classes, the mean over seeds: [draws]."""
        seen = _draws(self.seen_ids) @ self.seen.T
        unseen = _draws(self.unseen_ids)
        values = self._of_means(seen, unseen @ self.unseen.T, unseen @ self.zsl.T, score)
        return np.asarray(values.mean(axis=1), dtype=np.float64)

    def classes(self, score: Score) -> int:
        """Return how many classes a score rests on: of HM, the smaller group."""
        sizes = {"S": [len(self.seen_ids)], "HM": [len(self.seen_ids), len(self.unseen_ids)]}
        return min(sizes.get(score, [len(self.unseen_ids)]))

    @staticmethod
    def _of_means(seen: Float64, unseen: Float64, zsl: Float64, score: Score) -> Float64:
        if score == "HM":
            return harmonic(seen, unseen)
        return {"S": seen, "U": unseen, "ZSL": zsl}[score]


def _by_id(table: Mapping[str, Sequence[Any]]) -> tuple[npt.NDArray[np.int64], Float64, Float64]:
    """Return ids [C], recalls [1, C] and ZSL recalls [1, C] of ``Result.per_class`` by class id."""
    ids = np.array(table["class_id"], dtype=np.int64)
    order = np.argsort(ids, kind="stable")
    recall, zsl = (np.array(table[key], dtype=np.float64)[order] for key in ("recall", "zsl"))
    return ids[order], recall[None], zsl[None]


def harmonic(seen: Float64, unseen: Float64) -> Float64:
    """Return 2 S U / (S + U), 0 where both are 0."""
    total = seen + unseen
    return np.asarray(2 * seen * unseen / np.where(total > 0, total, 1), dtype=np.float64)


@functools.lru_cache(maxsize=32)
def _draws(ids: tuple[int, ...]) -> Float64:
    """Return the share of every class in every draw with replacement: [draws, classes]."""
    rng = np.random.default_rng(int(sha256_hex(repr(ids).encode())[:16], 16))
    n = len(ids)
    return np.asarray(rng.multinomial(n, np.full(n, 1 / n), size=_DRAWS) / n, dtype=np.float64)


# -- intervals ----------------------------------------------------------------------------------


def over_classes(recalls: Recalls, score: Score = "HM", level: float = LEVEL) -> Interval:
    """Return the interval of a score over classes: the weights as they are, other classes.

    Percentiles of the draws, taken further out the fewer classes there are (Hesterberg 2015,
    section 5.3, "expanded percentile"): plain ones are too narrow for the six unseen classes of
    UCF. Always holds the score itself.
    """
    estimate = recalls.value(score)
    if recalls.classes(score) < 2:
        return Interval(estimate, None, None, "classes", level, "one class: no interval over them")
    return _percentiles(recalls.drawn(score), estimate, recalls.classes(score), level, "classes")


def over_seeds(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Return the interval of a mean over seeds: another training, the same classes.

    Student's t. With one seed there is none, and the note says so.
    """
    estimate = float(np.mean(values))
    if len(values) < 2:
        return Interval(estimate, None, None, "seeds", level, "one seed: no interval over seeds")
    half = _t(len(values) - 1, level) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Interval(estimate, estimate - half, estimate + half, "seeds", level)


def over_both(recalls: Recalls, score: Score = "HM", level: float = LEVEL) -> Interval:
    """Return the interval of a score over classes and seeds: another training, other classes.

    To every draw of classes comes a draw of the mean over seeds from Student's t.
    """
    estimate = recalls.value(score)
    values = recalls.per_seed(score)
    alone = over_seeds(values, level)
    if alone.low is None or recalls.classes(score) < 2:
        note = alone.note or "one class: no interval over them"
        return Interval(estimate, None, None, "classes and seeds", level, note)
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    content = repr((recalls.seeds, recalls.seen_ids, recalls.unseen_ids)).encode()
    rng = np.random.default_rng(int(sha256_hex(content)[:16], 16))
    drawn = recalls.drawn(score) + error * rng.standard_t(len(values) - 1, _DRAWS)
    classes = recalls.classes(score)
    return _percentiles(np.clip(drawn, 0, 100), estimate, classes, level, "classes and seeds")


def difference_over_classes(
    one: Recalls, other: Recalls, score: Score = "HM", level: float = LEVEL
) -> Interval:
    """Return the interval of ``one - other`` over classes, both scored on the same draws.

    Raises:
        ValueError: they were scored on different classes.
    """
    if (one.seen_ids, one.unseen_ids) != (other.seen_ids, other.unseen_ids):
        raise ValueError("recalls of different classes cannot be compared class by class")
    estimate = one.value(score) - other.value(score)
    if one.classes(score) < 2:
        return Interval(estimate, None, None, "classes", level, "one class: no interval over them")
    drawn = one.drawn(score) - other.drawn(score)
    return _percentiles(drawn, estimate, one.classes(score), level, "classes")


def against_one_run(values: Sequence[float], single: float, level: float = LEVEL) -> Interval:
    """Return the interval of ``mean - single`` where ``single`` is one run of the same spread.

    If ``single`` were one more run of the configuration, the interval would hold 0 in ``level`` of
    all cases: t times s times the root of (1 + 1/n).
    """
    estimate = float(np.mean(values)) - single
    if len(values) < 2:
        return Interval(estimate, None, None, "seeds", level, "one seed: no interval over seeds")
    n = len(values)
    half = _t(n - 1, level) * float(np.std(values, ddof=1)) * math.sqrt(1 + 1 / n)
    return Interval(estimate, estimate - half, estimate + half, "seeds", level)


def _t(freedom: int, level: float) -> float:
    """Return the two-sided quantile of Student's t."""
    return float(stats.t.ppf((1 + level) / 2, freedom))


def _percentiles(
    drawn: Float64, estimate: float, classes: int, level: float, over: Over
) -> Interval:
    """Return expanded percentiles of draws of ``classes`` classes, widened to hold the estimate."""
    reach = _t(classes - 1, level) * math.sqrt(classes / (classes - 1))
    tail = float(stats.norm.cdf(-reach))
    low, high = np.quantile(drawn, [tail, 1 - tail]).tolist()
    return Interval(estimate, min(low, estimate), max(high, estimate), over, level)


# -- tests between two systems ------------------------------------------------------------------


def welch(one: Sequence[float], other: Sequence[float]) -> float:
    """Return p of Welch's t-test: are the means of two sets of seeds the same?

    Unpaired: nothing but the order of batches ties seed 42 of one system to seed 42 of another.
    1 where a side has fewer than two values, or no value differs from any other.
    """
    if min(len(one), len(other)) < 2 or len({*_rounded(one), *_rounded(other)}) == 1:
        return 1.0
    if len(set(_rounded(one))) == 1 and len(set(_rounded(other))) == 1:
        return 0.0  # no spread on either side, and they differ
    sides = [(float(np.mean(v)), float(np.std(v, ddof=1)), len(v)) for v in (one, other)]
    return float(stats.ttest_ind_from_stats(*sides[0], *sides[1], equal_var=False).pvalue)


def paired_t(one: Sequence[float], other: Sequence[float]) -> float:
    """Return p of the paired t-test, n >= 1 pairs in the same order; 1 where nothing differs."""
    differences = _differences(one, other)
    if len(differences) < 2 or not np.any(differences):
        return 1.0
    if np.all(differences == differences[0]):
        return 0.0
    return float(stats.ttest_1samp(differences, 0).pvalue)


def wilcoxon(one: Sequence[float], other: Sequence[float]) -> float:
    """Return p of Wilcoxon's signed-rank test, n >= 1 pairs in the same order.

    Pairs without a difference are left out; 1 where none is left.
    """
    differences = _differences(one, other)
    differences = differences[differences != 0]
    return float(stats.wilcoxon(differences).pvalue) if len(differences) else 1.0


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(float(value), _GRAIN) for value in values]


def _differences(one: Sequence[float], other: Sequence[float]) -> Float64:
    """Return the differences of pairs.

    Raises:
        ValueError: the two have different lengths.
    """
    if len(one) != len(other):
        raise ValueError(f"{len(one)} values cannot be paired with {len(other)}")
    difference = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    return np.asarray(np.round(difference, _GRAIN), dtype=np.float64)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's corrected p values, in the order given.

    With those below 0.05 called differences, at most 5 % of all families of tests call any wrongly.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    out = np.empty_like(p)
    out[order] = np.minimum(stepped, 1)
    return [float(v) for v in out]


# -- several systems over several datasets ------------------------------------------------------


@dataclass(frozen=True)
class Ranking:
    """Systems compared over the benchmarks all of them have."""

    systems: tuple[str, ...]
    """Best average rank first."""
    datasets: tuple[str, ...]
    average_rank: Mapping[str, float]
    """1 is best; ties share the mean of their ranks."""
    friedman: float | None
    """p that all systems are alike; None for fewer than three systems or two benchmarks."""
    critical_difference: float | None
    """Nemenyi: average ranks closer than this are not told apart."""
    pairs: Mapping[tuple[str, str], float]
    """Holm-corrected p of Wilcoxon's test of every pair, the better rank first."""
    notes: tuple[str, ...]

    def separated(self, one: str, other: str, level: float = LEVEL) -> bool:
        """Return whether the data tell two systems apart."""
        return self.pairs.get((one, other), self.pairs.get((other, one), 1.0)) < 1 - level


def over_datasets(scores: Mapping[str, Mapping[str, float]], level: float = LEVEL) -> Ranking:
    """Rank systems over benchmarks, with all that can and cannot be said from them.

    Args:
        scores: {system: {benchmark: one score, higher is better}}; benchmarks that not every
            system has are left out and named in the notes.
        level: of the critical difference.
    """
    names = sorted(scores)
    everything = sorted({d for row in scores.values() for d in row})
    datasets = [d for d in everything if all(d in scores[name] for name in names)]
    n, k = len(datasets), len(names)
    table = np.array([[scores[s][d] for s in names] for d in datasets]).reshape(n, k)
    ranks = stats.rankdata(-np.round(table, _GRAIN), axis=1) if n else np.zeros((0, k))
    average = {s: float(ranks[:, i].mean()) if n else 1.0 for i, s in enumerate(names)}
    order = sorted(names, key=lambda s: (average[s], s))
    pairs = list(itertools.combinations(order, 2))
    columns = {s: table[:, i].tolist() for i, s in enumerate(names)}
    p = holm([wilcoxon(columns[a], columns[b]) for a, b in pairs])
    return Ranking(
        tuple(order),
        tuple(datasets),
        average,
        _friedman(ranks) if n > 1 and k > 2 else None,
        nemenyi(k, n, level) if n > 1 and k > 1 else None,
        dict(zip(pairs, p, strict=True)),
        tuple(_dataset_notes(everything, datasets, len(pairs), level)),
    )


def _friedman(ranks: Float64) -> float:
    """Return p that all systems are alike; 1 where every benchmark ties them all."""
    if np.all(ranks == ranks[:, :1]):
        return 1.0
    return float(stats.friedmanchisquare(*ranks.T).pvalue)


def nemenyi(systems: int, datasets: int, level: float = LEVEL) -> float:
    """Return the critical difference of average ranks (Demsar 2006, section 3.2.2)."""
    q = float(stats.studentized_range.ppf(level, systems, np.inf)) / math.sqrt(2)
    return q * math.sqrt(systems * (systems + 1) / (6 * datasets))


def _dataset_notes(
    everything: Sequence[str], used: Sequence[str], pairs: int, level: float
) -> list[str]:
    """Return what a reader of a ranking must know."""
    notes = []
    left = [d for d in everything if d not in used]
    if left:
        notes.append(f"Left out, because not every system has it: {', '.join(left)}.")
    if pairs and 2.0 ** (1 - len(used)) * pairs >= 1 - level:
        need = math.ceil(1 - math.log2((1 - level) / pairs))
        many = f"{len(used)} benchmark{'s' if len(used) != 1 else ''}"
        notes.append(
            f"{many}: too few to tell any two systems apart by Wilcoxon's test with Holm's "
            f"correction for {pairs} pair{'s' if pairs != 1 else ''}; that takes {need} or more."
        )
    return notes
