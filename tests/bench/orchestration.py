"""Orchestration: trials per second of a sweep that computes nothing, against bare Ray Tune.

    make bench B=orchestration

One Ray cluster of two CPUs runs in turn: Ray Tune function trainables that return at once; a sweep
of 1,000 trials of a user's own system with next to no work (a linear map, one batch of two rows,
one epoch; its evaluation, checkpoint and VAL result are what every trial has); the same sweep with
arrays that answer at once, so that studies, journal, index, desk, Ray Tune and mailbox are all
there is; the trainables again. Seconds are of wall time, the only unit trials per second have; CPU
seconds of this process and all it started stand beside them, for the machine may be shared.
Goal (issue 4): at least 20 times the trainables' trials per second.

Before that, without Ray: CPU of the client per configuration of AVCA at UCF's size for ask (TPE),
load (build a trial in a slot), tell and log over HTTP, to a stub in another process. Trials end as
halving at 4, 12 and 36 epochs leaves them. Goal: at most 50 ms.
"""

from __future__ import annotations

import cProfile
import io
import logging
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.update({"RAY_AUTH_MODE": "disabled", "MLFLOW_DISABLE_TELEMETRY": "true"})

import torch

from avzero.data.avca import read_avca
from avzero.data.simulate import simulate
from avzero.data.store import FeatureStore
from avzero.spec import Job, Resources, Task
from avzero.track.mlflow_tracker import MlflowTracker
from avzero.train.folder import RunFolder
from avzero.train.records import Epoch
from avzero.train.slots import Outcome, Slots
from avzero.tune import sweep as sweep_module
from avzero.tune.desk import Desk, as_row, unpack
from avzero.tune.listener import Listener, TrialView
from avzero.tune.runner import ArrayRunner
from avzero.tune.sweep import Sweep
from tests.bench._measure import Family, machine
from tests.bench._ucf import ucf_size
from tests.trials import epoch_of, result_of

TRIALS = 1000
TRAINABLES = 24
"""Function trainables before the sweeps, and again behind them."""
CONFIGURATIONS = 60
"""Of one round of the client's CPU time."""

SYSTEM = '''
"""One small linear map: a system with next to no work."""

import torch
from torch import nn

from avzero.models._contract import Card, Model, ModelConfig


class NothingConfig(ModelConfig):
    """One number."""

    weight: float = 1.0


class Nothing(Model):
    """A linear map of the video features."""

    card = Card("Nothing", "nobody", 2026, "a benchmark", "https://example.org", ("averaged",))
    Config = NothingConfig
    reads_table = False

    def __init__(self, config, shapes):
        super().__init__(config, shapes)
        self.map = nn.Linear(shapes.features["video"], 4)
        self.weight = config.weight

    def loss(self, batch, context):
        gap = self.map(batch.features["video"][:, 0]) - batch.text[:, 0, :4]
        return {"mse": self.weight * gap.square().mean()}

    def embed(self, features):
        return {"both": self.map(features["video"])}

    def embed_classes(self, text):
        return text[:, :4]
'''
SPACE = """
model: nothing
space:
  lr: {log: [1.0e-3, 1.0e-1]}
defaults: {lr: 1.0e-2}
"""


class InstantRunner(ArrayRunner):
    """An array whose trials are over at once, with nothing trained, evaluated or written."""

    def _round(self, orders: list[dict[str, Any]]) -> Iterator[Outcome]:
        val = {"S": 0.3, "U": 0.15, "HM": 0.2, "ZSL": 0.25, "beta": 0.5}
        for task, _ in unpack(orders):
            yield Outcome(task.id, Epoch(0, {"mse": 1.0}, 1e-2, val, True, 0.1, 20.0), True)


# -- sweeps on Ray -----------------------------------------------------------------------------


@contextmanager
def cluster(scratch: str) -> Iterator[None]:
    """Start a cluster of two CPUs of our own; stop it at the end."""
    quiet = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
    os.environ.update(quiet | {"RAY_USAGE_STATS_ENABLED": "0"})
    import ray

    passed_on = {"AVZERO_PATH": scratch, "AVZERO_CACHE": f"{scratch}/cache", "OMP_NUM_THREADS": "1"}
    os.environ.update(passed_on)
    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
        _temp_dir=f"{scratch}/ray",
        runtime_env={"env_vars": passed_on},
    )
    try:
        yield
    finally:
        ray.shutdown()


def own_system(scratch: str) -> None:
    """Write a user's own system and its search space."""
    for folder, name, text in (
        ("models", "nothing.py", SYSTEM),
        ("search_spaces", "nothing.yaml", SPACE),
    ):
        (Path(scratch) / folder).mkdir()
        (Path(scratch) / folder / name).write_text(text)


def job_of(name: str, store: str, trials: int) -> Job:
    """Return the sweep of trials that compute nothing."""
    return Job.model_validate(
        {
            "name": name,
            "store": store,
            "benchmarks": ["bench"],
            "models": ["nothing"],
            "train": {"epochs": 1, "batches_per_epoch": 1, "batch_size": 2},
            "search": {"trials": trials, "sampler": "random"},
            "resources": {"slots": 16},
            "tracking": {"uri": "off"},
        }
    )


@dataclass(frozen=True)
class Spent:
    """What a number of trials took."""

    trials: int
    wall: float
    cpu: float

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.trials + other.trials, self.wall + other.wall, self.cpu + other.cpu)

    def line(self, name: str) -> str:
        """Return a row of the table."""
        return (
            f"{name:44} {self.trials:5} trials {self.trials / self.wall:8.2f} trials/s "
            f"{1e3 * self.cpu / self.trials:8.0f} CPU-ms per trial"
        )


def spent(action: Callable[[], object], trials: int) -> Spent:
    """Run an action; return the seconds it took, and those of CPU of all processes."""
    wall = time.perf_counter()
    with Family() as family:
        action()
    return Spent(trials, time.perf_counter() - wall, family.seconds)


def trainables(count: int, scratch: str) -> None:
    """Run Ray Tune function trainables that return at once."""
    from ray import tune

    def nothing(config: dict[str, Any]) -> None:
        """Return at once."""

    tuner = tune.Tuner(
        tune.with_resources(nothing, {"cpu": 1}),
        tune_config=tune.TuneConfig(num_samples=count),
        run_config=tune.RunConfig(storage_path=f"{scratch}/tune", verbose=0),
    )
    with redirect_stdout(io.StringIO()):  # a line per trial even so
        tuner.fit()


def run_sweep(name: str, scratch: str, trials: int) -> Sweep:
    """Run the sweep; refuse a trial that is not complete."""
    done = Sweep(job_of(name, f"{scratch}/store", trials), FeatureStore(f"{scratch}/store"))
    done.run()
    if len(done.done()) != trials or done.failures():
        raise SystemExit(f"{name}: {len(done.done())} trials, {done.failures()}")
    return done


def instant() -> AbstractContextManager[object]:
    """Let arrays answer at once."""
    return mock.patch.object(sweep_module, "ArrayRunner", InstantRunner)


def compare_sweeps(scratch: str, trials: int) -> None:
    """Print trials per second of everything, and the ratios."""
    run_sweep("warm", scratch, 32)
    with instant():
        run_sweep("warm-instant", scratch, 32)
    trainables(2, scratch)
    bare = spent(lambda: trainables(TRAINABLES, scratch), TRAINABLES)
    whole = spent(lambda: run_sweep("whole", scratch, trials), trials)
    with instant():
        empty = spent(lambda: run_sweep("instant", scratch, trials), trials)
    bare += spent(lambda: trainables(TRAINABLES, scratch), TRAINABLES)
    print(bare.line("Ray Tune function trainables"))
    for name, one in (
        ("sweep, a system with next to no work", whole),
        ("sweep, arrays that answer at once", empty),
    ):
        print(one.line(name))
        rate = one.trials / one.wall / (bare.trials / bare.wall)
        print(f"  trials/s: {rate:.1f} times the trainables' (goal at least 20)", flush=True)


def show_profile(scratch: str, trials: int) -> None:
    """Print where the driver's CPU time goes while arrays answer at once."""
    profiler = cProfile.Profile(time.thread_time)
    with instant():
        profiler.runcall(run_sweep, "profile", scratch, trials)
    stats = pstats.Stats(profiler)
    rows = [
        (cumulative, own, calls, f"{Path(file).parent.name}/{Path(file).name}:{line} {name}")
        for (file, line, name), (_, calls, own, cumulative, _) in stats.stats.items()  # type: ignore[attr-defined]
    ]
    print(f"the driver's own thread, {trials} trials, CPU-ms per trial (profiling included):")
    mine = [row for row in rows if row[3].startswith(("tune/", "optuna/", "storages/", "journal/"))]
    print(f"  {'with what it calls':>18} {'by itself':>10} {'calls':>6}")
    for cumulative, own, calls, where in sorted(mine, reverse=True)[:22]:
        print(f"  {1e3 * cumulative / trials:18.2f} {1e3 * own / trials:10.2f} {calls:6} {where}")
    print("  most by itself:")
    for _, own, calls, where in sorted(rows, key=lambda row: -row[1])[:10]:
        print(f"  {'':18} {1e3 * own / trials:10.2f} {calls:6} {where}")


# -- the client's CPU time ---------------------------------------------------------------------


class Timed(Listener):
    """Passes on to the tracker; counts the seconds of CPU its hooks take in the caller's thread."""

    def __init__(self, tracker: MlflowTracker) -> None:
        self.tracker = tracker
        self.seconds = 0.0

    def _add(self, action: Callable[[], None]) -> None:
        before = time.thread_time()
        action()
        self.seconds += time.thread_time() - before

    def trial_started(self, trial: TrialView) -> None:
        """A trial begins."""
        self._add(lambda: self.tracker.trial_started(trial))

    def epoch_ended(self, trial: TrialView, epoch: Epoch) -> None:
        """An epoch is over."""
        self._add(lambda: self.tracker.epoch_ended(trial, epoch))

    def trial_ended(self, trial: TrialView) -> None:
        """A trial has ended."""
        self._add(lambda: self.tracker.trial_ended(trial))


def client_round(name: str, store: FeatureStore, benchmark: str, uri: str) -> dict[str, float]:
    """Return CPU-ms per configuration by part: ask and tell, load, log."""
    job = Job.model_validate(
        {
            "name": name,
            "store": store.storage.url,
            "benchmarks": [benchmark],
            "models": ["avca"],
            "train": {"epochs": 50},
            "search": {"trials": CONFIGURATIONS, "min_epochs": 4},
            "tracking": {"uri": uri, "checkpoints": "none"},
        }
    )
    start = time.process_time()
    timed = Timed(MlflowTracker(uri, job))
    clock = Clock()
    sweep = Sweep(job, store)
    timed.tracker.sweep_started(job, sweep.groups, [])
    slots = Slots(store, Resources())
    with sweep.journal.exclusive():
        desk = Desk(sweep.studies, sweep.record, [timed], 8, 1)
        loaded: set[str] = set()
        rows: list[dict[str, Any]] = []
        while not desk.over:
            with clock("ask and tell"):
                desk.take("array", rows)
                orders = desk.orders("array")
            with clock("load"):
                tasks = unpack(orders)
                for task in (task for task, _ in tasks if task.id not in loaded):
                    slots._load(task)
            loaded |= {task.id for task, _ in tasks}
            with clock("aside"):
                rows = [answer(store, task, known) for task, known in tasks]
        desk.raise_trouble()
        with clock("ask and tell"):
            done = sweep.done()
    timed.tracker.sweep_ended(done, False)
    parts = dict(clock.seconds)
    total = time.process_time() - start - parts.pop("aside")
    parts["ask and tell"] -= timed.seconds
    parts["log"] = total - parts["ask and tell"] - parts["load"]
    return {part: 1e3 * seconds / CONFIGURATIONS for part, seconds in parts.items()}


class Clock:
    """CPU seconds of this thread by part."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add what the block takes to a part."""
        before = time.thread_time()
        yield
        self.seconds[part] += time.thread_time() - before


def answer(store: FeatureStore, task: Task, known: int) -> dict[str, Any]:
    """Return what an array says of a run's next epoch; with the last it leaves a result."""
    hm = 0.1 + int(task.id[:6], 16) / 16**6 / 5
    last = known + 1 == task.train.epochs
    if last:
        RunFolder(store.storage, task).save_result(result_of(task.id, hm=hm))
    return as_row(task.id, epoch_of(known, hm), last, "")


def compare_client(scratch: str, count: int) -> None:
    """Print the client's CPU time per configuration."""
    store, benchmark = ucf_size(f"{scratch}/ucf")
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.mlflow_stub"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        uri = server.stdout.readline().strip()
        taken = [
            client_round(f"client-{number}", store, benchmark.info.name, uri)
            for number in range(count + 1)
        ][1:]
    finally:
        server.terminate()
    report_client(taken)


def report_client(taken: Sequence[dict[str, float]]) -> None:
    """Print median and worst round of every part and the sum."""
    rows = {part: [one[part] for one in taken] for part in taken[0]}
    rows["together"] = [sum(one.values()) for one in taken]
    print(f"client CPU-ms per configuration, {CONFIGURATIONS} a round, over {len(taken)} rounds:")
    for part, ms in rows.items():
        goal = " (goal at most 50)" if part == "together" else ""
        print(f"  {part:14} median {statistics.median(ms):5.1f}, highest {max(ms):5.1f}{goal}")
    sys.stdout.flush()


def main() -> None:
    """Run everything; arguments: trials of the sweeps, rounds of the client's."""
    torch.set_num_threads(1)
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else TRIALS
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 9
    print(machine())
    with tempfile.TemporaryDirectory(prefix="avz-") as scratch:
        compare_client(scratch, count)
        own_system(scratch)
        simulate(Path(scratch) / "TINY", "tiny")
        FeatureStore(f"{scratch}/store").put(
            read_avca(Path(scratch) / "TINY", "tiny", "main", name="bench")
        )
        with cluster(scratch):
            compare_sweeps(scratch, trials)
            show_profile(scratch, min(trials, 300))


if __name__ == "__main__":
    main()
