"""What can go wrong in a sweep: diverging, failing, killed, interrupted, unreachable, changed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from avzero.data.avca import read_avca
from avzero.data.release import ReadOptions
from avzero.data.store import FeatureStore
from avzero.errors import UserError
from avzero.spec import Job
from avzero.track.mlflow_tracker import MlflowTracker
from avzero.train.folder import RunFolder
from avzero.train.loop import Trainer
from avzero.train.records import Epoch
from avzero.tune.final import freeze, run_final
from avzero.tune.listener import Listener, TrialView
from avzero.tune.sweep import Sweep
from tests.sweeps import SETTINGS, Recorder, sweep

pytestmark = [pytest.mark.ray, pytest.mark.faults]


def test_a_diverging_trial_fails_alone(ray_local: None, place: Path) -> None:
    recorder = Recorder()
    run = sweep(
        place,
        [recorder],
        name="diverging",
        search={
            "trials": 3,
            "sampler": "random",
            "pruner": "none",
            "space": {"lr": {"log": [1e-4, 1e30]}},
            "points": [{"lr": 1e30}],
        },
    )
    assert run.run()
    states = dict(recorder.ended)
    assert states[0] == "complete" and states[1] == "failed"
    record = json.loads(
        run.store.storage.read(f"sweeps/diverging/trials/{run.groups[0].key}/00001.json")
    )
    assert "is not finite in epoch" in record["reason"]


def test_a_trial_on_two_ray_train_workers(ray_local: None, place: Path) -> None:
    """Split over two workers a trial gives the losses and scores it gives on one."""
    search = {"trials": 1, "pruner": "none"}
    settings: dict[str, Any] = {
        "train": SETTINGS["train"] | {"epochs": 2, "precision": "float64"},
        "resources": {"workers": 2, "cpus": 0.5},
        "seed": 51,
    }
    run = sweep(place, name="workers", search=search, **settings)
    assert run.run()
    (view,) = run.done()
    assert view.state == "complete"
    alone = RunFolder(run.store.storage, view.task)
    alone.prefix += "-alone"
    expected = list(Trainer(view.task, run.store.open("tiny"), alone).epochs())
    for mine, theirs in zip(view.epochs, expected, strict=True):
        assert mine.losses == pytest.approx(theirs.losses, rel=1e-5)
        assert mine.val == pytest.approx(theirs.val)


def test_one_failing_worker_ends_the_trial_at_once(ray_local: None, place: Path) -> None:
    """Divergence on two workers is reported as such, and nobody waits for a dead partner."""
    began = time.monotonic()
    run = sweep(
        place,
        name="workers-diverge",
        search={"trials": 1, "pruner": "none", "space": {"lr": {"log": [1e-4, 1e31]}}},
        train=SETTINGS["train"] | {"lr": 1e30},
        resources={"workers": 2, "cpus": 0.5},
    )
    assert run.run()
    (view,) = run.done()
    assert view.state == "failed" and "is not finite" in view.reason
    assert time.monotonic() - began < 100, "the workers waited for each other"
    assert "is not finite" in run.failures()[run.groups[0].key]


def test_identical_configurations_are_run_once(ray_local: None, place: Path) -> None:
    """Two configurations, five trials: the others take over the outcome of their twins."""
    recorder = Recorder()
    train = SETTINGS["train"] | {"lr": 1e-3, "weight_decay": 0.0}
    fixed = (
        SETTINGS["fixed"]["avca"]
        | dict.fromkeys(("r_enc", "r_proj", "r_add", "k2"), 0.0)
        | {"bn_momentum": 0.1, "margin": 1.0, "w_reg": 1.0, "w_rec": 1.0}
    )
    run = sweep(
        place,
        [recorder],
        name="twins",
        train=train,
        fixed={"avca": fixed},
        search={
            "trials": 5,
            "sampler": "random",
            "pruner": "none",
            "space": {"k1": {"choice": [0.0, 1.0]}},
        },
    )
    assert run.run()
    views = run.done()
    assert len(views) == 5 and len({v.task.id for v in views}) == 2
    assert len(recorder.started) == 2 and len(recorder.ended) == 5
    twins = [v for v in views if v.twin_of is not None]
    assert len(twins) == 3
    by_number = {v.number: v for v in views}
    assert all(v.hm == by_number[v.twin_of].hm for v in twins)  # type: ignore[index]
    assert len(run.store.storage.keys("sweeps/twins/trials/")) == 5


class Breaking(Listener):
    """Breaks at the second epoch it hears of."""

    def __init__(self) -> None:
        self.heard = 0

    def epoch_ended(self, trial: TrialView, epoch: Epoch) -> None:
        self.heard += 1
        if self.heard == 2:
            raise UserError("the disk is full; free some")


def test_trouble_stops_the_sweep_and_costs_no_trial(ray_local: None, place: Path) -> None:
    """What fails in the surroundings is said once; running again goes on with every trial."""
    run = sweep(place, [Breaking()], name="trouble")
    with pytest.raises(UserError, match="the disk is full"):
        run.run()
    assert all(v.state != "failed" for v in run.done())
    again = sweep(place, name="trouble")
    assert again.run()
    assert sorted(v.number for v in again.done()) == list(range(5))
    assert all(v.state in ("complete", "pruned") for v in again.done())


def test_trouble_in_a_worker_burns_no_trial(ray_local: None, release: Path, tmp_path: Path) -> None:
    """The benchmark's file is gone when the workers look: no trial may count as failed."""
    store = FeatureStore(str(tmp_path / "store"))
    store.put(read_avca(release, "tiny", "main", name="tiny", options=ReadOptions()))
    # A content no node has cached: change one value's name, so the part has its own identity.
    manifest_key = store.storage.keys("benchmarks/")[0]
    manifest = json.loads(store.storage.read(manifest_key))
    manifest["parts"]["open"]["content"]["samples"] = "0" * 64
    store.storage.write(manifest_key, json.dumps(manifest).encode())
    run = Sweep(Job.model_validate(SETTINGS | {"name": "gone"}), store)
    with pytest.raises(UserError, match="does not have the content the manifest names"):
        run.run()
    assert run.done() == [] and Sweep(run.job, store).remaining == 5


def test_one_driver_at_a_time(place: Path) -> None:
    run = sweep(place, name="trouble")
    with (
        run.journal.exclusive(),
        pytest.raises(UserError, match="another avzero is running it"),
        sweep(place, name="trouble").journal.exclusive(),
    ):
        pass


def test_trial_proposed_only_half(ray_local: None, place: Path) -> None:
    """A driver killed while it wrote a trial's values leaves some out; they are completed."""
    run = sweep(place, name="half", search=SETTINGS["search"] | {"trials": 1})
    with run.journal.exclusive():
        study = run.journal.create(run.groups[0])
        names = list(run.groups[0].distributions)[:3]
        study.ask({name: run.groups[0].distributions[name] for name in names})
    again = sweep(place, name="half", search=SETTINGS["search"] | {"trials": 1})
    assert again.run()
    (view,) = again.done()
    assert set(view.values) == set(again.groups[0].distributions)


def test_a_sweep_stays_with_its_version_of_a_benchmark(
    ray_local: None, release: Path, tmp_path: Path
) -> None:
    from dataclasses import replace

    store = FeatureStore(str(tmp_path / "store"))
    raw = read_avca(release, "tiny", "main", name="tiny")
    store.put(raw)
    job = Job.model_validate(SETTINGS | {"search": {"trials": 1}})
    assert Sweep(job, store).run()
    store.put(replace(raw, split="changed"))
    again = Sweep(job, store)
    assert again.groups[0].benchmark.digest == raw.digest() and again.remaining == 0
    other = Job.model_validate(SETTINGS | {"name": "other", "search": {"trials": 1}})
    with pytest.raises(UserError, match="has 2 versions"):
        Sweep(other, store)
    both = [f"tiny@{digest}" for digest in (raw.digest(), replace(raw, split="changed").digest())]
    with pytest.raises(UserError, match="benchmarks lists tiny twice"):
        Sweep(other.model_copy(update={"benchmarks": both}), store)


def test_reseeding_the_whole_pipeline(ray_local: None, place: Path) -> None:
    """Another seed with its own stage 1; every look at TEST is counted, none repeated."""
    plan: dict[str, Any] = {
        "name": "reseeded",
        "search": {"trials": 1},
        "test": {"seeds": 2, "reseed": "pipeline"},
        "seed": 60,
    }
    run = sweep(place, **plan)
    assert run.run()
    before = len(run.store.openings("tiny"))
    first = list(run_final(freeze(run), []))
    assert [view.task.seed for view, _ in first] == [60, 61]
    assert first[1][0].frozen.task.seed == 61
    assert len(run.store.openings("tiny")) == before + 2
    # The same winner reseeded in stage 2 only may share stage-2 weights, never a TEST result.
    other = sweep(place, **plan | {"test": {"seeds": 2, "reseed": "stage2"}})
    second = list(run_final(freeze(other), []))
    for view, result in second:
        assert result.frozen == view.frozen.digest
        assert result.scores["both"]["beta"] == pytest.approx(view.frozen.calibration.betas["both"])


def test_tracker_that_goes_away_costs_records_only(
    ray_local: None,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    monkeypatch.chdir(tmp_path)
    job = Job.model_validate(SETTINGS | {"name": "outage", "search": {"trials": 2}})
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracker = MlflowTracker(uri, job)
    tracker.outbox.patience = 1.0
    answers = {"left": 3}
    for name in ("log_batch", "create_run", "search_runs", "set_terminated", "log_inputs"):
        real = getattr(MlflowClient, name)

        def unreliable(*arguments: Any, real: Any = real, **named: Any) -> Any:
            answers["left"] -= 1
            if answers["left"] < 0:
                raise MlflowException("connection refused")
            return real(*arguments, **named)

        monkeypatch.setattr(MlflowClient, name, unreliable)
    run = sweep(place, [tracker], name="outage", search={"trials": 2})
    assert run.run()
    err = capsys.readouterr().err
    assert err.count("has stopped answering") == err.count("could not be sent") == 1
    assert all(v.state in ("complete", "pruned") for v in run.done())
    with tracker.outbox._changed:  # its process is over
        tracker.outbox._entries.clear()
        tracker.outbox._changed.notify_all()
    answers["left"] = 10**6
    again = sweep(place, [MlflowTracker(uri, job)], name="outage", search={"trials": 2})
    assert again.run()
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.`avzero.kind` = 'trial'")
    assert len(runs) == 2 and all(r.info.status != "RUNNING" for r in runs)


def test_impossible_placement_is_refused(ray_local: None, place: Path) -> None:
    run = sweep(place, name="too-big", resources={"gpus": 1})
    with pytest.raises(
        UserError, match=r"a run needs 1 GPU \(on 1 worker\), the cluster has 0; lower"
    ):
        run.run()


def test_final_needs_a_finished_sweep(place: Path) -> None:
    run = sweep(place, name="unfinished")
    with pytest.raises(UserError, match="5 of its trials are missing"):
        freeze(run)


def sweep_command(
    place: Path, folder: Path, name: str, trials: int, **train: int
) -> tuple[list[str], dict[str, Any]]:
    """Write a job; return the command that sweeps it and what ``sweeps.sweep`` needs for it."""
    changes = {
        "name": name,
        "train": SETTINGS["train"] | train,
        "search": {"trials": trials, "pruner": "none", "sampler": "random"},
        # Two by two: stacked, all would end in the same moment.
        "resources": {"slots": 2, "concurrent": 1},
    }
    surroundings = {"store": str(place / "store"), "tracking": {"uri": "off"}}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(SETTINGS | changes | surroundings))
    return [sys.executable, "-m", "avzero.cli", "sweep", str(path)], changes


def wait_until(ready: Callable[[], object], process: subprocess.Popen[Any]) -> None:
    """Wait for what a running command is about to do; fail if it ends or takes two minutes."""
    deadline = time.monotonic() + 120
    while not ready():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)


def test_killed_driver_resumes(place: Path, tmp_path: Path) -> None:
    """SIGKILL the command in the middle; the same command trains nothing twice and ends whole."""
    command, changes = sweep_command(place, tmp_path, "killed", 4, epochs=6, batches_per_epoch=30)
    storage = FeatureStore(str(place / "store")).storage
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    wait_until(lambda: storage.keys("sweeps/killed/trials/"), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # The study is the truth; a trial's line in the index may be what the kill prevented.
    ended_before = len(sweep(place, **changes).done())
    assert 0 < ended_before < 4
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
    assert f"resumes: {ended_before} of 4 trials are done" in done.stdout
    run = sweep(place, **changes)
    assert len(storage.keys("sweeps/killed/trials/")) == 4
    views = {view.number: view for view in run.done()}
    assert sorted(views) == [0, 1, 2, 3] and all(v.state == "complete" for v in views.values())
    assert len({v.task.id for v in views.values()}) == 4
    assert all([e.epoch for e in v.epochs] == list(range(6)) for v in views.values())


def test_interrupt_is_graceful(place: Path, tmp_path: Path) -> None:
    """Ctrl-C ends the command with a word on how to go on, and the trials go on where they were."""
    command, changes = sweep_command(
        place, tmp_path, "interrupted", 3, epochs=40, batches_per_epoch=20
    )
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    storage = FeatureStore(str(place / "store")).storage
    wait_until(lambda: _some_run_has_epochs(storage, 40, 3), process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    # Nothing is lost: the trials that ran are taken up where they were.
    stored = {
        key: len(json.loads(storage.read(key))["history"])
        for key in storage.keys("runs/")
        if key.endswith("/state.json") and _planned(storage, key) == 40
    }
    assert stored and max(stored.values()) >= 3
    run = sweep(place, **changes)
    assert run.remaining == 3
    with run.journal.exclusive():
        study = next(iter(run.studies.values()))
        study.begin(4)
        runs = {f"runs/{view.task.id}/state.json" for view in study.runnable()}
        assert runs and stored.keys() <= runs
    assert "Interrupted. Run the same command again to go on." in out
    assert "Traceback" not in out


def _planned(storage: Any, key: str) -> int:
    """Return how many epochs the run of a state file is to have."""
    task = json.loads(storage.read(key.rsplit("/", 1)[0] + "/task.json"))
    return int(task["train"]["epochs"])


def _some_run_has_epochs(storage: Any, planned: int, done: int) -> bool:
    """Return whether a run of a given length has come some way."""
    return any(
        key.endswith("/state.json")
        and _planned(storage, key) == planned
        and len(json.loads(storage.read(key))["history"]) >= done
        for key in storage.keys("runs/")
    )
