"""A lab as the README means it: features and results in a bucket, MLflow on PostgreSQL."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from avzero.data.avca import read_avca
from avzero.data.store import FeatureStore
from avzero.spec import Job
from avzero.track.payload import STATUS, epoch_metrics
from avzero.tune.sweep import Sweep
from tests.infra.servers import Mlflow, Postgres, free_port, s3_environment
from tests.infra.stack import BUCKET, Stack

_ROWS = """
select t.value, r.status, m.key, m.step, m.value, m.is_nan
from runs r join tags t on t.run_uuid = r.run_uuid and t.key = 'avzero.run'
join tags s on s.run_uuid = r.run_uuid and s.key = 'avzero.sweep' and s.value = '{sweep}'
left join metrics m on m.run_uuid = r.run_uuid
where r.lifecycle_stage = 'active'
"""
_TWICE = """
select t.value, count(*)
from runs r join tags t on t.run_uuid = r.run_uuid and t.key = 'avzero.run'
join tags s on s.run_uuid = r.run_uuid and s.key = 'avzero.sweep' and s.value = '{sweep}'
where r.lifecycle_stage = 'active' group by t.value having count(*) > 1
"""


_ENDS = """
select t.value, m.step, m.timestamp from metrics m
join tags t on t.run_uuid = m.run_uuid and t.key = 'avzero.run'
join tags s on s.run_uuid = m.run_uuid and s.key = 'avzero.sweep' and s.value = '{sweep}'
where m.key = 'train/lr'
"""


class Lab:
    """PostgreSQL, an S3 server and MLflow of one's own, and stores that hold ``tiny``.

    Args:
        release: a tiny release to ingest.
        ceph: Ceph's gateway where it is installed; else moto.
    """

    def __init__(self, release: Path, ceph: bool = True) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="avzero-lab-"))
        self.folder.chmod(0o755)  # PostgreSQL runs under another account
        ports = {name: free_port() for name in ("postgres", "s3", "mlflow")}
        self._stack = Stack(self.folder, ports, ceph)
        self._release = release
        self._filled: set[str] = set()
        self.outages: dict[str, tuple[float, float]] = {}
        """By sweep: when its outage began and when all was back, seconds since 1970."""

    def __enter__(self) -> Lab:
        try:
            self._stack.start()
            os.environ.update(s3_environment(self._stack.s3.url))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def store(self, sweep: str) -> str:
        """Return the URL of a sweep's own store: in a common one, sweeps share their trials."""
        url = f"s3://{BUCKET}/{sweep}"
        if sweep not in self._filled:
            FeatureStore(url).put(read_avca(self._release, "tiny", "main", name="tiny"))
            self._filled.add(sweep)
        return url

    @property
    def postgres(self) -> Postgres:
        return self._stack.postgres

    @property
    def mlflow(self) -> Mlflow:
        return self._stack.mlflow

    def job(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Return a job that keeps everything here."""
        store = self.store(settings["name"])
        return settings | {"store": store, "tracking": {"uri": self.mlflow.url}}

    def runs(self, sweep: str) -> int:
        """Return how many runs of a sweep MLflow has."""
        return len({row[0] for row in self.postgres.query(_ROWS.format(sweep=sweep))})

    def epoch_ends(self, sweep: str) -> dict[tuple[str, int], float]:
        """Return when epochs ended by MLflow's record, seconds since 1970, by (task, epoch)."""
        rows = self.postgres.query(_ENDS.format(sweep=sweep))
        return {(task, int(step)): float(at) / 1000 for task, step, at in rows}

    def outage(self, sweep: str, after: int, seconds: float, over: threading.Event) -> str:
        """Kill MLflow for a while and restart PostgreSQL, once a sweep has some runs.

        Returns what was done, for a record.
        """
        while self.runs(sweep) < after:
            if over.wait(0.3):
                return "the sweep ended before"
        began = time.time()
        start = time.monotonic()
        self.mlflow.kill()
        over.wait(seconds)
        back = time.monotonic()
        self.mlflow.start()
        down = time.monotonic() - start
        over.wait(3)
        again = time.monotonic()
        self.postgres.restart()
        took = time.monotonic() - again
        self.outages[sweep] = began, time.time()
        return (
            f"MLflow killed for {back - start:.0f} s, answers after {down:.0f} s; PostgreSQL "
            f"restarted in {took:.1f} s{', after the sweep' if over.is_set() else ''}"
        )

    def problems(self, settings: dict[str, Any]) -> list[str]:
        """Return what MLflow has too little or too much of a sweep, by the store's records."""
        job = Job.model_validate(self.job(settings))
        rows = self.postgres.query(_ROWS.format(sweep=job.name))
        have = Counter((run, key, step) for run, _, key, step, *_ in rows if key)
        status = {row[0]: row[1] for row in rows}
        value = {(run, key, step): number for run, _, key, step, number, _ in rows if key}
        found = [f"{key} is there {n} times" for key, n in have.items() if n > 1]
        twice = self.postgres.query(_TWICE.format(sweep=job.name))
        found += [f"run {identity} is there {count} times" for identity, count in twice]
        for trial in Sweep(job, FeatureStore(job.store)).done():
            if trial.twin_of is not None:
                continue
            if status.get(trial.task.id) != STATUS[trial.state]:
                found.append(f"trial {trial.number} is {status.get(trial.task.id)}")
            for epoch in trial.epochs:
                for key, number in epoch_metrics(epoch).items():
                    at = (trial.task.id, key, str(epoch.epoch))
                    if at not in have:
                        found.append(f"trial {trial.number} lacks {key} of epoch {epoch.epoch}")
                    elif abs(float(value[at]) - number) > 1e-9 * max(1.0, abs(number)):
                        found.append(f"trial {trial.number}: {at} is {value[at]}, not {number}")
            if trial.result is not None and (trial.task.id, "HM", "0") not in have:
                found.append(f"trial {trial.number} lacks its result")
        return found


def lab_or_skip(release: Path, **options: Any) -> Lab:
    """Return a lab; skip where PostgreSQL cannot run."""
    if reason := Postgres.missing():
        pytest.skip(reason)
    return Lab(release, **options)


def during(action: Callable[[threading.Event], str], work: Callable[[], None]) -> str:
    """Run ``action`` beside ``work``, which it is told the end of; return what it returns."""
    over, said = threading.Event(), [""]

    def act() -> None:
        said[0] = action(over)

    thread = threading.Thread(target=act)
    thread.start()
    try:
        work()
    finally:
        over.set()
        thread.join()
    return said[0]
