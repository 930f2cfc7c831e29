"""Our side of the parity board, from the records in a store alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from avzero.canon import ID_LENGTH, canonical
from avzero.data.ledger import IMPORTS
from avzero.data.storage import Storage
from avzero.errors import UserError
from avzero.report.parity import SCORES, Ours
from avzero.report.records import sweep_names

Record = Mapping[str, Any]


def ours_in(storage: Storage, sweeps: Sequence[str] = ()) -> tuple[list[Ours], list[str]]:
    """Return everything a store can put on the board, and a sentence per record it cannot.

    Args:
        storage: of the store.
        sweeps: whose finals count; default: all.

    Raises:
        UserError: a sweep does not exist.
    """
    problems: list[str] = []
    return [*checkpoints(storage, problems), *finals(storage, sweeps, problems)], problems


def finals(storage: Storage, sweeps: Sequence[str], problems: list[str]) -> list[Ours]:
    """Return the final runs of sweeps, those of the current winners.

    Raises:
        UserError: a sweep does not exist.
    """
    have = sweep_names(storage)
    current = []
    for sweep in sweeps or have:
        if sweep not in have:
            raise UserError(
                f"{storage.url}: no sweep {sweep!r}; there is {', '.join(have) or 'none'}"
            )
        for key in storage.keys(f"sweeps/{sweep}/final/"):
            record, group = _read(storage, key, problems), key.split("/")[3]
            frozen = _read(storage, f"sweeps/{sweep}/frozen/{group}.json", problems)
            if record and record.get("winner") == frozen.get("trial"):
                current.append(record | {"sweep": sweep})
    return retrained(current, problems)


def retrained(records: Iterable[Record], problems: list[str]) -> list[Ours]:
    """Return rows from TEST records (``tune.final.final_record``), their sweep's name added.

    Seeds of one sweep, benchmark, system, protocol and winner are one row; nothing else is joined.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        try:
            same = {k: record[k] for k in ("sweep", "digest", "model", "protocol", "winner")}
            int(record["seed"]), [record["test"]["both"][name] for name in SCORES]
        except (KeyError, TypeError, ValueError) as error:
            problems.append(f"a record of sweep {record.get('sweep')}: lacks {error}; left out")
            continue
        groups.setdefault(canonical(same), []).append(record)
    return [_joined(group) for group in groups.values()]


def _joined(records: Sequence[Record]) -> Ours:
    """Join the seeds of one configuration."""
    records = sorted(records, key=lambda record: int(record["seed"]))
    first = records[0]
    return Ours(
        model=first["model"],
        benchmark=first["benchmark"],
        dataset=first["dataset"],
        feature_set=first["feature_set"],
        simulated=bool(first["simulated"]),
        protocol=first["protocol"],
        origin="retrained",
        seeds=tuple(int(record["seed"]) for record in records),
        scores={
            name: tuple(100 * record["test"]["both"][name] for record in records) for name in SCORES
        },
        sweep=first["sweep"],
        runs=tuple(record["run"] for record in records),
    )


def checkpoints(storage: Storage, problems: list[str]) -> list[Ours]:
    """Return the results of ``avzero import-checkpoint``: the ledger names their runs."""
    manifests = {
        manifest["digest"]: manifest
        for manifest in (_read(storage, key, problems) for key in storage.keys("benchmarks/"))
        if "digest" in manifest
    }
    lines = [_read(storage, key, problems) for key in storage.keys("ledger/")]
    wanted = {(line["run"], line["frozen"]): line for line in lines if line.get("sweep") == IMPORTS}
    found = []
    for (run, frozen), line in sorted(wanted.items()):
        result = _read(storage, f"runs/{run}/result-test-{frozen[:ID_LENGTH]}.json", problems)
        task = _read(storage, f"runs/{run}/task.json", problems)
        file = _read(storage, f"runs/{run}/checkpoint.json", problems)
        manifest = manifests.get(line["benchmark"])
        if result and task and file and manifest:
            stage_1 = _read(storage, f"runs/{line['trial']}/task.json", problems)
            found.append(_imported(result, task, file, manifest, stage_1))
    return found


def _imported(
    result: Record, task: Record, file: Record, manifest: Record, stage_1: Record
) -> Ours:
    """Return the row of one imported checkpoint."""
    own = stage_1.get("weights") == task["weights"]
    why = "beta from VAL scored with its own weights, which may have been trained on VAL"
    return Ours(
        model=task["model"],
        benchmark=manifest["name"],
        dataset=manifest["dataset"],
        feature_set=manifest["feature_set"],
        simulated=bool(manifest["simulated"]),
        protocol=task["protocol"],
        origin="checkpoint",
        seeds=(int(task["seed"]),),
        scores={name: (100 * result["scores"]["both"][name],) for name in SCORES},
        sweep=str(file.get("file", "")),
        runs=(result["task"],),
        remarks=(why,) if own else (),
    )


def _read(storage: Storage, key: str, problems: list[str]) -> dict[str, Any]:
    """Return a JSON object; empty, with a sentence, where there is none."""
    try:
        return dict(json.loads(storage.read(key)))
    except KeyError:
        problems.append(f"{key}: missing; left out")
    except (ValueError, TypeError):
        problems.append(f"{key}: not a JSON object; left out")
    return {}
