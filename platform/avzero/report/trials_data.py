"""Every trial as columns of short values: ten thousand fit into a page of a few megabytes."""

from __future__ import annotations

import json
from typing import Any

from avzero.report.records import SCORES, Records

_STATES = ("complete", "pruned", "failed")


def trials_data(records: Records) -> dict[str, Any]:
    """Return the trials by column.

    ``groups`` holds what trials of one search share and the names of its hyperparameters; ``group``
    the place in it, per trial. Scores are hundredths of a percent, null where there is none;
    ``state`` counts from ``states``; ``values`` are in the order of the group's names.
    """
    table = records.trials
    groups: dict[tuple[str, str], int] = {}
    described: list[dict[str, Any]] = []
    columns: dict[str, list[Any]] = {
        name: []
        for name in ("group", "number", "state", *SCORES, "epochs", "seconds", "run", "values")
    }
    states = list(_STATES)
    for row in table.to_pylist():
        key = (row["sweep"], row["group"])
        values = json.loads(row["values"])
        if key not in groups:
            groups[key] = len(described)
            described.append(
                {
                    "sweep": row["sweep"],
                    "benchmark": row["benchmark"],
                    "dataset": row["dataset"],
                    "features": row["feature_set"],
                    "model": row["model"],
                    "preset": row["preset"],
                    "text": row["text"],
                    "names": sorted(values),
                }
            )
        place = groups[key]
        names = described[place]["names"]
        names += sorted(values.keys() - set(names))
        if row["state"] not in states:
            states.append(row["state"])
        columns["group"].append(place)
        columns["state"].append(states.index(row["state"]))
        columns["values"].append([_short(values.get(name)) for name in names])
        columns["seconds"].append(round(row["seconds"], 1))
        for name in ("number", "epochs", "run"):
            columns[name].append(row[name])
        for name in SCORES:
            columns[name].append(None if row[name] is None else round(100 * row[name]))
    return {"groups": described, "states": states, **columns}


def _short(value: Any) -> Any:
    """Return a value with the digits a person would read."""
    return float(f"{value:.4g}") if isinstance(value, float) else value
