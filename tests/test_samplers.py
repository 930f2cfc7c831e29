"""Samplers: the same proposals whenever a driver is killed, CMA-ES, and grids."""

from __future__ import annotations

import builtins
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from avzero.errors import UserError
from avzero.spec import Search
from avzero.tune.samplers import _unit, _values, grid_points, make_sampler

SPACE: dict[str, BaseDistribution] = {
    "lr": FloatDistribution(1e-5, 1e-1, log=True),
    "layers": IntDistribution(1, 4),
    "drop": FloatDistribution(0.0, 0.6),
    "heads": CategoricalDistribution(["3x100", "6x50", 7]),
    "fixed": FloatDistribution(0.5, 0.5),
}


class Killed(Exception):
    """The driver dies here."""


class Mortal(InMemoryStorage):
    """A study's storage under a driver that is killed after its n-th write."""

    def __init__(self) -> None:
        super().__init__()
        self.left = math.inf

    def _wrote(self) -> None:
        self.left -= 1
        if self.left <= 0:
            self.left = math.inf
            raise Killed

    def create_new_trial(self, *args: Any, **kwargs: Any) -> int:
        made = super().create_new_trial(*args, **kwargs)
        self._wrote()
        return made

    def set_trial_param(self, *args: Any, **kwargs: Any) -> None:
        super().set_trial_param(*args, **kwargs)
        self._wrote()

    def set_trial_system_attr(self, *args: Any, **kwargs: Any) -> None:
        super().set_trial_system_attr(*args, **kwargs)
        self._wrote()

    def set_trial_state_values(self, *args: Any, **kwargs: Any) -> bool:
        done = super().set_trial_state_values(*args, **kwargs)
        self._wrote()
        return done


def quality(params: Mapping[str, Any]) -> float:
    """Return the value of a configuration; best at lr 1e-3, layers 3, drop 0.2."""
    cost: float = (
        (math.log10(params["lr"]) + 3) ** 2
        + (params["layers"] - 3) ** 2
        + (5 * params["drop"] - 1) ** 2
        + (params["heads"] == 7)
    )
    return -cost


def end(study: optuna.Study, trial: FrozenTrial) -> None:
    """End a trial: every fourth is pruned, every ninth fails."""
    value = quality(trial.params)
    values = [value, -abs(value + 3)][: len(study.directions)]
    if trial.number % 9 == 5:
        study.tell(trial.number, state=TrialState.FAIL)
    elif trial.number % 4 == 1:
        study._storage.set_trial_intermediate_value(trial._trial_id, 3, value - 0.5)
        study.tell(trial.number, state=TrialState.PRUNED)
    else:
        study.tell(trial.number, values)


def drive(storage: Mortal, search: Search, count: int, seats: int) -> list[dict[str, Any]]:
    """Run a study to its end from whatever is recorded; return what was proposed.

    What comes next depends on the recorded trials only, as in the driver: trials that lack values
    first, then free seats, then the end of the trial that has run longest.
    """
    study = optuna.create_study(
        study_name="s",
        storage=storage,
        directions=["maximize"] * len(search.objectives),
        load_if_exists=True,
    )
    if not study.get_trials(deepcopy=False):
        study.enqueue_trial({"lr": 1e-3, "layers": 1, "drop": 0.5, "heads": 7, "fixed": 0.5})
    while True:
        trials = study.get_trials(deepcopy=False)
        running = [t for t in trials if t.state is TrialState.RUNNING]
        partial = [t for t in running if t.params.keys() != SPACE.keys()]
        waiting = [t for t in trials if t.state is TrialState.WAITING]
        if partial or waiting or (len(running) < seats and len(trials) < count):
            number = partial[0].number if partial else waiting[0].number if waiting else len(trials)
            study.sampler = make_sampler(search, number, SPACE)
            taken = optuna.trial.Trial(study, partial[0]._trial_id) if partial else study.ask()
            for name, distribution in SPACE.items():
                taken._suggest(name, distribution)
        elif running:
            end(study, running[0])
        else:
            return [t.params for t in trials]


KINDS: list[dict[str, Any]] = [
    {"sampler": "tpe"},
    {"sampler": "tpe", "objectives": ["hm", "zsl"]},
    {"sampler": "random"},
    {"sampler": "random", "objectives": ["zsl", "hm"]},
    {"sampler": "cmaes"},
]


def name(kind: dict[str, Any]) -> str:
    return "-".join([kind["sampler"], *kind.get("objectives", [])])


@pytest.mark.parametrize("kind", KINDS, ids=name)
@settings(deadline=None, max_examples=12)
@given(moments=st.lists(st.integers(1, 60), min_size=1, max_size=12), seats=st.integers(1, 5))
def test_a_killed_driver_goes_on_with_the_same_proposals(
    kind: dict[str, Any], moments: list[int], seats: int
) -> None:
    """Killed after any writes, of values of a trial too, any number of times."""
    search = Search(seed=3, **kind)
    undisturbed = drive(Mortal(), search, 30, seats)
    storage = Mortal()
    for moment in moments:
        storage.left = moment
        try:
            drive(storage, search, 30, seats)
        except Killed:
            continue
    storage.left = math.inf
    assert drive(storage, search, 30, seats) == undisturbed


@pytest.mark.parametrize("kind", [*KINDS, {"sampler": "grid"}], ids=name)
def test_proposals_follow_the_seed_and_stay_in_their_ranges(kind: dict[str, Any]) -> None:
    first, again, other = (drive(Mortal(), Search(seed=s, **kind), 40, 3) for s in (0, 0, 1))
    assert first == again and first[0] == other[0]
    assert all(mine != theirs for mine, theirs in zip(first[1:], other[1:], strict=True))
    assert len({tuple(p.items()) for p in first}) == 40
    for params in first:
        assert 1e-5 <= params["lr"] <= 1e-1 and 0.0 <= params["drop"] <= 0.6
        assert type(params["layers"]) is int and 1 <= params["layers"] <= 4
        assert params["heads"] in ("3x100", "6x50", 7) and params["fixed"] == 0.5
        # Values drawn one by one are drawn independently.
        assert abs((math.log10(params["lr"]) + 5) / 4 - params["drop"] / 0.6) > 1e-6
    assert {p["heads"] for p in first} == {"3x100", "6x50", 7}


def test_tpe_of_two_objectives_prefers_the_first_among_pruned_trials() -> None:
    """Optuna cannot rank them by itself; only pruned trials, so nothing else can guide it."""
    study = optuna.create_study(directions=["maximize", "maximize"])
    space: dict[str, BaseDistribution] = {
        "x": FloatDistribution(0, 1),
        "y": FloatDistribution(0, 1),
    }
    for number in range(40):
        study.sampler = make_sampler(Search(), number, space)
        trial = study.ask(space)
        value = -abs(trial.params["x"] - 0.8)
        study._storage.set_trial_intermediate_value(trial._trial_id, 1, value)
        # The first ends completely: the ranges of complete trials are those drawn together.
        study.tell(trial, [value, 0.0] if number == 0 else None, state=_ended(number))
    late = [t.params["x"] for t in study.trials[25:]]
    assert statistics.median(abs(x - 0.8) for x in late) < 0.12


def _ended(number: int) -> TrialState:
    return TrialState.PRUNED if number else TrialState.COMPLETE


FIVE: dict[str, BaseDistribution] = {f"x{i}": FloatDistribution(0, 1) for i in range(5)}


def best_of(kind: Any, seed: int, seats: int, count: int = 120) -> float:
    """Return how near a sampler comes to the minimum of a quadratic of five unequal axes."""
    study = optuna.create_study(direction="maximize")
    running: list[optuna.trial.Trial] = []
    for number in range(count):
        study.sampler = make_sampler(Search(sampler=kind, seed=seed), number, FIVE)
        running.append(study.ask(FIVE))
        while len(running) >= seats or (number == count - 1 and running):
            trial = running.pop(0)
            offsets = zip(trial.params.values(), (0.3, 0.7, 0.45, 0.6, 0.2), strict=True)
            parts = zip(offsets, (1, 2, 3, 1, 5), strict=True)
            study.tell(trial, -sum(weight * (x - at) ** 2 for (x, at), weight in parts))
    return -study.best_value


@pytest.mark.parametrize(("seats", "times"), [(1, 8), (16, 4)])
def test_cmaes_finds_a_minimum_that_random_search_does_not(seats: int, times: float) -> None:
    found = {
        kind: statistics.median(best_of(kind, seed, seats) for seed in range(5))
        for kind in ("cmaes", "random")
    }
    assert found["cmaes"] * times < found["random"]


def cma_trials(
    count: int, ends: Callable[[list[optuna.trial.Trial]], None]
) -> list[dict[str, Any]]:
    """Return what CMA-ES proposes; ``ends`` is called after each proposal and may end trials."""
    study = optuna.create_study(direction="maximize")
    trials: list[optuna.trial.Trial] = []
    for number in range(count):
        study.sampler = make_sampler(Search(sampler="cmaes"), number, FIVE)
        trials.append(study.ask(FIVE))
        ends(trials)
    return [trial.params for trial in trials]


def test_cmaes_finishes_a_proposal_as_it_began_it() -> None:
    """Killed half-way through one; others end before the next driver takes it up."""

    def proposal(kill: bool) -> dict[str, Any]:
        storage = Mortal()
        study = optuna.create_study(storage=storage, direction="maximize")
        for number in range(16):  # two populations, had number 3 ended
            study.sampler = make_sampler(Search(sampler="cmaes"), number, FIVE)
            trial = study.ask(FIVE)
            if number != 3:
                study.tell(trial, height(trial.params))
        study.sampler = make_sampler(Search(sampler="cmaes"), 16, FIVE)
        if not kill:
            return study.ask(FIVE).params
        storage.left = 4  # writes: made, tagged, two values
        with pytest.raises(Killed):
            study.ask(FIVE)
        assert len(study.trials[16].params) == 2
        study.tell(3, 0.0)
        study.sampler = make_sampler(Search(sampler="cmaes"), 16, FIVE)
        taken = optuna.trial.Trial(study, study.trials[16]._trial_id)
        return {name: taken._suggest(name, range_) for name, range_ in FIVE.items()}

    assert proposal(True) == proposal(False)


def test_cmaes_maps_ranges_to_the_unit_cube_and_back() -> None:
    space: dict[str, BaseDistribution] = {name: SPACE[name] for name in ("lr", "layers", "drop")}
    centre = _values(np.full(3, 0.5), space)
    assert centre["lr"] == pytest.approx(1e-3) and centre["drop"] == pytest.approx(0.3)
    for corner, at in ((0.0, (1e-5, 1, 0.0)), (1.0, (1e-1, 4, 0.6))):
        assert tuple(_values(np.full(3, corner), space).values()) == pytest.approx(at)
    shares = Counter(_values(np.array([0.5, u / 1000, 0.5]), space)["layers"] for u in range(1000))
    assert all(249 <= shares[value] <= 251 for value in (1, 2, 3, 4))
    for number in range(11):
        point = np.array([number / 10, (number % 4 + 0.5) / 4, 1 - number / 10])
        assert _unit(_values(point, space), space) == pytest.approx(point)


def height(params: Mapping[str, Any]) -> float:
    return float(sum(params.values()))


def test_cmaes_a_late_trial_joins_the_next_population() -> None:
    """It does not rewrite the one it would have been in; here they have 8 trials each."""

    def proposals(late: bool) -> list[dict[str, Any]]:
        def ends(trials: list[optuna.trial.Trial]) -> None:
            last = trials[-1]
            if last.number:
                last.study.tell(last, height(last.params))
            if late and last.number == 25:
                last.study.tell(trials[0], 100.0)

        return cma_trials(34, ends)

    # Told so far: 1-8, 9-16, 17-24; without the late one the next are 25-32, asked for by 33.
    punctual, late = proposals(False), proposals(True)
    assert punctual[:32] == late[:32] and punctual[32] != late[32]


def test_cmaes_treats_a_failed_trial_as_its_populations_worst() -> None:
    def mean_height(fails: Callable[[float], bool]) -> float:
        def ends(trials: list[optuna.trial.Trial]) -> None:
            last = trials[-1]
            up = height(last.params)
            last.study.tell(last, *([None, TrialState.FAIL] if fails(up) else [up - 9]))

        return statistics.fmean(height(p) for p in cma_trials(60, ends)[30:])

    # All values are negative: a failure counted as 0 would do well.

    assert mean_height(lambda up: False) > 3.2
    assert mean_height(lambda up: up < 2.2) > 3.2
    assert mean_height(lambda up: up > 3) < 3.2
    assert 1 < mean_height(lambda up: True) < 4  # nothing but failures is no evidence


def test_cmaes_takes_a_pruned_trial_at_its_last_value() -> None:
    def proposals(pruned: bool) -> list[dict[str, Any]]:
        def ends(trials: list[optuna.trial.Trial]) -> None:
            last = trials[-1]
            if pruned and last.number % 2:
                last.report(9.0, 1)
                last.report(height(last.params), 2)
                last.study.tell(last, state=TrialState.PRUNED)
            else:
                last.study.tell(last, height(last.params))

        return cma_trials(30, ends)

    assert proposals(True) == proposals(False)


def test_cmaes_starts_afresh_once_it_has_converged() -> None:
    """On two integers it soon proposes one configuration only; it does not stay there."""
    space: dict[str, BaseDistribution] = {"a": IntDistribution(1, 6), "b": IntDistribution(1, 6)}
    study = optuna.create_study(direction="maximize")
    for number in range(200):
        study.sampler = make_sampler(Search(sampler="cmaes"), number, space)
        trial = study.ask(space)
        study.tell(trial, -((trial.params["a"] - 3) ** 2) - (trial.params["b"] - 3) ** 2)
    proposed = [(t.params["a"], t.params["b"]) for t in study.trials]
    assert set(proposed[90:110]) == {(3, 3)}
    assert len(set(proposed[130:])) > 8


def test_cmaes_after_a_range_was_added() -> None:
    """Trials that lack a range are no evidence about it; nothing breaks."""
    study = optuna.create_study(direction="maximize")
    for number in range(40):
        space = dict(FIVE) if number < 20 else FIVE | {"x5": FloatDistribution(0, 1)}
        study.sampler = make_sampler(Search(sampler="cmaes"), number, space)
        trial = study.ask(space)
        study.tell(trial, trial.params["x0"])
    assert study.trials[-1].params.keys() == {f"x{i}" for i in range(6)}
    assert study.trials[20].system_attrs["cma"] == [0]
    assert study.trials[-1].system_attrs["cma"][0] >= 1


@pytest.mark.parametrize(
    ("space", "named"),
    [
        ({"heads": SPACE["heads"]}, "none"),
        ({"lr": SPACE["lr"], "heads": SPACE["heads"], "fixed": SPACE["fixed"]}, "lr;"),
    ],
)
def test_cmaes_needs_two_numeric_ranges(space: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=f"at least two numeric ranges .* there is {named}"):
        make_sampler(Search(sampler="cmaes"), 0, space)


def test_cmaes_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "cmaes":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'avzero\[cmaes\]'"):
        make_sampler(Search(sampler="cmaes"), 0, SPACE)


GRID: dict[str, BaseDistribution] = {
    "a": CategoricalDistribution([0.1, "x", True]),
    "b": IntDistribution(3, 6),
    "c": FloatDistribution(2.0, 2.0),
    "d": CategoricalDistribution(list(range(10))),
}


def test_grid_is_every_combination_once_in_an_order_of_its_own() -> None:
    points = grid_points(GRID, seed=5)
    assert len(points) == 3 * 4 * 10
    assert len({tuple(p.items()) for p in points}) == 120
    assert {p["c"] for p in points} == {2.0} and {p["b"] for p in points} == {3, 4, 5, 6}
    assert points == grid_points(GRID, seed=5) != grid_points(GRID, seed=6)
    for count in (1, 7, 119, 500):
        assert grid_points(GRID, 5, count) == points[:count]
    assert grid_points({}, 5) == [{}]


def test_the_beginning_of_a_grid_is_a_fair_sample() -> None:
    """The first 12 of 120 hold every value in about its share, for most seeds."""
    counts: Counter[tuple[str, Any]] = Counter()
    for seed in range(200):
        counts.update((k, p[k]) for p in grid_points(GRID, seed, 12) for k in ("a", "b"))
    for value in (0.1, "x", True):
        assert counts["a", value] == pytest.approx(800, rel=0.15)
    for value in (3, 4, 5, 6):
        assert counts["b", value] == pytest.approx(600, rel=0.15)


def test_grids_that_are_refused() -> None:
    endless = GRID | {"lr": FloatDistribution(1e-4, 1e-2, log=True), "r": FloatDistribution(0, 1)}
    with pytest.raises(UserError, match=r"unlike lr, r; write search.space.lr: \{choice: \[...\]"):
        grid_points(endless, 0)
    wide = {f"i{n}": IntDistribution(1, 10) for n in range(5)}
    assert len(grid_points(wide, 0, 3)) == 3
    with pytest.raises(UserError, match="200,000 combinations, and 100,000 are the most"):
        grid_points(wide | {"two": IntDistribution(1, 2)}, 0)
