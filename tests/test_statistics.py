"""Intervals and tests: their properties, and the numbers of scipy, autorank and baycomp."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from avzero.report.statistics import (
    Recalls,
    against_one_run,
    difference_over_classes,
    holm,
    nemenyi,
    over_both,
    over_classes,
    over_datasets,
    over_seeds,
    paired_t,
    welch,
    wilcoxon,
)

SCORES = ("S", "U", "HM", "ZSL")
percents = st.floats(0, 100).map(lambda v: round(v, 4))
shares = st.integers(0, 20).map(lambda n: n / 20)


def table(seen: list[float], unseen: list[float], zsl: list[float]) -> dict[str, list[object]]:
    """``Result.per_class`` with ascending class ids."""
    n = len(seen) + len(unseen)
    return {
        "class_id": list(range(n)),
        "recall": [*seen, *unseen],
        "zsl": [*[None] * len(seen), *zsl],
        "count": [10] * n,
    }


@st.composite
def per_class(draw: st.DrawFn) -> dict[int, dict[str, list[object]]]:
    """Recalls of one to three seeds."""
    n, m = draw(st.integers(2, 8)), draw(st.integers(2, 5))
    seeds = draw(st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True))
    return {
        seed: table(*(draw(st.lists(shares, min_size=k, max_size=k)) for k in (n, m, m)))
        for seed in seeds
    }


def shuffled(data: dict[int, dict[str, list[object]]], rng: np.random.Generator) -> Recalls:
    """The same recalls with seeds and classes in another order."""
    out = {}
    for seed in rng.permutation(list(data)).tolist():
        order = rng.permutation(len(data[seed]["class_id"]))
        out[seed] = {key: [values[i] for i in order] for key, values in data[seed].items()}
    return Recalls.of(out)


@settings(max_examples=40, deadline=None)
@given(per_class(), st.randoms(use_true_random=False))
def test_intervals_hold_the_score_whatever_the_order(data: dict, random: object) -> None:
    recalls = Recalls.of(data)
    again = shuffled(data, np.random.default_rng(random.getrandbits(32)))  # type: ignore[attr-defined]
    for score in SCORES:
        interval = over_classes(recalls, score)
        assert interval.low is not None and interval.high is not None
        assert 0 <= interval.low <= interval.estimate <= interval.high <= 100
        assert interval == over_classes(again, score)
        assert over_both(recalls, score) == over_both(again, score)
        assert interval.estimate == pytest.approx(np.mean(recalls.per_seed(score)))
        same = difference_over_classes(recalls, again, score)
        assert (same.estimate, same.low, same.high) == (0, 0, 0)


@settings(deadline=None)
@given(st.lists(percents, min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_seeds(values: list[float], random: object) -> None:
    interval = over_seeds(values)
    assert interval.low is not None and interval.high is not None
    assert interval.low <= interval.estimate <= interval.high
    assert interval.estimate == pytest.approx(np.mean(values))
    random.shuffle(values)  # type: ignore[attr-defined]
    assert over_seeds(values).half == pytest.approx(interval.half)
    one_more = against_one_run(values, 10.0)
    assert one_more.half == pytest.approx(interval.half * np.sqrt(len(values) + 1))
    assert one_more.estimate == pytest.approx(np.mean(values) - 10)


def test_seeds_like_scipy() -> None:
    values = [27.1, 25.4, 29.0]
    interval = over_seeds(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))


def test_where_nothing_can_be_said() -> None:
    one = over_seeds([20.0])
    assert (one.estimate, one.low, one.text) == (20.0, None, "one seed: no interval over seeds")
    assert against_one_run([20.0], 19.0).half is None
    data = {42: table([0.5, 1.0], [0.25], [0.5])}
    recalls = Recalls.of(data)
    assert over_classes(recalls, "HM").note == "one class: no interval over them"
    assert over_classes(recalls, "S").note == ""
    assert over_both(recalls, "S").note == "one seed: no interval over seeds"
    other = Recalls.of({1: table([0.5, 1.0], [0.2, 0.3], [0.5, 0.5])})
    with pytest.raises(ValueError, match="different classes"):
        difference_over_classes(recalls, other)
    with pytest.raises(ValueError, match="seeds 1, 2: scored on different classes"):
        Recalls.of({1: table([1.0], [1.0], [1.0]), 2: table([1.0, 0.0], [1.0], [1.0])})
    with pytest.raises(ValueError, match="no recalls"):
        Recalls.of({})


def test_classes_like_scipy() -> None:
    """With many classes the draws are scipy's bootstrap; expanded percentiles are its own t's."""
    rng = np.random.default_rng(1)
    seen, unseen = rng.random(150), rng.random(60)
    recalls = Recalls.of({42: table(seen.tolist(), unseen.tolist(), unseen.tolist())})

    def mean(*groups: np.ndarray, axis: int) -> np.ndarray:
        return stats.hmean(np.stack([group.mean(axis) for group in groups]))

    for score, data in (("S", (seen,)), ("ZSL", (unseen,)), ("HM", (seen, unseen))):
        interval = over_classes(recalls, score)  # type: ignore[arg-type]
        theirs = stats.bootstrap(
            data, mean, method="percentile", n_resamples=4000, rng=2
        ).confidence_interval
        assert (interval.low, interval.high) == pytest.approx(
            (100 * theirs.low, 100 * theirs.high), abs=0.6
        )
    few = Recalls.of({42: table([0.5, 0.5], [0.1, 0.2, 0.6, 0.3, 0.9, 0.4], [0.5] * 6)})
    t = stats.ttest_1samp(few.unseen[0], 0).confidence_interval(0.95)
    interval = over_classes(few, "U")
    assert interval.high - interval.low == pytest.approx(t.high - t.low, rel=0.2)  # type: ignore[operator]


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_holm(p: list[float], random: object) -> None:
    corrected = holm(p)
    assert all(1 >= c >= raw for c, raw in zip(corrected, p, strict=True))
    in_order = [c for _, c in sorted(zip(p, corrected, strict=True))]
    assert in_order == sorted(in_order)
    order = list(range(len(p)))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert holm([p[i] for i in order]) == [corrected[i] for i in order]


def test_holm_like_statsmodels() -> None:
    from statsmodels.stats.multitest import multipletests

    rng = np.random.default_rng(0)
    for n in (1, 3, 20):
        for p in (rng.random(n) ** 4, np.round(rng.random(n), 1)):
            assert holm(p.tolist()) == pytest.approx(multipletests(p, method="holm")[1].tolist())


@settings(deadline=None)
@given(st.lists(percents, min_size=1, max_size=7))
def test_nothing_separates_a_system_from_itself(values: list[float]) -> None:
    assert welch(values, values) == paired_t(values, values) == wilcoxon(values, values) == 1
    shifted = [v + 1 for v in values]
    assert paired_t(values, shifted) == (0 if len(values) > 1 else 1)
    # Exact, although all differences are tied: 2 of the 2^n signs are as extreme. (An older
    # approximation separates five such pairs, which no exact test can.)
    assert wilcoxon(values, shifted) == pytest.approx(2.0 ** (1 - len(values)))


def test_pairs_like_scipy_and_baycomp() -> None:
    from baycomp.multiple import SignedRankTest
    from baycomp.single import Posterior

    rng = np.random.default_rng(3)
    for shift in (0.0, 0.5, 2.0):
        one = rng.normal(20, 1, 14)
        other = one + rng.normal(shift, 1, 14)
        assert welch(one, other) == pytest.approx(
            stats.ttest_ind(one, other, equal_var=False).pvalue
        )
        assert paired_t(one, other) == pytest.approx(stats.ttest_rel(one, other).pvalue)
        assert wilcoxon(one, other) == pytest.approx(stats.wilcoxon(one, other).pvalue)
        exact = stats.wilcoxon(one[:9], other[:9], method="exact").pvalue
        assert wilcoxon(one[:9], other[:9]) == pytest.approx(exact)
        # With a flat prior the chance that the worse mean is the better system is half of p.
        d = other - one
        left, right = Posterior(d.mean(), d.var(ddof=1) / len(d), len(d) - 1).probs()
        assert paired_t(one, other) == pytest.approx(2 * min(left, right))
        # The Bayesian signed-rank test is sure of a difference exactly where Wilcoxon's is.
        sure = max(SignedRankTest.probs(one, other, nsamples=2000, random_state=0)) > 0.975
        assert sure == (wilcoxon(one, other) < 0.05)
    with pytest.raises(ValueError, match="2 values cannot be paired with 3"):
        paired_t([1, 2], [1, 2, 3])


def test_ranks_like_autorank() -> None:
    import pandas as pd
    from autorank import autorank

    rng = np.random.default_rng(4)
    names, datasets = ["a", "b", "c", "d"], [f"d{i:02d}" for i in range(9)]
    data = rng.normal(20, 2, (9, 4)) + np.array([0, 1, 3, 3.2])
    data[0, 2] = data[0, 3]  # a tie
    scores = {
        name: dict(zip(datasets, data[:, i].tolist(), strict=True)) for i, name in enumerate(names)
    }
    theirs = autorank(pd.DataFrame(data, columns=names), force_mode="nonparametric")
    ours = over_datasets(scores)
    assert ours.average_rank == pytest.approx(theirs.rankdf["meanrank"].to_dict())
    assert ours.friedman == pytest.approx(theirs.pvalue)
    assert ours.critical_difference == pytest.approx(theirs.cd, rel=1e-3)  # theirs: a rounded table
    assert ours.systems == tuple(sorted(names, key=ours.average_rank.__getitem__))
    assert ours.notes == ()
    raw = [wilcoxon(data[:, names.index(a)], data[:, names.index(b)]) for a, b in ours.pairs]
    assert list(ours.pairs.values()) == holm(raw)
    assert ours.separated("a", "d") and ours.separated("d", "a")
    assert nemenyi(4, 9) == ours.critical_difference


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(percents, min_size=4, max_size=4), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_order_of_rows_changes_no_ranking(rows: list[list[float]], random: object) -> None:
    datasets = list("wxyz")
    items = [
        (f"s{i}", dict(zip(datasets, row, strict=True))) for i, row in enumerate([*rows, rows[0]])
    ]
    ours = over_datasets(dict(items))
    random.shuffle(items)  # type: ignore[attr-defined]
    assert over_datasets(dict(items)) == ours
    assert not ours.separated("s0", f"s{len(rows)}")  # its twin
    assert sum(ours.average_rank.values()) == pytest.approx(len(items) * (len(items) + 1) / 2)
    # Four benchmarks cannot separate anything, and the notes say so.
    assert not any(ours.separated(a, b) for a, b in ours.pairs)
    assert any("4 benchmarks: too few" in note for note in ours.notes)


def test_benchmarks_that_not_all_systems_have_are_named() -> None:
    ours = over_datasets({"a": {"x": 1.0, "y": 2.0}, "b": {"x": 2.0, "z": 5.0}})
    assert ours.datasets == ("x",) and ours.systems == ("b", "a")
    assert ours.notes[0] == "Left out, because not every system has it: y, z."
    assert ours.friedman is None and ours.critical_difference is None
    nothing = over_datasets({"a": {"x": 1.0}, "b": {"y": 1.0}})
    assert nothing.datasets == () and not nothing.separated("a", "b")
    assert over_datasets({}).systems == ()
