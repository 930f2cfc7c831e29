"""Scheduling overhead per trial: ``make bench B=cluster_overhead``.

A sweep of 500 trials on a local cluster of three nodes (``ray.cluster_utils``, one CPU each), of a
system with next to no work and one epoch: first with arrays that answer at once, so that studies,
journal, heartbeat, index, desk, Ray Tune and mailbox are all there is; then whole, with training,
evaluation, checkpoints and results; then one Ray Tune trial per configuration, reused and not
packed. Wall seconds per trial, from the call of ``Sweep.run`` to its return; beside them what the
trainings themselves took. Goal (issue 5): under 0.5 s per trial.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.update(
    {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
)

import torch

from avzero.data.avca import read_avca
from avzero.data.simulate import simulate
from avzero.data.store import FeatureStore
from avzero.tune.sweep import Sweep
from tests.bench._measure import machine
from tests.bench.orchestration import instant, job_of, own_system

TRIALS = 500
NODES = 3


@contextmanager
def three_nodes(scratch: str) -> Iterator[None]:
    """Start a cluster of three nodes and connect to it; stop it at the end."""
    import ray
    from ray.cluster_utils import Cluster

    passed_on = {"AVZERO_PATH": scratch, "AVZERO_CACHE": f"{scratch}/cache", "OMP_NUM_THREADS": "1"}
    os.environ.update(passed_on)
    small = {"num_cpus": 1, "object_store_memory": 100_000_000}
    head = small | {"include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(NODES - 1):
            cluster.add_node(**small)
        ray.init(
            cluster.address,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": passed_on},
        )
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def measured(name: str, scratch: str, trials: int, execution: str = "array") -> str:
    """Run a sweep; return its line. Every trial must be complete."""
    job = job_of(name, f"{scratch}/store", trials)
    resources = job.resources.model_copy(update={"execution": execution, "slots": 0})
    sweep = Sweep(job.model_copy(update={"resources": resources}), FeatureStore(job.store))
    begun = time.perf_counter()
    sweep.run()
    wall = time.perf_counter() - begun
    done = sweep.done()
    if len(done) != trials or any(view.state != "complete" for view in done):
        raise SystemExit(f"{name}: {len(done)} of {trials} trials, {sweep.failures()}")
    trained = sum(epoch.seconds for view in done for epoch in view.epochs)
    return (
        f"{name:10} {trials:4} trials {wall:7.1f} s, {wall / trials:6.3f} s per trial "
        f"(training itself {trained / trials:.4f} s)"
    )


def main() -> None:
    """Run everything; argument: trials."""
    torch.set_num_threads(1)
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else TRIALS
    print(machine())
    with tempfile.TemporaryDirectory(prefix="avz-") as scratch:
        own_system(scratch)
        simulate(Path(scratch) / "TINY", "tiny")
        FeatureStore(f"{scratch}/store").put(
            read_avca(Path(scratch) / "TINY", "tiny", "main", name="bench")
        )
        with three_nodes(scratch):
            measured("warm", scratch, 12)
            with instant():
                print(measured("scheduling", scratch, trials), flush=True)
            print(measured("whole", scratch, trials), flush=True)
            print(measured("single", scratch, min(trials, 100), "trial"), flush=True)


if __name__ == "__main__":
    main()
