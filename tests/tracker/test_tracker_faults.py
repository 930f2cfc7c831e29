"""The MLflow tracker where its server hangs, fails, stays away or refuses."""

from __future__ import annotations

import threading
import time
from collections import Counter

import pytest

from avzero.spec import Job
from avzero.track.mlflow_tracker import MlflowTracker
from avzero.track.outbox import Outbox
from avzero.tune.listener import TrialView
from avzero.tune.space import Group
from tests.mlflow_stub import Fault, MlflowStub
from tests.tracker.conftest import assert_complete, files_of, run_sweep, run_trial


def test_hooks_do_not_wait(
    stub: MlflowStub, job: Job, group: Group, trials: list[TrialView]
) -> None:
    """A server that takes a request and never answers holds up its own thread only."""
    tracker = MlflowTracker(stub.uri, job)
    answer = threading.Event()

    def hang(endpoint: str, request: tuple[str, bytes]) -> Fault:
        answer.wait()
        return None

    stub.fault = hang
    tracker.sweep_started(job, [group], [])
    for trial in trials:
        run_trial(tracker, trial)
    assert not stub.runs
    answer.set()
    tracker.sweep_ended(trials, False)
    assert_complete(stub, trials)


@pytest.mark.parametrize("kind", ["refuse", "lose", "503"])
def test_every_request_fails_at_first(
    stub: MlflowStub,
    job: Job,
    group: Group,
    trials: list[TrialView],
    kind: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every request fails once, done or not; repeated ones change nothing: in the end all is
    there, once."""
    tracker = MlflowTracker(stub.uri, job)
    seen: Counter[tuple[str, bytes]] = Counter()
    failed = set()

    def fault(endpoint: str, request: tuple[str, bytes]) -> Fault:
        seen[request] += 1
        failed.add(endpoint)
        return kind if seen[request] == 1 else None

    stub.fault = fault
    run_sweep(tracker, group, trials)
    assert_complete(stub, trials)
    assert failed >= {"runs/create", "runs/log-batch", "runs/update", "artifacts", "runs/search"}
    assert all(len(run["tags"]) > 10 for run in stub.runs.values())
    best = next(r for r in stub.kind("trial") if r["tags"]["avzero.number"] == "3")
    assert "learning_curves.png" in files_of(stub, best)
    assert capsys.readouterr().err.count("has stopped answering") <= 1


def test_outage_costs_one_line(
    stub: MlflowStub,
    job: Job,
    group: Group,
    trials: list[TrialView],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Hooks do not wait while the server is away; when it is back, everything is sent."""
    tracker = MlflowTracker(stub.uri, job)
    stub.fault = lambda *_: "refuse"
    tracker.sweep_started(job, [group], [])
    for trial in trials:
        run_trial(tracker, trial)
    deadline = time.monotonic() + 10
    while sum(stub.counts.values()) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not stub.runs
    stub.fault = lambda *_: None
    tracker.sweep_ended(trials, False)
    assert_complete(stub, trials)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2, lines
    assert f"MLflow at {stub.uri} has stopped answering (" in lines[0]
    assert "the sweep goes on" in lines[0] and "answers again; nothing is missing" in lines[1]


def test_server_that_stays_away(
    stub: MlflowStub,
    job: Job,
    group: Group,
    trials: list[TrialView],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command ends in bounded time and says what is missing; the next one fills it in."""
    monkeypatch.setattr(Outbox, "patience", 0.3)
    tracker = MlflowTracker(stub.uri, job)
    run = {"left": 3}

    def fault(endpoint: str, request: tuple[str, bytes]) -> Fault:
        run["left"] -= 1
        return "refuse" if run["left"] < 0 else None

    stub.fault = fault
    start = time.monotonic()
    run_sweep(tracker, group, trials)
    assert time.monotonic() - start < 10
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "could not be sent; results are in the store" in lines[1], lines
    stub.fault = lambda *_: None
    assert tracker.outbox.drain(), "what is left is still tried"
    stub.runs.clear()
    tracker = MlflowTracker(stub.uri, job)
    tracker.sweep_started(job, [group], trials)
    tracker.sweep_ended(trials, False)
    assert_complete(stub, trials)


def test_refused_run_does_not_stop_the_others(
    stub: MlflowStub,
    job: Job,
    group: Group,
    trials: list[TrialView],
    capsys: pytest.CaptureFixture[str],
) -> None:
    tracker = MlflowTracker(stub.uri, job)
    batches = {"left": 3}

    def fault(endpoint: str, request: tuple[str, bytes]) -> Fault:
        if endpoint != "runs/log-batch":
            return None
        batches["left"] -= 1
        return "400" if batches["left"] >= 0 else None

    stub.fault = fault
    run_sweep(tracker, group, trials)
    err = capsys.readouterr().err
    assert (
        err.count("\n") == 1
        and "run 'AVCA: trial 0 (defaults)' is not logged (" in err
        and "400" in err
    )
    stub.fault = lambda *_: None
    tracker = MlflowTracker(stub.uri, job)
    tracker.sweep_started(job, [group], trials)
    tracker.sweep_ended(trials, False)
    assert_complete(stub, trials)
