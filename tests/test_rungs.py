"""Early stopping: hand-made cases, decisions that never change, and what pruning saves."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import FrozenTrial, TrialState, create_trial

from avzero.spec import Search
from avzero.tune.rungs import SEAT, START, rung_epochs, should_stop

Curve = Sequence[float | None]
"""Best VAL HM so far after 1, 2, … epochs; None where VAL was not looked at."""


def trial(number: int, start: int, seat: int, reports: dict[int, float]) -> FrozenTrial:
    made = create_trial(
        state=TrialState.RUNNING,
        user_attrs={START: start, SEAT: seat},
        intermediate_values=dict(reports),
    )
    made.number = number
    return made


@dataclass
class Report:
    """One call of the rule: what it was asked and what it said."""

    number: int
    step: int
    value: float
    stopped: bool
    known: int
    """Reports made until then, this one included."""


@dataclass
class Run:
    """A sweep on the virtual clock."""

    trials: list[FrozenTrial] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)
    epochs: int = 0
    """Trained by all trials."""


def sweep(curves: Sequence[Curve], seats: int, search: Search) -> Run:
    """Run trials as the driver does: seats in order, reports by (moment, seat)."""
    run, agenda = Run(), list[tuple[int, int, int]]()

    def seat_next(now: int, seat: int) -> None:
        if len(run.trials) < len(curves):
            run.trials.append(trial(len(run.trials), now, seat, {}))
            heapq.heappush(agenda, (now + 1, seat, len(run.trials) - 1))

    for seat in range(seats):
        seat_next(0, seat)
    while agenda:
        now, seat, number = heapq.heappop(agenda)
        one, curve = run.trials[number], curves[number]
        step = now - one.user_attrs[START]
        run.epochs += 1
        value, stopped = curve[step - 1], False
        if value is not None:
            one.intermediate_values[step] = value
            stopped = should_stop(one, step, value, run.trials, search, len(curve))
            run.reports.append(Report(number, step, value, stopped, len(run.reports) + 1))
        if stopped or step == len(curve):
            seat_next(now, seat)
        else:
            heapq.heappush(agenda, (now + 1, seat, number))
    return run


def test_rung_epochs() -> None:
    assert rung_epochs(1, 3, 27) == [1, 3, 9]
    assert rung_epochs(1, 3, 28) == [1, 3, 9, 27]
    assert rung_epochs(4, 2, 50) == [4, 8, 16, 32]
    assert rung_epochs(5, 3, 5) == []


HALVING = Search(pruner="halving", min_epochs=2, reduction=3)
MEDIAN = Search(pruner="median", min_epochs=2)


@pytest.mark.parametrize(
    ("value", "before", "stopped"),
    [
        (0.1, [], False),  # alone
        (0.1, [0.2], True),  # one of two is kept, and the first was better
        (0.3, [0.2], False),
        (0.2, [0.2], True),  # a tie keeps the earlier
        (0.3, [0.1, 0.2, 0.4, 0.1], True),  # one of five: only the best
        (0.3, [0.1, 0.2, 0.4, 0.1, 0.1], False),  # two of six
        (0.3, [0.1, 0.2, 0.4, 0.3, 0.1], True),  # the earlier of two seconds has its place
        (math.nan, [], False),
        (math.nan, [0.0], True),
        (0.0, [math.nan], False),
    ],
)
def test_halving_keeps_the_best_third(value: float, before: list[float], stopped: bool) -> None:
    others = [trial(n, 0, n, {1: 0.9, 2: v}) for n, v in enumerate(before)]
    mine = trial(len(before), 0, len(before), {1: 0.0})
    assert should_stop(mine, 2, value, others, HALVING, 10) is stopped
    assert should_stop(mine, 2, value, [*others, mine], HALVING, 10) is stopped
    for search, step, epochs in (
        (HALVING, 1, 10),  # before the first rung
        (HALVING, 4, 4),  # nothing is left to stop
        (Search(pruner="none", min_epochs=2), 2, 10),
    ):
        assert not should_stop(trial(9, 0, 9, {}), step, value, others, search, epochs)


def test_halving_between_rungs_and_at_the_next() -> None:
    others = [trial(n, 0, n, dict.fromkeys(range(1, 7), 0.5)) for n in range(3)]
    late = trial(3, 0, 3, {2: 0.9, 3: 0.9, 4: 0.9, 5: 0.9})
    assert not should_stop(late, 5, 0.1, others, HALVING, 10)
    assert should_stop(late, 6, 0.1, others, HALVING, 10)


def test_halving_with_looks_at_val_every_few_epochs() -> None:
    """A rung is decided at the first report at or after it, once, and against such reports."""
    others = [trial(n, 0, n, {3: 0.2 + n, 6: 0.5}) for n in range(2)]
    mine = trial(2, 0, 2, {})
    assert should_stop(mine, 3, 1.1, others, HALVING, 10)
    assert not should_stop(mine, 3, 1.3, others, HALVING, 10)
    mine.intermediate_values[3] = 1.3
    assert not should_stop(mine, 4, 0.0, others, HALVING, 10)
    two_rungs = trial(3, 0, 3, {})  # rungs 2 and 6 at once; at 6 it is the better of two
    early = [trial(0, 0, 0, {2: 0.9}), trial(1, 0, 1, {2: 0.1, 6: 0.1})]
    assert should_stop(two_rungs, 7, 0.5, early, HALVING, 10)
    assert not should_stop(two_rungs, 7, 0.95, early, HALVING, 10)


def test_order_is_moment_then_seat() -> None:
    mine = trial(5, 3, 1, {})  # its second epoch ends at (5, 1)
    for start, seat, seen in ((3, 0, True), (3, 2, False), (2, 2, True), (4, 0, False)):
        assert should_stop(mine, 2, 0.1, [trial(0, start, seat, {2: 0.5})], HALVING, 9) is seen
    # Trials of a version without the clock came before everything.
    older = create_trial(state=TrialState.FAIL, intermediate_values={2: 0.5})
    older.number = 0
    assert should_stop(mine, 2, 0.1, [older], HALVING, 9)


@pytest.mark.parametrize(
    ("value", "step", "before", "stopped"),
    [
        (0.2, 3, [0.1, 0.3, 0.4], False),  # too few
        (0.374, 3, [0.125, 0.25, 0.5, 0.75], True),  # below 0.375
        (0.375, 3, [0.125, 0.25, 0.5, 0.75], False),  # at it
        (0.2, 4, [0.1, 0.2, 0.4, 0.5], False),  # nobody else has a value at this step
        (0.2, 1, [0.1, 0.2, 0.4, 0.5], False),  # before min_epochs, where all have 0.9
        (0.2, 2, [0.1, 0.2, 0.4, 0.5], True),  # at min_epochs, where all have 0.9
        (0.2, 10, [0.1, 0.2, 0.4, 0.5], False),  # at the end, where all have 0.9
        (math.nan, 3, [0.1, 0.2, 0.4, 0.5], True),
        (0.2, 3, [math.nan, 0.1, 0.3, 0.5, 0.6], True),
    ],
)
def test_median(value: float, step: int, before: list[float], stopped: bool) -> None:
    others = [trial(n, 0, n, {1: 0.9, 2: 0.9, 3: v, 10: 0.9}) for n, v in enumerate(before)]
    mine = trial(len(before), 0, len(before), {})
    assert should_stop(mine, step, value, others, MEDIAN, 10) is stopped
    later = [trial(n, 1, n, {3: 1.0}) for n in range(20, 30)]
    assert should_stop(mine, step, value, later + others, MEDIAN, 10) is stopped


@st.composite
def sweeps(draw: st.DrawFn) -> tuple[list[Curve], int, Search]:
    """Return learning curves with ties, budgets and looks at VAL of their own; seats; rules."""
    curves: list[Curve] = []
    for _ in range(draw(st.integers(1, 14))):
        epochs, every = draw(st.integers(1, 12)), draw(st.sampled_from([1, 1, 2, 3]))
        gains = draw(st.lists(st.integers(0, 2), min_size=epochs, max_size=epochs))
        looks = [e % every == 0 or e == epochs for e in range(1, epochs + 1)]
        curves.append(
            [float(sum(gains[: e + 1])) if look else None for e, look in enumerate(looks)]
        )
    search = Search(
        pruner=draw(st.sampled_from(["halving", "median"])),
        min_epochs=draw(st.integers(1, 4)),
        reduction=draw(st.integers(2, 3)),
    )
    return curves, draw(st.integers(1, 5)), search


@settings(deadline=None, max_examples=80)
@given(sweeps(), st.randoms(use_true_random=False), st.data())
def test_a_decision_is_the_same_whenever_it_is_taken(
    made: tuple[list[Curve], int, Search], shuffled: random.Random, data: st.DataObject
) -> None:
    """With any part of what came later, in any order of trials, whatever became of them."""
    curves, seats, search = made
    run = sweep(curves, seats, search)
    for report in run.reports:
        known = data.draw(st.integers(report.known, len(run.reports)))
        part = [trial(t.number, t.user_attrs[START], t.user_attrs[SEAT], {}) for t in run.trials]
        for earlier in run.reports[:known]:
            part[earlier.number].intermediate_values[earlier.step] = earlier.value
        one = part[report.number]
        for other in part:
            other.state = data.draw(st.sampled_from(list(TrialState)))
        shuffled.shuffle(part)
        again = should_stop(
            one, report.step, report.value, part, search, len(curves[report.number])
        )
        assert again is report.stopped


def learning_curves(count: int, epochs: int, seed: int) -> list[Curve]:
    """Return noisy saturating curves: unequal ends, unequal speeds, so early ranks mislead."""
    draw = random.Random(seed)
    curves: list[Curve] = []
    for _ in range(count):
        top, pace = draw.betavariate(2, 3) / 2, math.exp(draw.uniform(0.4, 2.5))
        noisy = [
            top * (1 - math.exp(-e / pace)) + draw.gauss(0, 0.02) for e in range(1, epochs + 1)
        ]
        curves.append([max(noisy[: e + 1]) for e in range(epochs)])
    return curves


@pytest.mark.parametrize(
    ("search", "epochs", "most"),
    [
        (Search(pruner="halving", min_epochs=1, reduction=3), 27, 0.18),
        (Search(pruner="median", min_epochs=1), 27, 0.25),
        (Search(), 50, 0.25),  # what a job gets that says nothing
    ],
)
def test_share_of_epochs_trained_by_200_trials(search: Search, epochs: int, most: float) -> None:
    """Against no pruning (goal 0.55), on 16 seats; the best curve is found or nearly."""
    for seed in range(5):
        curves = learning_curves(200, epochs, seed)
        run = sweep(curves, 16, search)
        assert 0.05 < run.epochs / (200 * epochs) <= most
        ends = [t.intermediate_values.get(epochs, 0.0) for t in run.trials]
        every_end = sorted((curve[-1] or 0.0 for curve in curves), reverse=True)
        assert max(ends) >= every_end[3]


@pytest.mark.parametrize("search", [Search(), Search(pruner="median")], ids=lambda s: s.pruner)
def test_decisions_do_not_depend_on_the_number_of_seats(search: Search) -> None:
    """At equal steps the clock orders trials as they were started, however many ran at once."""
    curves = learning_curves(60, 30, 7)
    ends = [
        [max(t.intermediate_values) for t in sweep(curves, seats, search).trials]
        for seats in (1, 4, 16, 60)
    ]
    assert ends[0] == ends[1] == ends[2] == ends[3] and len(set(ends[0])) > 2


def test_no_pruning_trains_everything() -> None:
    run = sweep(learning_curves(20, 9, 0), 4, Search(pruner="none"))
    assert run.epochs == 20 * 9
