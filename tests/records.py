"""A store that holds the records of sweeps which never ran: for tests and benches of reports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from avzero.canon import ID_LENGTH, canonical, identity, sha256_hex
from avzero.spec import Job

REVISION = "0123456789abcdef"


def put(store: Path, key: str, value: Any) -> Path:
    """Write a record as avzero does, without waiting for the disk."""
    path = store / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(canonical(value))
    return path


def benchmark(store: Path, name: str, dataset: str, features: str, simulated: bool = True) -> str:
    """Write a benchmark's manifest, as far as reports read it; return its digest."""
    digest = sha256_hex(name.encode())
    classes = [f"class {i:02d}" for i in range(12)]
    record = {
        "name": name,
        "digest": digest,
        "dataset": dataset,
        "feature_set": features,
        "simulated": simulated,
        "classes": {"names": classes, "roles": ["train"] * 8 + ["test_unseen"] * 4},
    }
    put(store, f"benchmarks/{name}@{digest[:ID_LENGTH]}.json", record)
    return digest


class Sweep:
    """A job whose outcome is drawn at random.

    Args:
        store: folder of the store.
        name: of the sweep.
        benchmarks: name -> (dataset, feature set); ``name:text`` has the text set as in jobs.
        models: systems.
        changes: of the job; also ``simulated``, and ``knobs``: further hyperparameters.
    """

    def __init__(
        self,
        store: Path,
        name: str,
        benchmarks: dict[str, tuple[str, str]],
        models: Sequence[str],
        **changes: Any,
    ) -> None:
        self.store = store
        self.simulated = bool(changes.pop("simulated", True))
        self.knobs = int(changes.pop("knobs", 0))
        listed = {"name": name, "benchmarks": list(benchmarks), "models": list(models)}
        self.job = Job.model_validate(listed | changes)
        self.random = np.random.default_rng(len(name))
        self.groups: dict[str, dict[str, Any]] = {}
        for reference, (dataset, features) in benchmarks.items():
            plain, text = self.job.text_of(reference)
            digest = benchmark(store, plain, dataset, features, self.simulated)
            title = plain if text == self.job.protocol.text else f"{plain}+{text}"
            for model in models:
                self.groups[f"{title}--{model}"] = {
                    "benchmark": plain,
                    "digest": digest,
                    "dataset": dataset,
                    "feature_set": features,
                    "model": model,
                    "text": text,
                }
        self.claim()

    def claim(self) -> None:
        """Write what the sweep was asked for."""
        groups = {
            key: {"digest": group["digest"], "fixed": {}, "space": {}}
            for key, group in self.groups.items()
        }
        job = self.job.model_dump(mode="json")
        put(self.store, f"sweeps/{self.job.name}/job.json", {"groups": groups, "job": job})

    def run(self, trials: int | None = None, level: float = 0.3) -> Sweep:
        """Write trials, one in three of them stopped early, and what they took."""
        count = self.job.search.trials if trials is None else trials
        for place, (key, group) in enumerate(self.groups.items()):
            for number in range(count):
                self._trial(key, group, number, level + 0.05 * (place % 4))
        spent = {"core_hours": 0.5, "gpu_hours": 0.0, "wall": 900.0}
        put(self.store, f"sweeps/{self.job.name}/spent.json", spent)
        return self

    def _trial(self, key: str, group: dict[str, Any], number: int, level: float) -> None:
        hm = float(level * self.random.beta(6, 2))
        pruned = number % 3 == 2
        values = {"lr": float(10 ** self.random.uniform(-4, -2)), "batch_size": 64 + number % 3}
        values |= {f"weight_{i}": float(v) for i, v in enumerate(self.random.random(self.knobs))}
        record = {
            **{k: group[k] for k in ("benchmark", "digest", "model")},
            "number": number,
            "task": identity([self.job.name, key, number]),
            "state": "pruned" if pruned else "complete",
            "reason": "",
            "twin_of": None,
            "values": values,
            "epochs": 3 if pruned else 12,
            "best_epoch": 2,
            "val": {"HM": hm, "S": 1.3 * hm, "U": 0.9 * hm, "ZSL": 1.1 * hm, "beta": 1.2},
            "seconds": 1.5 if pruned else 6.0,
        }
        put(self.store, f"sweeps/{self.job.name}/trials/{key}/{number:05d}.json", record)
        winner = self.groups[key].get("winner")
        if not pruned and (winner is None or hm > winner["val"]["HM"]):
            self.groups[key]["winner"] = record

    def test(self, seeds: int | None = None) -> Sweep:
        """Freeze the winners and write TEST results."""
        for key, group in self.groups.items():
            winner = group["winner"]
            frozen = sha256_hex(winner["task"].encode())
            record = {"trial": winner["task"], "digest": frozen, "number": winner["number"]}
            put(self.store, f"sweeps/{self.job.name}/frozen/{key}.json", record)
            for seed in range(self.job.test.seeds if seeds is None else seeds):
                self._final(key, group, frozen, self.job.seed + seed)
        return self

    def _final(self, key: str, group: dict[str, Any], frozen: str, seed: int) -> None:
        winner = group["winner"]
        protocol = self.job.protocol.model_dump(mode="json") | {"text": group["text"]}
        run = identity([winner["task"], seed])
        hm = winner["val"]["HM"] + float(self.random.normal(0, 0.01))
        u = 0.8 * hm
        scores = {"S": u * hm / (2 * u - hm), "U": u, "HM": hm, "ZSL": 1.2 * u, "beta": 1.2}
        record = {
            **{k: group[k] for k in ("benchmark", "digest", "dataset", "feature_set", "model")},
            "split": "main",
            "simulated": self.simulated,
            "protocol": protocol,
            "seed": seed,
            "reseed": "stage2",
            "winner": winner["task"],
            "trial": winner["task"],
            "frozen": frozen,
            "run": run,
            "best_epoch": 2,
            "val": winner["val"],
            "beta": 1.2,
            "test": {"both": scores, "audio": scores, "video": scores},
            "area": 0.5 * hm,
            "extra": {},
            "at_grid_end": False,
            "parameters": 123456,
            "seconds": 4.0,
            "revision": REVISION,
        }
        name = f"sweeps/{self.job.name}/final/{key}/{winner['task']}/{seed}.json"
        put(self.store, name, record)
        put(self.store, f"runs/{run}/task.json", {"config": {"d": 8}, "train": winner["values"]})
        result = record | {"per_class": self._per_class(u), "curve": _curve(scores)}
        put(self.store, f"runs/{run}/result-test-{frozen[:ID_LENGTH]}.json", result)
        line = {
            **{k: group[k] for k in ("benchmark", "model", "text")},
            **{"sweep": self.job.name, "trial": winner["task"], "run": run, "frozen": frozen},
            **{"seed": seed, "beta": 1.2, "time": f"2026-11-28T01:00:{seed % 60:02d}+00:00"},
        }
        put(self.store, f"ledger/{group['digest'][:ID_LENGTH]}/{run}-0.json", line)

    def _per_class(self, level: float) -> dict[str, list[Any]]:
        recall = self.random.uniform(0, 2 * level, 12).round(3).tolist()
        return {
            "class_id": list(range(12)),
            "recall": recall,
            "zsl": [None] * 8 + recall[8:],
            "count": [20] * 12,
        }


def _curve(scores: dict[str, float], points: int = 400) -> dict[str, list[float]]:
    """Return a seen-unseen curve that passes near the scores."""
    at = np.linspace(0, 1, points)
    return {
        "beta": (3 * at).tolist(),
        "S": (1.2 * scores["S"] * (1 - at**3)).tolist(),
        "U": (scores["ZSL"] * at**0.5).tolist(),
    }
