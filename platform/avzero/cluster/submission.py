"""Submitting a sweep to a Ray cluster, and staying with it until it ends.

The identity of a submission follows from the job: submitting the same job again finds what was
submitted before. A driver that died is replaced by another attempt, which goes on from the store;
the cluster's own word for a job's state is believed only where it agrees with the heartbeat.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from avzero.canon import identity
from avzero.cluster.jobs import JobInfo, JobsApi, Unreachable
from avzero.cluster.package import Package
from avzero.cluster.signs import Sign, Watch, last_sign
from avzero.data.storage import Storage
from avzero.errors import UserError
from avzero.report.units import duration
from avzero.spec import Job

ENTRYPOINT = "python -m avzero.cluster.driver"
_POLL = 2.0
_RESTARTS = 3
"""So often in a row a driver may die without having trained an epoch."""
_QUIET = {
    "OMP_NUM_THREADS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "PYTHONUNBUFFERED": "1",
}
Say = Callable[[str], None]
Verdict = Literal["wait", "done", "ended", "stopped", "restart"]


def is_here(host: str) -> bool:
    """Return whether a host name means this machine's loopback."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def portable(job: Job, host: str, shared_folder: bool = False) -> Job:
    """Return a job as the cluster must see it: places by absolute path.

    Args:
        job: as it was read here.
        host: the cluster's.
        shared_folder: whether every node mounts the store's folder.

    Raises:
        UserError: store or tracker is a file of this machine, and the cluster is another.
    """
    here, store, uri = is_here(host), job.store, job.tracking.uri
    if "://" not in store:
        if not here and not shared_folder:
            raise UserError(
                f"job {job.name}: store {store} is a folder; the cluster at {host} cannot see it. "
                "Use s3://bucket/prefix, or say --shared-folder if every node mounts it"
            )
        store = str(Path(store).expanduser().absolute())
    if re.match(r"(sqlite|file):", uri) or (uri != "off" and "://" not in uri):
        if not here:
            raise UserError(
                f"job {job.name}: tracking.uri {uri} is a file on this machine; give the address "
                "of a server with --tracking http://HOST:5000, or --tracking off"
            )
        file = uri.removeprefix("sqlite:///")
        if file != uri and not file.startswith("/"):
            uri = f"sqlite:///{Path(file).absolute()}"
    tracking = job.tracking.model_copy(update={"uri": uri})
    return job.model_copy(update={"store": store, "tracking": tracking})


def passed_on(names: Sequence[str]) -> dict[str, str]:
    """Return the environment variables the job is to have.

    Args:
        names: ``NAME`` of this environment, or ``NAME=VALUE``.

    Raises:
        UserError: one is not set here.
    """
    found: dict[str, str] = {}
    for entry in names:
        name, given, value = entry.partition("=")
        if not given and name not in os.environ:
            raise UserError(f"--env {name}: not set here; set it, or write --env {name}=VALUE")
        found[name] = value if given else os.environ[name]
    return found


@dataclass(frozen=True)
class Step:
    """What submitting means now."""

    action: Literal["start", "attach", "finished"]
    job_id: str
    why: str = ""


def next_step(name: str, jobs: Sequence[JobInfo], sign: Sign, job_key: str, done: bool) -> Step:
    """Decide what submitting a job means.

    Args:
        name: of the sweep.
        jobs: its submissions the cluster knows, the oldest first.
        sign: its last sign of life.
        job_key: identity of the job.
        done: whether the store says that this very job is finished.

    Raises:
        UserError: the sweep is running with another job file.
    """
    last = jobs[-1] if jobs else None
    running = [job for job in jobs if job.running]
    if running:
        newest = running[-1]
        if newest.metadata.get("avzero_job") == job_key:
            return Step("attach", newest.id, f"it was submitted before ({sign.line(name)})")
        if not sign.silent:
            raise UserError(
                f"sweep {name}: {newest.id} is running with another version of the job; wait for "
                f"it, or: avzero stop {name}"
            )
    if done:
        return Step("finished", "" if last is None else last.id)
    attempts = [job.attempt for job in jobs]
    tail = str(sign.claim.get("submission", "")).rpartition("-")[2]
    attempts.append(int(tail) if tail.isdecimal() else 0)
    number = max(attempts) + 1
    why = ""
    if last is not None or sign.claim:
        why = f"goes on from the store ({sign.line(name)})"
    return Step("start", f"{name}-{job_key[:8]}-{number}", why)


def verdict(info: JobInfo | None, overdue: float) -> tuple[Verdict, str]:
    """Return what to do about a submission, and why.

    Args:
        info: as the cluster sees it; None: it knows none.
        overdue: seconds the driver is overdue with its heartbeat.
    """
    if info is None:
        return "restart", "the cluster has forgotten it (its head was restarted)"
    if info.running and not overdue:
        return "wait", ""
    if info.running:
        text = f"no sign of life for {duration(overdue)} although the cluster says {info.status}"
        return "restart", text
    if info.status != "FAILED":
        return ("done", "") if info.status == "SUCCEEDED" else ("stopped", "it was stopped")
    if info.exit_code in (1, 2, 130):  # the command line's own; it has said why
        return "ended", f"it ended with exit code {info.exit_code}"
    reason = info.message.splitlines()[-1] if info.message else f"exit code {info.exit_code}"
    return "restart", f"its driver died ({reason})"


class Submission:
    """A sweep on a cluster.

    Args:
        api: the cluster.
        job: as the cluster must see it (``portable``).
        storage: its store, seen from here.
        package: the code to ship.
        variables: further environment variables for it.
        say: prints a line.
    """

    def __init__(
        self,
        api: JobsApi,
        job: Job,
        storage: Storage,
        package: Package,
        variables: dict[str, str],
        say: Say,
    ) -> None:
        self.api, self.job, self._storage = api, job, storage
        self._package, self._variables, self._say = package, variables, say
        self.key = identity(job.model_dump(mode="json"))
        self.id = ""

    def place(self) -> Step:
        """Start the job unless it is there or done; return what was done.

        Raises:
            UserError: the cluster does not take it, or another version of it is running.
        """
        sign = last_sign(self._storage, self.job.name)
        jobs = self.api.jobs(self.job.name, self.job.store)
        step = next_step(self.job.name, jobs, sign, self.key, self._finished(sign))
        self.id = step.job_id
        if step.action == "start":
            self._start(step.job_id)
        return step

    def _finished(self, sign: Sign) -> bool:
        """Return whether this very job has run to its end."""
        if sign.state != "finished":
            return False
        try:
            stored = json.loads(self._storage.read(f"sweeps/{self.job.name}/job.json"))["job"]
        except KeyError:
            return False
        apart = ("store", "tracking", "resources")  # seen otherwise from elsewhere
        mine = self.job.model_dump(mode="json")
        return all(stored.get(k) == v for k, v in mine.items() if k not in apart)

    def _start(self, job_id: str) -> None:
        text = self.job.model_dump_json()
        variables = _QUIET | self._variables | {"AVZERO_JOB": text, "AVZERO_SUBMISSION": job_id}
        metadata = {
            "avzero_sweep": self.job.name,
            "avzero_store": self.job.store,
            "avzero_job": self.key,
        }
        self.api.submit(job_id, ENTRYPOINT, self._package, variables, metadata)
        self.id = job_id

    def follow(self, supervise: bool = True) -> int:
        """Print what the job prints until it ends; replace drivers that died.

        Returns:
            The exit code of ``avzero sweep``.

        Raises:
            UserError: drivers die again and again.
        """
        tail, fruitless = Tail(self.api, self._say), 0
        watch = Watch(self._storage, self.job.name, self.id)
        while True:
            info, reachable = tail.read(self.id)
            if reachable:
                decision, why = verdict(info, self._overdue(watch))
                if decision == "wait":
                    time.sleep(_POLL)
                    continue
                if decision != "restart" or not supervise:
                    return self._ended(decision, why, info)
                fruitless = 0 if watch.sign.beat.get("epochs") else fruitless + 1
                if fruitless > _RESTARTS:
                    raise UserError(
                        f"sweep {self.job.name}: {_RESTARTS + 1} drivers in a row died before they "
                        f"had trained an epoch ({why}); look at: avzero logs {self.job.name}"
                    )
                self._replace(why)
                tail = Tail(self.api, self._say)
                watch = Watch(self._storage, self.job.name, self.id)
            time.sleep(_POLL)

    def _overdue(self, watch: Watch) -> float:
        """Return by how much the driver is overdue; not known while the store is unreachable."""
        try:
            return watch.look()
        except UserError as error:
            self._say(f"(heartbeat not readable: {error})")
            return 0.0

    def _replace(self, why: str) -> None:
        """Start another attempt."""
        try:
            self.api.stop(self.id)  # where the cluster still believes in it
            self._say(f"Sweep {self.job.name}: {why}; starting it again from the store.")
            number = int(self.id.rpartition("-")[2]) + 1
            self._start(f"{self.job.name}-{self.key[:8]}-{number}")
        except Unreachable as error:
            self._say(f"({error})")

    def _ended(self, decision: Verdict, why: str, info: JobInfo | None) -> int:
        if decision == "done":
            return 0
        self._say(f"Sweep {self.job.name}: {why}.")
        if decision == "ended" and info is not None and info.exit_code is not None:
            return info.exit_code
        return 130


class Tail:
    """Prints what a job has printed since it was last asked.

    Args:
        api: the cluster.
        say: prints a line.
    """

    def __init__(self, api: JobsApi, say: Say) -> None:
        self._api, self._say = api, say
        self._printed = 0
        self._down = 0.0

    def read(self, job_id: str) -> tuple[JobInfo | None, bool]:
        """Print what is new; return the job, and whether the cluster answered."""
        try:
            info = self._api.job(job_id)
            text = self._api.logs(job_id)
        except Unreachable as error:
            if not self._down:
                self._down = time.monotonic()
                self._say(f"({error}; asking on)")
            return None, False
        if self._down:
            self._say(f"(the cluster answers again after {time.monotonic() - self._down:.0f} s)")
            self._down = 0.0
        over = info is None or not info.running
        end = len(text) if over else text.rfind("\n") + 1
        for line in text[self._printed : end].splitlines():
            self._say(line)
        self._printed = max(self._printed, end)
        return info, True
