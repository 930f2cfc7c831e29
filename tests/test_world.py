"""One run split over workers: a real gloo group of two processes against one process."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from avzero.data.benchmark import Benchmark
from avzero.data.store import FeatureStore
from avzero.models._registry import model_class, model_files
from avzero.spec import Task
from avzero.train.folder import RunFolder
from avzero.train.loop import Trainer
from avzero.train.world import working_world
from tests.conftest import make_task

NO_DROPOUT = {"r_enc": 0.0, "r_proj": 0.0, "r_add": 0.0}


def run(rank: int, size: int, port: int, url: str, tasks: list[str], out: str) -> None:
    """Train tasks one after the other on one of ``size`` workers; keep records and weights."""
    torch.set_num_threads(1)
    if size > 1:
        os.environ.update(
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            RANK=str(rank),
            WORLD_SIZE=str(size),
            GLOO_SOCKET_IFNAME="lo",
        )
        torch.distributed.init_process_group("gloo")
    store = FeatureStore(url)
    done = []
    for text in tasks:
        task = Task.model_validate_json(text)
        folder = RunFolder(store.storage, task)
        folder.prefix += f"-{size}"
        world, active = working_world(task.train.batch_size)
        if not active:
            done.append(([], {}))
            continue
        trainer = Trainer(task, store.open(task.benchmark), folder, world)
        records = [(e.losses, e.val, e.lr) for e in trainer.epochs()]
        done.append((records, trainer.model.state_dict()))
    torch.save(done, f"{out}.{size}.{rank}")


Outcome = tuple[list[Any], dict[str, torch.Tensor]]


def both(task: Task, store: FeatureStore, tmp_path: Path) -> tuple[Outcome, Outcome, Outcome]:
    """Return (records, state) of one worker, and of each of two."""
    return many([task], store, tmp_path)[0]


def many(
    tasks: list[Task], store: FeatureStore, tmp_path: Path
) -> list[tuple[Outcome, Outcome, Outcome]]:
    """Return ``both`` of several tasks, trained in the same processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = str(tmp_path / "run")
    for size in (1, 2):
        texts = [task.model_dump_json() for task in tasks]
        arguments = (size, port, store.storage.url, texts, out)
        mp.spawn(run, arguments, nprocs=size)  # type: ignore[no-untyped-call]
    loaded = [torch.load(f"{out}.{size}.{rank}") for size, rank in ((1, 0), (2, 0), (2, 1))]
    return list(zip(*loaded, strict=True))


@pytest.mark.parametrize("dropout", [False, True])
def test_two_workers_give_the_losses_of_one(
    benchmark: Benchmark, store: FeatureStore, tmp_path: Path, dropout: bool
) -> None:
    """20 steps, each an epoch of one batch: same losses, scores and learning rates.

    In float64, because in float32 rounding differences grow chaotically through ReLU and Adam
    whatever the number of workers; docs/experiments.md has the measurement.
    """
    task = make_task(
        benchmark,
        seed=5001 + dropout,
        config={} if dropout else NO_DROPOUT,
        train={
            "epochs": 20,
            "batches_per_epoch": 1,
            "batch_size": 32,
            "precision": "float64",
            "weight_decay": 1e-5,
        },
    )
    (one, state), (two, state_0), (other, state_1) = both(task, store, tmp_path)
    for (losses, val, lr), (losses_2, val_2, lr_2) in zip(one, two, strict=True):
        assert losses_2 == pytest.approx(losses, rel=1e-5)
        assert val_2 == pytest.approx(val) and lr_2 == lr
    assert two == other, "all workers agree on losses, scores and rates"
    for key, value in state_0.items():
        assert torch.equal(value, state_1[key]), f"{key} differs between the workers"
        # Biases before a BatchNorm have zero gradient: Adam turns their rounding noise into steps.
        if not key.endswith(("fc.0.bias", "fc.4.bias", "net.3.bias", "running_mean")):
            torch.testing.assert_close(value, state[key], rtol=1e-5, atol=1e-7)


def test_float32_agrees_until_rounding_grows(
    benchmark: Benchmark, store: FeatureStore, tmp_path: Path
) -> None:
    task = make_task(
        benchmark,
        seed=5003,
        config=NO_DROPOUT,
        train={"epochs": 3, "batches_per_epoch": 1, "batch_size": 32},
    )
    (one, _), (two, _), _ = both(task, store, tmp_path)
    assert two[0][0] == pytest.approx(one[0][0], rel=1e-5)
    assert sum(two[2][0].values()) == pytest.approx(sum(one[2][0].values()), rel=1e-2)


def test_every_system_on_two_workers(
    benchmark: Benchmark, store: FeatureStore, tmp_path: Path
) -> None:
    """One group of two processes trains all systems, with dropout: losses equal one worker's."""
    train = {"epochs": 2, "batches_per_epoch": 2, "batch_size": 24, "precision": "float64"}
    variants: list[tuple[str, dict[str, Any]]] = [(system, {}) for system in model_files()]
    # What the released code does besides (settle, dead passes, outer products) as well.
    variants += [(s, dict(model_class(s).compat)) for s in model_files() if model_class(s).compat]
    variants += [
        ("avfs", {"use_vae": True}),
        ("hyper_multiple", {"framework": "alignment", "similarity": "geodesic"}),
        ("mft", {"variant": "av_tokens", "cosine_on": "pairs"}),
    ]
    tasks = [
        make_task(benchmark, system, seed=5101, train=dict(train), config=config)
        for system, config in variants
    ]
    for task, (one, two, other) in zip(tasks, many(tasks, store, tmp_path), strict=True):
        assert two[0] == other[0], f"{task.model}: the workers disagree"
        for (losses, val, _), (losses_2, val_2, _) in zip(one[0], two[0], strict=True):
            assert losses_2 == pytest.approx(losses, rel=1e-5, abs=1e-9), task.model
            assert val_2 == pytest.approx(val), task.model
        assert all(torch.equal(two[1][k], other[1][k]) for k in two[1]), task.model


def test_a_worker_the_batch_cannot_be_split_over_looks_on(
    benchmark: Benchmark, store: FeatureStore, tmp_path: Path
) -> None:
    """A batch of 32 on three workers: two train as two would, the third has nothing to do."""
    task = make_task(
        benchmark, seed=5009, train={"epochs": 2, "batch_size": 32, "precision": "float64"}
    )
    out = str(tmp_path / "run")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for size in (1, 3):
        arguments = (size, port, store.storage.url, [task.model_dump_json()], out)
        mp.spawn(run, arguments, nprocs=size)  # type: ignore[no-untyped-call]
    ((one, _),) = torch.load(f"{out}.1.0")
    ((first, _),), ((second, _),), ((third, _),) = (torch.load(f"{out}.3.{r}") for r in range(3))
    assert first == second and third == [] and len(first) == 2
    for (losses, _, _), (losses_3, _, _) in zip(one, first, strict=True):
        assert losses_3 == pytest.approx(losses, rel=1e-5)
