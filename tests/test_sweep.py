"""Sweeps on a real local Ray cluster: search, resume, extension, stage 2 by Ray Train, TEST."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from avzero.data.store import FeatureStore
from avzero.errors import UserError
from avzero.report.boards import boards
from avzero.report.console import ConsoleProgress
from avzero.report.records import sweep_names
from avzero.report.rows import leaderboard
from avzero.report.table import render
from avzero.spec import Job
from avzero.track.mlflow_tracker import MlflowTracker
from avzero.tune.final import freeze, run_final
from avzero.tune.sweep import Sweep
from tests.sweeps import SETTINGS, Recorder, sweep

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def finished(ray_local: None, place: Path) -> tuple[Sweep, Recorder, Path]:
    """The main sweep, run once, with console and MLflow attached."""
    recorder = Recorder()
    job = Job.model_validate(SETTINGS)
    uri = f"sqlite:///{place / 'mlflow.db'}"
    log = place / "console.txt"
    cwd = Path.cwd()
    os.chdir(place)  # MLflow puts artifacts of a database URI below the current folder
    try:
        with log.open("w") as out:
            listeners = [
                recorder,
                ConsoleProgress(Console(file=out, width=140)),
                MlflowTracker(uri, job),
            ]
            run = sweep(place, listeners)
            assert run.run()
            list(run_final(freeze(run), listeners))
    finally:
        os.chdir(cwd)
    return run, recorder, place


def test_trials(finished: tuple[Sweep, Recorder, Path]) -> None:
    run, recorder, _ = finished
    (group,) = run.groups
    assert sorted(recorder.started) == list(range(5)) == sorted(n for n, _ in recorder.ended)
    assert {state for _, state in recorder.ended} <= {"complete", "pruned"}
    views = {view.number: view for view in run.done()}
    assert views[0].values == group.start_points[0], "trial 0 is the published or default point"
    assert len({view.task.id for view in views.values()}) == 5
    for view in views.values():
        record = json.loads(
            run.store.storage.read(f"sweeps/tiny-sweep/trials/{group.key}/{view.number:05d}.json")
        )
        assert record["task"] == view.task.id and record["state"] == view.state
        assert record["val"] == view.best.val  # type: ignore[union-attr]
        assert len(view.epochs) == (4 if view.state == "complete" else record["epochs"])


def test_running_again_runs_nothing(finished: tuple[Sweep, Recorder, Path]) -> None:
    recorder = Recorder()
    again = sweep(finished[2], [recorder])
    assert again.remaining == 0 and again.run()
    assert recorder.started == [] and len(again.done()) == 5


def test_only_extension_is_allowed(finished: tuple[Sweep, Recorder, Path]) -> None:
    with pytest.raises(UserError, match=r"train\.epochs: 4 -> 9.*choose another name"):
        sweep(finished[2], train=SETTINGS["train"] | {"epochs": 9})
    recorder = Recorder()
    slow = {"trials": 6, "points": [{"lr": 1e-5}]}  # later tests count on the winner of the five
    more = sweep(finished[2], [recorder], search=SETTINGS["search"] | slow)
    assert more.remaining == 1 and more.run()
    assert recorder.started == [5]
    sweep(finished[2], search=SETTINGS["search"] | {"trials": 5})


def test_final_runs(finished: tuple[Sweep, Recorder, Path]) -> None:
    run, _, _ = finished
    storage = run.store.storage
    (group,) = run.groups
    frozen = json.loads(storage.read(f"sweeps/tiny-sweep/frozen/{group.key}.json"))
    complete = [v for v in run.done() if v.state == "complete" and v.number < 5]
    assert frozen["trial"] == max(complete, key=lambda v: (v.hm, -v.number)).task.id
    records = [
        json.loads(storage.read(f"sweeps/tiny-sweep/final/{group.key}/{frozen['trial']}/{n}.json"))
        for n in (42, 43)
    ]
    assert [r["seed"] for r in records] == [42, 43]
    assert len({r["run"] for r in records}) == 2
    assert {r["frozen"] for r in records} == {frozen["digest"]}
    lines = run.store.openings("tiny")
    assert [line["run"] for line in lines] == [r["run"] for r in records]
    assert all(line["sweep"] == "tiny-sweep" for line in lines)
    plan = freeze(run)
    assert not plan.pending
    again = list(run_final(plan, []))
    assert [v.task.id for v, _ in again] == [r["run"] for r in records]
    assert len(run.store.openings("tiny")) == 2, "TEST is not opened a second time"


def test_leaderboard(finished: tuple[Sweep, Recorder, Path]) -> None:
    storage = finished[0].store.storage
    assert "tiny-sweep" in sweep_names(storage)
    (row,) = leaderboard(storage, ["tiny-sweep"])
    assert row.seeds == (42, 43) and row.simulated
    assert row.mean("ZSL") > 12.5, "above chance with 8 unseen classes"
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(*render(boards([row], ()), 160), sep="\n")
    text = console.export_text()
    assert "avca" in text and "±" in text and f"{row.mean('HM'):.2f}" in text
    with pytest.raises(UserError, match=r"no sweep 'other'; there is .*tiny-sweep"):
        leaderboard(storage, ["other"])


def test_console_tells_the_story(finished: tuple[Sweep, Recorder, Path]) -> None:
    text = (finished[2] / "console.txt").read_text()
    for part in ("Sweep tiny-sweep: 5 trials", "[5/5]", "Best on VAL", "Stage 2", "TEST"):
        assert part in text


def check_test_run(client: Any, run: Sweep, one: Any, files: set[str]) -> None:
    """A TEST run has the stored scores, the figures and the model."""
    stored = run.store.storage
    (record,) = [
        json.loads(stored.read(key))
        for key in stored.keys("sweeps/tiny-sweep/final/")
        if f"/{one.data.tags['mlflow.runName'].rsplit(' ', 1)[1]}.json" in key
    ]
    assert one.data.metrics["ZSL"] == pytest.approx(100 * record["test"]["both"]["ZSL"], abs=1e-4)
    assert "AUSUC" in one.data.metrics
    assert one.data.tags["avzero.test_opened"] == "true" and one.info.status == "FINISHED"
    found = {f.path for f in client.list_artifacts(one.info.run_id)}
    assert found == files | {"run.yaml", "embeddings_tsne.png"}
    (made,) = one.outputs.model_outputs
    model = client.get_logged_model(made.model_id)
    assert model.status == "READY" and model.source_run_id == one.info.run_id


def test_mlflow_tree(finished: tuple[Sweep, Recorder, Path]) -> None:
    from mlflow import MlflowClient

    run, _, place = finished
    client = MlflowClient(tracking_uri=f"sqlite:///{place / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    by_kind: dict[str, list[Any]] = {}
    for one in runs:
        by_kind.setdefault(one.data.tags["avzero.kind"], []).append(one)
    counts = {kind: len(several) for kind, several in by_kind.items()}
    assert counts == {"sweep": 1, "trial": 5, "stage2": 2, "test": 2}
    (parent,) = by_kind["sweep"]
    for one in runs:
        assert len(one.data.metrics) <= 15
        assert one.data.tags["avzero.digest"] == run.groups[0].benchmark.digest
        assert one.data.tags["avzero.revision"]
        if one is not parent:
            assert one.data.tags["mlflow.parentRunId"] == parent.info.run_id
    for one in (parent, *by_kind["stage2"], *by_kind["test"]):
        assert one.inputs.dataset_inputs[0].dataset.name == "tiny"
    views = {view.task.id: view for view in run.done()}
    figures = {"seen_unseen_curve.png", "per_class_recall.png", "confusion_unseen.png"}
    pictures = {"learning_curves.png"} | figures
    tables = {"seen_unseen_curve.csv", "per_class.csv", "retrieval.csv"}
    for one in by_kind["trial"]:
        view = views[one.data.tags["avzero.run"]]
        assert one.info.status == {"complete": "FINISHED", "pruned": "KILLED"}[view.state]
        assert one.data.params["lr"] == str(view.task.train.lr)
        history = client.get_metric_history(one.info.run_id, "val/HM")
        assert [m.step for m in history] == [e.epoch for e in view.epochs]
        assert one.data.metrics["HM"] == pytest.approx(100 * view.hm, abs=1e-4)
        files = {f.path for f in client.list_artifacts(one.info.run_id)}
        best = one.data.tags["avzero.number"] == parent.data.tags["avzero.best_trial"]
        wanted = {"model.safetensors"} if view.state == "complete" else set()
        assert files == wanted | (pictures | tables if best else set())
    for one in by_kind["test"]:
        check_test_run(client, run, one, tables | figures)
    for one in by_kind["stage2"]:
        assert [m.step for m in client.get_metric_history(one.info.run_id, "train/loss")]
        files = {f.path for f in client.list_artifacts(one.info.run_id)}
        assert files == {"run.yaml", "learning_curves.png", "model.safetensors"}
        assert set(one.data.metrics).isdisjoint({"S", "U", "HM", "ZSL", "AUSUC"})
    files = {f.path for f in client.list_artifacts(parent.info.run_id)}
    assert files == pictures | tables | {
        *("job.yaml", "per_class_of_trials.parquet", "trials.csv", "parallel_coordinates.png")
    }
    assert parent.info.status == "FINISHED"


def test_deleted_tracking_database_is_filled_again(
    finished: tuple[Sweep, Recorder, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    run, _, place = finished
    uri = f"sqlite:///{tmp_path / 'new.db'}"
    again = sweep(place, [MlflowTracker(uri, run.job)], search=run.job.search.model_dump())
    again.run()
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    trials = client.search_runs(
        [experiment.experiment_id], filter_string="tags.`avzero.kind` = 'trial'"
    )
    assert len(trials) == len(again.done())
    assert all(one.info.status != "RUNNING" for one in trials)


def test_unreachable_tracker_is_refused() -> None:
    job = Job.model_validate(SETTINGS)
    for uri in ("http://127.0.0.1:9", "sqlite:////proc/nowhere/x.db", "nonsense://x"):
        with pytest.raises(UserError, match=f"MLflow at {uri}: does not answer"):
            MlflowTracker(uri, job)


def test_journal_cut_off_in_the_middle_of_a_line(finished: tuple[Sweep, Recorder, Path]) -> None:
    """Half a line, as a full disk or a power cut leaves it, is dropped; the rest is the truth."""
    _, _, place = finished
    run = sweep(place)
    numbers = [view.number for view in run.done()]
    with run.journal.path.open("ab") as out:
        out.write(b'{"op_code": 4, "worker_id": "x", "tri')
    with run.journal.exclusive():
        assert [view.number for view in sweep(place).done()] == numbers


def test_a_tune_trial_per_configuration_gives_the_same_bits(
    ray_local: None, store: FeatureStore, tmp_path: Path
) -> None:
    """``execution: trial`` is another way to run the sweep, not another sweep."""
    shutil.copytree(store.storage.url, tmp_path / "store")
    search = SETTINGS["search"] | {"trials": 4, "seats": 2, "min_epochs": 1}
    stories = []
    for execution in ("array", "trial"):
        resources = {"execution": execution, "slots": 2}
        # The runs of the one would be those of the other.
        shutil.rmtree(tmp_path / "store" / "runs", ignore_errors=True)
        run = sweep(tmp_path, name=f"by-{execution}", search=search, resources=resources)
        assert run.run()
        (study,) = run.studies.values()
        stories.append(
            [
                (t.number, t.state, t.params, t.values, t.intermediate_values, t.user_attrs)
                for t in study._trials()
            ]
            + [
                [(e.epoch, e.losses, e.val, e.lr) for e in view.epochs]
                + ([] if view.result is None else [view.result.scores, view.result.curve])  # type: ignore[list-item]
                for view in run.done()
            ]
        )
    assert stories[0] == stories[1]
