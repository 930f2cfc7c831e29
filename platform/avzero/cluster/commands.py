"""Commands for a Ray cluster that runs elsewhere: submit, status, logs, stop, doctor."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from avzero.errors import UserError
from avzero.report.terminal import DEFAULT_STORE, JobArgument, JobStore, TrackingOption

if TYPE_CHECKING:
    from avzero.cluster.jobs import JobInfo, JobsApi
    from avzero.spec import Job

_Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        envvar="RAY_API_SERVER_ADDRESS",
        help="The cluster's dashboard, http://HOST:8265.",
    ),
]
_Env = Annotated[
    list[str] | None,
    typer.Option(
        "--env",
        help="Environment variable for the job, NAME (as here) or NAME=VALUE; repeatable. Seen by "
        "all who may see the cluster's jobs.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (submit, status, logs, stop, doctor):
        app.command()(command)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _api(address: str | None) -> JobsApi:
    from avzero.cluster.jobs import JobsApi

    if not address:
        raise UserError(
            "--address is missing: give the cluster's dashboard, http://HOST:8265 (or set "
            "RAY_API_SERVER_ADDRESS)"
        )
    return JobsApi(address)


def submit(  # noqa: PLR0913, PLR0917 - one per option
    job_file: JobArgument,
    address: _Address = None,
    store: JobStore = None,
    tracking: TrackingOption = None,
    env: _Env = None,
    shared_folder: Annotated[
        bool, typer.Option("--shared-folder", help="Every node mounts the store's folder.")
    ] = False,
    follow: Annotated[bool, typer.Option(help="Stay: show the log, replace dead drivers.")] = True,
    kubernetes: Annotated[
        bool, typer.Option("--kubernetes", help="Print a RayJob for kubectl instead.")
    ] = False,
    template: Annotated[
        str, typer.Option("--template", help="RayJob to fill in: a kustomize folder or a file.")
    ] = "",
) -> None:
    """Run a sweep on a Ray cluster; the same command finds it again, or goes on with it."""
    from avzero.cluster.submission import Submission, passed_on, portable
    from avzero.tune.opening import open_job

    job = open_job(job_file, store, tracking)
    if kubernetes:
        _say(_rayjob(job, template))
        return
    variables = passed_on(env or [])
    api = _api(address)
    job = portable(job, api.host, shared_folder)
    from avzero.cluster.checks import check_cluster, check_room, require
    from avzero.cluster.package import build_package
    from avzero.data.store import FeatureStore
    from avzero.tune.sweep import Sweep

    require(list(check_cluster(api)))
    require(list(check_room(api, job)))
    # Everything a sweep refuses, it refuses here: unknown names, changed settings, bad ranges.
    storage = Sweep(job, FeatureStore(job.store)).store.storage
    run = Submission(api, job, storage, build_package(), variables, _say)
    step = run.place()
    if step.action == "finished":
        _say(f"Sweep {job.name} is finished. Next: avzero test {job.name} --store {job.store}")
        return
    verb = "submitted" if step.action == "start" else "attached"
    _say(f"Sweep {job.name}: {verb} as {run.id}{'; ' + step.why if step.why else ''}.")
    at = f"{job.name} --address {api.address}"
    later = f"Follow it: avzero logs {at} --follow. Stop it: avzero stop {at}"
    if not follow:
        _say(later)
        return
    try:
        code = run.follow()
    except KeyboardInterrupt:
        _say(f"\nSweep {job.name} goes on. {later}")
        raise typer.Exit(130) from None
    if code:
        raise typer.Exit(code)


def _rayjob(job: Job, template: str) -> str:
    """Return a RayJob as YAML."""
    from avzero.cluster.kubernetes import render_rayjob

    return str(render_rayjob(job, template))


def _name_of(sweep: str, store: str | None) -> tuple[str, Job | None]:
    """Return a sweep's name, and its job where it is at hand."""
    from pathlib import Path

    from avzero.spec import PLAIN_NAME
    from avzero.tune.opening import open_job

    if Path(sweep).suffix in (".yaml", ".yml") or Path(sweep).is_file():
        job = open_job(sweep, store, None)
        return job.name, job
    if not PLAIN_NAME.fullmatch(sweep):
        raise UserError(f"{sweep!r} is neither a job file nor a sweep's name")
    return sweep, None


def _latest(api: JobsApi, name: str) -> JobInfo:
    """Return a sweep's last submission."""
    jobs = api.jobs(name)
    if not jobs:
        raise UserError(f"{api.address}: no sweep {name!r} was submitted here")
    return jobs[-1]


def status(sweep: JobArgument, address: _Address = None, store: JobStore = None) -> None:
    """Say how far a sweep is and when it was last heard of, wherever it runs."""
    from avzero.cluster.signs import last_sign
    from avzero.data.storage import open_storage

    name, job = _name_of(sweep, store)
    place = store or (job.store if job else "")
    if address:
        latest = _latest(_api(address), name)
        place = place or latest.metadata.get("avzero_store", "")
        _say(f"{latest.id}: {latest.status} according to the cluster")
    sign = last_sign(open_storage(place or DEFAULT_STORE), name)
    if not sign.claim and not address:
        raise UserError(f"{place or DEFAULT_STORE}: sweep {name!r} has never run; check --store")
    _say(sign.line(name))
    if sign.silent:
        raise typer.Exit(1)


def logs(
    sweep: JobArgument,
    address: _Address = None,
    follow: Annotated[bool, typer.Option("--follow", help="Stay until it ends.")] = False,
) -> None:
    """Print what a submitted sweep has printed."""
    from avzero.cluster.submission import Tail

    name, _ = _name_of(sweep, None)
    api = _api(address)
    latest, tail = _latest(api, name), Tail(api, _say)
    try:
        info, _ = tail.read(latest.id)
        while follow and (info is None or info.running):
            import time

            time.sleep(2)
            info, _ = tail.read(latest.id)
    except KeyboardInterrupt:
        _say(f"\nSweep {name} goes on. Stop it: avzero stop {name} --address {api.address}")
        raise typer.Exit(130) from None


def stop(sweep: JobArgument, address: _Address = None) -> None:
    """Stop a submitted sweep; submitting it again goes on."""
    import time

    name, _ = _name_of(sweep, None)
    api = _api(address)
    latest = _latest(api, name)
    if not latest.running:
        _say(f"Sweep {name}: {latest.id} is not running ({latest.status}).")
        return
    api.stop(latest.id)
    until = time.monotonic() + 60
    while time.monotonic() < until:
        info = api.job(latest.id)
        if info is None or not info.running:
            _say(f"Sweep {name}: {latest.id} stopped. Submit it again to go on.")
            return
        time.sleep(1)
    raise UserError(
        f"sweep {name}: {latest.id} does not stop; look at the cluster's head, or: avzero status "
        f"{name}"
    )


def doctor(
    job_file: Annotated[
        str | None, typer.Argument(metavar="[SWEEP]", help="A job to check.")
    ] = None,
    address: _Address = None,
    store: JobStore = None,
    tracking: TrackingOption = None,
    env: _Env = None,
) -> None:
    """Check cluster, versions, store, tracker and GPUs before anything starts."""
    from avzero.cluster.doctor import examine
    from avzero.cluster.submission import passed_on
    from avzero.tune.opening import open_job

    job = open_job(job_file, store, tracking) if job_file else None
    api = _api(address) if address else None
    places = (
        store or (job.store if job else None),
        tracking or (job.tracking.uri if job else None),
    )
    if not any((api, *places)):
        raise UserError("nothing to check: give a job, --address, --store or --tracking")
    failed = 0
    for where, check in examine(api, job, *places, passed_on(env or [])):
        failed += check.state == "fail"
        _say(f"{check.state:4}  {where:7}  {check.what}: {check.text}")
    if failed:
        raise UserError(f"doctor: {failed} check{'s' * (failed > 1)} failed")
