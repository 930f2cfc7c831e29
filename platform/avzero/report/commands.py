"""The commands that report and compare. Heavy libraries are imported when one is called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from avzero.errors import UserError
from avzero.report.terminal import DEFAULT_STORE, StoreOption, terminal

if TYPE_CHECKING:
    from avzero.data.storage import Storage
    from avzero.report.boards import Board
    from avzero.report.records import Records


def report(
    sweeps: Annotated[list[str] | None, typer.Argument(help="Sweep names; default: all.")] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Write a table of all rows.")] = None,
    latex: Annotated[Path | None, typer.Option("--latex", help="Write booktabs tables.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write one page to open.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    parity: Annotated[
        bool, typer.Option("--parity", help="Published results beside ours, with verdicts.")
    ] = False,
    tracking: Annotated[
        str | None, typer.Option("--tracking", help="MLflow server the page links to.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Show the leaderboards: in the terminal, as CSV, LaTeX, JSON, or as a page (--html)."""
    from avzero.data.storage import open_storage
    from avzero.report.boards import boards, notices
    from avzero.report.export import to_csv, to_json, to_latex
    from avzero.report.records import load
    from avzero.report.rows import rows_of
    from avzero.report.spent import comparison
    from avzero.report.table import render

    storage = open_storage(store)
    if parity:
        if csv or latex or html or as_json:
            raise UserError("--parity prints to the terminal alone; the page (--html) has it, too")
        _parity(storage, sweeps or [])
        return
    records = load(storage, sweeps or [])
    rows = rows_of(records)
    told = notices(records, rows)
    if not rows and (html is None or not records.sweeps):
        why = f" {told[0]}" if told else ""
        raise UserError(
            f"{store}: no TEST results yet; run avzero sweep, then avzero test.{why}".rstrip(".")
        )
    tables = boards(rows)
    files: dict[Path, str] = {}
    if csv:
        files[csv] = to_csv(tables)
    if latex:
        files[latex] = to_latex(tables)
    if html:
        files[html] = _page(storage, sweeps or [], records, tables, told, tracking)
    for path, text in files.items():
        _save(path, text)
    if as_json:
        typer.echo(to_json(tables, told))
        return
    console = terminal()
    for part in render(tables, console.width) if rows else ():
        console.print(part)
    for line in comparison(storage, [sweep.name for sweep in records.sweeps]):
        console.print(line)
    for line in told:
        console.print(f"Note: {line}")
    for path in files:
        console.print(f"{path}: written")


def _page(
    storage: Storage,
    sweeps: list[str],
    records: Records,
    tables: list[Board],
    told: list[str],
    tracking: str | None,
) -> str:
    """Return the page, with the parity board on it."""
    from avzero.report.mlflow_links import links
    from avzero.report.page import page
    from avzero.report.parity import board
    from avzero.report.parity_records import ours_in

    ours, _ = ours_in(storage, sweeps)
    return page(records, tables, told, board(ours), links(records, tracking))


def _parity(storage: Storage, sweeps: list[str]) -> None:
    """Print the parity board, and what is wrong with published rows."""
    from avzero.report.parity import board, unmatched
    from avzero.report.parity_records import ours_in
    from avzero.report.parity_view import doubts_view, parity_view

    ours, problems = ours_in(storage, sweeps)
    console = terminal()
    for part in parity_view(board(ours), console.width, unmatched(ours)):
        console.print(part)
    for part in doubts_view(console.width):
        console.print(part)
    for problem in problems:
        console.print(f"Note: {problem}")


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN RUN...",
            help="Heads of identities, sweep/group, sweep/model, sweep/model/benchmark, or "
            "sweep/group/number for a trial.",
        ),
    ],
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Set results or trials side by side: settings, scores, classes, cost."""
    from avzero.data.storage import open_storage
    from avzero.report.compare import comparison, find
    from avzero.report.records import load

    if len(runs) < 2:
        raise UserError(f"{runs[0]}: nothing to compare it with; name two runs or more")
    storage = open_storage(store)
    records = load(storage)
    sides = [find(storage, records, run) for run in runs]
    console = terminal()
    for part in comparison(sides):
        console.print(part)


def _save(path: Path, text: str) -> None:
    """Write a file, all or nothing.

    Raises:
        UserError: it is a folder, or cannot be written.
    """
    from avzero.data.storage import disk_errors

    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file in it")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it, or name another file")
    draft = path.with_name(f".tmp-{path.name}")
    try:
        with disk_errors(path, "choose another file"):
            draft.write_text(text, encoding="utf-8")
            draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
