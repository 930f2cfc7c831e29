"""The leaderboards of finished sweeps in a terminal, from the records in the store alone."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from avzero.report.boards import Block, Board
from avzero.report.records import SCORES
from avzero.report.rows import DISJOINT

_WIDE = 120
_STYLE = {"best": "bold", "tied": "underline", "": ""}


def render(boards: Sequence[Board], width: int) -> list[RenderableType]:
    """Return leaderboards for a terminal of a width: a table and a sentence per protocol.

    Percent, mean ± std over seeds. What must not be compared stands in tables of its own.
    """
    rows = [row for board in boards for row in board.rows]
    wide = width >= _WIDE
    asked = ("AUSUC", DISJOINT) if wide else ()
    extra = tuple(name for name in asked if any(name in row.scores for row in rows))
    # The same in all tables, so that columns stand below each other.
    widths = tuple(
        min(16, max((len(getattr(row, name)) for row in rows), default=0))
        for name in ("model", "sweep")
    )
    parts: list[RenderableType] = [
        "TEST, percent, mean ± std over seeds. Bold: told apart from all others; underlined: the "
        "best and those not told apart from it. Place: where a system can stand by HM."
    ]
    for board in boards:
        for block in board.blocks:
            title = board.title + (" (simulated)" if board.simulated else "")
            parts += [Text(f"\n{title}, {block.title}", style="bold")]
            parts += [_table(block, wide, extra, widths)]
            if len(block.rows) > 1:
                parts.append(Text(block.standing("HM").sentence, style="dim"))
    return parts


def _table(block: Block, wide: bool, extra: Sequence[str], widths: Sequence[int]) -> Table:
    """Return the rows that may be ranked."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("place", justify="right", no_wrap=True)
    table.add_column("system", min_width=widths[0], overflow="fold")
    table.add_column("sweep", min_width=widths[1], overflow="fold")
    table.add_column("seeds", justify="right", no_wrap=True)
    digits = 2 if wide else 1
    for name in (*SCORES, *extra):
        table.add_column(name, justify="right", no_wrap=True, min_width=8 + 2 * digits)
    for name in ("beta", "VAL HM") if wide else ():
        table.add_column(name, justify="right", no_wrap=True, min_width=6)
    for place, row in enumerate(block.rows):
        cells = [Text(row.cell(n, digits), style=_STYLE[block.mark(place, n)]) for n in SCORES]
        more = [f"{row.beta:.3g}" + ("!" if row.at_grid_end else ""), f"{row.val_hm:.2f}"]
        table.add_row(
            block.standing("HM").place(block.names[place]),
            row.model,
            row.sweep,
            str(len(row.seeds)),
            *cells,
            *(row.cell(name, digits) for name in extra),
            *(more if wide else ()),
        )
    return table
