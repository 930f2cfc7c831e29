"""Kill a sweep's workers and its driver at random moments; compare with an undisturbed one.

    make bench B=faults           # 20 kills; python -m tests.bench.faults 5 3: five, seed 3

A small sweep (AVCA on the tiny simulated benchmark, stacked, two arrays, early stopping, MLflow on)
runs once in peace and once while SIGKILL hits, at random moments, a worker (an array's process) or
the driver, which holds the study, with everything it started. A killed driver is started again by
the same command. At the end the study, the scores, the weights and the MLflow runs of both must be
identical; the script ends with an error if anything differs.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from avzero.canon import sha256_hex
from avzero.data.avca import read_avca
from avzero.data.simulate import simulate
from avzero.data.store import FeatureStore
from avzero.spec import Job
from avzero.tune.sweep import Sweep, difference
from tests.bench._measure import machine

JOB: dict[str, Any] = {
    "name": "faults",
    "benchmarks": ["tiny"],
    "models": ["avca"],
    "train": {"epochs": 9, "batches_per_epoch": 40, "batch_size": 32},
    "fixed": {"avca": {"encoder_hidden": 64, "proj_hidden": 64, "depth": 1, "heads": "3x100"}},
    "search": {"trials": 40, "min_epochs": 1, "seats": 6},
    # A machine that is taken away often: no number of lost workers makes a trial fail.
    "resources": {"slots": 3, "concurrent": 2, "max_failures": 1000},
}

SHOWN = 300
"""Characters of a difference."""


class Run:
    """A sweep run by the command line in a folder of its own."""

    def __init__(self, place: Path, release: Path) -> None:
        self.store = FeatureStore(str(place / "store"))
        self.store.put(read_avca(release, "tiny", "main", name="tiny"))
        self.uri = f"sqlite:///{place / 'mlflow.db'}"
        self.job = JOB | {"store": str(place / "store"), "tracking": {"uri": self.uri}}
        path = place / "faults.yaml"
        path.write_text(yaml.safe_dump(self.job))
        self._command = [sys.executable, "-m", "avzero.cli", "sweep", str(path)]
        self._log = (place / "log.txt").open("a")

    def start(self) -> subprocess.Popen[bytes]:
        """Start, or start again, the sweep."""
        return subprocess.Popen(
            self._command, stdout=self._log, stderr=self._log, start_new_session=True
        )

    def story(self) -> dict[str, Any]:
        """Return everything two sweeps must agree in, as JSON values by trial."""
        run = Sweep(Job.model_validate(self.job), self.store)
        (study,) = run.studies.values()
        trials = {
            t.number: (t.state.name, t.params, t.values, t.intermediate_values, t.user_attrs)
            for t in study._trials()
        }
        scores, weights = {}, {}
        for view in run.done():
            if view.twin_of is None:
                scores[view.number] = [
                    (e.epoch, e.losses, e.val, e.lr, e.best) for e in view.epochs
                ]
                if view.result is not None:
                    scores[view.number] += [(view.result.scores, view.result.per_class)]
                state = view.folder.load_state()
                if state is not None:
                    key = view.folder.best_weights_key(state)
                    weights[view.number] = sha256_hex(self.store.storage.read(key))
        story = {"study": trials, "scores": scores, "weights": weights, "mlflow": self._logged()}
        return dict(json.loads(json.dumps(story, default=str), parse_constant=str))  # NaN is NaN

    def _logged(self) -> list[object]:
        """Return what MLflow has of every trial."""
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self.uri)
        (experiment,) = client.search_experiments(filter_string="name = 'tiny'")
        runs = client.search_runs([experiment.experiment_id], "tags.`avzero.kind` = 'trial'")
        out = []
        for one in runs:
            history = client.get_metric_history(one.info.run_id, "val/HM")
            steps = [(m.step, m.value) for m in history]
            out.append((one.data.tags["avzero.run"], one.info.status, steps))
        return sorted(out)


def workers(session: int) -> list[int]:
    """Return the processes of a driver's session that train (Tune's name for them)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
            if b"ray::ResourceTrainable" in name and os.getsid(int(folder.name)) == session:
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def storm(run: Run, kills: int, draw: random.Random) -> dict[str, int]:
    """Run a sweep to its end under SIGKILLs; return how many hit what."""
    hit = {"worker": 0, "driver": 0}
    process = run.start()
    while process.poll() is None:
        if sum(hit.values()) == kills:
            process.wait()
            break
        time.sleep(draw.uniform(0.3, 3.0))
        alive = workers(process.pid)
        if not alive or process.poll() is not None:
            continue
        if draw.random() < 0.7:
            os.kill(draw.choice(alive), signal.SIGKILL)
            hit["worker"] += 1
        else:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            hit["driver"] += 1
            process = run.start()
    if process.returncode:
        raise SystemExit(f"the sweep ended with exit code {process.returncode}")
    return hit


def main() -> None:
    """Compare a sweep in peace with one in a storm."""
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    os.environ.update(
        RAY_AUTH_MODE="disabled", MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true"
    )
    print(machine())
    with tempfile.TemporaryDirectory() as scratch:
        places = [Path(scratch) / name for name in ("peace", "storm")]
        release = simulate(Path(scratch) / "TINY", "tiny")
        for place in places:
            place.mkdir()
        calm, wild = (Run(place, release) for place in places)
        started = time.perf_counter()
        if calm.start().wait():
            raise SystemExit((places[0] / "log.txt").read_text())
        quiet = time.perf_counter() - started
        hit = storm(wild, kills, random.Random(seed))
        loud = time.perf_counter() - started - quiet
        ours, theirs = calm.story(), wild.story()
        print(f"in peace {quiet:.0f} s; with {hit} killed {loud:.0f} s")
        for part, value in ours.items():
            found = difference(value, theirs[part])
            print(f"  {part}: {'DIFFERENT' if found else 'identical'}")
            for line in found:
                print(f"    {line[:SHOWN]}")
        if ours != theirs:
            raise SystemExit("the two sweeps differ")


if __name__ == "__main__":
    main()
