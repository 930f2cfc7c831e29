"""Fixtures shared by all tests; the environment is set here, before anything is imported."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# What a user says about a store of theirs that the tests of S3 shall run against.
USERS_BUCKET = os.environ.get("AVZERO_TEST_S3", "")
USERS_AWS = {key: value for key, value in os.environ.items() if key.startswith("AWS_")}

# Explicit choices: without them Ray, MLflow and the AWS SDK behave as the machine happens to be.
_SCRATCH = tempfile.mkdtemp(prefix="avzero-tests-")
os.environ.update(
    {
        "AVZERO_CACHE": f"{_SCRATCH}/cache",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
)
os.environ.pop("AVZERO_STORE", None)
os.environ.pop("AVZERO_TRACKING", None)
os.environ.pop("AVZERO_PATH", None)

import pytest
import torch

from avzero import cli
from avzero.data.avca import read_avca
from avzero.data.benchmark import Benchmark
from avzero.data.simulate import simulate
from avzero.data.store import FeatureStore
from avzero.models._registry import make_config
from avzero.spec import Preset, Protocol, Task, TrainConfig

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

LAYOUTS = ("clipclap", "temporal")
"""Kinds of pickled releases."""

Run = Callable[..., tuple[int, str, str]]
"""What runs a command line: see ``avzero``."""

SMALL: dict[str, dict[str, object]] = {
    "avca": {"encoder_hidden": 32, "proj_hidden": 32},
    "avfs": {"hidden": 64, "embed_dim": 32, "proj_dim": 16, "n_syn": 20, "classifier_epochs": 2},
    "fvaegan_d2": {"syn_num": 20, "classifier_epochs": 2, "input_scaling": "minmax"},
    "mft": {"layers": 1},
    "stft": {"T": 3, "tucker_rank": 20},
    "tcaf": {"layers": 2, "H": 64, "K": 64},
}
"""Hyperparameters that make a system train in milliseconds; systems not named are fast enough."""


@functools.cache
def _needs_ray(file: Path) -> bool:
    """Whether a file of tests uses the shared Ray cluster."""
    return "ray_local" in file.read_text(encoding="utf-8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest first: what needs Ray, then the stacks and the contract."""
    ahead = {"test_array.py": 1, "test_contract.py": 1}
    items.sort(key=lambda i: 0 if _needs_ray(i.path) else ahead.get(i.path.name, 2))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Share the suite between processes: files stay whole, and those with Ray share one cluster."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ray" if _needs_ray(config.rootpath / file) else file

    return Files(config, log)


@pytest.fixture(autouse=True)
def _threads_are_left_alone() -> Iterator[None]:
    """The number of threads decides last bits: a test that changed it would fail another one."""
    yield
    assert torch.get_num_threads() == 1, "this test left the process with another thread count"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data and specifications; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent: real data is not part of the repository")
    return SHARED


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny simulated release; copy it before changing it."""
    return simulate(tmp_path_factory.mktemp("release") / "TINY", "tiny")


@pytest.fixture(scope="session")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny simulated release of each pickled kind; copy it before changing it."""
    folder = tmp_path_factory.mktemp("pickled")
    return {kind: simulate(folder / kind / "TINY", "tiny", layout=kind) for kind in LAYOUTS}


@pytest.fixture(params=LAYOUTS)
def copy(request: pytest.FixtureRequest, releases: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of each kind of release, in turn, that a test may damage."""
    return Path(shutil.copytree(releases[request.param], tmp_path / "TINY"))


@pytest.fixture
def clips(releases: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the release of CLIP and CLAP vectors."""
    return Path(shutil.copytree(releases["clipclap"], tmp_path / "TINY"))


@pytest.fixture
def steps(releases: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the release of sequences."""
    return Path(shutil.copytree(releases["temporal"], tmp_path / "TINY"))


@pytest.fixture(scope="session")
def store(release: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """A store that holds the tiny benchmark as ``tiny``; tests may add runs, not change it."""
    target = FeatureStore(str(tmp_path_factory.mktemp("store")))
    target.put(read_avca(release, "tiny", "main", name="tiny"))
    return target


@pytest.fixture(scope="session")
def benchmark(store: FeatureStore) -> Benchmark:
    """The open part of the tiny benchmark."""
    return store.open("tiny")


def make_task(benchmark: Benchmark, model: str = "avca", **changes: object) -> Task:
    """Return a task that trains in well under a second."""
    values = SMALL.get(model, {}) | changes.pop("config", {})  # type: ignore[operator]
    protocol = changes.pop("protocol", Protocol())
    train = {"epochs": 3, "batches_per_epoch": 4, "batch_size": 16}
    train |= changes.pop("train", {})  # type: ignore[arg-type,assignment]
    config = make_config(model, values, Preset.PAPER, "test")
    fields: dict[str, object] = {
        "benchmark": benchmark.info.digest,
        "model": model,
        "config": config.model_dump(mode="json"),
        "train": TrainConfig.model_validate(train),
        "protocol": protocol,
        "seed": 7,
    }
    return Task.model_validate(fields | changes)


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """One local Ray cluster for all tests that need one."""
    from avzero.cluster.connect import ray_cluster

    with ray_cluster():
        yield


@pytest.fixture(scope="module")
def place(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store that holds the tiny benchmark; sweeps of one module live there."""
    folder = tmp_path_factory.mktemp("sweeps")
    FeatureStore(str(folder / "store")).put(read_avca(release, "tiny", "main", name="tiny"))
    return folder


@pytest.fixture
def avzero(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process; return (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["avzero", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A moto server with one bucket; yields ``s3://bucket``."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", f"http://{host}:{port}")
        boto3.client("s3").create_bucket(Bucket="lab")
        yield "s3://lab"
    server.stop()
