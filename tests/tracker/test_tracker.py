"""The MLflow tracker against a stub server: requests, order, taking up, limits."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from avzero.data.store import FeatureStore
from avzero.protocol.calibration import Calibration
from avzero.protocol.seal import Frozen
from avzero.spec import Job
from avzero.track import mlflow_tracker
from avzero.track.mlflow_tracker import MlflowTracker
from avzero.track.payload import EPOCH_KEYS, METRIC_KEYS, epoch_metrics, rate, result_metrics
from avzero.train.folder import RunFolder
from avzero.tune.listener import FinalView, TrialView
from avzero.tune.space import Group
from tests.mlflow_stub import MlflowStub
from tests.test_outbox import ended
from tests.tracker.conftest import assert_complete, files_of, run_sweep, run_trial, steps
from tests.trials import EPOCHS, SETTINGS, epoch_of, result_of, trial_view

SCORES = {"S", "U", "HM", "ZSL", "beta", "AUSUC"}


def test_requests_of_a_sweep(
    stub: MlflowStub, job: Job, group: Group, trials: list[TrialView]
) -> None:
    """Three requests a trial; recalls by class of all of them are one file."""
    tracker = MlflowTracker(stub.uri, job)
    run_sweep(tracker, group, trials)
    assert_complete(stub, trials)
    by_run: dict[str, Counter[str]] = {}
    for endpoint, body in stub.sent:
        if "run_id" in body:
            by_run.setdefault(body["run_id"], Counter())[endpoint] += 1
    for run in stub.kind("trial"):
        assert by_run[run["id"]] == {"runs/log-batch": 1, "runs/update": 1}
    assert stub.counts["runs/create"] == 1 + len(trials)
    assert stub.counts["runs/search"] == stub.counts["runs/get"] == 0, "the experiment was new"
    (parent,) = stub.kind("sweep")
    best = next(r for r in stub.kind("trial") if r["tags"]["avzero.number"] == "3")
    assert parent["tags"]["avzero.best_trial"] == "3"
    assert {m["key"]: m["value"] for m in parent["metrics"]}["HM"] == 30.0
    names = {run["tags"]["mlflow.runName"] for run in stub.runs.values()}
    assert names == {
        *("AVCA: search tracked", "AVCA: trial 0 (defaults)"),
        *(f"AVCA: trial {n}" for n in (1, 2, 3)),
    }
    for run in stub.runs.values():
        wanted = {"benchmark": "tiny", "model": "avca", "stage": "1", "seed": "42"}
        wanted |= {"preset": "paper", "text": "w2v"}
        assert wanted.items() <= run["tags"].items() and "VAL" in run["tags"]["selection"]
        assert run["tags"]["feature_set"] and run["tags"]["dataset"]
    note = parent["tags"]["mlflow.note.content"]
    assert "4 trials: 2 complete, 2 stopped early. Trial 3 is the best on VAL:" in note
    assert (
        "**HM 30.00 %** (S 31.00, U 15.00" in note
        and f"path=seen_unseen_curve.png&run_uuid={parent['id']}" in note
    )
    pictures = {"learning_curves.png", "seen_unseen_curve.png", "per_class_recall.png"}
    tables = {"seen_unseen_curve.csv", "per_class.csv", "retrieval.csv"}
    assert files_of(stub, best) == pictures | tables
    own = {"job.yaml", "per_class_of_trials.parquet", "trials.csv", "parallel_coordinates.png"}
    assert files_of(stub, parent) == pictures | tables | own
    assert stub.counts["artifacts"] == 6 + 6 + 4
    (table,) = (d for name, d in stub.artifacts.items() if name.endswith(".parquet"))
    rows = pq.read_table(io.BytesIO(table))
    assert rows.column_names == ["trial", "class_id", "recall", "zsl"]
    assert Counter(rows["trial"].to_pylist()) == {0: 40, 3: 40}
    assert rows["zsl"].null_count == 40 and rows["recall"][0].as_py() == pytest.approx(0.2)


def test_nothing_before_the_first_rung_then_one_batch_per_rung(
    stub: MlflowStub,
    job: Job,
    group: Group,
    trials: list[TrialView],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mlflow_tracker, "LINGER", 0.0)
    tracker = MlflowTracker(stub.uri, job)
    tracker.sweep_started(job, [group], [])
    trial = trials[3]
    tracker.trial_started(trial)
    logged = []
    for epoch in trial.epochs:
        tracker.epoch_ended(trial, epoch)
        tracker.outbox.drain()
        logged.append(
            [len({m["step"] for m in b["metrics"]}) for e, b in stub.sent if e == "runs/log-batch"]
        )
        assert len(stub.kind("trial")) == (epoch.epoch >= 1)
    assert logged == [[]] + 4 * [[2]] + 7 * [[2, 4]]
    tracker.trial_ended(trial)
    tracker.outbox.drain()
    # Parameters go with the first batch, tags of the result with the last.
    batches = [body for endpoint, body in stub.sent if endpoint == "runs/log-batch"]
    assert [len(b.get("params", [])) > 20 for b in batches] == [True, False, False]
    assert steps(stub.kind("trial")[0]) == list(range(EPOCHS))


def test_requests_keep_the_limits(stub: MlflowStub, store: FeatureStore, tmp_path: Path) -> None:
    """1,000 entities and 100 parameters a request, whole epochs in each."""
    job = Job.model_validate(SETTINGS | {"train": {"epochs": 400}})
    group = Group(job, store.info("tiny"), "avca", "w2v")
    trial = trial_view(group, store.storage, 0, 400, complete=True)
    config = trial.task.config | {f"option_{n}": n for n in range(120)}
    trial.task = trial.task.model_copy(update={"config": config})
    run_sweep(MlflowTracker(stub.uri, job), group, [trial])
    (run,) = stub.kind("trial")
    assert len(run["params"]) > 130 and steps(run) == list(range(400))
    seen: list[int] = []
    for endpoint, body in stub.sent:
        if endpoint == "runs/log-batch" and body["run_id"] == run["id"]:
            parts = [len(body.get(part, [])) for part in ("metrics", "params", "tags")]
            assert sum(parts) <= 1000 and max(parts[1:]) <= 100
            by_step = Counter(m["step"] for m in body["metrics"] if "/" in m["key"])
            assert set(by_step.values()) == {EPOCH_KEYS - 1}
            seen += by_step
    assert seen == list(range(400))


def test_at_most_fifteen_metric_keys() -> None:
    """And the same columns everywhere: of a trial on VAL, of a TEST run on TEST."""
    per_epoch = set(epoch_metrics(epoch_of(0)))
    one = {"S": 0.1, "U": 0.1, "HM": 0.1, "ZSL": 0.1, "beta": 0.5}
    results = [result_of("t"), result_of("t", "test")]
    for result in results:
        result.scores.update(audio=one, video=one | {"HM": 0.2})
    trial, test = (result_metrics(result) for result in results)
    shared = {"S", "U", "HM", "ZSL", "beta", "AUSUC", "audio_HM", "video_HM"}
    shared |= {"seconds", "parameters"}
    assert set(trial) == shared < set(test) and trial["video_HM"] == 20.0
    assert len(per_epoch) == EPOCH_KEYS and len(per_epoch | set(trial)) == METRIC_KEYS
    assert len(test | rate([epoch_of(0)])) <= METRIC_KEYS
    assert {"S_source_disjoint", "retrieval/mAP_text_both_hm"} <= set(test)


# -- taking up ----------------------------------------------------------------------------------


def test_running_again_adds_nothing(
    stub: MlflowStub, job: Job, group: Group, trials: list[TrialView]
) -> None:
    run_sweep(MlflowTracker(stub.uri, job), group, trials)
    before, runs = Counter(stub.counts), len(stub.runs)
    metrics = {run["id"]: list(run["metrics"]) for run in stub.runs.values()}
    tracker = MlflowTracker(stub.uri, job)
    tracker.sweep_started(job, [group], trials)
    tracker.sweep_ended(trials, False)
    assert_complete(stub, trials)
    assert len(stub.runs) == runs
    assert metrics == {run["id"]: run["metrics"] for run in stub.runs.values()}
    asked = Counter(stub.counts) - before
    assert asked["runs/log-batch"] == asked["runs/create"] == 0
    assert asked["runs/search"] == 2 and asked.total() <= 8, "not one request per trial"


def test_missing_runs_are_filled_in(
    stub: MlflowStub, job: Job, group: Group, trials: list[TrialView]
) -> None:
    """Trials of an earlier, untracked call; more than a page of them. Twins have no run."""
    stub.page = 20
    many = [*trials]
    storage = trials[0].folder.storage
    many += [trial_view(group, storage, n, 2, complete=False) for n in range(4, 45)]
    twin = trial_view(group, storage, 45, EPOCHS, complete=True)
    twin.twin_of = 0
    for held_back in (many[5:], []):
        tracker = MlflowTracker(stub.uri, job)
        tracker.sweep_started(job, [group], [t for t in many if t not in held_back])
        tracker.trial_ended(twin)
        tracker.sweep_ended([*many, twin], False)
        assert_complete(stub, many)


def test_killed_driver_is_taken_up(
    stub: MlflowStub, job: Job, group: Group, trials: list[TrialView]
) -> None:
    """What a driver left RUNNING is found, nothing is logged twice, duplicates go."""
    first, second = trials[0], trials[3]
    tracker = MlflowTracker(stub.uri, job)
    tracker.sweep_started(job, [group], [])
    for trial in (first, second):
        tracker.trial_started(trial)
        for epoch in trial.epochs[:8]:
            tracker.epoch_ended(trial, epoch)
    tracker.outbox.drain()  # and then it was killed
    assert sorted(len(steps(run)) for run in stub.kind("trial")) == [8, 8]
    double = dict(stub.kind("trial")[0]) | {"id": "d" * 32, "metrics": []}
    stub.runs[double["id"]] = double
    # The first trial had ended in the study; the second goes on, and replays what it had.
    tracker = MlflowTracker(stub.uri, job)
    tracker.sweep_started(job, [group], [first])
    second.epochs = [epoch_of(e, 0.3, replayed=e < 8) for e in range(EPOCHS)]
    run_trial(tracker, second)
    tracker.sweep_ended([first, second], False)
    assert_complete(stub, [first, second])
    assert stub.counts["metrics/get-history"] == 2, "once per run taken up"


def test_killed_just_before_a_run_was_closed(
    stub: MlflowStub, job: Job, group: Group, trials: list[TrialView]
) -> None:
    """The result is there, the status is not: only the latter is sent."""
    run_sweep(MlflowTracker(stub.uri, job), group, trials)
    for run in stub.runs.values():
        run["status"] = "RUNNING"
    tracker = MlflowTracker(stub.uri, job)
    tracker.sweep_started(job, [group], trials)
    tracker.sweep_ended(trials, False)
    assert_complete(stub, trials)


def test_interrupted_trials_stay_open(
    stub: MlflowStub, job: Job, group: Group, trials: list[TrialView]
) -> None:
    trial, untouched = trials[3], trials[0]
    tracker = MlflowTracker(stub.uri, job)
    tracker.sweep_started(job, [group], [])
    tracker.trial_started(trial)
    tracker.epoch_ended(trial, trial.epochs[0])
    tracker.trial_started(untouched)
    tracker.sweep_ended([], True)
    (run,) = stub.kind("trial")
    assert run["status"] == "RUNNING" and steps(run) == [0]
    assert stub.kind("sweep")[0]["status"] == "KILLED"
    assert ended(tracker.outbox)
    tracker = MlflowTracker(stub.uri, job)
    run_sweep(tracker, group, [trial, untouched])
    assert_complete(stub, [trial, untouched])


# -- final runs ---------------------------------------------------------------------------------


def final_of(group: Group, trial: TrialView, seed: int, stored: bool) -> FinalView:
    calibration = Calibration({"both": 0.5}, 1.0, False)
    frozen = Frozen(trial.task, 3, (1e-3,) * 4, calibration, {"HM": 0.3})
    task = frozen.stage_2_task(seed)
    return FinalView(group, frozen, task, RunFolder(trial.folder.storage, task), stored)


def run_final(tracker: MlflowTracker, final: FinalView) -> None:
    tracker.final_started(final)
    for number in range(4):
        tracker.final_epoch_ended(final, epoch_of(number, replayed=final.stored))
    tracker.test_scored(final, result_of(final.task.id, "test"))


def test_final_runs(stub: MlflowStub, job: Job, group: Group, trials: list[TrialView]) -> None:
    """Stage 2 and TEST are closed when ``test_scored`` returns; again, nothing is added."""
    for stored in (False, True):
        before = Counter(stub.counts)
        tracker = MlflowTracker(stub.uri, job)
        for seed in (42, 43):
            run_final(tracker, final_of(group, trials[3], seed, stored))
        assert len(stub.kind("stage2")) == len(stub.kind("test")) == 2
        assert len(stub.runs) == 5 and all(r["status"] == "FINISHED" for r in stub.runs.values())
    assert not (Counter(stub.counts) - before).keys() & {"runs/create", "runs/log-batch"}
    (parent,) = stub.kind("sweep")
    assert not any("TEST" in m["key"] for m in parent["metrics"]) and not parent["metrics"]
    for run in stub.kind("stage2"):
        assert {m["key"] for m in run["metrics"]}.isdisjoint(SCORES), "TEST is on TEST runs only"
        assert run["tags"]["mlflow.parentRunId"] == parent["id"]
        assert steps(run) == [0, 1, 2, 3] and run["params"]["stage"] == "2"
        assert files_of(stub, run) == {"run.yaml", "learning_curves.png"}
    for run in stub.kind("test"):
        assert run["tags"]["avzero.test_opened"] == "true" and run["params"]["stage"] == "2"
        assert {m["key"]: m["value"] for m in run["metrics"]}["HM"] == 20.0
        assert len(run["inputs"]) == 1
        assert files_of(stub, run) == {
            *("run.yaml", "seen_unseen_curve.png", "seen_unseen_curve.csv"),
            *("per_class_recall.png", "per_class.csv", "retrieval.csv"),
        }


def test_stage_1_of_a_pipeline_is_closed_by_stage_2(
    stub: MlflowStub, job: Job, group: Group, trials: list[TrialView]
) -> None:
    tracker = MlflowTracker(stub.uri, job)
    second = final_of(group, trials[3], 43, False)
    task = trials[3].task.model_copy(update={"seed": 43})
    first = FinalView(group, second.frozen, task, second.folder, False)
    tracker.final_started(first)
    tracker.final_epoch_ended(first, epoch_of(0))
    run_final(tracker, second)
    (run,) = stub.kind("stage1")
    assert run["status"] == "FINISHED" and steps(run) == [0]
