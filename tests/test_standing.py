"""What a leaderboard may say of its order: never more than its seeds can carry."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avzero.report.standing import groups_of_equals, ranking_lines, standing
from avzero.report.statistics import over_datasets

values = st.lists(st.floats(0, 100).map(lambda v: round(v, 2)), min_size=1, max_size=4)
boards = st.dictionaries(st.sampled_from("abcdef"), values, min_size=1, max_size=6)
CLOSE = {"a": [27.0, 28.0, 26.0], "b": [26.0, 25.0, 27.0], "c": [2.0, 3.0, 2.5]}


@settings(max_examples=60, deadline=None)
@given(boards, st.randoms(use_true_random=False))
def test_properties(board: dict[str, list[float]], random: object) -> None:
    ours = standing(board)
    items = [(name, list(v)) for name, v in board.items()]
    random.shuffle(items)  # type: ignore[attr-defined]
    for _, v in items:
        random.shuffle(v)  # type: ignore[attr-defined]
    again = standing(dict(items))
    assert (again.order, again.equals, again.places) == (ours.order, ours.equals, ours.places)
    assert set(ours.order) == set(board) and ours.order[0] in ours.equals
    # Every system is in a group; the best and its group's others are equals.
    assert {name for group in ours.groups for name in group} == set(board)
    assert set(ours.groups[0]) <= set(ours.equals)
    for name, (first, last) in ours.places.items():
        assert 1 <= first <= ours.order.index(name) + 1 <= last <= len(board)
        if len(board[name]) == 1:
            assert (first, last) == (1, len(board))


@settings(deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=5))
def test_identical_systems_share_a_place(seeds: list[float]) -> None:
    ours = standing({"a": seeds, "b": list(seeds), "c": [0.0, 0.0]})
    assert ours.places["a"] == ours.places["b"]
    assert any({"a", "b"} <= set(group) for group in ours.groups)


def test_words() -> None:
    ours = standing(CLOSE)
    assert ours.equals == ("a", "b") and ours.groups == (("a", "b"), ("c",))
    assert [ours.place(name) for name in "abc"] == ["1-2", "1-2", "3"]
    assert ours.sentence == (
        "a has the highest mean HM (27.00), but b cannot be separated from it "
        "(Welch's t-test over seeds, Holm's correction, 95 %)."
    )
    alone = standing({"a": CLOSE["a"], "c": CLOSE["c"]})
    assert alone.sentence.startswith("a has the highest mean HM (27.00) and is separated from c")


@pytest.mark.parametrize(
    ("board", "part"),
    [
        ({}, "No results."),
        ({"a": [1.0]}, "a is the only system"),
        ({"a": [27.0], "b": [1.0, 1.1]}, "from one seed: no interval over seeds, so nothing"),
        (CLOSE | {"d": [20.0]}, "but b and d cannot be separated from it"),
        (CLOSE | {"d": [20.0]}, "; d with one seed only."),
        ({"a": [9.0, 9.1], "b": [1.0, 1.1], "c": [5.0, 5.1]}, "separated from every other system"),
        ({n: [20.0 + i, 25.0 - i] for i, n in enumerate("abcde")}, "none of the others"),
    ],
)
def test_honest_about_few_seeds(board: dict[str, list[float]], part: str) -> None:
    assert part in standing(board).sentence


def test_a_single_seed_costs_the_others_nothing() -> None:
    """What is not tested needs no correction."""
    more = standing(CLOSE | {"d": [20.0], "e": [10.0]})
    assert {k: v for k, v in more.p.items() if "d" not in k} == standing(CLOSE).p


def test_groups_may_overlap() -> None:
    apart = {("a", "c"), ("a", "d"), ("b", "d")}
    groups = groups_of_equals("abcd", lambda one, other: (one, other) in apart)
    assert groups == (("a", "b"), ("b", "c"), ("c", "d"))
    assert groups_of_equals("abc", lambda one, other: False) == (("a", "b", "c"),)
    assert groups_of_equals("", lambda one, other: False) == ()


def test_a_ranking_in_words() -> None:
    many = {f"d{i}": float(i) for i in range(8)}
    board = {name: {d: v + 10 * i for d, v in many.items()} for i, name in enumerate("cba")}
    lines = ranking_lines(over_datasets(board))
    assert lines[0].endswith(": a 1.00, b 2.00, c 3.00.")
    assert lines[1] == "Friedman's test that all are alike: p = 0.00034."
    assert lines[3].endswith("Holm's correction): a before b; a before c; b before c.")
    few = ranking_lines(over_datasets({name: {"x": row["d0"]} for name, row in board.items()}))
    assert few[1].endswith("no two systems.") and few[2].startswith("1 benchmark: too few")
    nothing = ranking_lines(over_datasets({"a": {"x": 1.0}, "b": {"y": 1.0}}))
    assert nothing[0] == "No two systems share a benchmark: nothing to rank."
