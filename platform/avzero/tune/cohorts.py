"""Trials in a row that share what shapes a stack, so that an array can train them together.

Sizes, heads and the batch size decide which operations a step has; two trials that differ in one
of them cannot be stacked. Proposed freely, hardly two of a sweep's trials agree in all, and an
array of 32 slots would run 32 programs one after the other. So a sweep is proposed in cohorts: the
sampler chooses everything for a cohort's first trial, and for the others all but the structural
values, which they take from the first. The sampler still sees every result, and chooses the next
cohort's structure by them.

Which names are structural is found by building the system (``train.structure``), not declared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import IntDistribution
from optuna.trial import FrozenTrial, TrialState

from avzero.errors import UserError
from avzero.spec import Search
from avzero.tune.samplers import make_sampler
from avzero.tune.space import Group

_FEWEST_COHORTS = 8
"""So many structures are tried at least, however many slots there are."""
_PROBED = 3
"""Configurations around which every value of a hyperparameter is tried."""
_MOST_INTEGERS = 16


def begun_with(study: optuna.Study | None) -> tuple[int, int] | None:
    """Return the seats and the size of a cohort a study began with; None before that."""
    if study is None or "seats" not in study.user_attrs:
        return None
    # Studies begun by an earlier version had no cohorts.
    return int(study.user_attrs["seats"]), int(study.user_attrs.get("cohort", 1))


def cohort_size(search: Search, trials: int, seats: int) -> int:
    """Return how many trials in a row share a structure."""
    return search.cohort or max(1, min(seats, trials // _FEWEST_COHORTS))


def shared_values(
    trials: Sequence[FrozenTrial], number: int, size: int, names: Sequence[str]
) -> dict[str, Any]:
    """Return the structural values a trial takes from its cohort; none where it is free.

    A structure that failed is not given on: the next trial is free again.

    Args:
        trials: the study's, in order.
        number: the trial's.
        size: of a cohort.
        names: the structural hyperparameters.
    """
    for earlier in trials[number - number % size : number]:
        if earlier.state is not TrialState.FAIL and earlier.params.keys() >= set(names):
            return {name: earlier.params[name] for name in names}
    return {}


def structural_names(group: Group) -> tuple[str, ...]:
    """Return the searched names that shape a stack."""
    counts = structural(group, proposals(group, min(_PROBED, group.trials)))
    return tuple(name for name, count in counts.items() if count > 1)


def structural(group: Group, around: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return for every searched name how many structures its values make, others left alone.

    Args:
        group: the group.
        around: configurations to vary, for a switch may matter only beside another; the first
            three are used.
    """
    counts = {}
    for name, known in group.distributions.items():
        values = getattr(known, "choices", None) or (known.low, known.high)  # type: ignore[attr-defined]
        if isinstance(known, IntDistribution) and known.high - known.low < _MOST_INTEGERS:
            values = tuple(range(known.low, known.high + 1))
        found = 1
        for point in around[:_PROBED]:
            different = set()
            for value in values:
                # A combination the system refuses makes no structure.
                with contextlib.suppress(UserError):
                    different.add(group.structure(group.task({**point, name: value})))
            found = max(found, len(different))
        counts[name] = found
    return counts


def proposals(
    group: Group, count: int, size: int = 1, names: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Return the first configurations a sweep would try if none had ended before.

    Args:
        group: the group.
        count: how many.
        size: of a cohort.
        names: the structural hyperparameters.
    """
    study = optuna.create_study(directions=["maximize"] * len(group.job.search.objectives))
    for point in group.start_points[:count]:
        study.enqueue_trial(point)
    found = []
    for number in range(count):
        shared = shared_values(study.get_trials(deepcopy=False), number, size, names)
        study.sampler = make_sampler(group.job.search, number, group.distributions, shared)
        found.append(dict(study.ask(group.distributions).params))
    return found
