"""The order in which runs reach MLflow, and how many requests they take, without any server.

A schedule says which request fails and how, and before which request hooks are called meanwhile:
the sweep's thread and the outbox's, interleaved in every way that matters, the same way each time.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from avzero.data.store import FeatureStore
from avzero.spec import Job
from avzero.track import files, payload
from avzero.track.mlflow_tracker import MlflowTracker
from avzero.track.outbox import Outbox
from avzero.tune.listener import TrialView
from avzero.tune.space import Group
from tests.mlflow_memory import MemoryClient, stepped
from tests.mlflow_stub import MlflowStub
from tests.trials import EPOCHS, PICTURES, SETTINGS, trial_view


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for picture in PICTURES:
        monkeypatch.setattr(files, picture, lambda *_: b"picture")


def group_of(store: FeatureStore, **changes: Any) -> Group:
    return Group(Job.model_validate(SETTINGS | changes), store.info("tiny"), "avca", "w2v")


def hooks_of(tracker: MlflowTracker, trials: Sequence[TrialView]) -> list[Callable[[], None]]:
    """Every call of a sweep but its first and last, trials side by side in the order of epochs."""
    calls: list[tuple[int, int, Callable[[], None]]] = []
    for n, trial in enumerate(trials):
        calls.append((n, n, lambda t=trial: tracker.trial_started(t)))  # type: ignore[misc]
        for at, epoch in enumerate(trial.epochs):
            calls.append(
                (n + at, n, lambda t=trial, e=epoch: tracker.epoch_ended(t, e))  # type: ignore[misc]
            )
        end = n + len(trial.epochs)
        calls.append((end, n, lambda t=trial: tracker.trial_ended(t)))  # type: ignore[misc]
    return [call for _, _, call in sorted(calls, key=lambda c: c[:2])]


@pytest.mark.parametrize("outage", [0.0, 0.15, 0.6])
def test_whatever_fails_and_whenever_everything_ends_closed(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch, outage: float
) -> None:
    """150 interleavings per share of failing requests; each is a seed, to be had again."""
    group = group_of(store)
    trials = [
        trial_view(group, store.storage, 0, EPOCHS, complete=True),
        trial_view(group, store.storage, 1, 2, complete=False),
        trial_view(group, store.storage, 2, 6, complete=False),
        trial_view(group, store.storage, 3, EPOCHS, complete=True, hm=0.3),
    ]
    seen: Counter[str] = Counter()
    for seed in range(150):
        with monkeypatch.context() as patch:
            try:
                seen += interleaved(patch, group, trials, seed, outage)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, outage {outage}: {error}") from error
    # The schedules do reach what they are for: hooks during deliveries, ends before beginnings.
    assert seen["hook during a request"] > 700
    assert seen["parent closed before it was made"] > (10 if outage else -1)


def interleaved(
    patch: pytest.MonkeyPatch, group: Group, trials: Sequence[TrialView], seed: int, outage: float
) -> Counter[str]:
    """Play a sweep and assert what MLflow has in the end; return what happened on the way."""
    chance = random.Random(seed)
    seen: Counter[str] = Counter()
    left: list[Callable[[], None]] = []
    busy = False
    # Failures stop for good once the sweep has ended, or later; some sweeps are over before that.
    budget = chance.randrange(5, 60)

    def before(endpoint: str) -> str | None:
        nonlocal busy, budget
        while left and not busy and chance.random() < 0.3:
            busy = True
            left.pop(0)()
            busy = False
            seen["hook during a request"] += 1
        budget -= 1
        if budget > 0 and chance.random() < outage:
            return chance.choice(["refuse", "lose"])
        return None

    stub = MlflowStub()
    stub._server.server_close()
    clock = stepped(patch, MemoryClient(stub, before))
    tracker = MlflowTracker("memory", group.job)
    clock.boxes.append(tracker.outbox)
    patch.setattr(Outbox, "patience", 1e6)
    patch.setattr(Outbox, "limit", 1e6)
    tracker.sweep_started(group.job, [group], [])
    left += hooks_of(tracker, trials)
    swiftness = chance.choice([0.2, 0.6, 0.95])
    while left:
        if chance.random() < swiftness:
            left.pop(0)()
        else:
            clock.step(tracker.outbox)
    seen["parent closed before it was made"] += not stub.kind("sweep")
    tracker.sweep_ended(trials, False)
    assert not tracker.outbox._entries or clock.step(tracker.outbox) is False
    check(stub, trials)
    return seen


def check(stub: MlflowStub, trials: Sequence[TrialView]) -> None:
    (parent,) = stub.kind("sweep")
    assert parent["status"] == "FINISHED", "its beginning came after its end"
    assert parent["tags"]["avzero.best_trial"] == "3"
    assert parent["start_time"] <= parent["end_time"]
    runs = {run["tags"]["avzero.run"]: run for run in stub.kind("trial")}
    assert len(runs) == len(stub.kind("trial")) == len(trials)
    for trial in trials:
        run = runs[trial.task.id]
        assert run["status"] == {"complete": "FINISHED", "pruned": "KILLED"}[trial.state]
        for key in ("train/loss", "val/HM"):
            steps = sorted(m["step"] for m in run["metrics"] if m["key"] == key)
            assert steps == [epoch.epoch for epoch in trial.epochs]
    files = [name for name in stub.artifacts if name.startswith(runs[trials[3].task.id]["id"])]
    assert any(name.endswith("learning_curves.png") for name in files), "the best has its pictures"
    for run in (parent, *runs.values()):
        states = [b for e, b in stub.sent if e == "runs/update" and b["run_id"] == run["id"]]
        assert states[-1]["status"] == run["status"] != "RUNNING"
        last = max(n for n, (_, b) in enumerate(stub.sent) if b.get("run_id") == run["id"])
        assert stub.sent[last][0] == "runs/update", "nothing comes after the end"


LENGTHS = {"mixed": [4, 4, 12, 4, 4, 12, 4, 4, 50], "all complete": [50]}


@pytest.mark.parametrize("weights", ["none", "all"])
@pytest.mark.parametrize("mix", LENGTHS)
def test_at_most_five_requests_per_run(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch, mix: str, weights: str
) -> None:
    """Where every rung is outlived; the first trials and long ones report nevertheless."""
    monkeypatch.setattr(payload, "weights", lambda folder: {"model.safetensors": b"w"})
    search = {"trials": 90, "min_epochs": 4, "reduction": 3}
    group = group_of(store, train={"epochs": 50}, search=search, tracking={"checkpoints": weights})
    lengths = [LENGTHS[mix][n % len(LENGTHS[mix])] for n in range(90)]
    trials = [
        trial_view(group, store.storage, n, length, complete=length == 50)
        for n, length in enumerate(lengths)
    ]
    stub = MlflowStub()
    stub._server.server_close()
    clock = stepped(monkeypatch, MemoryClient(stub, lambda _: None))
    tracker = MlflowTracker("memory", group.job)
    clock.boxes.append(tracker.outbox)
    tracker.sweep_started(group.job, [group], [])
    for trial in trials:
        for epoch in trial.epochs:
            tracker.epoch_ended(trial, epoch)
            if epoch.epoch + 1 in (4, 12, 36) and epoch is not trial.epochs[-1]:
                tracker.outbox.drain()
        tracker.trial_ended(trial)
    tracker.sweep_ended(trials, False)
    assert stub.counts.total() <= 5 * len(trials)
    assert len(stub.kind("trial")) == len(trials)
    batches = Counter(b["run_id"] for endpoint, b in stub.sent if endpoint == "runs/log-batch")
    by_number = {int(r["tags"]["avzero.number"]): batches[r["id"]] for r in stub.kind("trial")}
    assert max(by_number.values()) == 4, "three rungs and the end"
    whole = [by_number[t.number] for t in trials if t.state == "complete"]
    if mix == "mixed":
        assert min(whole[1:]) == 4, "what others leave is enough for all that are long"
    else:
        assert whole[0] == 4 and sum(whole) >= (100 if weights == "all" else 200)
