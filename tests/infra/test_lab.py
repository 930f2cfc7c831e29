"""A whole lab: store in a bucket, MLflow on PostgreSQL, and both going away in the middle."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from avzero.data.s3 import S3Storage
from tests.conftest import Run
from tests.infra.lab import Lab, during, lab_or_skip
from tests.sweeps import SETTINGS

pytestmark = [pytest.mark.infra, pytest.mark.timeout(500)]


@pytest.fixture(scope="module")
def lab(release: Path) -> Iterator[Lab]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
            patch.delenv(name)  # put back at the end
        patch.setenv("AWS_ENDPOINT_URL_S3", "")
        with lab_or_skip(release) as it:
            yield it


def write(path: Path, job: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(job))
    return path


def apart(*arguments: object) -> tuple[int, str]:
    """Run a command line in a process of its own; return its exit code and what it said."""
    command = [sys.executable, "-m", "avzero.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def test_outage_in_the_middle_of_a_sweep(lab: Lab, tmp_path: Path) -> None:
    """MLflow killed and PostgreSQL restarted: no metric is lost or there twice."""
    settings = SETTINGS | {
        "name": "outage",
        "train": {"epochs": 4, "batches_per_epoch": 20, "batch_size": 64},
        "search": {"trials": 8, "min_epochs": 2, "sampler": "random", "pruner": "none"},
        "resources": {"slots": 2, "concurrent": 1},
    }
    job = write(tmp_path / "job.yaml", lab.job(settings))
    answer: list[tuple[int, str]] = []
    said = during(
        lambda over: lab.outage("outage", after=2, seconds=8, over=over),
        lambda: answer.append(apart("sweep", job)),
    )
    code, err = answer[0]
    assert code == 0, err
    assert "MLflow killed" in said
    if "could not be sent" in err:  # the sweep ended first: the same command sends the rest
        code, err = apart("sweep", job)
        assert code == 0, err
    assert lab.problems(settings) == [], said
    assert lab.runs("outage") == 9


def test_split_over_workers_with_notes_in_the_bucket(lab: Lab, tmp_path: Path) -> None:
    """Ray Train keeps its notes on a fit in the bucket and leaves nothing there; artifacts are
    stored by the server."""
    job = write(tmp_path / "job.yaml", lab.job(SETTINGS | {"name": "split"}))
    for command in ("sweep", "test"):
        code, err = apart(command, job)
        assert code == 0, err
    assert lab.problems(SETTINGS | {"name": "split"}) == []
    storage = S3Storage(lab.store("split"))
    assert storage.keys("ray/") == [] and storage.keys("sweeps/split/final/")
    names = {key.split("/")[-1] for key in S3Storage("s3://avzero/mlflow").keys("")}
    assert {"job.yaml", "run.yaml", "learning_curves.png", "seen_unseen_curve.csv"} <= names


def test_tracker_that_is_down_at_the_start(lab: Lab, tmp_path: Path, avzero: Run) -> None:
    """One line, exit 2, nothing written; and none once the sweep goes without."""
    job = write(tmp_path / "job.yaml", lab.job(SETTINGS | {"name": "down"}))
    before = S3Storage(lab.store("down")).keys("")
    lab.mlflow.stop()
    try:
        code, _, err = avzero("sweep", job)
        assert code == 2 and err.count("\n") == 1
        assert err.startswith(f"avzero: MLflow at {lab.mlflow.url}: does not answer ("), err
        lab.mlflow.start()
        lab.postgres.stop()  # the server is there, its database is not
        code, _, err = avzero("sweep", job)
        assert code == 2 and err.count("\n") == 1 and "does not answer" in err, err
    finally:
        lab.postgres.start()
        lab.mlflow.start()
    assert S3Storage(lab.store("down")).keys("") == before


def test_stack_says_what_runs(lab: Lab) -> None:
    lines = "\n".join(lab._stack.lines())
    assert lab.mlflow.url in lines and "export AWS_ENDPOINT_URL_S3=" in lines
    assert "does not run" not in lines
    lab._stack.start()  # again: nothing changes
    assert lines == "\n".join(lab._stack.lines())
