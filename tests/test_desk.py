"""Arrays that are lost, and arrays that wait for a place: no trial may wait with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from avzero.tune.desk import Desk
from avzero.tune.place import ArraySearcher
from tests.sweeps import sweep
from tests.test_clock import SEARCH, TRAIN, rows


def desk_of(place: Path, name: str, single: bool = False, deaths: int = 2) -> tuple[Any, Desk]:
    """Return a begun sweep and its desk: two arrays of two slots."""
    search = SEARCH | {"trials": 8, "seats": 4, "pruner": "none"}
    run = sweep(place, name=name, train=TRAIN, search=search)
    run.journal.path.parent.mkdir(parents=True, exist_ok=True)
    slots = 1 if single else 2
    return run, Desk(run.studies, lambda view: None, [], slots, 2, single, deaths)


def held(desk: Desk, array: str) -> set[int]:
    """Return the numbers of an array's trials."""
    return {view.number for view in desk._held.get(array, {}).values()}


def test_others_take_up_what_a_lost_array_held(place: Path) -> None:
    """With one of two machines gone for good the sweep comes to its end on the other."""
    run, desk = desk_of(place, "gone")
    first, second = desk.orders("array-0"), desk.orders("array-1")
    desk.take("array-0", rows(first))
    desk.take("array-1", rows(second))
    assert held(desk, "array-1") == {2, 3}
    desk.fell("array-1")
    seen: set[int] = set()
    for _ in range(400):
        if desk.over:
            break
        orders = desk.orders("array-0")
        seen |= held(desk, "array-0")
        assert orders, "nothing waits for the array that is gone"
        desk.take("array-0", rows(orders))
    desk.raise_trouble()
    assert desk.over and seen == set(range(8))
    (study,) = run.studies.values()
    assert all(t.state.is_finished() for t in study._trials())


def test_a_lost_machine_is_not_held_against_a_trial(place: Path) -> None:
    """A trial alone in an array that is lost goes on elsewhere, until it was in too many."""
    run, desk = desk_of(place, "blame", deaths=2)
    for number in range(3):
        array = f"array-{number}"
        desk.orders(array)  # a suspect's turn comes when nothing else is left
        desk._held[array] = {v.task.id: v for v in desk._runnable() if v.number == 0}
        desk.lost(array, "its node is gone")
        (study,) = run.studies.values()
        state = study._trials()[0].state
        assert state is (TrialState.FAIL if number == 2 else TrialState.RUNNING)
    desk.raise_trouble()


def test_an_array_that_waits_for_a_place_holds_nothing(place: Path) -> None:
    _, desk = desk_of(place, "waits")
    searcher = ArraySearcher(desk, {}, single=False)
    first, second = searcher.suggest("t0"), searcher.suggest("t1")
    assert first["id"] != second["id"]
    assert first["orders"] == second["orders"] == "[]"
    assert len(desk.orders(first["id"])) == 2 and held(desk, second["id"]) == set()


def test_a_single_trial_gives_way_to_one_that_waits_for_its_place(place: Path) -> None:
    """The one that runs waits for a decision; the one it waits for has no place to run."""
    _, desk = desk_of(place, "place", single=True)
    running = [f"array-{number}" for number in range(3)]
    for array in running:
        desk.take(array, rows(desk.orders(array)))
    desk.orders("array-3")  # suggested; its worker is never started
    for _ in range(200):
        busy = [a for a in running if not desk.ended(a)]
        if not busy:
            break
        for array in busy:
            desk.take(array, rows(desk.orders(array)))
    assert all(desk.ended(array) for array in running), "each makes room"
