"""What a sweep tries next, as a pure function of the study's recorded history.

A driver may be killed between any two writes to the study; the next one must propose the very same
values. So a sampler is made anew for every trial, keeps nothing between asks, pickles nothing, and
draws every value from a generator keyed by the trial's number (and, for a value drawn by itself,
its name): what a killed driver had already drawn of a trial cannot shift the rest.
"""

from __future__ import annotations

import heapq
import itertools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from optuna import Study
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from avzero.errors import UserError
from avzero.protocol.counter import fold
from avzero.spec import Search

Distributions = Mapping[str, BaseDistribution]
Vector = NDArray[np.float64]

MOST_GRID_POINTS = 100_000

_STARTUP_TRIALS = 8
"""Trials TPE draws at random before it models anything."""

_KNOWN = (TrialState.COMPLETE, TrialState.PRUNED)
"""States of trials that TPE learns from."""

_SIGMA = 0.25
"""CMA-ES starts from the centre of the unit cube with this standard deviation."""

_CMA_TAG = "cma"
"""System attribute of a trial: how many populations it was drawn after, then the last one's
trials."""


def make_sampler(
    search: Search,
    number: int,
    distributions: Distributions,
    shared: Mapping[str, Any] | None = None,
) -> BaseSampler:
    """Return the sampler of one trial.

    Args:
        search: which sampler, and the seed.
        number: the trial's number.
        distributions: every searched range.
        shared: values the trial takes from its cohort (``tune.cohorts``).

    Raises:
        UserError: the sampler cannot work with these ranges.
    """
    own: BaseSampler
    if search.sampler == "cmaes":
        own = CmaSampler(search.seed, number, distributions)
    else:
        # Every value of a grid's point is given; nothing is left to a sampler.
        make, together = (_tpe, distributions) if search.sampler == "tpe" else (RandomSampler, {})
        own = PerTrial(make, search.seed, number, together)
    return Sharing(shared, own) if shared else own


def _tpe(seed: int) -> BaseSampler:
    return TPESampler(seed=seed, multivariate=True, n_startup_trials=_STARTUP_TRIALS)


def _name_key(name: str) -> int:
    """Return a number for a hyperparameter's name, the same in every process."""
    return zlib.crc32(name.encode())


def _seed(*parts: int) -> int:
    """Return a 31-bit seed."""
    return fold(*parts) >> 33


class PerTrial(BaseSampler):
    """One of Optuna's samplers for one trial; a value drawn by itself has its own generator.

    Args:
        make: returns the sampler for a seed.
        seed: of the search.
        number: of the trial.
        together: the ranges whose values are drawn together once there is something to go by.
    """

    def __init__(
        self,
        make: Callable[[int], BaseSampler],
        seed: int,
        number: int,
        together: Distributions,
    ) -> None:
        self._make = make
        self._key = (seed, number)
        self._together = together

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the ranges whose values are drawn together.

        Optuna compares the ranges of all trials at every ask, for they may differ in general; all
        trials of a sweep have the same.
        """
        together = {
            n: range_ for n, range_ in sorted(self._together.items()) if not range_.single()
        }
        known = together and study._get_trials(deepcopy=False, states=_KNOWN, use_cache=True)
        return together if known else {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Draw the values of several ranges together."""
        sampler = self._make(_seed(*self._key))
        return dict(sampler.sample_relative(_first_decides(study), trial, search_space))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        """Draw the value of one range."""
        sampler = self._make(_seed(*self._key, _name_key(param_name)))
        return sampler.sample_independent(
            _first_decides(study), trial, param_name, param_distribution
        )


class Sharing(BaseSampler):
    """Another sampler, but for the values that are given.

    Args:
        given: values by name.
        own: what proposes the others.
    """

    def __init__(self, given: Mapping[str, Any], own: BaseSampler) -> None:
        self._given = given
        self._own = own

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the ranges whose values are drawn together, without those that are given."""
        space = self._own.infer_relative_search_space(study, trial)
        return {name: range_ for name, range_ in space.items() if name not in self._given}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Draw the values of several ranges together."""
        values = self._own.sample_relative(study, trial, search_space)
        return {name: value for name, value in values.items() if name not in self._given}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        """Return a given value, or draw one."""
        if param_name in self._given:
            return self._given[param_name]
        return self._own.sample_independent(study, trial, param_name, param_distribution)


class _FirstDecides:
    """A study of several objectives that answers with the first where one is asked for.

    TPE ranks pruned trials by step and value in ``study.direction``, which a study of several
    objectives refuses to give (Optuna 5.0); the reported values are the first objective's.
    """

    def __init__(self, study: Study) -> None:
        self._study = study

    @property
    def direction(self) -> Any:
        return self._study.directions[0]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)


def _first_decides(study: Study) -> Study:
    return study if len(study.directions) == 1 else cast(Study, _FirstDecides(study))


class CmaSampler(BaseSampler):
    """CMA-ES over the numeric ranges; categorical ones are drawn at random.

    The optimiser is rebuilt for every trial from the study: as soon as a population of trials has
    ended, it is told. A proposed trial is tagged with how many populations had been told and which
    trials were the last one, so that a trial that ends late cannot rewrite the past; it joins the
    next population, whichever it was drawn from (waiting for its own wastes most trials of many
    seats). Start points count like others, a pruned trial with its last value, a failed one as its
    population's worst.

    N. Hansen, "The CMA Evolution Strategy: A Tutorial", arXiv:1604.00772, in the implementation of
    the package ``cmaes``. Optuna's own sampler keeps its optimiser pickled in the study.

    Args:
        seed: of the search.
        number: of the trial.
        distributions: every searched range.

    Raises:
        UserError: fewer than two numeric ranges, or the package is missing.
    """

    def __init__(self, seed: int, number: int, distributions: Distributions) -> None:
        try:
            from cmaes import CMA
        except ModuleNotFoundError as error:
            raise UserError(
                "sampler cmaes needs the package cmaes; pip install 'avzero[cmaes]'"
            ) from error
        self._optimiser_class = CMA
        self._seed, self._number = seed, number
        self._space = {
            name: range_
            for name, range_ in sorted(distributions.items())
            if isinstance(range_, FloatDistribution | IntDistribution) and not range_.single()
        }
        if len(self._space) < 2:
            raise UserError(
                "sampler cmaes needs at least two numeric ranges (uniform, log, int) in "
                f"search.space, and there is {', '.join(self._space) or 'none'}; add ranges, or "
                "use sampler tpe"
            )

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the numeric ranges."""
        return dict(self._space)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Draw the values of the numeric ranges; tags the trial."""
        optimiser, tag = self._replay(study.get_trials(deepcopy=False))
        # There is no public way to tag a trial from inside a sampler; Optuna's own do the same.
        study._storage.set_trial_system_attr(trial._trial_id, _CMA_TAG, tag)
        return _values(optimiser.ask(), self._space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        """Draw the value of one range at random."""
        sampler = RandomSampler(seed=_seed(self._seed, self._number, _name_key(param_name)))
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def _replay(self, trials: Sequence[FrozenTrial]) -> tuple[Any, list[int]]:
        """Return the optimiser this trial is drawn from, and the trial's tag."""
        # Ranges may have been changed since; trials of other ranges say nothing about these.
        known = {t.number: t for t in trials if self._space.keys() <= t.params.keys()}
        tags = {t.number: t.system_attrs[_CMA_TAG] for t in trials if _CMA_TAG in t.system_attrs}
        tags = {
            number: [told, *members]
            for number, (told, *members) in tags.items()
            if known.keys() >= {*members, number} - {self._number}
        }
        populations = {told: members for told, *members in tags.values()}
        # Where a driver was killed after tagging this trial, others may have ended since.
        last = tags.get(self._number, [math.inf])[0]
        waiting = [number for number, trial in sorted(known.items()) if trial.state.is_finished()]
        optimiser, told, members = self._fresh(), 0, []
        while told < last:
            population = populations.get(told + 1, waiting)[: optimiser.population_size]
            if len(population) < optimiser.population_size:
                break
            optimiser.tell(_told([known[number] for number in population], self._space))
            if optimiser.should_stop():  # Converged, or numerically at its end: look elsewhere.
                optimiser = self._fresh()
            waiting = [number for number in waiting if number not in population]
            told, members = told + 1, population
        return optimiser, [told, *members]

    def _fresh(self) -> Any:
        """Return an optimiser that knows nothing; it draws from the trial's own generator."""
        size = len(self._space)
        return self._optimiser_class(
            mean=np.full(size, 0.5),
            sigma=_SIGMA,
            bounds=np.tile([0.0, 1.0], (size, 1)),
            seed=_seed(self._seed, self._number),
        )


def _told(population: Sequence[FrozenTrial], space: Distributions) -> list[tuple[Vector, float]]:
    """Return what CMA-ES, which minimises, is told about a population."""
    scores = [_score(trial) for trial in population]
    worst = min((score for score in scores if score is not None), default=0.0)
    return [
        (_unit(trial.params, space), -(worst if score is None else score))
        for trial, score in zip(population, scores, strict=True)
    ]


def _score(trial: FrozenTrial) -> float | None:
    """Return a trial's value, a pruned one's last, or None where there is none."""
    if trial.state is TrialState.COMPLETE:
        return float(trial.values[0])
    if trial.state is TrialState.PRUNED and trial.intermediate_values:
        value = trial.intermediate_values[max(trial.intermediate_values)]
        return None if math.isnan(value) else value
    return None


def _edges(range_: Any) -> tuple[float, float]:
    """Return the ends a range has on the line that the unit interval is mapped to."""
    if isinstance(range_, IntDistribution):
        return range_.low - 0.5, range_.high + 0.5
    if range_.log:
        return math.log(range_.low), math.log(range_.high)
    return range_.low, range_.high


def _unit(params: Mapping[str, Any], space: Distributions) -> Vector:
    """Return values as a point of the unit cube."""
    point = []
    for name, range_ in space.items():
        low, high = _edges(range_)
        value = math.log(params[name]) if getattr(range_, "log", False) else params[name]
        point.append((value - low) / (high - low))
    return np.clip(np.array(point, dtype=np.float64), 0.0, 1.0)


def _values(point: Vector, space: Distributions) -> dict[str, Any]:
    """Return a point of the unit cube as values; every integer has an equal share of its side."""
    values: dict[str, Any] = {}
    for (name, range_), share in zip(space.items(), point.tolist(), strict=True):
        low, high = _edges(range_)
        value = low + share * (high - low)
        if isinstance(range_, IntDistribution):
            values[name] = min(max(round(value), range_.low), range_.high)
        else:
            value = math.exp(value) if getattr(range_, "log", False) else value
            values[name] = min(max(value, range_.low), range_.high)  # type: ignore[attr-defined]
    return values


def grid_points(
    distributions: Distributions, seed: int, count: int | None = None
) -> list[dict[str, Any]]:
    """Return the points of a grid in an order shuffled by ``seed``, or the first ``count``.

    The beginning of the list is a fair sample of the grid, and the beginning of a longer one.

    Raises:
        UserError: a range has no end of values, or there are more than 100,000 points.
    """
    sides = {name: _listed(range_) for name, range_ in distributions.items()}
    endless = [name for name, values in sides.items() if values is None]
    if endless:
        raise UserError(
            f"sampler grid needs ranges whose values can be listed, unlike {', '.join(endless)}; "
            f"write search.space.{endless[0]}: {{choice: [...]}}, or fix it"
        )
    size = math.prod(len(values) for values in sides.values() if values is not None)
    if size > MOST_GRID_POINTS:
        raise UserError(
            f"sampler grid: the ranges have {size:,} combinations, and {MOST_GRID_POINTS:,} are "
            "the most; shorten or fix some, or use sampler random"
        )
    order = heapq.nsmallest(count or size, range(size), key=lambda index: fold(seed, index))
    points = list(itertools.product(*(values for values in sides.values() if values is not None)))
    return [dict(zip(sides, points[index], strict=True)) for index in order]


def _listed(range_: BaseDistribution) -> Sequence[Any] | None:
    """Return the values of a range; None where they cannot be listed."""
    if isinstance(range_, CategoricalDistribution):
        return range_.choices
    if isinstance(range_, IntDistribution):
        return range(range_.low, range_.high + 1, range_.step)
    if range_.single() and isinstance(range_, FloatDistribution):
        return [range_.low]
    return None
