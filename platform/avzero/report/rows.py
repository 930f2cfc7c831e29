"""Rows of a leaderboard: one system under one protocol in one sweep, over its seeds.

Nothing is averaged but the seeds of one frozen winner. What may stand in one ranking has the same
``Row.ground``: the same content of the benchmark and the same protocol, to the last option.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from avzero.data.storage import Storage
from avzero.report.records import SCORES, Records, SweepFacts, load
from avzero.spec import Protocol

DISJOINT = "S disjoint"
"""S over samples whose source video is not in training (P-16)."""


@dataclass(frozen=True)
class Cost:
    """What a row took. Hours are those cores and GPUs were held for, not those they worked."""

    search_core_hours: float
    search_gpu_hours: float
    final_core_hours: float
    """Of stage 2, over all seeds; the look at TEST is not counted."""
    final_gpu_hours: float
    training_hours: float
    """Optimiser steps of the search alone."""
    shared: bool
    """Whether the search's hours are this row's share, by training time, of a sweep of several."""
    measured: bool
    """Whether the sweep noted what it held; otherwise the hours are those of training alone."""


@dataclass(frozen=True)
class Row:
    """TEST scores of one system on one benchmark under one protocol, over its seeds."""

    benchmark: str
    digest: str
    dataset: str
    feature_set: str
    model: str
    protocol: Mapping[str, Any]
    sweep: str
    group: str
    simulated: bool
    seeds: tuple[int, ...]
    scores: dict[str, tuple[float, ...]]
    """Per score name one value per seed, in percent."""
    records: tuple[dict[str, Any], ...]
    """The rows of ``records.RESULTS`` it is made of, by seed."""
    beta: float
    val_hm: float
    at_grid_end: bool
    openings: int
    """How often this sweep has opened the benchmark's TEST for this system."""
    trials: tuple[dict[str, Any], ...] = field(default=(), repr=False)
    """The rows of ``records.TRIALS`` of its search, by number."""
    cost: Cost | None = None
    wanted_seeds: int = 0
    winner: int | None = None
    """Number of the winning trial."""
    time: str = ""
    """Of the last look at TEST for it, as in the ledger."""

    @property
    def text(self) -> str:
        """The text set of class vectors."""
        return str(self.protocol["text"])

    @property
    def preset(self) -> str:
        """The protocol's preset."""
        return str(self.protocol["preset"])

    @property
    def alignment(self) -> str:
        """How class texts are found (P-01)."""
        return str(self.protocol["text_alignment"])

    @property
    def ground(self) -> tuple[str, str]:
        """What rows must share to be compared: the benchmark's content and the protocol."""
        return self.digest, json.dumps(self.protocol, sort_keys=True)

    def mean(self, name: str) -> float:
        """Mean over seeds, in percent."""
        return statistics.fmean(self.scores[name])

    def std(self, name: str) -> float:
        """Sample standard deviation over seeds; NaN of a single one."""
        values = self.scores[name]
        return statistics.stdev(values) if len(values) > 1 else math.nan

    def cell(self, name: str, digits: int = 2) -> str:
        """Return ``mean ± std`` (sample standard deviation), the one value, or nothing."""
        values = self.scores.get(name, ())
        if len(values) < 2:
            return f"{values[0]:.{digits}f}" if values else ""
        return f"{self.mean(name):.{digits}f} ± {self.std(name):.{digits}f}"

    @property
    def system(self) -> str:
        """The system's name with whatever sets the row apart from the default protocol."""
        marks = [*self.departures]
        if self.preset != "paper":
            marks.insert(0, self.preset)
        return self.model + (f" ({', '.join(marks)})" if marks else "")

    @property
    def departures(self) -> list[str]:
        """Options that differ from those of the row's own preset, text set aside."""
        return departures(self.protocol)


def departures(protocol: Mapping[str, Any]) -> list[str]:
    """Return the options of a protocol that its preset does not imply, as people read them."""
    usual = Protocol.model_validate({"preset": protocol["preset"]}).model_dump(mode="json")
    marks = []
    for key, value in protocol.items():
        if key in ("text", "preset") or value == usual.get(key):
            continue
        if key == "text_alignment":
            marks.append(str(value))
        elif isinstance(value, dict):
            marks.append(f"{key} {'/'.join(f'{v:g}' for v in value.values())}")
        else:
            marks.append(f"{key} {value}")
    return marks


def leaderboard(storage: Storage, sweeps: Sequence[str]) -> list[Row]:
    """Return one row per sweep, benchmark and system that has TEST results, best HM first.

    Only runs of the current winner count: when further trials changed it, the results of the
    earlier one stay in the store and in the number of openings.

    Raises:
        UserError: a sweep does not exist.
    """
    return rows_of(load(storage, sweeps))


def rows_of(records: Records) -> list[Row]:
    """Return the rows of ``leaderboard`` from records that have been read."""
    sweeps = {sweep.name: sweep for sweep in records.sweeps}
    trials = _by_group(records.trials.to_pylist())
    training = {key: _training(rows) for key, rows in trials.items()}
    totals: dict[str, float] = {}
    for (name, _), hours in training.items():
        totals[name] = totals.get(name, 0.0) + hours
    rows = []
    for (name, group), results in _by_group(records.results.to_pylist()).items():
        sweep = sweeps[name]
        frozen = sweep.frozen.get(group, {})
        current = [r for r in results if r["winner"] == frozen.get("trial")]
        if not current:
            continue
        key = (name, group)
        share = training.get(key, 0.0)
        cost = _cost(sweep, current, share, totals.get(name, 0.0))
        current.sort(key=lambda record: int(record["seed"]))
        own = sorted(trials.get(key, []), key=lambda t: int(t["number"]))
        rows.append(_row(records, sweep, current, tuple(own), cost, frozen.get("number")))
    return sorted(rows, key=lambda row: (row.benchmark, -row.mean("HM"), row.sweep, row.group))


def _by_group(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Return rows by (sweep, group)."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["sweep"], row["group"]), []).append(row)
    return found


def _training(trials: Sequence[dict[str, Any]]) -> float:
    """Return the hours of training of trials; a twin took its elder's outcome, and no time."""
    return sum(float(trial["seconds"]) for trial in trials if trial["twin_of"] is None) / 3600


def _cost(sweep: SweepFacts, results: Sequence[dict[str, Any]], hours: float, total: float) -> Cost:
    """Return what a row took; a sweep of several rows is divided by their training time."""
    need, plan = sweep.job["resources"], sweep.job["test"]
    share = hours / total if total else 0.0
    spent, final = sweep.spent, sum(r["seconds"] for r in results) / 3600
    measured = "core_hours" in spent
    held = hours * need["workers"]
    return Cost(
        spent["core_hours"] * share if measured else held * need["cpus"],
        spent["gpu_hours"] * share if measured else held * need["gpus"],
        final * plan["workers"] * need["cpus"],
        final * plan["workers"] * need["gpus"],
        hours,
        shared=len(sweep.groups) > 1,
        measured=measured,
    )


def _row(
    records: Records,
    sweep: SweepFacts,
    results: list[dict[str, Any]],
    trials: tuple[dict[str, Any], ...],
    cost: Cost,
    winner: int | None,
) -> Row:
    """Join the seeds of one group."""
    first = results[0]
    scores = {name: tuple(r[name] for r in results) for name in (*SCORES, "AUSUC")}
    if all(r["S_source_disjoint"] is not None for r in results):
        scores[DISJOINT] = tuple(r["S_source_disjoint"] for r in results)
    openings = list(_openings(records, first))
    return Row(
        **{k: first[k] for k in ("benchmark", "digest", "dataset", "feature_set", "model")},
        **{k: first[k] for k in ("sweep", "group", "simulated", "beta")},
        protocol=json.loads(first["protocol"]),
        seeds=tuple(r["seed"] for r in results),
        scores=scores,
        records=tuple(results),
        val_hm=first["val_HM"],
        at_grid_end=any(r["at_grid_end"] for r in results),
        openings=len(openings),
        trials=trials,
        cost=cost,
        wanted_seeds=sweep.seeds,
        winner=winner,
        time=max((line["time"] for line in openings), default=""),
    )


def _openings(records: Records, result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the ledger's lines of a result's system in its sweep."""
    for line in records.openings[result["digest"]]:
        text = line.get("text", result["text"])
        if (line["sweep"], line["model"], text) == (
            result["sweep"],
            result["model"],
            result["text"],
        ):
            yield line
