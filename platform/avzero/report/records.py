"""What a store knows about its sweeps, as Arrow tables; MLflow is not asked.

Scores are percent here, as on every report; the JSON records hold fractions. The tables are kept
beside the records, ``sweeps/<name>/records/trials.parquet`` and ``results.parquet``, so that
pandas, polars or DuckDB can read them without avzero (``report.compact`` keeps them true).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import pyarrow as pa

from avzero.canon import ID_LENGTH, canonical
from avzero.data.storage import Storage
from avzero.errors import UserError
from avzero.report.compact import KEY, MARK, compacted, read_all
from avzero.report.spent import SPENT

SCORES = ("S", "U", "HM", "ZSL")
MODALITIES = ("audio", "video")
"""Withheld in turn at TEST; columns ``audio_HM`` and so on are what is left with one alone."""
_TEXT, _INT, _FLOAT, _BOOL = pa.string(), pa.int64(), pa.float64(), pa.bool_()
_INTS, _FLOATS = (pa.list_(pa.field("element", kind)) for kind in (_INT, _FLOAT))
"""Their entries have the name Parquet gives them, so that a table read back has the same schema."""
_WHERE = {
    "sweep": _TEXT,
    "group": _TEXT,
    "benchmark": _TEXT,
    "digest": _TEXT,
    "dataset": _TEXT,
    "feature_set": _TEXT,
    "simulated": _BOOL,
    "model": _TEXT,
    "text": _TEXT,
    "preset": _TEXT,
    "protocol": _TEXT,
}
_KEPT = {KEY: _TEXT, MARK: _TEXT}
_META = {"unit": "percent", "version": "1"}
TRIALS = pa.schema(
    _WHERE
    | {"number": _INT, "state": _TEXT, "reason": _TEXT, "twin_of": _INT, "run": _TEXT}
    | {"values": _TEXT, "epochs": _INT, "best_epoch": _INT}
    | dict.fromkeys((*SCORES, "beta"), _FLOAT)
    | {"seconds": _FLOAT}
    | _KEPT,
    metadata=_META,
)
"""A row per trial that has ended. Scores are of VAL, of the best epoch; ``values`` (searched
hyperparameters) and ``protocol`` are JSON; ``run`` is the identity shared by Optuna, Ray, MLflow
(tag ``avzero.run``) and the folder ``runs/<run>`` of the store."""
RESULTS = pa.schema(
    _WHERE
    | {"seed": _INT, "reseed": _TEXT, "winner": _TEXT, "trial": _TEXT, "frozen": _TEXT}
    | {"run": _TEXT, "mlflow": _TEXT, "revision": _TEXT, "config": _TEXT}
    | dict.fromkeys((*SCORES, "AUSUC"), _FLOAT)
    | {"beta": _FLOAT, "at_grid_end": _BOOL, "best_epoch": _INT}
    | {f"val_{name}": _FLOAT for name in SCORES}
    | {f"{m}_{name}": _FLOAT for m in MODALITIES for name in (*SCORES, "beta")}
    | {"S_source_disjoint": _FLOAT, "extra": _TEXT, "parameters": _INT, "seconds": _FLOAT}
    | {
        "class_id": _INTS,
        "count": _INTS,
    }
    | {
        "recall": _FLOATS,
        "zsl": _FLOATS,
    }
    | {f"curve_{name}": _FLOATS for name in ("beta", "S", "U")}
    | _KEPT,
    metadata=_META,
)
"""A row per seed whose TEST has been scored. ``seconds`` are those of stage 2; ``mlflow`` is the
tag ``avzero.run`` of its TEST run; the lists hold one entry per class with TEST samples, and the
points of the seen-unseen curve."""


@dataclass(frozen=True)
class SweepFacts:
    """What a sweep was asked for and what it took."""

    name: str
    job: dict[str, Any]
    groups: dict[str, int]
    """Group -> trials asked for."""
    frozen: dict[str, dict[str, Any]]
    """Group -> frozen winner, where there is one."""
    spent: dict[str, Any]

    @property
    def seeds(self) -> int:
        """Seeds of stage 2 asked for."""
        return int(self.job["test"]["seeds"])


@dataclass(frozen=True)
class Records:
    """Everything a report is made from."""

    sweeps: tuple[SweepFacts, ...]
    trials: pa.Table
    results: pa.Table
    openings: dict[str, list[dict[str, Any]]]
    """Digest of a benchmark -> lines of its ledger."""
    manifests: dict[str, dict[str, Any]]
    """Digest -> what the store says about the benchmark; the class names above all."""
    problems: tuple[str, ...]
    """Records that could not be read, a sentence each."""


def sweep_names(storage: Storage) -> list[str]:
    """Return the names of all sweeps in a store."""
    keys = storage.marks("sweeps/")
    return sorted({k.split("/")[1] for k in keys if k.count("/") == 2 and k.endswith("/job.json")})


def load(storage: Storage, sweeps: Sequence[str] = ()) -> Records:
    """Read some sweeps, or all.

    Raises:
        UserError: a sweep does not exist.
    """
    have = sweep_names(storage)
    for name in sweeps:
        if name not in have:
            raise UserError(
                f"{storage.url}: no sweep {name!r}; there is {', '.join(have) or 'none'}"
            )
    problems: list[str] = []
    manifests = {m["digest"]: m for m in _json(storage, storage.keys("benchmarks/"), problems)}
    facts, trials, results = [], [TRIALS.empty_table()], [RESULTS.empty_table()]
    for name in dict.fromkeys(sweeps or have):
        fact = _facts(storage, name, problems)
        if fact is None:
            continue
        facts.append(fact)
        maker = _Maker(storage, fact, manifests)
        home = f"sweeps/{name}"
        for kind, schema, row, parts in (
            ("trials", TRIALS, maker.trial, trials),
            ("final", RESULTS, maker.result, results),
        ):
            target = f"{home}/records/{'results' if kind == 'final' else kind}.parquet"
            parts.append(compacted(storage, f"{home}/{kind}/", target, schema, row, problems))
    together = pa.concat_tables(results)
    digests = sorted(set(together["digest"].to_pylist()))
    openings = {
        digest: _json(storage, storage.keys(f"ledger/{digest[:ID_LENGTH]}/"), problems)
        for digest in digests
    }
    return Records(
        tuple(facts), pa.concat_tables(trials), together, openings, manifests, tuple(problems)
    )


def refresh(storage: Storage, sweep: str) -> None:
    """Bring a sweep's tables up to date; whoever ends a sweep or a test calls this."""
    load(storage, [sweep])


def current(records: Records) -> pa.Array:
    """Return, for every result, whether it is of its search's present winner."""
    winners = {
        (sweep.name, group): frozen.get("trial")
        for sweep in records.sweeps
        for group, frozen in sweep.frozen.items()
    }
    columns = (records.results[name].to_pylist() for name in ("sweep", "group", "winner"))
    return pa.array(
        [winners.get((s, g)) == winner for s, g, winner in zip(*columns, strict=True)], pa.bool_()
    )


def recall_table(records: Records) -> pa.Table:
    """Return a row per class and seed."""
    shared = ("sweep", "group", "benchmark", "digest", "model", "text", "preset", "seed", "run")
    rows = []
    for result in records.results.to_pylist():
        names = class_names(records, result["digest"])
        lists = (result[name] for name in ("class_id", "count", "recall", "zsl"))
        for at, count, recall, zsl in zip(*lists, strict=True):
            rows.append(
                {name: result[name] for name in shared}
                | {"class_id": at, "class": names.get(at, ""), "unseen": zsl is not None}
                | {"count": count, "recall": recall, "zsl": zsl}
            )
    types = dict.fromkeys(shared, _TEXT) | {"seed": _INT, "class_id": _INT, "class": _TEXT}
    types |= {"unseen": _BOOL, "count": _INT, "recall": _FLOAT, "zsl": _FLOAT}
    return pa.Table.from_pylist(rows, schema=pa.schema(types, metadata={"unit": "percent"}))


def class_names(records: Records, digest: str) -> dict[int, str]:
    """Return a benchmark's class names by id; empty where the benchmark is gone from the store."""
    return dict(enumerate(records.manifests.get(digest, {}).get("classes", {}).get("names", [])))


def published_table() -> pa.Table:
    """Return published rows, every source on its own."""
    from avzero.report.published import judged_rows

    words = ("system", "variant", "model", "venue", "dataset", "feature_set", "claimed", "source")
    types = dict.fromkeys(words, _TEXT) | {"year": _INT} | dict.fromkeys(SCORES, _FLOAT)
    types |= {"verified": _BOOL, "verdict": _TEXT, "findings": _TEXT}
    rows = [
        {name: getattr(one.row, name) for name in (*words, "year", "verified")}
        | dict(one.row.scores)
        | {"verdict": one.verdict, "findings": one.text()}
        for one in judged_rows()
    ]
    return pa.Table.from_pylist(rows, schema=pa.schema(types, metadata={"unit": "percent"}))


def _json(storage: Storage, keys: Iterable[str], problems: list[str]) -> list[dict[str, Any]]:
    """Return the objects of some keys."""
    found = []
    names = [key for key in keys if key.endswith(".json")]
    for key, data in zip(names, read_all(storage, names), strict=True):
        try:
            if data is not None:
                found.append(dict(json.loads(data)))
        except (ValueError, TypeError):
            problems.append(f"{key}: not JSON; left out")
    return found


def _facts(storage: Storage, name: str, problems: list[str]) -> SweepFacts | None:
    """Return what a sweep was asked for; None, with a sentence, where that cannot be read."""
    key = f"sweeps/{name}/job.json"
    try:
        claim = json.loads(storage.read(key))
        job = claim["job"]
        trials = int(job["search"]["trials"])
        groups = {
            group: min(trials, _combinations(held["space"]))
            if job["search"]["sampler"] == "grid"
            else trials
            for group, held in claim["groups"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problems.append(f"{key}: not a record this avzero can read ({error}); sweep left out")
        return None
    home = f"sweeps/{name}"
    frozen = {}
    for group in groups:
        for winner in _json(storage, [f"{home}/frozen/{group}.json"], problems):
            frozen[group] = winner
    spent = next(iter(_json(storage, [f"{home}/{SPENT}"], problems)), {})
    return SweepFacts(name, job, groups, frozen, spent)


def _combinations(space: Mapping[str, Any]) -> int:
    """Return how many configurations a grid has."""
    return prod(len(range_["attributes"].get("choices", [0])) for range_ in space.values())


class _Maker:
    """Makes rows of a sweep's records.

    Args:
        storage: has the records of the runs, which the sweep's records name.
        sweep: whose records.
        manifests: what the store says about benchmarks, by digest.
    """

    def __init__(
        self, storage: Storage, sweep: SweepFacts, manifests: Mapping[str, dict[str, Any]]
    ) -> None:
        self._storage = storage
        self._sweep = sweep
        self._manifests = manifests

    def trial(self, key: str, record: dict[str, Any]) -> dict[str, Any]:
        """Return the row of a trial's record."""
        group = key.split("/")[3]
        manifest = self._manifests.get(record["digest"], {})
        title = group.removesuffix(f"--{record['model']}")
        own_text = title.removeprefix(record["benchmark"]).removeprefix("+")
        protocol = dict(self._sweep.job["protocol"])
        protocol["text"] = own_text or protocol["text"]
        val = record["val"]
        return {
            "sweep": self._sweep.name,
            "group": group,
            "dataset": manifest.get("dataset", ""),
            "feature_set": manifest.get("feature_set", ""),
            "simulated": manifest.get("simulated", False),
            "text": protocol["text"],
            "preset": protocol["preset"],
            "protocol": canonical(protocol),
            "run": record["task"],
            "values": canonical(record["values"]),
            **{k: record[k] for k in ("benchmark", "digest", "model", "number", "state")},
            **{k: record[k] for k in ("reason", "twin_of", "epochs", "best_epoch", "seconds")},
            **{name: _percent(val.get(name)) for name in SCORES},
            "beta": val.get("beta"),
        }

    def result(self, key: str, record: dict[str, Any]) -> dict[str, Any]:
        """Return the row of a TEST record."""
        protocol, test, extra = record["protocol"], record["test"], record["extra"]
        run, frozen = record["run"], record["frozen"][:ID_LENGTH]
        task, stored = self._run(f"{run}/task.json"), self._run(f"{run}/result-test-{frozen}.json")
        per_class, curve = stored.get("per_class", {}), stored.get("curve", {})
        alone = {m: test[m] for m in MODALITIES if m in test}
        direct = ("benchmark", "digest", "dataset", "feature_set", "simulated", "model", "seed")
        more = ("reseed", "winner", "trial", "frozen", "run", "revision", "beta", "at_grid_end")
        return {
            "sweep": self._sweep.name,
            "group": key.split("/")[3],
            **{name: record[name] for name in (*direct, *more, "best_epoch", "parameters")},
            "text": protocol["text"],
            "preset": protocol["preset"],
            "protocol": canonical(protocol),
            "mlflow": f"{run}-{frozen}-test",
            "config": canonical(task.get("config", {}) | task.get("train", {})),
            **{name: _percent(test["both"][name]) for name in SCORES},
            "AUSUC": _percent(record["area"]),
            **{f"val_{name}": _percent(record["val"].get(name)) for name in SCORES},
            **{f"{m}_{n}": _percent(scores[n]) for m, scores in alone.items() for n in SCORES},
            **{f"{m}_beta": scores["beta"] for m, scores in alone.items()},
            "S_source_disjoint": _percent(extra.get("S_source_disjoint")),
            "extra": canonical(extra),
            "seconds": record["seconds"],
            "class_id": per_class.get("class_id", []),
            "count": per_class.get("count", []),
            "recall": _percents(per_class.get("recall", [])),
            "zsl": _percents(per_class.get("zsl", [])),
            "curve_beta": curve.get("beta", []),
            "curve_S": _percents(curve.get("S", [])),
            "curve_U": _percents(curve.get("U", [])),
        }

    def _run(self, name: str) -> dict[str, Any]:
        """Return a record of a run's folder; empty where it is gone."""
        try:
            return dict(json.loads(self._storage.read(f"runs/{name}")))
        except KeyError:
            return {}


def _percent(value: float | None) -> float | None:
    """Return a fraction as percent."""
    return None if value is None else 100 * value


def _percents(values: Sequence[float | None]) -> list[float | None]:
    """Return fractions as percent."""
    return [_percent(value) for value in values]
