"""The training loop: schedule, checkpoints, stages, failures, calibration, and TEST once."""

from __future__ import annotations

import json
import math
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avzero.data.benchmark import Benchmark, Role
from avzero.data.store import FeatureStore
from avzero.errors import UserError
from avzero.protocol.seal import Frozen
from avzero.spec import Protocol, Task
from avzero.train.data import StageData
from avzero.train.folder import RunFolder
from avzero.train.loop import Trainer
from avzero.train.outcome import conclude_stage_1, score_test
from avzero.train.records import TrainingFailed
from avzero.train.schedule import Plateau
from tests.conftest import make_task
from tests.toys import taken


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.integers(0, 4))
def test_plateau_is_the_framework_schedule(scores: list[float], patience: int) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([parameter], lr=1e-3)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="max", factor=0.1, patience=patience
    )
    ours = Plateau(1e-3, patience, 0.1)
    for score in scores:
        theirs.step(score)
        ours = Plateau.from_dict(json.loads(json.dumps(ours.as_dict())))
        assert ours.step(score) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


def test_stage_data(benchmark: Benchmark) -> None:
    one = StageData(benchmark, make_task(benchmark), torch.device("cpu"))
    two = StageData(benchmark, make_task(benchmark, stage=2), torch.device("cpu"))
    assert len(one.sampler.classes) == 24 and len(two.sampler.classes) == 32
    draws = one.sampler.epoch(0, 1, 0, 2, 16)
    batch = taken(one, draws, 1, 0, 1)
    samples = benchmark.part.samples
    rows = draws.row[1].numpy()
    assert set(samples.role[rows.flatten()]) == {Role.TRAIN.code}
    np.testing.assert_array_equal(batch.features["video"], benchmark.part.features["video"][rows])
    classes = torch.from_numpy(samples.class_id[rows]).long()
    torch.testing.assert_close(batch.text, one.class_text[classes])
    torch.testing.assert_close(one.sampler.classes[batch.label], classes)
    halves = [taken(one, draws, 1, rank, 2) for rank in (0, 1)]
    for modality, value in batch.features.items():
        joined = torch.cat([half.features[modality] for half in halves])
        torch.testing.assert_close(joined, value)


def test_input_scaling_is_fitted_on_training_rows_only(benchmark: Benchmark) -> None:
    task = make_task(benchmark, protocol=Protocol(input_scaling="standard"))
    data = StageData(benchmark, task, torch.device("cpu"))
    rows = benchmark.part.samples.rows(Role.TRAIN)
    for modality, table in benchmark.part.features.items():
        scaled = data.scaling.apply(modality, torch.from_numpy(np.asarray(table[rows])))
        assert scaled.mean(0).abs().max() < 1e-4
        assert (scaled.std(0, correction=0) - 1).abs().max() < 1e-3
    unit = StageData(
        benchmark,
        make_task(benchmark, protocol=Protocol(input_scaling="l2")),
        torch.device("cpu"),
    )
    norms = unit.scaling.apply("audio", torch.from_numpy(np.asarray(table[:5]))).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(5))


def test_finished_run_is_not_trained_again(benchmark: Benchmark, store: FeatureStore) -> None:
    task = make_task(benchmark, seed=2001)
    list(Trainer(task, benchmark, RunFolder(store.storage, task)).epochs())
    keys = store.storage.keys(f"runs/{task.id}/")
    assert [k.split("/")[-1].split("-")[0] for k in keys] == ["state.json", "task.json", "weights"]
    again = list(Trainer(task, benchmark, RunFolder(store.storage, task)).epochs())
    assert all(epoch.replayed for epoch in again) and len(again) == 3


def test_damaged_checkpoint_starts_again(benchmark: Benchmark, store: FeatureStore) -> None:
    task = make_task(benchmark, seed=2002)
    folder = RunFolder(store.storage, task)
    running = Trainer(task, benchmark, folder).epochs()
    first = next(running)
    state = folder.load_state()
    assert state is not None
    key = f"{folder.prefix}/{state.files['optimizer']}"
    store.storage.write(key, store.storage.read(key)[:-1] + b"x")
    records = list(Trainer(task, benchmark, RunFolder(store.storage, task)).epochs())
    assert [e.replayed for e in records] == [False] * 3 and records[0].losses == first.losses


def test_task_identity_covers_everything_that_decides_the_result(benchmark: Benchmark) -> None:
    base = make_task(benchmark)
    variants = [
        make_task(benchmark, seed=8),
        make_task(benchmark, stage=2),
        make_task(benchmark, train={"lr": 2e-3}),
        make_task(benchmark, config={"margin": 0.5}),
        make_task(benchmark, protocol=Protocol(input_scaling="l2")),
        base.model_copy(update={"benchmark": "0" * 64}),
        base.model_copy(update={"lr_plan": (1e-3,)}),
    ]
    assert len({task.id for task in [base, *variants]}) == 8
    assert make_task(benchmark).id == base.id
    assert Task.model_validate_json(base.model_dump_json()).id == base.id


def test_non_finite_loss_names_term_epoch_and_step(
    benchmark: Benchmark, store: FeatureStore
) -> None:
    task = make_task(benchmark, seed=2003, train={"lr": 1e30})
    with pytest.raises(TrainingFailed, match=r"loss term \w+ is not finite in epoch \d, step \d"):
        list(Trainer(task, benchmark, RunFolder(store.storage, task)).epochs())


def test_missing_text_and_uneven_batches_are_refused(
    benchmark: Benchmark, store: FeatureStore
) -> None:
    task = make_task(benchmark, seed=2004, protocol=Protocol(text="glove"))
    with pytest.raises(UserError, match=r"no text set 'glove'; it has w2v"):
        Trainer(task, benchmark, RunFolder(store.storage, task))

    class Three:
        size, rank = 3, 1

    odd = make_task(benchmark, seed=2005)
    with pytest.raises(UserError, match="batch_size 16 cannot be split evenly over 3 workers"):
        Trainer(odd, benchmark, RunFolder(store.storage, odd), Three())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def concluded(benchmark: Benchmark, store: FeatureStore) -> tuple[RunFolder, Frozen]:
    task = make_task(benchmark, seed=3001, train={"epochs": 5, "batches_per_epoch": 10})
    folder = RunFolder(store.storage, task)
    list(Trainer(task, benchmark, folder).epochs())
    return folder, conclude_stage_1(folder, benchmark)[1]


def test_conclusion_repeats_the_best_epoch(concluded: tuple[RunFolder, Frozen]) -> None:
    folder, frozen = concluded
    state = folder.load_state()
    assert state is not None
    best = max(range(5), key=lambda e: (state.history[e].val["HM"], -e))
    assert frozen.best_epoch == best == state.best_epoch
    assert frozen.val == pytest.approx(state.history[best].val)
    assert frozen.lr_plan == tuple(epoch.lr for epoch in state.history)
    result = folder.load_result("val")
    assert result is not None
    assert result.scores["both"] == pytest.approx(frozen.val)
    assert result.exact["HM"] >= frozen.val["HM"] - 1e-12
    assert Frozen.from_dict(folder.load_frozen() or {}).digest == frozen.digest


def test_stage_2_and_test(
    benchmark: Benchmark, store: FeatureStore, concluded: tuple[RunFolder, Frozen]
) -> None:
    _, frozen = concluded
    task = frozen.stage_2_task(seed=3001)
    assert task.train.epochs == frozen.best_epoch + 1 == len(task.lr_plan or ())
    folder = RunFolder(store.storage, task)
    with pytest.raises(UserError, match="not finished"):
        score_test(store, folder, frozen, "s")
    records = list(Trainer(task, benchmark, folder).epochs())
    assert [e.lr for e in records] == list(frozen.lr_plan[: len(records)])
    assert all(e.val == {} for e in records), "stage 2 selects on nothing"
    before = len(store.openings("tiny"))
    result = score_test(store, folder, frozen, "s")
    assert len(store.openings("tiny")) == before + 1
    line = store.openings("tiny")[-1]
    assert (line["frozen"], line["run"]) == (frozen.digest, task.id)
    scores = result.scores["both"]
    assert scores["beta"] == pytest.approx(frozen.calibration.betas["both"])
    assert scores["HM"] == pytest.approx(
        2 * scores["S"] * scores["U"] / (scores["S"] + scores["U"])
    )
    assert scores["ZSL"] > 1 / 8, "above chance on a benchmark made to be learnable"
    assert result.exact == {}, "no optimum over beta is computed on TEST"
    assert score_test(store, folder, frozen, "s") == result
    assert len(store.openings("tiny")) == before + 1, "the stored result is not a second look"


@pytest.mark.parametrize("seed", [3002, 3003, 3004])
def test_compat_stage_2_steps_on_val(benchmark: Benchmark, store: FeatureStore, seed: int) -> None:
    protocol = Protocol.model_validate({"preset": "compat"})
    train = {"epochs": 6, "batches_per_epoch": 8}
    task = make_task(benchmark, seed=seed, protocol=protocol, train=train)
    folder = RunFolder(store.storage, task)
    list(Trainer(task, benchmark, folder).epochs())
    frozen = conclude_stage_1(folder, benchmark)[1]
    second = frozen.stage_2_task(seed)
    assert second.lr_plan is None
    records = list(Trainer(second, benchmark, RunFolder(store.storage, second)).epochs())
    assert all(math.isfinite(e.val["HM"]) for e in records)
    # VAL is part of stage 2's training data: whatever it says, the last epoch (e*) is kept.
    state = RunFolder(store.storage, second).load_state()
    assert state is not None and state.best_epoch == frozen.best_epoch == len(records) - 1


def test_killed_at_random_moments_equals_undisturbed(
    benchmark: Benchmark, store: FeatureStore
) -> None:
    """A real process is killed with SIGKILL again and again; the result is the same bit for bit."""
    task = make_task(benchmark, seed=4001, train={"epochs": 8, "batches_per_epoch": 12})
    reference = RunFolder(store.storage, task)
    reference.prefix += "-undisturbed"
    expected = list(Trainer(task, benchmark, reference).epochs())
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from avzero.data.store import FeatureStore\n"
        "from avzero.spec import Task\n"
        "from avzero.train.folder import RunFolder\n"
        "from avzero.train.loop import Trainer\n"
        "store = FeatureStore(sys.argv[1]); task = Task.model_validate_json(sys.argv[2])\n"
        "trainer = Trainer(task, store.open(task.benchmark), RunFolder(store.storage, task))\n"
        "print('ready', flush=True)\n"
        "for epoch in trainer.epochs(): print(epoch.epoch, flush=True)\n"
    )
    arguments = [sys.executable, "-c", code, store.storage.url, task.model_dump_json()]
    random.seed(5)
    for _ in range(4):
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(random.uniform(0.0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(arguments, check=True, capture_output=True)
    folder = RunFolder(store.storage, task)
    state, undisturbed = folder.load_state(), reference.load_state()
    assert state is not None and undisturbed is not None and state.finished
    assert [e.losses for e in state.history] == [e.losses for e in expected]
    mine, theirs = folder.best_weights(state), reference.best_weights(undisturbed)
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs)
    left = [k for k in store.storage.keys(folder.prefix + "/") if k.endswith(".safetensors")]
    # Files of an attempt killed between its write and its state may stay; the state names one.
    assert f"{folder.prefix}/{state.files['best']}" in left


def test_looking_at_val_every_other_epoch(benchmark: Benchmark, store: FeatureStore) -> None:
    task = make_task(benchmark, seed=2201, train={"epochs": 5, "evaluate_every": 2, "patience": 0})
    folder = RunFolder(store.storage, task)
    records = list(Trainer(task, benchmark, folder).epochs())
    assert [bool(e.val) for e in records] == [False, True, False, True, True]
    assert all(e.val for e in records if e.best)
    state = folder.load_state()
    assert state is not None and records[state.best_epoch].val
    # The plateau rule is stepped by looks, not by epochs.
    assert records[1].lr == records[0].lr
    _, frozen = conclude_stage_1(folder, benchmark)
    assert frozen.stage_2_task(1).train.epochs == state.best_epoch + 1
    default = make_task(benchmark).model_dump(mode="json")["train"]
    assert "evaluate_every" not in default, "the default must not change identities"
