"""MLflow killed for a minute and PostgreSQL restarted during a sweep; the same sweep in peace.

    make bench B=outage           # one pair; python -m tests.bench.outage 3: three, in turn

The sweep (AVCA on the tiny simulated benchmark, random search without pruning, so that every round
does the same work) keeps its store in a bucket, Ceph's where installed, and logs to MLflow on
PostgreSQL. Printed per round: seconds of training as the workers note them epoch by epoch, CPU
seconds of the sweep with all its workers and without the servers, seconds of the whole command; and
what MLflow lacks or has twice, compared with the records in the store. Goals (issue 5): nothing,
and training not slowed by more than 5 %.

Two sweeps minutes apart differ by what else a machine does (30 % seen on a virtual one). So within
each sweep with an outage the epochs that ran while MLflow was down, or restarting with PostgreSQL,
are compared with its other epochs: both kinds are of one process.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from avzero.data.simulate import simulate
from avzero.data.store import FeatureStore
from avzero.spec import Job
from avzero.tune.listener import TrialView
from avzero.tune.sweep import Sweep
from tests.bench._measure import Family, in_fresh_process, machine
from tests.infra.lab import Lab, during

JOB: dict[str, Any] = {
    "benchmarks": ["tiny"],
    "models": ["avca"],
    "train": {"epochs": 7, "batches_per_epoch": 60, "batch_size": 64},
    "fixed": {"avca": {"encoder_hidden": 128, "proj_hidden": 128, "depth": 1, "heads": "3x100"}},
    "search": {"trials": 8, "min_epochs": 2, "sampler": "random", "pruner": "none"},
    "resources": {"slots": 2, "concurrent": 1},
}
DOWN = 60.0


def _lab(scratch: Path) -> Lab:
    return Lab(simulate(scratch / "TINY", "tiny"))


def sweep(lab: Lab, name: str, outage: bool) -> dict[str, float]:
    """Run one sweep; return what it took."""
    settings = JOB | {"name": name}
    path = lab.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(lab.job(settings)))
    taken: dict[str, Any] = {}

    def work() -> None:
        taken.update(in_fresh_process("tests.bench.outage", "one", str(path)))

    if outage:
        print("   ", during(lambda over: lab.outage(name, 3, DOWN, over), work))
    else:
        work()
    if "could not be sent" in taken["said"]:
        again = in_fresh_process("tests.bench.outage", "one", str(path))
        print(f"    the same command again sent the rest in {again['wall']:.1f} s")
    views = [
        v
        for v in Sweep(Job.model_validate(lab.job(settings)), FeatureStore(lab.store(name))).done()
        if v.twin_of is None
    ]
    taken["training"] = sum(epoch.seconds for view in views for epoch in view.epochs)
    if outage:
        if name not in lab.outages:
            raise SystemExit("the sweep ended before its outage was over; give JOB more epochs")
        taken["slowed"] = slowed(lab, name, views)
    problems = lab.problems(settings)
    epochs = sum(len(view.epochs) for view in views)
    print(
        f"    {name}: training {taken['training']:.1f} s, CPU {taken['cpu']:.1f} s, command "
        f"{taken['wall']:.1f} s; {len(views)} trials, {epochs} epochs, {lab.runs(name)} runs; "
        f"lost or twice: {len(problems)}",
        flush=True,
    )
    for line in [*problems[:5], *filter(None, taken["said"].splitlines())]:
        print("        " + line)
    return taken


def slowed(lab: Lab, name: str, views: Sequence[TrialView]) -> float:
    """Return the median seconds of an epoch that ran in the outage by that of the others.

    An epoch that had only begun or ended in it counts for neither; nor does each run's first, whose
    system is built in it.
    """
    ends, (down, back) = lab.epoch_ends(name), lab.outages[name]
    inside, outside = [], []
    for view in views:
        for epoch in view.epochs[1:]:
            end = ends[view.task.id, epoch.epoch]
            if down <= end - epoch.seconds and end <= back:
                inside.append(epoch.seconds)
            elif end < down or end - epoch.seconds > back:
                outside.append(epoch.seconds)
    ratio = statistics.median(inside) / statistics.median(outside)
    print(
        f"    epochs in the outage: {len(inside)}, median {statistics.median(inside):.2f} s; "
        f"before and after: {len(outside)}, {statistics.median(outside):.2f} s; ratio {ratio:.3f}"
    )
    return ratio


def one(path: str) -> None:
    """Run one sweep in this process's family; print what it took as JSON."""
    start = time.monotonic()
    with Family() as family:
        command = [sys.executable, "-m", "avzero.cli", "sweep", path]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    wall = time.monotonic() - start
    print(json.dumps({"wall": wall, "cpu": family.seconds, "said": done.stderr}))


def main() -> None:
    """Run pairs of sweeps, the one in peace first and last in turn."""
    if sys.argv[1:2] == ["one"]:
        one(sys.argv[2])
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # and end the servers
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    print(machine())
    ratios: dict[str, list[float]] = {"training": [], "cpu": [], "wall": []}
    slow: list[float] = []
    with tempfile.TemporaryDirectory() as scratch, _lab(Path(scratch)) as lab:
        for number in range(rounds):
            pair = {}
            for outage in (False, True) if number % 2 == 0 else (True, False):
                name = f"{'outage' if outage else 'peace'}-{number}"
                pair[outage] = sweep(lab, name, outage)
            for key, found in ratios.items():
                found.append(pair[True][key] / pair[False][key])
            slow.append(pair[True]["slowed"])
    print(
        f"an epoch in the outage / another of the same sweep: median {statistics.median(slow):.3f}"
        f", lowest {min(slow):.3f}, highest {max(slow):.3f} over {len(slow)} outages (goal 1.05)"
    )
    for key, found in ratios.items():
        print(
            f"{key} with the outage / in peace: median {statistics.median(found):.3f}, lowest "
            f"{min(found):.3f}, highest {max(found):.3f} over {len(found)} pairs (goal 1.05)"
        )


if __name__ == "__main__":
    main()
