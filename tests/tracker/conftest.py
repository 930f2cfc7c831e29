"""What tests of the MLflow tracker share: a stub server, trials, and what is right there."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from avzero.data.store import FeatureStore
from avzero.spec import Job
from avzero.track import files, mlflow_tracker, outbox
from avzero.track.mlflow_tracker import MlflowTracker
from avzero.track.payload import METRIC_KEYS
from avzero.tune.listener import TrialView
from avzero.tune.space import Group
from tests.mlflow_stub import MlflowStub
from tests.trials import EPOCHS, PICTURES, SETTINGS, trial_view


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the pauses after failures; a trial's end comes soon after its rung."""
    monkeypatch.setattr(outbox, "_PAUSES", (0.01, 0.02))
    monkeypatch.setattr(mlflow_tracker, "LINGER", 30.0)
    for picture in PICTURES:
        monkeypatch.setattr(files, picture, lambda *_: b"picture")  # tests of sweeps draw them


@pytest.fixture
def stub() -> Iterator[MlflowStub]:
    with MlflowStub() as server:
        yield server


@pytest.fixture
def job() -> Job:
    return Job.model_validate(SETTINGS)


@pytest.fixture
def group(store: FeatureStore, job: Job) -> Group:
    return Group(job, store.info("tiny"), "avca", "w2v")


@pytest.fixture
def trials(group: Group, store: FeatureStore) -> list[TrialView]:
    """Two trials stopped at a rung, two complete; the last is the best."""
    return [
        trial_view(group, store.storage, 0, EPOCHS, complete=True),
        trial_view(group, store.storage, 1, 2, complete=False),
        trial_view(group, store.storage, 2, 6, complete=False),
        trial_view(group, store.storage, 3, EPOCHS, complete=True, hm=0.3),
    ]


def run_trial(tracker: MlflowTracker, trial: TrialView) -> None:
    tracker.trial_started(trial)
    for epoch in trial.epochs:
        tracker.epoch_ended(trial, epoch)
    if len(trial.epochs) == SETTINGS["search"]["min_epochs"]:
        time.sleep(0.1)  # stopped at a rung: the end comes a little later
    tracker.trial_ended(trial)


def run_sweep(tracker: MlflowTracker, group: Group, trials: Sequence[TrialView]) -> None:
    tracker.sweep_started(group.job, [group], [])
    for trial in trials:
        run_trial(tracker, trial)
    tracker.sweep_ended(trials, False)


def steps(run: dict[str, Any], key: str = "train/loss") -> list[int]:
    return [m["step"] for m in run["metrics"] if m["key"] == key]


def assert_complete(stub: MlflowStub, trials: Sequence[TrialView]) -> None:
    """One run per trial, closed, with every epoch and the result once."""
    runs = {run["tags"]["avzero.run"]: run for run in stub.kind("trial")}
    assert len(stub.kind("trial")) == len(runs) == len(trials)
    (parent,) = stub.kind("sweep")
    assert parent["status"] == "FINISHED" and parent["start_time"] <= parent["end_time"]
    for trial in trials:
        run = runs[trial.task.id]
        assert run["status"] == {"complete": "FINISHED", "pruned": "KILLED"}[trial.state]
        assert run["tags"]["mlflow.parentRunId"] == parent["id"]
        assert run["params"]["lr"] == str(trial.task.train.lr)
        assert run["end_time"] >= run["start_time"]
        for key in ("train/loss", "val/HM"):
            assert steps(run, key) == [e.epoch for e in trial.epochs]
        assert [m["value"] for m in run["metrics"] if m["key"] == "HM"] == [100 * trial.hm]
        assert len({m["key"] for m in run["metrics"]}) <= METRIC_KEYS
        assert all(run["start_time"] <= m["timestamp"] <= run["end_time"] for m in run["metrics"])
    files = [name for name in stub.artifacts if parent["id"] in name]
    complete = any(trial.state == "complete" for trial in trials)
    assert any(name.endswith("/per_class_of_trials.parquet") for name in files) == complete


def files_of(stub: MlflowStub, run: dict[str, Any]) -> set[str]:
    return {name.split("/")[-1] for name in stub.artifacts if run["id"] in name}
