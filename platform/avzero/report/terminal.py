"""What commands share: where they print, and options for a sweep, a store or a tracker."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from avzero import DEFAULT_STORE

__all__ = ["DEFAULT_STORE", "JobArgument", "JobStore", "StoreOption", "TrackingOption", "terminal"]

if TYPE_CHECKING:
    from rich.console import Console

StoreOption = Annotated[
    str,
    typer.Option("--store", "--to", envvar="AVZERO_STORE", help="A folder or s3://bucket/prefix."),
]
JobArgument = Annotated[
    str, typer.Argument(metavar="SWEEP", help="A job file (jobs/demo.yaml) or a sweep's name.")
]
TrackingOption = Annotated[
    str | None,
    typer.Option(
        "--tracking", envvar="AVZERO_TRACKING", help="MLflow URI instead of the job's; 'off': none."
    ),
]
JobStore = Annotated[
    str | None, typer.Option("--store", envvar="AVZERO_STORE", help="Instead of the job's store.")
]


def terminal() -> Console:
    """Return where a command prints."""
    from rich.console import Console

    # Into a file or a pipe nothing is cut off: a line may be as long as it needs.
    # No markup: what is printed holds paths and names of other people's making.
    width = None if sys.stdout.isatty() else 160
    return Console(highlight=False, markup=False, width=width)
