"""Early stopping by asynchronous successive halving or the median rule, as a pure function.

A sweep has a virtual clock that counts epochs. A trial started at ``start`` in ``seat`` reports
after e epochs at the moment (start + e, seat); no two reports share a moment, and the driver takes
them in this order. A decision looks only at values reported at earlier moments. They are all in
the study by then and never change, so the decision comes out the same whenever it is taken again:
later, by another driver, after any number of restarts. States of trials do change; they are not
looked at.

Values are those of ``FrozenTrial.intermediate_values``: the best VAL HM so far, by epochs done.

Successive halving without waiting: Li et al., "A System for Massively Parallel Hyperparameter
Tuning", MLSys 2020. The median rule: Golovin et al., "Google Vizier", KDD 2017, section 3.2.1.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from optuna.trial import FrozenTrial

from avzero.spec import Search

SEAT, START = "seat", "start"
"""User attributes of a trial: where (0, 1, …) and at which virtual epoch it was started."""

_FEWEST_FOR_MEDIAN = 4

_BEFORE_ALL = (-1, -1)
"""Moment of reports of trials without a place on the clock: an earlier version made them."""


def rung_epochs(min_epochs: int, reduction: int, epochs: int) -> list[int]:
    """Return the epochs at which halving decides: min_epochs * reduction^k below ``epochs``."""
    rungs = []
    rung = min_epochs
    while rung < epochs:
        rungs.append(rung)
        rung *= reduction
    return rungs


def should_stop(
    trial: FrozenTrial,
    step: int,
    value: float,
    others: Sequence[FrozenTrial],
    search: Search,
    epochs: int,
) -> bool:
    """Return whether a trial is stopped at a report.

    Args:
        trial: with the user attributes ``seat`` and ``start``; whether this report or later ones
            are among its values already makes no difference.
        step: epochs done at the report.
        value: best VAL HM so far; NaN counts as worst.
        others: trials of the study in any order; ``trial`` may be among them, for no report comes
            before itself.
        search: pruner, min_epochs and reduction.
        epochs: the trial's own budget; at its end there is nothing to stop.
    """
    earlier = max((s for s in trial.intermediate_values if s < step), default=0)
    if not decides(earlier, step, search, epochs):
        return False
    now = (trial.user_attrs[START] + step, trial.user_attrs[SEAT])
    if search.pruner == "median":
        return _below_median(step, _rank(value), others, now)
    return any(
        # With evaluate_every above 1, one report may be the first at or after several rungs.
        _outside_best(rung, _rank(value), others, now, search.reduction)
        for rung in rung_epochs(search.min_epochs, search.reduction, epochs)
        if earlier < rung <= step
    )


def decides(before: int, step: int, search: Search, epochs: int) -> bool:
    """Return whether ``should_stop`` looks at other trials at a report.

    Args:
        before: epochs done at the report before, 0 if this is the first.
        step: epochs done at this report.
        search: pruner, min_epochs and reduction.
        epochs: the trial's own budget.
    """
    if search.pruner == "none" or step >= epochs:
        return False
    if search.pruner == "median":
        return step >= search.min_epochs
    rungs = rung_epochs(search.min_epochs, search.reduction, epochs)
    return any(before < rung <= step for rung in rungs)


def _outside_best(
    rung: int, value: float, others: Sequence[FrozenTrial], now: tuple[int, int], reduction: int
) -> bool:
    """Return whether a value is not among the best 1 / reduction seen at a rung, itself included.

    At least one is kept. The others seen came earlier, so of equals they go first.
    """
    seen = []
    for other in others:
        values = other.intermediate_values
        step = rung if rung in values else min((s for s in values if s > rung), default=None)
        if step is not None and _moment(other, step) < now:
            seen.append(_rank(values[step]))
    better = sum(other >= value for other in seen)
    return better >= max(1, (len(seen) + 1) // reduction)


def _below_median(
    step: int, value: float, others: Sequence[FrozenTrial], now: tuple[int, int]
) -> bool:
    """Return whether a value is below the median of at least four others' at the same step."""
    seen = [
        _rank(other.intermediate_values[step])
        for other in others
        if step in other.intermediate_values and _moment(other, step) < now
    ]
    return len(seen) >= _FEWEST_FOR_MEDIAN and value < statistics.median(seen)


def _moment(trial: FrozenTrial, step: int) -> tuple[int, int]:
    """Return when, on the sweep's virtual clock, a trial reported ``step``."""
    attrs = trial.user_attrs
    return (attrs[START] + step, attrs[SEAT]) if START in attrs else _BEFORE_ALL


def _rank(value: float) -> float:
    """Return a value for comparing: NaN, which compares with nothing, is worst."""
    return -math.inf if math.isnan(value) else value
