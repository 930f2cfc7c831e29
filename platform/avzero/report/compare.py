"""Results and trials side by side: which settings differ, what they scored, and for which classes.

A side is a row of the leaderboard (a winner over its seeds), one of its seeds, or a trial. Sides
on other ground (another content of the benchmark, another protocol, VAL beside TEST) are shown, and
no difference is taken between them.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table

from avzero.canon import ID_LENGTH
from avzero.data.storage import Storage
from avzero.errors import UserError
from avzero.report.records import SCORES, Records, class_names
from avzero.report.rows import Row, rows_of
from avzero.report.standing import standing
from avzero.report.units import duration

_CLASSES = 8
"""Classes shown, seen and unseen each: those whose recalls differ most."""
_LEAST = 4
"""Digits an identity must have to be looked up by its head."""


@dataclass(frozen=True)
class Side:
    """One thing to compare."""

    title: str
    kind: str
    """``TEST`` or ``VAL``."""
    facts: Mapping[str, str]
    settings: Mapping[str, Any]
    scores: Mapping[str, tuple[float, ...]]
    """One value per seed, percent."""
    recalls: Mapping[str, tuple[str, float]]
    """Class name -> (seen or unseen, mean recall in percent)."""
    cost: Mapping[str, str]
    ground: tuple[str, ...]


def find(storage: Storage, records: Records, selector: str) -> Side:
    """Return the side a selector names.

    Raises:
        UserError: nothing fits, or several things do.
    """
    found = dict(_matches(storage, records, selector))
    if len(found) == 1:
        return next(iter(found.values()))()
    if found:
        shown = ", ".join(list(found)[:6]) + (" …" if len(found) > 6 else "")
        raise UserError(f"{selector}: fits {len(found)} runs ({shown}); write one of these")
    sweeps = ", ".join(sweep.name for sweep in records.sweeps) or "none"
    raise UserError(
        f"{selector}: no such run. Write the first {_LEAST} or more digits of an identity, "
        "sweep/model, sweep/model/benchmark, sweep/group, or sweep/group/number for a trial; "
        f"sweeps here: {sweeps}"
    )


def _matches(
    storage: Storage, records: Records, selector: str
) -> Iterator[tuple[str, Callable[[], Side]]]:
    """Yield (unambiguous selector, how to make the side) of all that fits."""
    sweep, _, rest = selector.partition("/")
    head = selector if re.fullmatch(rf"[0-9a-f]{{{_LEAST},}}", selector) else None
    for row in rows_of(records):
        name = f"{row.sweep}/{row.group}"
        asked = (row.group, row.model, f"{row.model}/{row.benchmark}")
        if row.sweep == sweep and (rest in asked or rest == f"{asked[2]}:{row.text}"):
            yield name, lambda row=row, name=name: _of_row(records, row, name)  # type: ignore[misc]
        for record in row.records:
            if head and record["run"].startswith(head):
                one = (record,)
                yield (
                    record["run"],
                    lambda row=row, one=one, name=name: _of_row(records, row, name, one),  # type: ignore[misc]
                )
    columns = ("sweep", "group", "number", "run")
    for place, (name, group, number, run) in enumerate(
        zip(*(records.trials[c].to_pylist() for c in columns), strict=True)
    ):
        if (name == sweep and rest == f"{group}/{number}") or (head and run.startswith(head)):
            yield (
                f"{name}/{group}/{number}",
                lambda place=place: _of_trial(  # type: ignore[misc]
                    storage, records, records.trials.slice(place, 1).to_pylist()[0]
                ),
            )


def _of_row(
    records: Records, row: Row, name: str, only: tuple[dict[str, Any], ...] | None = None
) -> Side:
    """Return a row of the leaderboard, or one of its seeds."""
    chosen = only or row.records
    first = chosen[0]
    places = [row.records.index(record) for record in chosen]
    facts = {
        "sweep": row.sweep,
        "system": row.model,
        "benchmark": row.benchmark + (" (simulated)" if row.simulated else ""),
        "digest": row.digest[:ID_LENGTH],
        "kind": f"TEST, {len(chosen)} seed{'s' * (len(chosen) != 1)}",
        "seeds": ", ".join(str(record["seed"]) for record in chosen),
        "runs": "\n".join(record["run"] for record in chosen),
        "winner": f"trial {row.winner}, {first['winner']}",
        "revision": ", ".join(sorted({record["revision"][:ID_LENGTH] for record in chosen})),
    }
    cost = {"stage 2": duration(sum(record["seconds"] for record in chosen))}
    if row.cost:
        cost["search, core-hours"] = f"{row.cost.search_core_hours:.3g}"
        if row.cost.search_gpu_hours:
            cost["search, GPU-hours"] = f"{row.cost.search_gpu_hours:.3g}"
        cost["search, training"] = duration(3600 * row.cost.training_hours)
        cost["trials"] = str(len(row.trials))
    scores = {key: tuple(values[p] for p in places) for key, values in row.scores.items()}
    scores["beta"] = tuple(record["beta"] for record in chosen)
    classes = [
        dict(
            zip(record["class_id"], zip(record["recall"], record["zsl"], strict=True), strict=True)
        )
        for record in chosen
    ]
    return Side(
        name if only is None else f"{name}, seed {first['seed']}",
        "TEST",
        facts,
        _settings(row.protocol, json.loads(first["config"])),
        scores,
        _recalls(records, row.digest, classes),
        cost,
        ("TEST", *row.ground),
    )


def _of_trial(storage: Storage, records: Records, trial: dict[str, Any]) -> Side:
    """Return a trial; its settings and recalls are in its run's folder."""
    task = _record(storage, f"runs/{trial['run']}/task.json")
    result = _record(storage, f"runs/{trial['run']}/result-val.json")
    table = result.get("per_class", {"class_id": [], "recall": [], "zsl": []})
    per_class = {
        at: (None if recall is None else 100 * recall, zsl)
        for at, recall, zsl in zip(table["class_id"], table["recall"], table["zsl"], strict=True)
    }
    protocol = json.loads(trial["protocol"])
    facts = {
        "sweep": trial["sweep"],
        "system": trial["model"],
        "benchmark": trial["benchmark"] + (" (simulated)" if trial["simulated"] else ""),
        "digest": trial["digest"][:ID_LENGTH],
        "kind": f"VAL, trial {trial['number']}, {trial['state']}",
        "runs": trial["run"],
        "revision": result.get("revision", "")[:ID_LENGTH],
        "epochs": f"{trial['epochs']}, best {trial['best_epoch']}",
    }
    values = json.loads(trial["values"])
    own = task.get("config", {}) | task.get("train", {}) or values
    scores = {s: (trial[s],) for s in (*SCORES, "beta") if trial[s] is not None}
    return Side(
        f"{trial['sweep']}/{trial['group']}/{trial['number']}",
        "VAL",
        {key: value for key, value in facts.items() if value},
        _settings(protocol, own),
        scores,
        _recalls(records, trial["digest"], [per_class] if per_class else []),
        {"training": duration(trial["seconds"])},
        ("VAL", trial["digest"], json.dumps(protocol, sort_keys=True)),
    )


def _record(storage: Storage, key: str) -> dict[str, Any]:
    """Return a record; empty where it is gone."""
    try:
        return dict(json.loads(storage.read(key)))
    except KeyError:
        return {}


def _settings(protocol: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return hyperparameters and protocol as one flat set of names."""
    return dict(config) | {f"protocol.{key}": value for key, value in protocol.items()}


def _recalls(
    records: Records, digest: str, seeds: Sequence[Mapping[int, tuple[float | None, float | None]]]
) -> dict[str, tuple[str, float]]:
    """Return the mean recall over seeds of every class, by name."""
    if not seeds:
        return {}
    names = class_names(records, digest)
    found = {}
    for at, (_, zsl) in seeds[0].items():
        values = [v for seed in seeds if (v := seed.get(at, (None, None))[0]) is not None]
        if values:
            found[names.get(at, f"class {at}")] = (
                "seen" if zsl is None else "unseen",
                statistics.fmean(values),
            )
    return found


# -- showing ------------------------------------------------------------------------------------


def comparison(sides: Sequence[Side]) -> Iterator[RenderableType]:
    """Yield what to print about several sides."""
    marks = [f"[{chr(ord('A') + i)}]" if i < 26 else f"[{i + 1}]" for i in range(len(sides))]
    for mark, side in zip(marks, sides, strict=True):
        yield f"{mark} {side.title}"
    yield from _warnings(sides)
    yield _table("What", marks, _facts([side.facts for side in sides]))
    differing = _facts([{k: _value(v) for k, v in side.settings.items()} for side in sides], True)
    if differing:
        yield _table("Settings that differ", marks, differing)
    else:
        yield "Settings: all the same."
    yield _table("Scores, percent", _with_difference(marks, sides), list(_scores(sides)))
    if len({side.ground for side in sides}) == 1 and sides[0].kind == "TEST":
        yield standing({side.title: side.scores["HM"] for side in sides}).sentence
    classes = list(_classes(sides))
    if classes:
        title = f"{sides[0].kind} recalls that differ most, percent"
        yield _table(title, _with_difference(["class", *marks], sides), classes)
    yield _table("Cost", marks, _facts([side.cost for side in sides]))


def _warnings(sides: Sequence[Side]) -> Iterator[str]:
    """Yield why sides must not be compared."""
    if len({side.ground[0] for side in sides}) > 1:
        yield "Not comparable: scores of VAL beside scores of TEST."
    if len({side.ground[1] for side in sides}) > 1:
        yield "Not comparable: different benchmarks, or different contents of one."
    elif len({side.ground[2] for side in sides}) > 1:
        yield "Not like for like: the protocols differ, see protocol.* below."


def _comparable(sides: Sequence[Side]) -> bool:
    """Return whether a difference between two sides means something."""
    return len(sides) == 2 and len({side.ground[:2] for side in sides}) == 1


def _with_difference(columns: list[str], sides: Sequence[Side]) -> list[str]:
    return [*columns, "B - A"] if _comparable(sides) else columns


def _facts(sides: Sequence[Mapping[str, str]], only_different: bool = False) -> list[list[str]]:
    """Return rows of (name, value on every side)."""
    rows = []
    for name in dict.fromkeys(key for side in sides for key in side):
        cells = [side.get(name, "-") for side in sides]
        if not only_different or len(set(cells)) > 1:
            rows.append([name, *cells])
    return rows


def _scores(sides: Sequence[Side]) -> Iterator[list[str]]:
    """Yield a row per score."""
    for name in dict.fromkeys(key for side in sides for key in side.scores):
        values = [side.scores.get(name, ()) for side in sides]
        cells = [_spread(v) for v in values]
        if _comparable(sides):
            a, b = values
            cells.append(f"{statistics.fmean(b) - statistics.fmean(a):+.2f}" if a and b else "")
        yield ["beta (a distance)" if name == "beta" else name, *cells]


def _spread(values: Sequence[float]) -> str:
    """Return mean ± sample standard deviation."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def _classes(sides: Sequence[Side]) -> Iterator[list[str]]:
    """Yield a row per class whose recalls differ most; none where the classes are others."""
    if len({side.ground[:2] for side in sides}) > 1 or not all(side.recalls for side in sides):
        return
    shared = [name for name in sides[0].recalls if all(name in side.recalls for side in sides)]

    def spread(name: str) -> float:
        values = [side.recalls[name][1] for side in sides]
        return max(values) - min(values)

    kinds = {name: sides[0].recalls[name][0] for name in shared}
    order = sorted(shared, key=lambda name: (-spread(name), name))
    for name in (
        *[name for name in order if kinds[name] == "unseen"][:_CLASSES],
        *[name for name in order if kinds[name] == "seen"][:_CLASSES],
    ):
        values = [side.recalls[name][1] for side in sides]
        cells = [f"{value:.1f}" for value in values]
        if _comparable(sides):
            cells.append(f"{values[1] - values[0]:+.1f}")
        yield [kinds[name], name, *cells]


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table whose first column is named by its title."""
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for column in columns:
        numbers = column != "class" and title.endswith("percent")
        table.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _value(value: Any) -> str:
    """Return a setting as people write it."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)
