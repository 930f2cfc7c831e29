"""A sweep on three Ray hosts through the loss of a worker host and of the head.

Afterwards every trial is there exactly once, in Optuna, in MLflow and in the store, and no run has
lost more than one epoch to a fault. ``docs/reliability.md`` has the times.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from tests.hosts.lab import STORE, Lab, answers, get, lab
from tests.hosts.net import wait

JOB: dict[str, Any] = {
    "name": "hosts",
    "store": STORE,
    "benchmarks": ["tiny"],
    "models": ["avca"],
    "train": {"epochs": 12, "batches_per_epoch": 60, "batch_size": 64},
    "fixed": {"avca": {"encoder_hidden": 64, "proj_hidden": 64, "depth": 1, "heads": "3x100"}},
    "search": {"trials": 10, "min_epochs": 4, "sampler": "tpe", "seats": 4},
    "resources": {"slots": 2},
}
TRIALS = JOB["search"]["trials"]


def submit_sweep(here: Lab, release: Path, **changes: Any) -> Any:
    """Bring up Ray, ingest, submit; return the command that follows the sweep."""
    ingest = here.avzero("ingest", "avca", release, "--features", "tiny", "--split", "main",
                         "--name", "tiny", "--to", STORE, log="ingest.log")  # fmt: skip
    here.start_ray()
    assert ingest.wait(60) == 0, here.said("ingest.log")
    path = here.root / "job.yaml"
    path.write_text(yaml.safe_dump(JOB | {"tracking": {"uri": here.mlflow}} | changes))
    return here.avzero("submit", path, "--address", here.address, log="submit.log")


def epochs(here: Lab) -> int:
    """Return how many epochs have been written."""
    return here.trained().total()


def check_store(here: Lab) -> None:
    """Every trial once in the index; every run whole."""
    records = [here.read(key) for key in here.keys("sweeps/hosts/trials/")]
    assert sorted(record["number"] for record in records) == list(range(TRIALS))
    assert all(record["state"] in ("complete", "pruned") for record in records)
    for record in records:
        state = here.read(f"avzero/runs/{record['task']}/state.json")
        assert len(state["history"]) >= record["epochs"]
        names = {key.rpartition("/")[2] for key in here.keys(f"runs/{record['task']}/")}
        assert set(state["files"].values()) <= names, "the files that count are there"


def check_optuna(here: Lab) -> None:
    """Every trial once in the study, and ended."""
    claim = here.read("avzero/sweeps/hosts/driver.json")
    copy = here.root / "study.journal"
    here.boto().download_file("lab", f"avzero/{claim['journal']}", str(copy))
    storage = JournalStorage(JournalFileBackend(str(copy)))
    (summary,) = optuna.get_all_study_summaries(storage)
    trials = optuna.load_study(study_name=summary.study_name, storage=storage).trials
    assert [trial.number for trial in trials] == list(range(TRIALS))
    assert all(trial.state.is_finished() for trial in trials)
    assert len({trial.user_attrs["task"] for trial in trials}) == TRIALS


def check_mlflow(here: Lab) -> None:
    """One run per trial, closed, with every epoch's metrics once."""
    import mlflow

    client = mlflow.MlflowClient(here.mlflow)
    ids = [one.experiment_id for one in client.search_experiments()]
    runs = client.search_runs(ids, "tags.`avzero.sweep` = 'hosts'", max_results=1000)
    trials = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert Counter(run.data.tags["avzero.run"] for run in trials).most_common(1)[0][1] == 1
    assert len(trials) == TRIALS and len(runs) == TRIALS + 1
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}
    for run in trials:
        steps = [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")]
        assert steps == sorted(set(steps)), "no metric twice"


def check_epochs(here: Lab, faults: int) -> tuple[int, int]:
    """No run has repeated more epochs than there were faults; return (written, repeated)."""
    written = here.trained()
    repeated: Counter[str] = Counter()
    for (run, _), count in written.items():
        repeated[run] += count - 1
    assert max(repeated.values()) <= faults, repeated
    return len(written), repeated.total()


def test_worker_cut_off_and_head_killed(ground: Path, release: Path) -> None:
    with lab(ground) as here:
        here.start_store()
        following = submit_sweep(here, release)
        here.lap("first epoch, from submitting", lambda: epochs(here) > 0, 150)
        here.lap("MLflow answers", lambda: answers(f"{here.mlflow}/health"), 60)
        wait(lambda: epochs(here) >= 14, 120, "some epochs")

        here.net.cut("worker1")
        gone = here.net["worker1"].address
        here.lap("worker 1 cut off: declared dead", lambda: gone not in here.alive(), 100)
        before = epochs(here)
        here.lap("going on without it", lambda: epochs(here) >= before + 4, 120)
        here.net.heal("worker1")
        here.lap("worker 1 healed: back", lambda: gone in here.alive(), 150)

        wait(lambda: epochs(here) >= before + 8, 120, "some more epochs")
        here.head.power_off()
        assert following.poll() is None, here.said("submit.log")
        here.lap("head killed: noticed by submit",
                 lambda: "asking on" in here.said("submit.log"), 60)  # fmt: skip
        here.head.boot()
        here.start_head()
        here.lap("head restarted: answers", lambda: len(here.alive()) == 2, 120)
        (first,) = get(f"{here.address}/api/jobs/", here.env()["RAY_AUTH_TOKEN"])
        here.note(f"the Jobs API says {first['status']}; the driver is gone", 0)
        here.lap("driver replaced", lambda: "starting it again" in here.said("submit.log"), 150)
        before = epochs(here)
        here.lap("next epoch", lambda: epochs(here) > before, 150)
        here.lap("finished", lambda: following.poll() is not None, 240)

        assert following.returncode == 0, here.said("submit.log")
        check_store(here)
        check_optuna(here)
        check_mlflow(here)
        written, repeated = check_epochs(here, faults=2)
        here.note(f"{written} epochs written, {repeated} of them twice", 0)
        again = here.avzero("submit", ground / "job.yaml", "--address", here.address, log="2.log")
        assert again.wait(60) == 0 and "is finished" in here.said("2.log"), here.said("2.log")
        (ground / "times.json").write_text(json.dumps(here.times))


if __name__ == "__main__":
    pytest.main([__file__, "-s"])
