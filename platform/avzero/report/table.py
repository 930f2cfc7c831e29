"""The leaderboard of finished sweeps, from the records in the store alone (no MLflow)."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from avzero.data.ledger import read_openings
from avzero.data.storage import Storage
from avzero.errors import UserError

SCORES = ("S", "U", "HM", "ZSL")
DISJOINT = "S disjoint"
"""S over samples whose source video is not in training (P-16)."""


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
    beta: float
    val_hm: float
    at_grid_end: bool
    openings: int
    """How often this sweep has opened the benchmark's TEST for this system."""

    def mean(self, name: str) -> float:
        """Mean over seeds, in percent."""
        return statistics.fmean(self.scores[name])

    def cell(self, name: str, digits: int = 2) -> str:
        """Return ``mean ± std`` (sample standard deviation), the one value, or nothing."""
        values = self.scores.get(name, ())
        if len(values) < 2:
            return f"{values[0]:.{digits}f}" if values else ""
        return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"

    @property
    def system(self) -> str:
        """The system's name with whatever sets the row apart from the default protocol."""
        marks = [
            mark
            for mark, default in ((self.preset, "paper"), (self.alignment, "by_class"))
            if mark != default
        ]
        return self.model + (f" ({', '.join(marks)})" if marks else "")


def sweep_names(storage: Storage) -> list[str]:
    """Return the names of all sweeps in a store."""
    keys = storage.keys("sweeps/")
    return sorted({key.split("/")[1] for key in keys if key.endswith("/job.json")})


def leaderboard(storage: Storage, sweeps: Sequence[str]) -> list[Row]:
    """Return one row per sweep, benchmark and system that has TEST results, best HM first.

    Only runs of the current winner count: when further trials changed it, the results of the
    earlier one stay in the store and in the number of openings.

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
        for group, records in groups.items():
            winner = json.loads(storage.read(f"sweeps/{sweep}/frozen/{group}.json"))["trial"]
            current = [record for record in records if record["winner"] == winner]
            if current:
                rows.append(_row(storage, sweep, current))
    return sorted(rows, key=lambda row: (row.benchmark, -row.mean("HM")))


def _row(storage: Storage, sweep: str, records: list[dict[str, Any]]) -> Row:
    """Join the seeds of one group."""
    records = sorted(records, key=lambda record: int(record["seed"]))
    first = records[0]
    scores = {
        name: tuple(100 * record["test"]["both"][name] for record in records) for name in SCORES
    }
    scores["AUSUC"] = tuple(100 * record["area"] for record in records)
    if all("S_source_disjoint" in record["extra"] for record in records):
        scores[DISJOINT] = tuple(100 * r["extra"]["S_source_disjoint"] for r in records)
    openings = [
        line
        for line in read_openings(storage, first["digest"])
        if line["sweep"] == sweep
        and line["model"] == first["model"]
        and line.get("text", first["protocol"]["text"]) == first["protocol"]["text"]
    ]
    return Row(
        benchmark=first["benchmark"],
        model=first["model"],
        text=first["protocol"]["text"],
        alignment=first["protocol"]["text_alignment"],
        preset=first["protocol"]["preset"],
        sweep=sweep,
        simulated=first["simulated"],
        seeds=tuple(record["seed"] for record in records),
        scores=scores,
        beta=first["beta"],
        val_hm=100 * first["val"]["HM"],
        at_grid_end=any(record["at_grid_end"] for record in records),
        openings=len(openings),
    )


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
