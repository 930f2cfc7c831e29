"""Several Ray nodes on one machine, and one of them killed in the middle of a sweep."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from avzero.spec import Job
from avzero.tune.sweep import Sweep
from tests.sweeps import SETTINGS

pytestmark = [pytest.mark.infra, pytest.mark.timeout(300)]


def test_node_that_is_killed(place: Path, tmp_path: Path) -> None:
    """A sweep over two nodes ends on the other one, with every trial once."""
    from ray.cluster_utils import Cluster

    settings = SETTINGS | {
        "name": "nodes",
        "train": {"epochs": 6, "batches_per_epoch": 20, "batch_size": 64},
        "search": {"trials": 10, "min_epochs": 2, "sampler": "random", "pruner": "none"},
        "resources": {"slots": 2, "concurrent": 2},
        "store": str(place / "store"),
        "tracking": {"uri": "off"},
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(settings))
    sweep: subprocess.Popen[bytes] | None = None
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        command = [sys.executable, "-m", "avzero.cli", "sweep", str(path), "--address"]
        with (tmp_path / "log").open("w") as log:
            sweep = subprocess.Popen([*command, cluster.address], stdout=log, stderr=log)
        job = Job.model_validate(settings)
        records = place / "store" / "sweeps" / "nodes" / "trials"
        deadline = time.monotonic() + 120
        while len(list(records.rglob("*.json"))) < 2:
            assert sweep.poll() is None and time.monotonic() < deadline, (
                tmp_path / "log"
            ).read_text()
            time.sleep(0.2)
        cluster.remove_node(nodes[0], allow_graceful=False)
        assert sweep.wait(200) == 0, (tmp_path / "log").read_text()
    finally:
        if sweep is not None and sweep.poll() is None:
            sweep.kill()
            sweep.wait()
        cluster.shutdown()  # type: ignore[no-untyped-call]
    from avzero.data.store import FeatureStore

    done = Sweep(job, FeatureStore(job.store)).done()
    assert Counter(view.state for view in done) == {"complete": 10}
    assert sorted(view.number for view in done) == list(range(10))
    assert all([e.epoch for e in view.epochs] == list(range(6)) for view in done)
