"""Stage 2 and TEST of several seeds at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from avzero.errors import UserError
from avzero.train.folder import RunFolder
from avzero.train.loop import Trainer
from avzero.train.records import Epoch
from avzero.tune.final import freeze, run_final
from avzero.tune.listener import FinalView, Listener
from tests.sweeps import SETTINGS, sweep

pytestmark = pytest.mark.ray


class Follower(Listener):
    """Keeps the epochs of final runs."""

    def __init__(self) -> None:
        self.epochs: list[tuple[int, int, bool]] = []

    def final_epoch_ended(self, final: FinalView, epoch: Epoch) -> None:
        self.epochs.append((final.task.seed, epoch.epoch, epoch.replayed))


def test_stage_2_runs_side_by_side(ray_local: None, place: Path) -> None:
    """Three seeds as Ray tasks: followed live, in order, same numbers as one after the other."""
    changes: dict[str, Any] = {"search": {"trials": 1}, "test": {"seeds": 3}}
    run = sweep(place, name="ahead", **changes)
    assert run.run()
    plan, follower = freeze(run), Follower()
    results = [result for _, result in run_final(plan, [follower])]
    lengths = next(iter(plan.frozen.values())).best_epoch + 1
    expected = [(seed, epoch, False) for seed in (42, 43, 44) for epoch in range(lengths)]
    assert follower.epochs == expected
    benchmark = run.store.open("tiny")
    for (_, frozen, seed), result in zip(plan.runs(), results, strict=True):
        task = frozen.stage_2_task(seed)
        alone = RunFolder(run.store.storage, task)
        alone.prefix += "-alone"
        list(Trainer(task, benchmark, alone).epochs())
        there = RunFolder(run.store.storage, task)
        weights, again = (f.best_weights(f.load_state()) for f in (there, alone))  # type: ignore[arg-type]
        assert all(torch.equal(weights[k], again[k]) for k in weights)
        assert result.task == task.id
    assert freeze(run).pending == 0


def test_a_small_machine_trains_stage_2_itself(ray_local: None, place: Path) -> None:
    """A job whose runs do not fit the connected cluster is not queued for ever."""
    changes: dict[str, Any] = {"search": {"trials": 1}, "test": {"seeds": 2}}
    changes["train"] = SETTINGS["train"] | {"epochs": 3}  # not the runs of the test above
    assert sweep(place, name="small-machine", **changes).run()
    job = sweep(place, name="small-machine", resources={"cpus": 64}, **changes)
    assert freeze(job).pending == 2
    assert len(list(run_final(freeze(job), []))) == 2
    with pytest.raises(UserError, match="a run needs 64 CPU"):
        changes["test"] = {"seeds": 3}
        more = sweep(place, name="small-machine", resources={"cpus": 64}, **changes)
        list(run_final(freeze(more), [], on_cluster=True))
