"""The leaderboard of finished sweeps in a terminal, from the records in the store alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

from avzero.report.boards import Board
from avzero.report.records import SCORES
from avzero.report.rows import DISJOINT


def render(boards: Sequence[Board], width: int) -> Table:
    """Return leaderboards for a terminal of a width; percent, mean ± std over seeds.

    Lines part what must not be compared: other benchmarks, contents and protocols.
    """
    wide = width >= 150
    rows = [row for board in boards for row in board.rows]
    texts = wide or len({row.text for row in rows}) > 1
    digits = 2 if wide else 1
    disjoint = wide and any(DISJOINT in row.scores for row in rows)
    table = Table(title="TEST, percent (mean ± std over seeds)", title_justify="left")
    for name in ("benchmark", "system", *(("text",) if texts else ()), "sweep"):
        table.add_column(name, overflow="fold")
    extra = ("AUSUC", *((DISJOINT,) if disjoint else ()), "beta", "VAL HM") if wide else ()
    for name in ("place", "seeds", *SCORES, *extra):
        table.add_column(name, justify="right", no_wrap=True)
    for board in boards:
        for block in board.blocks:
            table.add_section()
            for name, row in zip(block.names, block.rows, strict=True):
                cells = [
                    Text(row.cell(n, digits), style="bold" if n == "HM" else "") for n in SCORES
                ]
                more = [row.cell("AUSUC")] + ([row.cell(DISJOINT)] if disjoint else [])
                more += [f"{row.beta:.3g}" + ("!" if row.at_grid_end else ""), f"{row.val_hm:.2f}"]
                table.add_row(
                    row.benchmark + (" (simulated)" if row.simulated else ""),
                    row.system,
                    *((row.text,) if texts else ()),
                    row.sweep,
                    block.standing("HM").place(name),
                    str(len(row.seeds)),
                    *cells,
                    *(more if wide else ()),
                )
    return table


def verdicts(boards: Sequence[Board]) -> Iterator[str]:
    """Yield, for everything that may be ranked, what can be said of the order by HM."""
    for board in boards:
        for block in board.blocks:
            if len(block.rows) > 1:
                yield f"{board.title}, {block.title}: {block.standing('HM').sentence}"
