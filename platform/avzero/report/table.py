"""The leaderboard of finished sweeps, from the records in the store alone (no MLflow)."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from avzero.data.storage import Storage
from avzero.errors import UserError

SCORES = ("S", "U", "HM", "ZSL")


@dataclass(frozen=True)
class Row:
    """TEST scores of one system on one benchmark under one protocol, over its seeds."""

    benchmark: str
    model: str
    text: str
    alignment: str
    preset: str
    sweep: str
    simulated: bool
    seeds: tuple[int, ...]
    scores: dict[str, tuple[float, ...]]
    """Per score name one value per seed, in percent."""
    area: tuple[float, ...]
    beta: float
    val_hm: float
    at_grid_end: bool

    def mean(self, name: str) -> float:
        """Mean over seeds, in percent."""
        return statistics.fmean(self.scores[name])

    def cell(self, name: str) -> str:
        """Return ``mean ± std`` (sample standard deviation), or the one value."""
        values = self.area if name == "AUSUC" else self.scores[name]
        if len(values) == 1:
            return f"{values[0]:.2f}"
        return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"


def sweep_names(storage: Storage) -> list[str]:
    """Return the names of all sweeps in a store."""
    keys = storage.keys("sweeps/")
    return sorted({key.split("/")[1] for key in keys if key.endswith("/job.json")})


def leaderboard(storage: Storage, sweeps: Sequence[str]) -> list[Row]:
    """Return one row per sweep, benchmark and system that has TEST results, best HM first.

    Raises:
        UserError: a sweep does not exist.
    """
    have = sweep_names(storage)
    rows: list[Row] = []
    for sweep in sweeps:
        if sweep not in have:
            raise UserError(
                f"{storage.url}: no sweep {sweep!r}; there is {', '.join(have) or 'none'}"
            )
        groups: dict[str, list[dict[str, Any]]] = {}
        for key in storage.keys(f"sweeps/{sweep}/final/"):
            groups.setdefault(key.split("/")[3], []).append(json.loads(storage.read(key)))
        rows += [_row(sweep, records) for records in groups.values()]
    return sorted(rows, key=lambda row: (row.benchmark, -row.mean("HM")))


def _row(sweep: str, records: list[dict[str, Any]]) -> Row:
    """Join the seeds of one group."""
    records = sorted(records, key=lambda record: int(record["seed"]))
    first = records[0]
    return Row(
        benchmark=first["benchmark"],
        model=first["model"],
        text=first["protocol"]["text"],
        alignment=first["protocol"]["text_alignment"],
        preset=first["protocol"]["preset"],
        sweep=sweep,
        simulated=first["simulated"],
        seeds=tuple(record["seed"] for record in records),
        scores={
            name: tuple(100 * record["test"]["both"][name] for record in records) for name in SCORES
        },
        area=tuple(100 * record["area"] for record in records),
        beta=first["test"]["both"]["beta"],
        val_hm=100 * first["val"]["HM"],
        at_grid_end=any(record["at_grid_end"] for record in records),
    )


def render(rows: Sequence[Row], width: int) -> Table:
    """Return the leaderboard for a terminal of a width; percent, mean ± std over seeds."""
    wide = width >= 150
    table = Table(title="TEST, percent (mean ± std over seeds)", title_justify="left")
    left = ("benchmark", "system", *(("text", "sweep") if wide else ()))
    right = ("seeds", *SCORES, *(("AUSUC", "beta", "VAL HM") if wide else ()))
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        text = row.text if row.alignment == "by_class" else f"{row.text} ({row.alignment})"
        scores = [f"[bold]{row.cell(n)}[/bold]" if n == "HM" else row.cell(n) for n in SCORES]
        beta = f"{row.beta:.3g}" + ("!" if row.at_grid_end else "")
        table.add_row(
            row.benchmark + (" (simulated)" if row.simulated else ""),
            row.model + ("" if row.preset == "paper" else f" ({row.preset})"),
            *((text, row.sweep) if wide else ()),
            str(len(row.seeds)),
            *scores,
            *((row.cell("AUSUC"), beta, f"{row.val_hm:.2f}") if wide else ()),
        )
    if any(row.at_grid_end for row in rows):
        table.caption = "! beta lies at an end of the grid; widen protocol.beta_grid"
    return table
