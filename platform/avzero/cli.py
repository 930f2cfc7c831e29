"""The command line: parse, call, print. Heavy libraries are imported by the command that needs
them, so ``avzero --help`` answers at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from avzero.cluster.commands import register as register_cluster
from avzero.errors import UserError
from avzero.report.commands import compare, report
from avzero.report.terminal import (
    DEFAULT_STORE,
    JobArgument,
    JobStore,
    StoreOption,
    TrackingOption,
    terminal,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from avzero.data.benchmark import Progress
    from avzero.spec import Job
    from avzero.tune.listener import Listener

app = typer.Typer(
    help="Experiments for audio-visual generalised zero-shot learning: released features in, an "
    "honest TEST score out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
ingest_app = typer.Typer(help="Read released features into the store.", no_args_is_help=True)
data_app = typer.Typer(help="Look at benchmarks in the store.", no_args_is_help=True)
app.add_typer(ingest_app, name="ingest")
app.add_typer(data_app, name="data")


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks (may stand anywhere).")
    ] = False,
) -> None:
    """Document the options every command has; ``main`` acts on them."""
    del debug


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    """Give a callback that shows what is read or written and the time left; on terminals only."""
    from rich.progress import Progress as Bar

    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done + 1)

        yield show


@app.command()
def simulate(
    root: Annotated[Path, typer.Argument(help="Folder to make; its name names the dataset.")],
    size: Annotated[str, typer.Option(help="tiny, small, UCF-main, UCF-cls, …")] = "small",
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    layout: Annotated[
        str, typer.Option(help="hdf5 (averaged), clipclap or temporal, as in the releases.")
    ] = "hdf5",
) -> None:
    """Write a simulated dataset in the layout of the releases."""
    from avzero.data.simulate import simulate as make

    console = terminal()
    with _progress(console) as progress:
        make(root, size, seed, progress, layout)
    console.print(f"{root}: simulated dataset, size {size}, seed {seed}, layout {layout}")


@ingest_app.command("avca")
def ingest_avca(
    root: Annotated[Path, typer.Argument(help="Root of one dataset, e.g. …/UCF.")],
    features: Annotated[str, typer.Option(help="main, cls or a folder below features/.")] = "main",
    split: Annotated[
        str, typer.Option(help="main, cls or a folder below class-split/; default: as features.")
    ] = "",
    name: Annotated[
        str, typer.Option(help="Name in the store; default <dataset>-<features>.")
    ] = "",
    nonfinite: Annotated[str, typer.Option(help="Rows with NaN: fail, drop or zero.")] = "fail",
    text: Annotated[
        list[str] | None, typer.Option(help="Text vectors as NAME=FILE; default: those found.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Read a release in the AVCA layout: checked, digested, stored as Parquet."""
    from avzero.data.avca import read_avca
    from avzero.data.benchmark import Role
    from avzero.data.release import ReadOptions
    from avzero.data.store import FeatureStore

    console = terminal()
    files: dict[str, Path] = {}
    for pair in text or ():
        key, sep, file = pair.partition("=")
        if not sep or not key or not file:
            raise UserError(f"--text {pair}: write NAME=FILE")
        files[key] = Path(file)
    target = FeatureStore(store)
    with _progress(console) as progress:
        raw = read_avca(
            root,
            features,
            split or ("cls" if features.partition("_")[0] == "cls" else "main"),
            name=name or None,
            options=ReadOptions(nonfinite, files),
            progress=progress,
        )
        info, new = target.put(raw, progress)
    counts = ", ".join(f"{role} {info.counts[role]}" for role in Role if role in info.counts)
    verb = "stored" if new else "already in the store"
    console.print(f"{info.name}@{info.digest[:16]}: {verb} ({counts})")


@data_app.command("list")
def data_list(store: StoreOption = DEFAULT_STORE) -> None:
    """List the benchmarks in a store."""
    from rich.table import Table

    from avzero.data.store import FeatureStore

    table = Table()
    for column in ("benchmark", "digest", "features", "classes", "samples", "text sets"):
        table.add_column(column)
    for manifest in FeatureStore(store).manifests():
        dims = manifest["parts"]["open"]["dims"]
        steps = "T x " if manifest.get("step_seconds") else ""
        table.add_row(
            manifest["name"] + (" (simulated)" if manifest["simulated"] else ""),
            manifest["digest"][:16],
            ", ".join(f"{m} {steps}{d}" for m, d in dims.items()),
            str(sum(role != "unused" for role in manifest["classes"]["roles"])),
            str(sum(manifest["counts"].values())),
            ", ".join(sorted(manifest["text"])),
        )
    terminal().print(table)


@data_app.command("verify")
def data_verify(
    benchmark: Annotated[str, typer.Argument(help="name or name@digest; default: all.")] = "",
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Check every stored file against its digest."""
    from avzero.data.store import FeatureStore

    target = FeatureStore(store)
    if not benchmark and not target.manifests():
        raise UserError(f"{store}: holds no benchmarks; check --store")
    names = [benchmark] if benchmark else [f"{m['name']}@{m['digest']}" for m in target.manifests()]
    problems = [problem for name in names for problem in target.verify(name)]
    if problems:
        raise UserError("; ".join(problems))
    terminal().print(f"{len(names)} benchmark{'s' if len(names) != 1 else ''}: all digests match")


@data_app.command("audit")
def data_audit(
    benchmark: Annotated[str, typer.Argument(help="name or name@digest.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Print the validation report of a benchmark's import."""
    from avzero.data.audit import audit_lines
    from avzero.data.store import FeatureStore

    audit = FeatureStore(store).audit(benchmark)
    if as_json:
        typer.echo(json.dumps(audit, indent=2, ensure_ascii=False))
    else:
        typer.echo("\n".join(audit_lines(audit)))


@data_app.command("ledger")
def data_ledger(
    benchmark: Annotated[str, typer.Argument(help="name or name@digest.")],
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """List every opening of a benchmark's TEST rows."""
    from avzero.data.store import FeatureStore

    lines = FeatureStore(store).openings(benchmark)
    for line in lines:
        typer.echo(
            f"{line['time']}  {line['user']}@{line['host']}  sweep {line['sweep']}  "
            f"trial {line['trial']}  seed {line['seed']}  beta {line['beta']:.4g}"
        )
    typer.echo(f"TEST of {benchmark} was opened {len(lines)} time{'s' * (len(lines) != 1)}")


@app.command("models")
def models(
    name: Annotated[str, typer.Argument(help="One system, in full.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the systems, or one with its hyperparameters, ranges and published points."""
    from avzero.report.systems import all_systems, describe, in_full, overview

    systems = [describe(name)] if name else all_systems()
    if as_json:
        typer.echo(json.dumps([s.as_dict() for s in systems], indent=2, ensure_ascii=False))
        return
    console = terminal()
    for part in in_full(systems[0]) if name else [overview(systems, console.width)]:
        console.print(part)


def _open_job(sweep: str, store: str | None, tracking: str | None) -> Job:
    """Read a job from its file or, by name, from the store; apply the command line's options."""
    from avzero.tune.opening import open_job

    return open_job(sweep, store, tracking)


def _listeners(job: Job, console: Console) -> list[Listener]:
    """Return the console display and, unless switched off, the MLflow tracker."""
    from avzero.report.console import ConsoleProgress

    members: list[Listener] = [ConsoleProgress(console)]
    if job.tracking.uri != "off":
        from avzero.track.mlflow_tracker import MlflowTracker

        members.append(MlflowTracker(job.tracking.uri, job))
    return members


AddressOption = Annotated[
    str | None, typer.Option("--address", help="Ray cluster; default: one on this machine.")
]


@app.command("plan")
def plan_command(
    job_file: JobArgument,
    store: JobStore = None,
    address: AddressOption = None,
    counts_only: Annotated[
        bool, typer.Option("--no-calibration", help="Only what follows from the job file.")
    ] = False,
) -> None:
    """Say what a sweep will run and cost, from a short calibration on this hardware."""
    from avzero.cluster.connect import ray_cluster
    from avzero.data.store import FeatureStore
    from avzero.report.plan import page
    from avzero.tune.nodes import cluster_nodes
    from avzero.tune.plan import make_plan
    from avzero.tune.sweep import Sweep

    job = _open_job(job_file, store, None)
    console = terminal()
    run = Sweep(job, FeatureStore(job.store))
    with ray_cluster(address) if address else nullcontext(), _progress(console) as progress:
        nodes = cluster_nodes() if address else None
        plan = make_plan(run, not counts_only, nodes, progress)
    if plan.calibrated:
        plan.save(run.store.storage)
    for part in page(plan, run.store.storage):
        console.print(part)


@app.command()
def sweep(
    job_file: JobArgument,
    store: JobStore = None,
    tracking: TrackingOption = None,
    address: AddressOption = None,
) -> None:
    """Search hyperparameters on VAL; the same command resumes an interrupted sweep."""
    from avzero.cluster.connect import ray_cluster
    from avzero.data.store import FeatureStore
    from avzero.report.bookkeeper import Bookkeeper
    from avzero.report.records import refresh
    from avzero.report.spent import comparison
    from avzero.tune.sweep import Sweep

    job = _open_job(job_file, store, tracking)
    console = terminal()
    run = Sweep(job, FeatureStore(job.store))
    run.listeners = (Bookkeeper(run.store.storage), *_listeners(job, console))
    if run.remaining:
        console.print(f"Starting Ray{' at ' + address if address else ' on this machine'} …")
    with ray_cluster(address) if run.remaining else nullcontext():
        finished = run.run()
    refresh(run.store.storage, job.name)
    if not finished:
        raise typer.Exit(130)
    for line in comparison(run.store.storage, [job.name]):
        console.print(line)
    failures = run.failures()
    for key, reason in failures.items():
        sys.stderr.write(f"avzero: {key}: no trial is complete: {reason}\n")
    if failures:
        raise typer.Exit(1)


@app.command("test")
def test_command(
    job_file: JobArgument,
    store: JobStore = None,
    tracking: TrackingOption = None,
    address: AddressOption = None,
) -> None:
    """Freeze a sweep's winner, train stage 2, and look at TEST once."""
    from avzero.cluster.connect import ray_cluster
    from avzero.data.store import FeatureStore
    from avzero.report.boards import boards, notices
    from avzero.report.records import load
    from avzero.report.rows import rows_of
    from avzero.report.spent import comparison
    from avzero.report.table import render
    from avzero.tune.final import freeze, run_final
    from avzero.tune.sweep import Sweep

    job = _open_job(job_file, store, tracking)
    console = terminal()
    run = Sweep(job, FeatureStore(job.store))
    plan = freeze(run)
    on_cluster = address is not None
    listeners = _listeners(job, console)
    several = plan.pending > 1 and job.test.reseed != "pipeline"
    needs_ray = plan.pending and (several or on_cluster or job.test.workers > 1)
    with ray_cluster(address) if needs_ray else nullcontext():
        try:
            for _ in run_final(plan, listeners, on_cluster):
                pass
        except KeyboardInterrupt:
            console.print("Interrupted. Run the same command again to go on.")
            raise typer.Exit(130) from None
    records = load(run.store.storage, [job.name])
    rows = rows_of(records)
    for part in render(boards(rows, ()), console.width):
        console.print(part)
    for line in comparison(run.store.storage, [job.name]):
        console.print(line)
    for line in notices(records, rows):
        console.print(f"Note: {line}")


app.command()(report)
app.command()(compare)


@app.command("import-checkpoint")
def import_checkpoint(  # noqa: PLR0913, PLR0917 - one per option
    file: Annotated[Path, typer.Argument(help="A published .pt, or .safetensors.")],
    model: Annotated[str, typer.Option(help="The system it is a checkpoint of.")],
    benchmark: Annotated[str, typer.Option(help="name or name@digest.")],
    stage1: Annotated[Path | None, typer.Option(help="Its stage-1 checkpoint; gives beta.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Hyperparameter as key=value; repeatable.")
    ] = None,
    text: Annotated[str, typer.Option(help="Text set of class vectors.")] = "w2v",
    alignment: Annotated[
        str, typer.Option(help="Class texts as released (legacy_sorted) or by_class.")
    ] = "legacy_sorted",
    store: StoreOption = DEFAULT_STORE,
    seed: Annotated[int, typer.Option(help="Of systems that draw when scored.")] = 42,
    no_test: Annotated[bool, typer.Option("--no-test", help="VAL only; TEST stays shut.")] = False,
) -> None:
    """Score a published checkpoint on VAL and, through the seal, on TEST."""
    from avzero.data.store import FeatureStore
    from avzero.report.result import score_lines
    from avzero.tune.imported import Import, parse_settings

    console = terminal()
    protocol = {"text": text, "text_alignment": alignment}
    values = parse_settings(settings or [])
    run = Import(
        FeatureStore(store),
        file,
        model,
        benchmark,
        stage1,
        values=values,
        protocol=protocol,
        seed=seed,
    )
    console.print("\n".join(run.notes()))
    val, frozen = run.val()
    console.print("\n".join(score_lines(val)))
    if not no_test:
        test, stored = run.test(frozen)
        console.print("\n".join(score_lines(test)))
        if stored:
            console.print("TEST was not opened again: this is the stored result.")


register_cluster(app)


def main() -> None:
    """Run the command line: one clear line and exit code 2 for what a person must correct."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        app([a for a in arguments if a != "--debug"], prog_name="avzero")
    except UserError as error:
        if debug:
            raise
        sys.stderr.write(f"avzero: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
