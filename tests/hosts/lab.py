"""A lab on hosts of network namespaces: a Ray head, two workers, and a host with S3 and MLflow."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

from tests.conftest import ROOT
from tests.hosts.net import Host, Network, wait

BIN = Path(sys.executable).parent
TOKEN = "token-of-the-hosts-test-0123456789abcdef"
STORE = "s3://lab/avzero"
QUIET = {
    "PATH": f"{BIN}:{os.environ['PATH']}",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": TOKEN,
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "OMP_NUM_THREADS": "1",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}
HEAD = {
    # A silently cut node is dead after some 8 s instead of 68.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    # What the head knows survives its death.
    "RAY_gcs_storage": "rocksdb",
}


class Lab:
    """What runs on the hosts, and how to reach it from the test.

    Args:
        root: where hosts keep their files.
        workers: CPUs of every worker host.
    """

    def __init__(self, root: Path, workers: Sequence[int] = (1, 1)) -> None:
        self.root, self.cpus = root, tuple(workers)
        self.workers = [f"worker{number}" for number in range(1, len(workers) + 1)]
        self.net = Network(root, ["head", *self.workers, "store"])
        self.head, self.store = self.net["head"], self.net["store"]
        self.s3 = f"http://{self.store.address}:9000"
        self.mlflow = f"http://{self.store.address}:5000"
        self.address = f"http://{self.head.address}:8265"
        self.times: list[tuple[str, float]] = []
        self._begun = time.monotonic()

    # -- servers ---------------------------------------------------------------------------------

    def start_store(self, mlflow: bool = True) -> None:
        """Start S3 (moto) and MLflow."""
        self.store.start(
            [BIN / "moto_server", "-H", self.store.address, "-p", 9000],
            "moto.log",
            QUIET,
        )
        wait(lambda: answers(f"{self.s3}/moto-api/"), 60, "moto")
        self.boto().create_bucket(Bucket="lab")
        if mlflow:
            self.store.start(
                [BIN / "mlflow", "server", "--host", self.store.address, "--port", 5000,
                 "--backend-store-uri", f"sqlite:///{self.store.root}/mlflow.db",
                 "--serve-artifacts", "--artifacts-destination", f"{STORE}/mlflow",
                 "--workers", 1],
                "mlflow.log",
                QUIET | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                         "MLFLOW_S3_ENDPOINT_URL": self.s3, "AWS_ENDPOINT_URL_S3": self.s3},
            )  # fmt: skip

    def start_ray(self) -> None:
        """Start head and workers; wait until all are there."""
        self.start_head()
        for name, cpus in zip(self.workers, self.cpus, strict=True):
            self.start_worker(self.net[name], cpus)
        self.lap("three Ray hosts", lambda: len(self.alive()) == len(self.workers), 180)

    def start_head(self) -> None:
        """Start the head; it takes up what it knew before."""
        gcs = self.head.root / "gcs"
        gcs.mkdir(exist_ok=True)
        self.head.start(
            [BIN / "ray", "start", "--head", "--block", "--port", 6379, "--num-cpus", 0,
             "--node-ip-address", self.head.address, "--dashboard-host", self.head.address,
             "--object-store-memory", 100_000_000, "--disable-usage-stats"],
            "ray.log",
            self.env() | HEAD | {"RAY_gcs_storage_path": str(gcs)},
        )  # fmt: skip

    def start_worker(self, host: Host, cpus: int) -> None:
        """Start a worker; it is started again whenever it ends, as Kubernetes would."""
        line = (
            f"while true; do {BIN}/ray start --block --address {self.head.address}:6379 "
            f"--node-ip-address {host.address} --num-cpus {cpus} "
            "--object-store-memory 100000000 --disable-usage-stats; sleep 1; done"
        )
        host.start(["sh", "-c", line], "ray.log", self.env())

    def env(self) -> dict[str, str]:
        """Return the environment of every node: where S3 is, nothing of avzero."""
        return QUIET | {"AWS_ENDPOINT_URL_S3": self.s3}

    # -- looking ---------------------------------------------------------------------------------

    def boto(self) -> Any:
        """Return an S3 client of the test's own."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.s3,
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
            region_name="us-east-1",
        )

    def alive(self) -> list[str]:
        """Return the addresses of living nodes that hold CPUs; nothing while the head is away."""
        try:
            said = get(f"{self.address}/api/v0/nodes?limit=100&detail=true", TOKEN)
        except OSError:
            return []
        rows = said["data"]["result"]["result"]
        return [
            row["node_ip"]
            for row in rows
            if row["state"] == "ALIVE" and (row.get("resources_total") or {}).get("CPU")
        ]

    def keys(self, prefix: str) -> list[str]:
        """Return the keys below ``prefix`` in the store."""
        pages = self.boto().get_paginator("list_objects_v2")
        found = pages.paginate(Bucket="lab", Prefix=f"avzero/{prefix}")
        return [row["Key"] for page in found for row in page.get("Contents", ())]

    def read(self, key: str) -> Any:
        """Return an object's JSON."""
        return json.loads(self.boto().get_object(Bucket="lab", Key=key)["Body"].read())

    def trained(self) -> Counter[tuple[str, int]]:
        """Return how often each (run, epoch) was written, from the S3 server's own log."""
        found = re.findall(
            r'"PUT /lab/avzero/runs/(\w+)/weights-(\d{4})-\w+\.safetensors[^"]*" 200',
            self.store.log("moto.log"),
        )
        return Counter((run, int(epoch)) for run, epoch in found)

    def lap(self, what: str, ready: Any, seconds: float) -> None:
        """Wait for something and note how long it took."""
        self.note(what, wait(ready, seconds, what))

    def note(self, what: str, seconds: float) -> None:
        """Keep and print a time."""
        self.times.append((what, seconds))
        sys.stdout.write(f"  {time.monotonic() - self._begun:6.1f} s  {what}: {seconds:.1f} s\n")
        sys.stdout.flush()

    # -- the command line ------------------------------------------------------------------------

    def avzero(self, *words: object, log: str) -> subprocess.Popen[bytes]:
        """Run a command line on the laptop: the test's own network, outside the hosts."""
        env = dict(os.environ) | self.env() | {"PYTHONPATH": str(ROOT / "platform")}
        env["AVZERO_CACHE"] = str(self.root / "laptop")
        with (self.root / log).open("ab") as out:
            return subprocess.Popen(
                [sys.executable, "-m", "avzero.cli", *map(str, words)],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=self.root,
            )

    def said(self, log: str) -> str:
        """Return what a command line has printed."""
        path = self.root / log
        return path.read_text(errors="replace") if path.exists() else ""

    def close(self) -> None:
        """Switch everything off."""
        self.net.close()


@contextmanager
def lab(root: Path, workers: Sequence[int] = (1, 1)) -> Iterator[Lab]:
    """Give a lab whose hosts are up; nothing runs on them yet."""
    made = Lab(root, workers)
    try:
        yield made
    finally:
        made.close()


def answers(url: str) -> bool:
    """Return whether a server gives any HTTP answer."""
    try:
        requests.get(url, timeout=3)
    except requests.RequestException:
        return False
    return True


def get(url: str, token: str = "") -> Any:
    """Return the JSON of a GET.

    Raises:
        OSError: no answer, or not a good one.
    """
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    answer = requests.get(url, headers=headers, timeout=5)
    answer.raise_for_status()
    return answer.json()
