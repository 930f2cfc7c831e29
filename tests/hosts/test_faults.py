"""Sweeps on three Ray hosts: split over hosts, through a cut that only some see, the loss of a
worker host, and the loss of the head.

Afterwards every trial is there exactly once, in Optuna, in MLflow and in the store, and no run has
lost more than one epoch to a fault. ``docs/reliability.md`` has the times.
"""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from tests.hosts.lab import STORE, TOKEN, Lab, answers, get, lab
from tests.hosts.net import wait

JOB: dict[str, Any] = {
    "store": STORE,
    "benchmarks": ["tiny"],
    "models": ["avca"],
    "train": {"epochs": 9, "batches_per_epoch": 60, "batch_size": 64},
    "fixed": {"avca": {"encoder_hidden": 64, "proj_hidden": 64, "depth": 1, "heads": "3x100"}},
    "search": {"trials": 8, "min_epochs": 3, "sampler": "tpe", "seats": 4},
    "resources": {"slots": 2},
}


@pytest.fixture(scope="module")
def here(ground: Path, release: Path) -> Iterator[Lab]:
    """A lab with Ray on a head and two workers of one CPU each, S3, MLflow and a benchmark."""
    with lab(ground) as made:
        made.start_store()
        ingest = made.avzero("ingest", "avca", release, "--features", "tiny", "--split", "main",
                             "--name", "tiny", "--to", STORE, log="ingest.log")  # fmt: skip
        made.start_ray()
        assert ingest.wait(60) == 0, made.said("ingest.log")
        wait(lambda: answers(f"{made.mlflow}/health"), 90, "MLflow")
        yield made


def submit(here: Lab, name: str, **changes: Any) -> subprocess.Popen[bytes]:
    """Submit a sweep; return the command that follows it."""
    job = JOB | {"name": name, "tracking": {"uri": here.mlflow}} | changes
    (here.root / f"{name}.yaml").write_text(yaml.safe_dump(job))
    return here.avzero("submit", f"{name}.yaml", "--address", here.address, log=f"{name}.log")


def ended(here: Lab, following: subprocess.Popen[bytes], name: str, seconds: float) -> None:
    """Wait for the end; everything is there once."""
    here.lap(f"{name}: finished", lambda: following.poll() is not None, seconds)
    assert following.returncode == 0, here.said(f"{name}.log")
    trials = len(check_store(here, name))
    check_optuna(here, name, trials)
    check_mlflow(here, name, trials)


def check_store(here: Lab, name: str) -> list[str]:
    """Every trial once in the index, every run whole; return the runs."""
    records = [here.read(key) for key in here.keys(f"sweeps/{name}/trials/")]
    assert sorted(record["number"] for record in records) == list(range(len(records)))
    assert all(record["state"] in ("complete", "pruned") for record in records)
    for record in records:
        state = here.read(f"avzero/runs/{record['task']}/state.json")
        assert len(state["history"]) >= record["epochs"]
        names = {key.rpartition("/")[2] for key in here.keys(f"runs/{record['task']}/")}
        assert set(state["files"].values()) <= names, "the files that count are there"
    return [record["task"] for record in records]


def check_optuna(here: Lab, name: str, count: int) -> None:
    """Every trial once in the study, and ended."""
    claim = here.read(f"avzero/sweeps/{name}/driver.json")
    copy = here.root / f"{name}.journal"
    here.boto().download_file("lab", f"avzero/{claim['journal']}", str(copy))
    storage = JournalStorage(JournalFileBackend(str(copy)))
    (summary,) = optuna.get_all_study_summaries(storage)
    trials = optuna.load_study(study_name=summary.study_name, storage=storage).trials
    assert [trial.number for trial in trials] == list(range(count))
    assert all(trial.state.is_finished() for trial in trials)
    assert len({trial.user_attrs["task"] for trial in trials}) == count


def check_mlflow(here: Lab, name: str, count: int) -> None:
    """One run per trial, closed, with every epoch's metrics once."""
    import mlflow

    client = mlflow.MlflowClient(here.mlflow)
    ids = [one.experiment_id for one in client.search_experiments()]
    runs = client.search_runs(ids, f"tags.`avzero.sweep` = '{name}'", max_results=1000)
    trials = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert len({run.data.tags["avzero.run"] for run in trials}) == len(trials) == count
    assert len(runs) == count + 1, "and the sweep's own"
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}
    for run in trials:
        steps = [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")]
        assert steps and steps == sorted(set(steps)), "no metric twice"


def check_epochs(here: Lab, name: str, faults: int) -> None:
    """No run has repeated more epochs than there were faults."""
    runs = set(check_store(here, name))
    written = {key: count for key, count in here.trained().items() if key[0] in runs}
    repeated: Counter[str] = Counter()
    for (run, _), count in written.items():
        repeated[run] += count - 1
    here.note(f"{name}: {len(written)} epochs written, {repeated.total()} of them twice", 0)
    assert max(repeated.values()) <= faults, repeated


def epochs(here: Lab) -> int:
    """Return how many epochs have been written."""
    return here.trained().total()


def gained(here: Lab, count: int, what: str, seconds: float = 150) -> None:
    """Wait until so many more epochs have been written."""
    before = epochs(here)
    here.lap(what, lambda: epochs(here) >= before + count, seconds)


def test_a_run_split_over_hosts(here: Lab) -> None:
    """Two workers of one CPU each on hosts of one CPU each: Ray Train, gloo between the hosts."""
    following = submit(
        here,
        "split",
        search={"trials": 1, "pruner": "none"},
        train=JOB["train"] | {"epochs": 3},
        resources={"workers": 2},
        seed=7,
    )
    gained(here, 1, "split over hosts: first epoch, from submitting")
    ended(here, following, "split", 150)


def test_a_run_that_may_shrink(here: Lab) -> None:
    """With one of its two hosts gone an elastic run goes on with one worker."""
    following = submit(
        here,
        "elastic",
        search={"trials": 1, "pruner": "none"},
        train=JOB["train"] | {"epochs": 6},
        resources={"workers": 2, "min_workers": 1},
        seed=9,
    )
    gained(here, 2, "elastic: two epochs on two workers, from submitting")
    here.net.cut("worker2")
    gone = here.net["worker2"].address
    here.lap("worker 2 cut off: declared dead", lambda: gone not in here.alive(), 100)
    gained(here, 2, "elastic: two epochs on one worker")
    here.net.heal("worker2")
    ended(here, following, "elastic", 200)
    check_epochs(here, "elastic", faults=1)
    here.lap("healed worker back", lambda: gone in here.alive(), 150)


def test_a_cut_only_the_head_sees(here: Lab) -> None:
    """The worker still reaches S3: what it goes on writing is a zombie's."""
    following = submit(here, "pair", search=JOB["search"] | {"trials": 6}, seed=8)
    gained(here, 4, "cut in part: first epochs, from submitting")
    gone = here.net["worker2"].address
    here.net.cut_pair("worker2", "head")
    here.lap("worker 2 cut off from the head alone: declared dead",
             lambda: gone not in here.alive(), 100)  # fmt: skip
    gained(here, 4, "going on without it")
    here.net.heal_pair("worker2", "head")
    ended(here, following, "pair", 240)
    check_epochs(here, "pair", faults=1)
    here.lap("healed worker back, after the sweep's end", lambda: gone in here.alive(), 150)


def test_worker_cut_off_and_head_killed(here: Lab) -> None:
    following = submit(here, "faults")
    gained(here, 8, "eight epochs, from submitting")

    here.net.cut("worker1")
    gone = here.net["worker1"].address
    here.lap("worker 1 cut off: declared dead", lambda: gone not in here.alive(), 100)
    gained(here, 4, "going on without it")
    here.net.heal("worker1")
    here.lap("worker 1 healed: back", lambda: gone in here.alive(), 150)
    gained(here, 4, "some more epochs")

    here.head.power_off()
    assert following.poll() is None, here.said("faults.log")
    here.lap("head killed: noticed by submit",
             lambda: "asking on" in here.said("faults.log"), 60)  # fmt: skip
    here.head.boot()
    here.start_head()
    here.lap("head restarted: workers back", lambda: len(here.alive()) == 2, 120)
    states = [job["status"] for job in get(f"{here.address}/api/jobs/", TOKEN)
              if job["metadata"]["avzero_sweep"] == "faults"]  # fmt: skip
    here.note(f"the Jobs API says {states[0]}; the driver is gone", 0)
    here.lap("driver replaced", lambda: "starting it again" in here.said("faults.log"), 150)
    gained(here, 1, "next epoch")
    ended(here, following, "faults", 300)
    check_epochs(here, "faults", faults=2)
    again = here.avzero("submit", "faults.yaml", "--address", here.address, log="again.log")
    assert again.wait(60) == 0 and "is finished" in here.said("again.log"), here.said("again.log")
