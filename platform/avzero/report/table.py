"""The leaderboard of finished sweeps in a terminal, from the records in the store alone."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from avzero.report.records import SCORES
from avzero.report.rows import DISJOINT, Row


def render(rows: Sequence[Row], width: int) -> Table:
    """Return the leaderboard for a terminal of a width; percent, mean ± std over seeds."""
    wide = width >= 150
    texts = wide or len({row.text for row in rows}) > 1
    digits = 2 if wide else 1
    disjoint = wide and any(DISJOINT in row.scores for row in rows)
    table = Table(title="TEST, percent (mean ± std over seeds)", title_justify="left")
    for name in ("benchmark", "system", *(("text",) if texts else ()), "sweep"):
        table.add_column(name, overflow="fold")
    extra = ("AUSUC", *((DISJOINT,) if disjoint else ()), "beta", "VAL HM") if wide else ()
    for name in ("seeds", *SCORES, *extra):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = [Text(row.cell(n, digits), style="bold" if n == "HM" else "") for n in SCORES]
        more = [row.cell("AUSUC")] + ([row.cell(DISJOINT)] if disjoint else [])
        more += [f"{row.beta:.3g}" + ("!" if row.at_grid_end else ""), f"{row.val_hm:.2f}"]
        table.add_row(
            row.benchmark + (" (simulated)" if row.simulated else ""),
            row.system,
            *((row.text,) if texts else ()),
            row.sweep,
            str(len(row.seeds)),
            *cells,
            *(more if wide else ()),
        )
    table.caption = " ".join(_notes(rows)) or None
    table.caption_justify = "left"
    return table


def _notes(rows: Sequence[Row]) -> list[str]:
    """Return what a reader of the table must know."""
    notes = [
        f"Beta lies at an end of the grid for {row.system} on {row.benchmark}; widen "
        "protocol.beta_grid."
        for row in rows
        if row.at_grid_end
    ]
    return notes + [
        f"Sweep {row.sweep} has opened TEST of {row.benchmark} {row.openings} times for "
        f"{row.model}, {len(row.seeds)} of them for these scores."
        for row in rows
        if row.openings > len(row.seeds)
    ]
