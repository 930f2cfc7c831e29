"""Stacked training: a run comes out the same, bit for bit, alone or among others."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from avzero.data.benchmark import Benchmark
from avzero.data.store import FeatureStore
from avzero.models._contract import Model
from avzero.models._registry import build, model_class, model_files
from avzero.protocol.counter import fold, site_keys
from avzero.spec import Preset, Resources, Task
from avzero.train.array import Stack, run_epoch
from avzero.train.data import StageData
from avzero.train.folder import RunFolder
from avzero.train.loop import Trainer
from avzero.train.records import Epoch, TrainingFailed
from avzero.train.slots import Outcome, Slots
from avzero.train.structure import structure
from avzero.tune.runner import _Split
from tests import test_contract as contract
from tests.conftest import make_task
from tests.toys import taken

every_system = pytest.mark.parametrize("system", list(model_files()))
CPU = torch.device("cpu")


def alone(store: FeatureStore, task: Task) -> tuple[list[Epoch], dict[str, torch.Tensor]]:
    """Train a run by itself; return its epochs and its best weights."""
    folder = RunFolder(store.storage, task)
    epochs = list(Trainer(task, store.open(task.benchmark), folder).epochs())
    state = folder.load_state()
    assert state is not None
    return epochs, folder.best_weights(state)


def content(epoch: Epoch) -> tuple[object, ...]:
    """Return an epoch without its times."""
    return epoch.epoch, epoch.losses, epoch.lr, epoch.val, epoch.best


def assert_same(
    store: FeatureStore, task: Task, said: list[Outcome], whole: tuple[list[Epoch], object]
) -> None:
    """Compare what an array said and kept of a run with the run alone."""
    epochs = [o.epoch for o in said if o.task == task.id and o.epoch is not None]
    assert [content(e) for e in epochs] == [content(e) for e in whole[0]]
    assert [o.finished for o in said if o.task == task.id] == [False] * (len(epochs) - 1) + [True]
    folder = RunFolder(store.storage, task)
    state = folder.load_state()
    assert state is not None and state.finished and folder.load_result("val") is not None
    weights, reference = folder.best_weights(state), whole[1]
    assert isinstance(reference, dict) and weights.keys() == reference.keys()
    assert all(torch.equal(weights[name], reference[name]) for name in weights)


@pytest.fixture
def empty(release: Path, tmp_path: Path) -> FeatureStore:
    """A store with the tiny benchmark and no runs."""
    from avzero.data.avca import read_avca

    target = FeatureStore(str(tmp_path / "own"))
    target.put(read_avca(release, "tiny", "main", name="tiny"))
    return target


@every_system
def test_bits_do_not_depend_on_the_array(
    system: str, benchmark: Benchmark, store: FeatureStore, empty: FeatureStore
) -> None:
    """Another slot, other neighbours, one of them diverging, a refill in mid-flight."""
    first = make_task(benchmark, system, seed=21)
    second = make_task(benchmark, system, seed=22, train={"lr": 5e-3, "weight_decay": 1e-4})
    third = make_task(benchmark, system, seed=23, train={"beta1": 0.5, "epochs": 2})
    doomed = make_task(benchmark, system, seed=24, train={"lr": 1e30})
    whole = {task.id: alone(store, task) for task in (first, second, third)}
    slots = Slots(empty, Resources())
    said = list(slots.round([(doomed, 0), (first, 0), (third, 0)]))
    said += slots.round([(doomed, 1), (third, 1), (first, 1)])
    assert any(o.task == doomed.id and o.failed for o in said), "the neighbour did not diverge"
    assert len({t.structure for t in slots._trainers.values()}) == 1, "they were not stacked"
    said += slots.round([(second, 0), (first, 2)])
    for known in (1, 2):
        said += slots.round([(second, known)])
    for task in (first, second, third):
        assert_same(empty, task, said, whole[task.id])


@pytest.mark.parametrize("kind", [Slots, _Split])
def test_nothing_is_trained_before_what_was_is_told(
    kind: type[Slots | _Split], benchmark: Benchmark, empty: FeatureStore
) -> None:
    """A run that is taken up may have to stop after an epoch its last worker could not report."""
    task = make_task(benchmark, seed=41, train={"epochs": 3})
    folder = RunFolder(empty.storage, task)

    def told(rounds: Slots | _Split, known: int) -> list[tuple[int, bool, bool]]:
        said = list(rounds.round([(task, known)]))
        return [(o.epoch.epoch, o.epoch.replayed, o.finished) for o in said if o.epoch]

    def stored() -> int:
        state = folder.load_state()
        return 0 if state is None else len(state.history)

    lost = kind(empty, Resources())
    assert told(lost, 0) == [(0, False, False)]
    assert told(lost, 1) == [(1, False, False)] and stored() == 2
    again = kind(empty, Resources())
    assert told(again, 1) == [(1, True, False)] and stored() == 2, "it trained on"
    assert told(again, 2) == [(2, False, True)]
    last = kind(empty, Resources())
    assert told(last, 1) == [(1, True, False), (2, True, True)]
    assert [o.finished for o in kind(empty, Resources()).round([(task, 3)])] == [True]


@pytest.mark.parametrize("system", ["avca", "hyper_multiple", "clipclap", "tcaf"])
def test_compat_presets_stack(system: str, benchmark: Benchmark, store: FeatureStore) -> None:
    """What the released code does after every step is done for each slot."""
    compat = model_class(system).compat
    tasks = [make_task(benchmark, system, seed=s, config=dict(compat)) for s in (31, 32)]
    lone = []
    for task in tasks:
        trainer = Trainer(task, benchmark, RunFolder(store.storage, task))
        list(run_epoch([trainer]))
        lone.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
    again = [t.model_copy(update={"weights": "0"}) for t in tasks]  # the same runs elsewhere
    trainers = [Trainer(t, benchmark, RunFolder(store.storage, t)) for t in again]
    list(run_epoch(trainers))
    for trainer, reference in zip(trainers, lone, strict=True):
        state = trainer.model.state_dict()
        assert all(torch.equal(state[name], reference[name]) for name in reference)


def test_stages_share_a_stack_where_the_table_is_not_read(
    benchmark: Benchmark, store: FeatureStore
) -> None:
    """Stage 1 beside stage 2, each on its own samples and classes."""
    one = make_task(benchmark, "avca", seed=41)
    two = make_task(benchmark, "avca", seed=42, stage=2, lr_plan=(1e-3, 1e-4, 1e-5))
    whole = [alone(store, task)[0] for task in (one, two)]
    again = [t.model_copy(update={"weights": "0"}) for t in (one, two)]
    trainers = [Trainer(t, benchmark, RunFolder(store.storage, t)) for t in again]
    assert trainers[0].structure == trainers[1].structure
    for _ in range(3):
        list(run_epoch(trainers))
    for trainer, epochs in zip(trainers, whole, strict=True):
        assert [content(e) for e in trainer.state.history] == [content(e) for e in epochs]


def test_dropout_that_one_slot_leaves_out(benchmark: Benchmark, store: FeatureStore) -> None:
    rates: tuple[dict[str, object], ...] = ({"r_enc": 0.0, "r_add": 0.0}, {"r_enc": 0.3})
    tasks = [make_task(benchmark, "avca", seed=51, config=rate) for rate in rates]
    whole = [alone(store, task)[0] for task in tasks]
    again = [t.model_copy(update={"weights": "0"}) for t in tasks]
    trainers = [Trainer(t, benchmark, RunFolder(store.storage, t)) for t in again]
    assert trainers[0].structure == trainers[1].structure
    list(run_epoch(trainers))
    for trainer, epochs in zip(trainers, whole, strict=True):
        assert content(trainer.state.history[0]) == content(epochs[0])


def test_a_stack_of_one_is_the_plain_module(benchmark: Benchmark, store: FeatureStore) -> None:
    task = make_task(benchmark, "avca", seed=61)
    data = StageData(benchmark, task, CPU)
    trainer = Trainer(task, benchmark, RunFolder(store.storage, task))
    keys = site_keys(fold(61), 1, trainer.sites, CPU)
    batch = taken(data, trainer.draws(), 0)
    stack = Stack([trainer.model.train()])
    lone = type(batch)(
        {m: x[None] for m, x in batch.features.items()}, *(x[None] for x in batch[1:])
    )
    names, values = stack.losses(lone, keys)
    from avzero.models._contract import Context

    terms = trainer.model.loss(batch, Context(keys[0]))
    assert names == list(terms) and torch.equal(values[0], torch.stack(list(terms.values())))


@every_system
def test_structure_is_the_same_for_continuous_values(system: str, benchmark: Benchmark) -> None:
    """Everything continuous is carried by a slot; switches and sizes are not."""
    from avzero.tune.space import load_space

    def sign(**values: object) -> str:
        train = {k: v for k, v in values.items() if k in ("lr", "weight_decay", "beta1", "beta2")}
        own = {k: v for k, v in values.items() if k not in train}
        task = make_task(benchmark, system, config=own, train=train)
        data = StageData(benchmark, task, CPU)
        return structure(build(task, data.shapes), task, data.shapes, 8)

    base = sign()
    settings = set(type(make_task(benchmark, system).train).model_fields)
    for name, range_ in load_space(system).space.items():
        bounds = range_.log or range_.uniform
        if bounds and (name not in settings or name in ("lr", "weight_decay", "beta1", "beta2")):
            middle = (bounds[0] + bounds[1]) / 2
            assert sign(**{name: middle}) == base, f"{name} should not need a stack of its own"


@every_system
def test_what_the_loss_does_not_read(system: str) -> None:
    """Attributes named as read by scoring alone, and the table of class texts, change no term."""
    model: Model = contract.make(system, Preset.PAPER)
    data, context = contract.batch(), contract.context(model)
    want = contract.terms(model, data, context)
    for name in model.scoring:
        assert hasattr(model, name)
        setattr(model, name, None)
    if not model.reads_table:
        data = data._replace(class_text=torch.full_like(data.class_text, torch.nan))
    got = contract.terms(model, data, context)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_diverging_slot_says_where(benchmark: Benchmark, store: FeatureStore) -> None:
    good = make_task(benchmark, "avca", seed=71)
    bad = make_task(benchmark, "avca", seed=72, train={"lr": 1e30})
    trainers = [Trainer(t, benchmark, RunFolder(store.storage, t)) for t in (good, bad)]
    outcomes = {t.task.id: outcome for t, outcome in run_epoch(trainers)}
    assert isinstance(outcomes[good.id], Epoch)
    failure = outcomes[bad.id]
    assert isinstance(failure, TrainingFailed) and "is not finite in epoch 0, step 1" in str(
        failure
    )


@pytest.mark.parametrize("preset", list(Preset))
def test_statistics_are_updated_only_where_they_matter(
    benchmark: Benchmark, store: FeatureStore, preset: Preset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaving out updates that are forgotten by the end of the epoch changes nothing."""
    compat = dict(model_class("avca").compat) if preset is Preset.COMPAT else {}
    train = {"batches_per_epoch": 230, "epochs": 1, "batch_size": 8}
    calls: list[bool] = []
    real = Stack.settle

    def counted(self: Stack, *arguments: Any) -> None:
        calls.append(True)
        real(self, *arguments)

    monkeypatch.setattr(Stack, "settle", counted)
    runs = []
    for steps in (158, 230):
        if steps == 230:
            monkeypatch.setattr("avzero.train.array.memory", lambda model: 0)
        calls.clear()
        task = make_task(benchmark, "avca", seed=81, config=compat, train=train)
        trainer = Trainer(task, benchmark, RunFolder(store.storage, task))
        ((_, outcome),) = run_epoch([trainer])
        assert isinstance(outcome, Epoch) and len(calls) == steps
        runs.append((outcome, {k: v.clone() for k, v in trainer.model.state_dict().items()}))
        shutil.rmtree(Path(store.storage.url) / trainer.folder.prefix)
    (short, ours), (whole, theirs) = runs
    assert short.losses == whole.losses and short.val == whole.val
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=2e-6, atol=1e-7)
