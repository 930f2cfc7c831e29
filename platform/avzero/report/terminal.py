"""What commands share: where they print, and the options that name a store."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

StoreOption = Annotated[
    str,
    typer.Option("--store", "--to", envvar="AVZERO_STORE", help="A folder or s3://bucket/prefix."),
]
DEFAULT_STORE = ".avzero/store"


def terminal() -> Console:
    """Return where a command prints."""
    from rich.console import Console

    # Into a file or a pipe nothing is cut off: a line may be as long as it needs.
    # No markup: what is printed holds paths and names of other people's making.
    width = None if sys.stdout.isatty() else 160
    return Console(highlight=False, markup=False, width=width)
