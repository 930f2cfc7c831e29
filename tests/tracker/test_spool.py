"""Runs that wait on disk while MLflow is away: kept, sent later, each once."""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from avzero.spec import Job
from avzero.track import payload
from avzero.track.mlflow_tracker import MlflowTracker
from avzero.track.outbox import Outbox
from avzero.track.payload import Draft, Outcome, final_draft, trial_draft
from avzero.track.spool import Spool, Ticket
from avzero.tune.listener import TrialView
from avzero.tune.space import Group
from tests.mlflow_stub import Fault, MlflowStub
from tests.test_outbox import ended
from tests.tracker.conftest import assert_complete, files_of, run_sweep, run_trial
from tests.tracker.test_tracker import final_of, run_final
from tests.trials import result_of


@pytest.fixture
def spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Spool:
    """A spool in a cache of the test's own."""
    monkeypatch.setenv("AVZERO_CACHE", str(tmp_path / "cache"))
    return Spool("http://away", "store", "tracked")


def waiting() -> list[Path]:
    from avzero.data.cache import cache_root

    return sorted((cache_root() / "spool").rglob("*.zip"))


def test_a_draft_comes_back_as_it_was(
    spool: Spool, group: Group, trials: list[TrialView], monkeypatch: pytest.MonkeyPatch
) -> None:
    final = final_of(group, trials[3], 42, False)
    draft = final_draft(final, "test")
    for epoch in trials[3].epochs:
        draft.add(epoch)
    result = result_of(final.task.id, "test")
    monkeypatch.setattr(payload, "model_files", lambda *_: {"MLmodel": b"m"})
    outcome = functools.partial(payload.test_outcome, final, trials[3].epochs, result)

    def make_outcome(run: str) -> Outcome:
        made = outcome()
        made.tags["mlflow.note.content"] = f"see #/runs/{run}"
        return made

    draft.close("FINISHED", make_outcome)
    draft.marks = {"a": "b"}
    ticket = spool.keep(draft)
    assert isinstance(ticket, Ticket) and str(ticket) == str(draft)
    (found,) = spool.left(group)
    assert found == ticket
    again = found.draft()
    for name in ("identity", "kind", "name", "tags", "marks", "started", "status", "ended"):
        assert getattr(again, name) == getattr(draft, name), name
    assert (again.task, again.epochs, again.group) == (draft.task, draft.epochs, group)
    before, after = draft.make_outcome("r"), again.make_outcome("r")
    assert (after.metrics, after.tags, after.also) == (before.metrics, before.tags, before.also)
    assert after.tags["mlflow.note.content"] == "see #/runs/r"
    assert after.files() == before.files() and len(after.files()) > 2
    assert after.model() == {"MLmodel": b"m"}
    assert again.files() == draft.files() and "run.yaml" in again.files()
    found.done()
    assert list(spool.left(group)) == [] and waiting() == []


def test_runs_in_the_making_stay_in_memory(spool: Spool, trials: list[TrialView]) -> None:
    draft = trial_draft(trials[0])
    assert spool.keep(draft) is draft and waiting() == []


def test_next_call_sends_what_this_one_could_not(
    spool: Spool,
    stub: MlflowStub,
    job: Job,
    group: Group,
    trials: list[TrialView],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also ``avzero test``, which tells the tracker nothing of trials; times stay as they were."""
    monkeypatch.setattr(Outbox, "patience", 0.3)
    tracker = MlflowTracker(stub.uri, job)
    stub.fault = lambda *_: "refuse"
    run_sweep(tracker, group, trials)
    assert capsys.readouterr().err.count("could not be sent") == 1
    assert len(waiting()) == len(trials) + 1 and not stub.runs
    ended_by = time.time() * 1000
    monkeypatch.setattr(tracker.outbox, "_deliver", lambda item: threading.Event().wait())  # ended
    time.sleep(0.2)
    stub.fault = lambda *_: None
    tracker = MlflowTracker(stub.uri, job)
    run_final(tracker, final_of(group, trials[3], 42, False))
    assert_complete(stub, trials)
    assert len(stub.kind("test")) == 1 and waiting() == []
    for run in stub.kind("trial"):
        assert max(run["end_time"], *(m["timestamp"] for m in run["metrics"])) <= ended_by
    (parent,) = stub.kind("sweep")
    assert {"job.yaml", "learning_curves.png"} <= files_of(stub, parent)
    # And what is sent twice, because the program ended between sending and forgetting: nothing.
    runs, sent = len(stub.runs), {run["id"]: list(run["metrics"]) for run in stub.runs.values()}
    assert tracker._spool._lock is not None
    tracker._spool._lock.close()  # as when the program ends
    spool = Spool(stub.uri, job.store, job.name)
    for trial in trials[:2]:
        draft = trial_draft(trial)
        for epoch in trial.epochs:
            draft.add(epoch)
        draft.close("FINISHED")
        spool.keep(draft)
    tracker = MlflowTracker(stub.uri, job)
    tracker.sweep_started(job, [group], trials)
    tracker.sweep_ended(trials, False)
    assert len(stub.runs) == runs and waiting() == []
    assert sent == {run["id"]: run["metrics"] for run in stub.runs.values()}


def test_memory_is_bounded_during_an_outage(
    spool: Spool,
    stub: MlflowStub,
    job: Job,
    group: Group,
    trials: list[TrialView],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Outbox, "room", 1)
    tracker = MlflowTracker(stub.uri, job)
    stub.fault = lambda *_: "refuse"
    tracker.sweep_started(job, [group], [])
    for trial in trials:
        run_trial(tracker, trial)
    deadline = time.monotonic() + 10
    while len(waiting()) < len(trials) - 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    items = [item for entry in tracker.outbox._entries.values() for item in entry.items]
    finished = [item for item in items if isinstance(item, Draft) and item.status != "RUNNING"]
    assert len(finished) == 1 and sum(isinstance(item, Ticket) for item in items) == 3
    stub.fault = lambda *_: None
    tracker.sweep_ended(trials, False)
    assert_complete(stub, trials)
    assert waiting() == [] and ended(tracker.outbox)


def test_full_disk_costs_memory_only(
    spool: Spool,
    stub: MlflowStub,
    job: Job,
    group: Group,
    trials: list[TrialView],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Outbox, "room", 0)

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    tracker = MlflowTracker(stub.uri, job)
    stub.fault = lambda *_: "refuse"
    tracker.sweep_started(job, [group], [])
    for trial in trials:
        run_trial(tracker, trial)
    deadline = time.monotonic() + 10
    said = ""
    while "on disk" not in said and time.monotonic() < deadline:
        time.sleep(0.01)
        said += capsys.readouterr().err
    assert said.count("(No space left on device)") == 1, said
    stub.fault = lambda *_: None
    monkeypatch.undo()
    tracker.sweep_ended(trials, False)
    assert_complete(stub, trials)


def test_what_is_damaged_or_another_process_sends_is_left_out(
    spool: Spool, group: Group, trials: list[TrialView]
) -> None:
    draft = trial_draft(trials[0])
    draft.close("FINISHED")
    ticket = spool.keep(draft)
    assert isinstance(ticket, Ticket)
    other = Spool("http://away", "store", "tracked")
    assert len(list(other.left(group))) == 1
    assert list(spool.left(group)) == [], "the other one sends it"
    ticket.path.write_bytes(ticket.path.read_bytes()[:50])
    with pytest.raises(ValueError, match="is damaged"):
        ticket.draft()
    assert list(other.left(group)) == [] and waiting() == []


def test_run_that_was_made_late(
    spool: Spool, stub: MlflowStub, job: Job, group: Group, trials: Sequence[TrialView]
) -> None:
    """A creation that seemed lost is carried out after the run was looked for and made again."""
    tracker = MlflowTracker(stub.uri, job)
    late: list[dict[str, Any]] = []

    def fault(endpoint: str, request: tuple[str, bytes]) -> Fault:
        if endpoint == "runs/create" and not late:
            late.append(json.loads(request[1]))
            return "refuse"
        if endpoint == "runs/log-batch" and late and late[-1]:
            stub._runs_create(late[0])
            late.append({})
        return None

    stub.fault = fault
    run_sweep(tracker, group, trials)
    assert len(late) == 2
    assert_complete(stub, trials)
