"""Is everything there that a job needs? Each check is one line: ok, warn or fail, and a remedy."""

from __future__ import annotations

import os
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from avzero.cluster.jobs import JobsApi
from avzero.data.storage import Storage, open_storage
from avzero.errors import UserError
from avzero.spec import Job
from avzero.tune.nodes import misfit, room, total

State = Literal["ok", "warn", "fail"]
RAY = ((2, 60), (3, 0))
"""The versions of Ray that avzero runs on: from, to (excluded)."""
_SKEW_WARN, _SKEW_FAIL = 30.0, 900.0
"""Seconds; S3 refuses requests signed more than 15 minutes off."""
_TRACKER_TIMEOUT = 10.0


@dataclass(frozen=True)
class Check:
    """One finding; ``text`` ends with the remedy where there is one."""

    state: State
    what: str
    text: str

    def as_dict(self) -> dict[str, Any]:
        """Return the finding as JSON values."""
        return asdict(self)


def guarded(what: str, check: Callable[[], Iterator[Check]]) -> list[Check]:
    """Run a check; what stops it is its last finding."""
    found: list[Check] = []
    try:
        found.extend(check())
    except UserError as error:
        found.append(Check("fail", what, str(error)))
    return found


def require(checks: Sequence[Check]) -> None:
    """Refuse to go on when something failed.

    Raises:
        UserError: the first failure.
    """
    for check in checks:
        if check.state == "fail":
            raise UserError(check.text)


# -- the cluster -------------------------------------------------------------------------------


def check_cluster(api: JobsApi) -> Iterator[Check]:
    """Reachable, token accepted, version of Ray."""
    version = api.ray_version()
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    low, high = RAY
    wanted = f"{low[0]}.{low[1]} <= Ray < {high[0]}"
    if not low <= numbers < high:
        yield Check(
            "fail",
            "cluster",
            f"{api.address}: the cluster runs Ray {version}, avzero needs {wanted}; use an image "
            "built from constraints.txt",
        )
        return
    yield Check("ok", "cluster", f"{api.address}: Ray {version}, access granted")


def check_room(api: JobsApi, job: Job | None) -> Iterator[Check]:
    """What the nodes hold, and how much of the job runs at once."""
    nodes = api.nodes()
    have = total(nodes)
    words = ", ".join(f"{have.get(k, 0):g} {k}" for k in ("CPU", "GPU"))
    text = f"{len(nodes)} node{'s' * (len(nodes) != 1)} with {words}"
    if job is None:
        yield Check("ok" if nodes else "warn", "placement", text)
        return
    problem = misfit(nodes, job.resources)
    if problem:
        remedy = "lower resources or workers, or add nodes"
        yield Check("fail", "placement", f"job {job.name}: {problem}; {remedy}")
        return
    runs = room(nodes, job.resources)
    runs = min(runs, job.resources.concurrent or runs)
    yield Check(
        "ok", "placement", f"{text}: {runs} at once, each {job.resources.width} trials wide"
    )


def check_environment(unmet: Sequence[str]) -> Iterator[Check]:
    """Python, and the packages avzero is built on."""
    if unmet:
        more = f" and {len(unmet) - 3} more" if len(unmet) > 3 else ""
        yield Check(
            "fail",
            "packages",
            f"{'; '.join(unmet[:3])}{more}; install from constraints.txt",
        )
        return
    yield Check("ok", "packages", f"Python {platform.python_version()}, all requirements met")


def check_gpus(wanted: float) -> Iterator[Check]:
    """Whether torch sees the GPUs here."""
    import torch

    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted and not seen:
        yield Check(
            "fail",
            "gpus",
            "torch sees no GPU on a node that has one; install a CUDA build of torch",
        )
    elif seen:
        yield Check("ok", "gpus", f"torch {torch.__version__} sees {torch.cuda.get_device_name(0)}")
    else:
        yield Check("ok", "gpus", "none, and none asked for")


# -- the store ---------------------------------------------------------------------------------


def check_store(url: str) -> Iterator[Check]:
    """Write, read, list and delete a probe; what conditional writes do; whose clock is off."""
    storage = open_storage(url)
    key, text = f".doctor/{uuid.uuid4().hex}", os.urandom(64)
    begun = time.monotonic()
    storage.write(key, text)
    try:
        if storage.read(key) != text or storage.size(key) != len(text):
            yield Check("fail", "store", f"{url}: reads back other bytes than were written")
            return
        if storage.keys(".doctor/").count(key) != 1:
            yield Check(
                "warn",
                "store",
                f"{url}: a new object is not listed at once (eventually consistent store); "
                "avzero does not rely on it, listings may lag",
            )
    finally:
        storage.delete(key)
    taken = (time.monotonic() - begun) * 1e3
    yield Check("ok", "store", f"{url}: written, read, listed and deleted in {taken:.0f} ms")
    yield from _check_local(storage) if storage.local_path(key) else _check_s3(url)


def _check_local(storage: Storage) -> Iterator[Check]:
    """Return what matters of a folder: space."""
    root = Path(storage.url)
    free = shutil.disk_usage(root).free
    state: State = "ok" if free > 5e9 else "warn"
    remedy = "" if state == "ok" else "; free some"
    yield Check(state, "space", f"{root}: {free / 1e9:.1f} GB free{remedy}")


def _check_s3(url: str) -> Iterator[Check]:
    """Say how the bucket treats conditional writes, and compare clocks."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    key = f"{prefix.rstrip('/')}/.doctor/{uuid.uuid4().hex}".lstrip("/")
    client = boto3.client("s3", config=Config(connect_timeout=5, read_timeout=20))
    said: list[str] = []
    try:
        for text in (b"1", b"2"):
            try:
                answer = client.put_object(Bucket=bucket, Key=key, Body=text, IfNoneMatch="*")
                said.append("taken")
            except ClientError as error:
                answer = error.response
                said.append(str(answer.get("Error", {}).get("Code", "?")))
        client.delete_object(Bucket=bucket, Key=key)
    except BotoCoreError as error:
        yield Check("fail", "store", f"{url}: {error}; check the endpoint and the network")
        return
    kind = {
        "taken, PreconditionFailed": "the second of two is refused, as it should be",
        "taken, taken": "ignored (the second of two was taken too)",
    }.get(", ".join(said), f"not supported ({', '.join(said)})")
    yield Check("ok", "conditional", f"conditional writes: {kind}; avzero does not rely on them")
    date = answer["ResponseMetadata"]["HTTPHeaders"].get("date", "")
    if date:
        yield clock_check(parsedate_to_datetime(date).timestamp() - time.time())


def clock_check(skew: float) -> Check:
    """Return the finding of a difference between the store's clock and this one, in seconds."""
    text = f"the store's clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} this one"
    if abs(skew) > _SKEW_FAIL:
        return Check("fail", "clock", f"{text}: signed requests are refused; set it right (NTP)")
    if abs(skew) > _SKEW_WARN:
        return Check("warn", "clock", f"{text}; set it right (NTP)")
    return Check("ok", "clock", f"{text}")


# -- the tracker -------------------------------------------------------------------------------


def check_tracker(uri: str) -> Iterator[Check]:
    """Ask MLflow for experiments: its ``/health`` says OK with the database down."""
    if uri == "off":
        yield Check("ok", "tracker", "off; results are in the store")
        return
    if urlsplit(uri).scheme not in ("http", "https"):
        yield Check("ok", "tracker", f"{uri}: opened when the first trial is logged")
        return
    import requests

    name, password = (os.environ.get(f"MLFLOW_TRACKING_{k}") for k in ("USERNAME", "PASSWORD"))
    address = uri.rstrip("/") + "/api/2.0/mlflow/experiments/search"
    try:
        answer = requests.post(
            address,
            json={"max_results": 1},
            timeout=_TRACKER_TIMEOUT,
            auth=(name, password or "") if name else None,
        )
    except (requests.RequestException, ValueError) as error:
        slow = isinstance(error, requests.Timeout)
        why = (
            f"no answer within {_TRACKER_TIMEOUT:.0f} s; its database may be down"
            if slow
            else "cannot be reached; check the address and that MLflow runs"
        )
        yield Check("fail", "tracker", f"{uri}: {why} (or give --tracking off)")
        return
    remedy = {
        401: "it wants MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        403: "access refused; add this host name to the server's --allowed-hosts, or correct the "
        "credentials",
        404: "this is no MLflow server",
    }.get(answer.status_code, f"it answers {answer.status_code}; look at its log and database")
    if answer.status_code != 200:
        yield Check("fail", "tracker", f"{uri}: {remedy}")
        return
    yield Check("ok", "tracker", f"{uri}: answers in {answer.elapsed.total_seconds() * 1e3:.0f} ms")
