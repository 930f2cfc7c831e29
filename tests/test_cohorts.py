"""Cohorts: trials in a row share what shapes a stack, and nothing else."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState, create_trial

from avzero.spec import Search
from avzero.train.records import Epoch
from avzero.tune.cohorts import cohort_size, shared_values, structural_names
from avzero.tune.study import Report
from tests.sweeps import sweep

FREE: dict[str, Any] = {"train": {"epochs": 3, "batches_per_epoch": 6}, "fixed": {}}
SHAPES = ("batch_size", "encoder_hidden", "proj_hidden", "depth", "heads")


def values_of(place: Path, drivers: int = 1, **search: Any) -> list[dict[str, Any]]:
    """Run a study whose trials all end after an epoch; a new driver takes over now and then."""
    search = {"trials": 24, "seats": 3, "pruner": "none"} | search
    name = "cohorts-" + "-".join(str(value) for value in [drivers, *search.values()])
    settings = FREE | {"train": FREE["train"] | {"epochs": 1}}
    trained = 0
    while True:
        run = sweep(place, name=name, search=search, **settings)
        (study,) = run.studies.values()
        with run.journal.exclusive():
            study.begin(7)
            list(study.advance())
            for _ in range(-(-24 // drivers)):
                for view in study.runnable()[:1]:
                    hm = 0.1 + 0.01 * (trained % 7)
                    val = dict.fromkeys(("S", "U", "HM", "ZSL"), hm) | {"beta": 0.5}
                    epoch = Epoch(0, {"all": 1.0}, 1e-3, val, True, 1.0, 1.0)
                    study.receive(view.task.id, Report(epoch, True))
                    trained += 1
                    list(study.advance())
            if not study.remaining:
                return [dict(t.params) for t in study._trials()]


def shape(values: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(values[name] for name in SHAPES)


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes"])
def test_a_cohort_shares_its_structure_and_nothing_else(place: Path, sampler: str) -> None:
    found = values_of(place, sampler=sampler, cohort=6)
    for first in range(0, 24, 6):
        cohort = found[first : first + 6]
        assert len({shape(values) for values in cohort}) == 1
        for name in ("lr", "r_enc", "margin"):
            assert len({values[name] for values in cohort}) == 6
    assert len({shape(values) for values in found}) > 2


@pytest.mark.parametrize("sampler", ["tpe", "cmaes"])
def test_another_driver_goes_on_with_the_same_cohorts(place: Path, sampler: str) -> None:
    search = {"sampler": sampler, "cohort": 5}
    assert values_of(place, 6, **search) == values_of(place, 1, **search)


def test_by_default_as_many_as_seats_and_eight_structures_at_least(place: Path) -> None:
    assert [cohort_size(Search(), trials, 8) for trials in (1, 15, 16, 64, 200)] == [1, 1, 2, 8, 8]
    assert cohort_size(Search(), 200, 32) == 25
    assert cohort_size(Search(cohort=1), 200, 32) == 1
    found = values_of(place, sampler="random")  # 24 trials: three in a row
    assert [shape(a) == shape(b) for a, b in itertools.pairwise(found)][:5] == [
        *(True, True),
        *(False, True, True),
    ]


def test_a_study_begun_without_cohorts_goes_on_without(place: Path) -> None:
    run = sweep(place, name="older", search={"trials": 24, "seats": 3, "sampler": "random"}, **FREE)
    (study,) = run.studies.values()
    with run.journal.exclusive():
        own = run.journal.create(study.group)
        own.set_user_attr("seats", 3)  # as an earlier version left it
        study.begin(3)
        list(study.advance())
    assert len({shape(dict(t.params)) for t in study._trials()}) == 3


def test_names_are_found_by_building_the_system(place: Path) -> None:
    (group,) = sweep(place, name="names", **FREE).groups
    assert sorted(structural_names(group)) == sorted(SHAPES)
    (fixed,) = sweep(place, name="names-fixed", search={"trials": 3}).groups
    assert set(structural_names(fixed)) == {"batch_size"} & set(fixed.distributions)


def test_a_structure_that_failed_is_not_given_on() -> None:
    from optuna.distributions import IntDistribution

    def trial(depth: int, state: TrialState) -> Any:
        value = 1.0 if state is TrialState.COMPLETE else None
        space = {"depth": IntDistribution(1, 3)}
        return create_trial(state=state, value=value, params={"depth": depth}, distributions=space)

    done, failed = trial(1, TrialState.COMPLETE), trial(2, TrialState.FAIL)
    assert shared_values([done, done, done], 3, 2, ["depth"]) == {"depth": 1}
    assert shared_values([done, done, failed], 3, 2, ["depth"]) == {}
    assert shared_values([failed, done], 2, 4, ["depth"]) == {"depth": 1}
    assert shared_values([done, done], 2, 2, ["depth"]) == {}, "a cohort's first is free"
    assert shared_values([done], 1, 1, ["depth"]) == {}
