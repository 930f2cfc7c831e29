"""The virtual clock: the same sweep whatever is killed, however fast each array is."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from avzero.canon import sha256_hex
from avzero.data.store import FeatureStore
from avzero.spec import TRAIN_FIELDS, Task
from avzero.train.records import Epoch
from avzero.tune.desk import Desk, as_row
from avzero.tune.journal_file import OnlyWriter
from avzero.tune.listener import Listener, TrialView
from avzero.tune.sweep import Sweep
from tests.sweeps import SETTINGS, sweep

EPOCHS = 9
SEARCH: dict[str, Any] = {"trials": 26, "min_epochs": 1, "reduction": 3, "seats": 6}
TRAIN = SETTINGS["train"] | {"epochs": EPOCHS}


class Killed(BaseException):
    """The process is gone."""


def chance(*parts: object) -> float:
    """Return a number in 0 … 1 that depends on the parts alone."""
    return int(sha256_hex(json.dumps(parts).encode())[:8], 16) / 16**8


def record(task: Task, epoch: int) -> Epoch:
    """Return what a run does in an epoch: a noisy, rising learning curve."""
    scores = [
        chance(task.id) * (1 - 0.5 ** (e + 1)) + 0.1 * chance(task.id, e) for e in range(epoch + 1)
    ]
    val = {"S": 0.5, "U": 0.5, "HM": scores[-1], "ZSL": 1 - scores[-1], "beta": 0.0}
    best = scores[-1] == max(scores) and scores.index(scores[-1]) == epoch
    return Epoch(epoch, {"loss": 1.0}, 1e-3, val, best, 1.0, 1.0)


def rows(orders: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Return what an array would report of its orders; one run in eight diverges."""
    for order in orders:
        task = Task.model_validate_json(order["task"])
        at = order["known"]
        if at == 2 and chance("diverges", task.id) < 1 / 8:
            yield as_row(task.id, None, False, "diverged")
            continue
        yield as_row(task.id, record(task, at), at + 1 == task.train.epochs, "")


class Story(Listener):
    """Keeps what listeners are told, in order."""

    def __init__(self) -> None:
        self.lines: list[tuple[object, ...]] = []

    def trial_started(self, trial: TrialView) -> None:
        self.lines.append(("started", trial.number))

    def epoch_ended(self, trial: TrialView, epoch: Epoch) -> None:
        self.lines.append(("epoch", trial.number, epoch.epoch))

    def trial_ended(self, trial: TrialView) -> None:
        self.lines.append(("ended", trial.number, trial.state))


def drive(
    place: Path, name: str, seed: int, arrays: int = 2, slots: int = 3, **changes: Any
) -> Story:
    """Run a sweep with arrays that answer at random speeds, as one driver."""
    story = Story()
    run = sweep(place, name=name, train=TRAIN, search=SEARCH | changes)
    with run.journal.exclusive():
        answer(run, story, random.Random(seed), arrays, slots)
    return story


def answer(run: Sweep, story: Story, draw: random.Random, arrays: int, slots: int) -> None:
    """Answer for all arrays until the desk has nothing left."""
    desk = Desk(run.studies, lambda view: None, [story], slots, arrays)
    orders = {f"array-{i}": desk.orders(f"array-{i}") for i in range(arrays)}
    while not desk.over:
        array = draw.choice(list(orders))
        if draw.random() < 0.05:  # its process was restarted: it repeats what it had said
            again = [o | {"known": k} for o in orders[array] for k in range(o["known"])]
            desk.take(array, rows(again))
        desk.take(array, rows(orders[array]))
        orders[array] = desk.orders(array)
    desk.raise_trouble()


def outcome(place: Path, name: str) -> list[tuple[object, ...]]:
    """Return everything the study of a sweep says of its trials."""
    run = sweep(place, name=name, train=TRAIN, search=SEARCH)
    (study,) = run.studies.values()
    return [
        (t.number, t.state, t.params, t.values, t.intermediate_values, t.user_attrs)
        for t in study._trials()
    ]


@pytest.fixture
def place(store: FeatureStore, tmp_path: Path) -> Path:
    """A folder for sweeps of the tiny benchmark."""
    import shutil

    shutil.copytree(store.storage.url, tmp_path / "store")
    return tmp_path


@pytest.mark.parametrize("pruner", ["halving", "median", "none"])
def test_speeds_change_nothing(place: Path, pruner: str) -> None:
    """One array or three, fast or slow: the same trials, values and decisions."""
    stories = []
    for number, (seed, arrays, slots) in enumerate([(0, 1, 6), (1, 2, 3), (2, 3, 2), (3, 3, 1)]):
        name = f"speed-{pruner}-{number}"
        stories.append(drive(place, name, seed, arrays, slots, pruner=pruner).lines)
        assert outcome(place, name) == outcome(place, f"speed-{pruner}-0")
    assert all(story == stories[0] for story in stories)
    states = [line[1] for line in outcome(place, f"speed-{pruner}-0")]
    assert states.count(TrialState.COMPLETE) >= 1 and TrialState.FAIL in states
    assert (TrialState.PRUNED in states) == (pruner != "none")


def test_kills_at_any_write_change_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty drivers in a row die while they write to the journal, after any of its bytes."""
    drive(place, "calm", 0)
    real = OnlyWriter.commit
    draw = random.Random(7)
    left = {"writes": 0}
    cut: list[float] = []

    def dying(self: OnlyWriter) -> None:
        left["writes"] -= bool(self._waiting)
        if left["writes"] >= 0 or not self._waiting:
            return real(self)
        data = "".join(f"{line}\n" for line in self._waiting).encode()
        written = data[: draw.randrange(len(data) + 1)]
        os.write(self._handle, written)
        cut.append(len(written) / len(data))
        self._waiting.clear()
        raise Killed

    monkeypatch.setattr(OnlyWriter, "commit", dying)
    for attempt in range(40):
        left["writes"] = draw.randrange(8) if len(cut) < 20 else 10**9
        try:
            drive(place, "stormy", attempt)
            break
        except Killed:
            continue
    monkeypatch.undo()
    assert len(cut) == 20 and sum(0 < share < 1 for share in cut) > 10
    assert outcome(place, "stormy") == outcome(place, "calm")


def test_two_objectives(place: Path) -> None:
    drive(place, "pareto", 0, objectives=["hm", "zsl"])
    run = sweep(place, name="pareto", train=TRAIN, search=SEARCH | {"objectives": ["hm", "zsl"]})
    (study,) = run.studies.values()
    complete = [t for t in study._trials() if t.state is TrialState.COMPLETE]
    assert complete and all(len(t.values) == 2 for t in complete)
    assert any(t.state is TrialState.PRUNED for t in study._trials())
    winner = study.winner()
    assert winner is not None
    assert winner.number == max(complete, key=lambda t: t.values[0]).number


def test_extending_a_sweep_goes_on_after_everything(place: Path) -> None:
    drive(place, "longer", 0, trials=8)
    before = outcome(place, "longer")
    drive(place, "longer", 1, trials=12)
    after = outcome(place, "longer")
    assert after[: len(before)] == before and len(after) == 12
    ends = [line[5]["end"] for line in before if "end" in line[5]]  # type: ignore[index,operator]
    assert min(line[5]["start"] for line in after[8:] if "start" in line[5]) == max(ends)  # type: ignore[index,operator]


def test_grid_is_tried_once(place: Path) -> None:
    space = {"lr": {"choice": [1e-3, 3e-3]}, "r_enc": {"choice": [0.1, 0.2, 0.3]}}
    free = sweep(place, name="free").groups[0]
    own = {n: v for n, v in free.start_points[0].items() if n not in {*space, *TRAIN_FIELDS}}
    train = {n: v for n, v in free.start_points[0].items() if n in TRAIN_FIELDS - {"lr"}} | TRAIN
    search = SEARCH | {"sampler": "grid", "space": space, "pruner": "none"}
    fixed = {"avca": SETTINGS["fixed"]["avca"] | own}
    run = sweep(place, name="grid", train=train, search=search, fixed=fixed)
    with run.journal.exclusive():
        answer(run, Story(), random.Random(0), 1, 4)
    (study,) = run.studies.values()
    assert len({tuple(t.params.items()) for t in study._trials()}) == 6 == len(study._trials())


def test_an_array_that_dies_is_taken_apart(place: Path) -> None:
    """Its trials are tried one by one; the one that kills a worker alone has failed."""
    run = sweep(place, name="deaths", train=TRAIN, search=SEARCH | {"trials": 6, "pruner": "none"})
    desk = Desk(run.studies, lambda view: None, [], 3, 1)
    poison = 1
    run.journal.path.parent.mkdir(parents=True, exist_ok=True)
    for number in range(400):
        if desk.over:
            break
        array = f"array-{number}"
        orders = desk.orders(array)
        numbers = {view.number for view in desk._held[array].values()}
        if poison in numbers:
            desk.lost(array, "its worker died")
            continue
        desk.take(array, rows(orders))
        desk.release(array)
    desk.raise_trouble()
    states = {t.number: t.state for t in next(iter(run.studies.values()))._trials()}
    assert desk.over and states[poison] is TrialState.FAIL
    assert sum(state is TrialState.COMPLETE for state in states.values()) >= 3
