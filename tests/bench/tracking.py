"""Tracking: MLflow requests per run, and CPU time of the client per run, over HTTP.

    make bench B=tracking

A stub server in another process counts requests by endpoint. Trials go through the tracker's hooks
as in a sweep: ``mixed`` stops six of nine at epoch 4 and two at 12, as halving with rungs at 4, 12
and 36 does, or every trial is complete. ``fast``: epochs come at once. ``slow``: whatever a trial
had when it survived a rung is due at once, as it is where epochs take long; the tracker's budget
says whether it is sent. Weights are not logged: with ``checkpoints: all`` a complete trial takes
one request more, from the same budget (tests/test_tracker_order.py counts those). Requests include
those of the sweep itself. Goals (issue 4): at most 5 requests per run, and for logging at most 30
of the 50 CPU-ms per configuration.

The last line is what taking up costs: the same command over a sweep that is complete.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from avzero.data.avca import read_avca
from avzero.data.simulate import simulate
from avzero.data.store import FeatureStore
from avzero.spec import Job
from avzero.track.mlflow_tracker import MlflowTracker
from avzero.tune.listener import TrialView
from avzero.tune.space import Group
from tests.bench._measure import cpu_of, machine
from tests.trials import trial_view

TRIALS = 90


def ends(mixed: bool, trials: int, epochs: int) -> list[int]:
    """Return after how many epochs each trial ends: halving keeps one in three, or all go on."""
    pattern = [4, 4, 12, 4, 4, 12, 4, 4, epochs] if mixed else [epochs]
    return [min(pattern[n % len(pattern)], epochs) for n in range(trials)]


def views(group: Group, store: FeatureStore, lengths: Sequence[int]) -> list[TrialView]:
    """Return trials of the given lengths with records of a real run's size."""
    epochs = group.job.train["epochs"]
    return [
        trial_view(group, store.storage, n, length, complete=length == epochs)
        for n, length in enumerate(lengths)
    ]


def play(tracker: MlflowTracker, group: Group, trials: Sequence[TrialView], slow: bool) -> float:
    """Call the hooks as a sweep does; return the CPU seconds they took in its own thread."""
    start = time.thread_time()
    tracker.sweep_started(group.job, [group], [])
    for trial in trials:
        tracker.trial_started(trial)
        for epoch in trial.epochs:
            tracker.epoch_ended(trial, epoch)
            if slow and epoch.epoch + 1 in (4, 12, 36) and epoch is not trial.epochs[-1]:
                tracker.outbox.drain()
        tracker.trial_ended(trial)
    own = time.thread_time() - start
    tracker.sweep_ended(trials, False)
    return own


def counts(uri: str) -> Counter[str]:
    """Return the stub's counts so far."""
    with urllib.request.urlopen(f"{uri}/counts") as answer:  # noqa: S310 - our own stub
        return Counter(json.loads(answer.read()))


def job_of(name: str, store: str, epochs: int) -> Job:
    """Return a job of a sweep with rungs at 4, 12, …"""
    return Job.model_validate(
        {
            "name": name,
            "store": store,
            "benchmarks": ["bench"],
            "models": ["avca"],
            "train": {"epochs": epochs},
            "search": {"trials": TRIALS, "min_epochs": 4, "reduction": 3},
            "tracking": {"checkpoints": "none"},
        }
    )


VARIANTS = {
    f"{'slow' if slow else 'fast'}, {'mixed' if mixed else 'all complete'}, {epochs} epochs": (
        slow,
        mixed,
        epochs,
    )
    for epochs, slow, mixed in [
        (12, False, True),
        (12, False, False),
        (12, True, True),
        (12, True, False),
        (50, True, True),
        (50, True, False),
    ]
}


@dataclass
class Cost:
    """What one variant took."""

    cpu: list[float] = field(default_factory=list)
    """Milliseconds per run, all threads, by round."""
    own: list[float] = field(default_factory=list)
    """The same of the sweep's own thread."""
    requests: Counter[str] = field(default_factory=Counter)
    """Of the last round."""


def measure(uri: str, group: Group, trials: Sequence[TrialView], slow: bool | None) -> Cost:
    """Run a sweep (``slow`` None: take up one that is complete); the first cost is its only one."""
    tracker = MlflowTracker(uri, group.job)
    before, own = counts(uri), 0.0

    def sweep() -> None:
        nonlocal own
        if slow is not None:
            own = play(tracker, group, trials, slow)
            return
        tracker.sweep_started(group.job, [group], trials)
        tracker.sweep_ended(trials, False)

    cpu = cpu_of(sweep)
    return Cost([1e3 * cpu / TRIALS], [1e3 * own / TRIALS], counts(uri) - before)


def main() -> None:
    """Run every variant in turn, for a number of rounds."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    print(machine())
    costs = {name: Cost() for name in (*VARIANTS, "taken up when complete")}
    with tempfile.TemporaryDirectory() as scratch:
        simulate(Path(scratch) / "TINY", "tiny")
        store = FeatureStore(f"{scratch}/store")
        info, _ = store.put(read_avca(Path(scratch) / "TINY", "tiny", "main", name="bench"))
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.mlflow_stub"], stdout=subprocess.PIPE, text=True
        )
        try:
            assert server.stdout is not None
            uri = server.stdout.readline().strip()
            for number in range(rounds + 1):
                for at, (name, (slow, mixed, epochs)) in enumerate(VARIANTS.items()):
                    group = Group(job_of(f"r{number}-{at}", scratch, epochs), info, "avca", "w2v")
                    trials = views(group, store, ends(mixed, TRIALS, epochs))
                    keep(costs[name], measure(uri, group, trials, slow), number)
                keep(costs["taken up when complete"], measure(uri, group, trials, None), number)
        finally:
            server.terminate()
    report(costs)


def keep(cost: Cost, one: Cost, number: int) -> None:
    """Add one round's cost; round 0 warms up."""
    if number:
        cost.cpu += one.cpu
        cost.own += one.own
    cost.requests = one.requests


def report(costs: dict[str, Cost]) -> None:
    """Print a block per variant."""
    for name, cost in costs.items():
        total, files = cost.requests.total() / TRIALS, cost.requests["artifacts"] / TRIALS
        print(
            f"{name}: {total:.2f} requests per run (goal 5), {files:.2f} of them files; client CPU "
            f"per run: median {statistics.median(cost.cpu):.1f}, highest {max(cost.cpu):.1f} ms "
            f"over {len(cost.cpu)} rounds (goal 30), {statistics.median(cost.own):.2f} ms of it in "
            "the sweep's own thread"
        )
        parts = (f"{key} {n / TRIALS:.2f}" for key, n in cost.requests.most_common())
        print("    " + ", ".join(parts))


if __name__ == "__main__":
    main()
