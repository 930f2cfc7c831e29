"""``avzero doctor``: the checks made here, and those made on the cluster by a short job."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator

from avzero.cluster.checks import (
    Check,
    check_cluster,
    check_environment,
    check_room,
    check_store,
    check_tracker,
    guarded,
)
from avzero.cluster.jobs import JobsApi
from avzero.cluster.package import build_package, unmet
from avzero.cluster.probe import MARK
from avzero.cluster.submission import portable
from avzero.errors import UserError
from avzero.spec import Job
from avzero.tune.nodes import total

_PROBE_SECONDS = 240.0
_POLL = 1.0


def examine(
    api: JobsApi | None,
    job: Job | None,
    store: str | None,
    tracking: str | None,
    variables: dict[str, str],
) -> Iterator[tuple[str, Check]]:
    """Yield (where, finding), as they come in.

    Args:
        api: the cluster, if there is one.
        job: the job to be placed, if there is one.
        store: to be checked from here and from the cluster.
        tracking: likewise.
        variables: environment variables for the cluster's side.
    """

    def here(found: list[Check]) -> Iterator[tuple[str, Check]]:
        yield from (("here", check) for check in found)

    yield from here(guarded("packages", lambda: check_environment(unmet())))
    if api is not None and job is not None:
        try:
            placed = portable(job, api.host)
            store, tracking = placed.store, placed.tracking.uri
        except UserError as error:
            yield "here", Check("fail", "job", str(error))
    if store is not None:
        yield from here(guarded("store", lambda: check_store(store)))
    if tracking is not None:
        yield from here(guarded("tracker", lambda: check_tracker(tracking)))
    if api is None:
        return
    found = guarded("cluster", lambda: check_cluster(api))
    yield from here(found)
    if any(check.state == "fail" for check in found):
        return
    yield from here(guarded("placement", lambda: check_room(api, job)))
    for check in guarded("probe", lambda: _ask_cluster(api, store, tracking, variables)):
        yield "cluster", check


def _ask_cluster(
    api: JobsApi, store: str | None, tracking: str | None, variables: dict[str, str]
) -> Iterator[Check]:
    """Run the checks as a job on the head.

    Raises:
        UserError: it cannot be run, or does not answer.
    """
    gpus = total(api.nodes()).get("GPU", 0)
    wanted = json.dumps({"store": store, "tracking": tracking, "gpus": gpus})
    job_id = f"avzero-doctor-{uuid.uuid4().hex[:8]}"
    entrypoint = "python -m avzero.cluster.probe"
    variables = variables | {"AVZERO_PROBE": wanted, "OMP_NUM_THREADS": "1"}
    api.submit(job_id, entrypoint, build_package(), variables, {})
    try:
        yield from _answer(api, job_id)
    finally:
        api.stop(job_id)
        api.delete(job_id)


def _answer(api: JobsApi, job_id: str) -> Iterator[Check]:
    until = time.monotonic() + _PROBE_SECONDS
    while time.monotonic() < until:
        info = api.job(job_id)
        if info is not None and not info.running:
            break
        time.sleep(_POLL)
    else:
        yield Check(
            "fail", "probe", f"a job did not end in {_PROBE_SECONDS:.0f} s; look at the head"
        )
        return
    text = api.logs(job_id)
    rows = [line for line in text.splitlines() if line.startswith(MARK)]
    if rows:
        yield from (Check(**row) for row in json.loads(rows[-1].removeprefix(MARK)))
        return
    said = [line for line in (text or info.message if info else text).splitlines() if line.strip()]
    yield Check("fail", "probe", f"a job fails on the cluster: {said[-1] if said else 'no log'}")
