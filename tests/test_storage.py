"""Storage: the contract of folders and buckets, and what S3 servers and networks do wrong.

Every test of S3 runs against moto; with ``make test-infra`` also against Ceph's gateway and the
bucket of yours that ``AVZERO_TEST_S3=s3://bucket/prefix`` names.
"""

from __future__ import annotations

import pickle
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from avzero.data.avca import read_avca
from avzero.data.benchmark import VIDEO, Benchmark
from avzero.data.cache import NodeCache
from avzero.data.s3 import ATTEMPTS, PatientFileSystem, S3Storage
from avzero.data.storage import Damaged, LocalStorage, Storage, open_storage
from avzero.data.store import FeatureStore
from avzero.errors import UserError
from avzero.train.folder import RunFolder, State
from tests.conftest import Run, make_task
from tests.fault_proxy import FaultProxy
from tests.infra.servers import Moto, free_port, s3_environment
from tests.s3_servers import SERVERS, Endpoint
from tests.sweeps import SETTINGS

REAL = [pytest.param(name, marks=pytest.mark.infra) for name in ("rgw", "yours")]


@pytest.fixture(scope="module", params=["moto", *REAL])
def server(request: pytest.FixtureRequest) -> Iterator[Endpoint]:
    """Each S3 server in turn."""
    with SERVERS[request.param]() as endpoint, pytest.MonkeyPatch.context() as patch:
        for name, value in endpoint.environment.items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL_S3", endpoint.url)
        yield endpoint


@pytest.fixture
def bucket(server: Endpoint) -> str:
    """A place of the test's own."""
    return f"{server.bucket}/{uuid.uuid4().hex[:8]}"


@pytest.fixture
def proxy(server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """The server behind a proxy that breaks things; the SDK's pauses are left out."""
    from botocore.retries.standard import ExponentialBackoff

    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0.0)
    with FaultProxy(*server.address) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", between.url)
        yield between


@pytest.fixture
def shaky(proxy: FaultProxy, bucket: str) -> S3Storage:
    """Storage behind the proxy, opened."""
    storage = S3Storage(bucket)
    proxy.heal()
    return storage


# -- the contract -------------------------------------------------------------------------------


def check(storage: Storage, tmp_path: Path) -> None:
    """What every kind of storage does."""
    assert storage.keys("") == [] and storage.size("a/b") is None
    for missing in (storage.read, lambda key: storage.download(key, tmp_path / "x")):
        with pytest.raises(KeyError):
            missing("a/b")
    assert not (tmp_path / "x").exists()
    storage.delete("a/b")
    storage.write("a/b", b"one")
    storage.write("a/b", b"two")
    storage.write("a/bc/d", b"")
    (tmp_path / "file").write_bytes(b"three")
    storage.upload("c", tmp_path / "file")
    assert storage.read("a/b") == b"two" and storage.read("a/bc/d") == b""
    assert storage.size("a/b") == 3 and storage.size("a/bc/d") == 0
    assert storage.keys("") == ["a/b", "a/bc/d", "c"]
    assert storage.keys("a/") == ["a/b", "a/bc/d"] and storage.keys("a/b") == ["a/b", "a/bc/d"]
    assert storage.keys("nothing/") == []
    storage.download("c", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"three"
    assert not storage.create("a/b", b"other") and storage.read("a/b") == b"two"
    assert storage.create("new", b"mine") and storage.read("new") == b"mine"
    for key in ("a b+c%20/ü=1&2.json", "weights-0001-ab.safetensors"):
        storage.write(key, key.encode())
        assert storage.read(key) == key.encode() and key in storage.keys("")
    storage.delete("a/b")
    assert storage.keys("a/") == ["a/bc/d"]


def test_folder(tmp_path: Path) -> None:
    check(LocalStorage(tmp_path / "objects"), tmp_path)


def test_bucket(bucket: str, tmp_path: Path) -> None:
    check(open_storage(bucket), tmp_path)


def test_large_objects_in_parts(bucket: str, tmp_path: Path) -> None:
    storage = S3Storage(bucket)
    data = np.random.default_rng(0).bytes(20 << 20)
    (tmp_path / "large").write_bytes(data)
    storage.upload("large", tmp_path / "large")
    storage.download("large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data == storage.read("large")


def test_benchmark_in_a_bucket(bucket: str, release: Path, tmp_path: Path) -> None:
    raw = read_avca(release, "tiny", "main", name="tiny")
    target = FeatureStore(bucket, NodeCache(tmp_path / "cache"))
    assert target.put(raw)[1] and not target.put(raw)[1]
    benchmark = target.open("tiny")
    np.testing.assert_array_equal(benchmark.part.features[VIDEO], raw.open.features[VIDEO])
    assert target.verify("tiny") == []
    assert not list((tmp_path / "cache").rglob("*.parquet"))


def test_nothing_rests_on_one_winner(bucket: str) -> None:
    """Of many who create one key at least one is told yes, and whole bytes of one are there."""
    storage = S3Storage(bucket)
    told: dict[bytes, bool] = {}

    def create(name: bytes) -> None:
        told[name] = storage.create("key", 1000 * name)

    threads = [threading.Thread(target=create, args=(b"%d" % n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 8 and any(told.values())
    assert storage.read("key") in [1000 * name for name, yes in told.items() if yes]


@pytest.mark.infra
def test_more_keys_than_a_page(bucket: str) -> None:
    storage = S3Storage(bucket)
    names = [f"many/{n:04d}" for n in range(1005)]
    for name in names:
        storage.write(name, b"")
    assert storage.keys("many/") == names


def test_pyarrow_sees_the_bucket(bucket: str) -> None:
    """As Ray does; and a pickled file system, which is what its workers get, is as patient."""
    place = S3Storage(bucket).arrow("ray")
    assert place is not None
    path, system = place
    table = pa.table({"a": list(range(1000))})
    system = pickle.loads(pickle.dumps(system))  # noqa: S301 - our own
    assert isinstance(system, PatientFileSystem)
    pq.write_table(table, f"{path}/table.parquet", filesystem=system)
    assert pq.read_table(f"{path}/table.parquet", filesystem=system) == table
    assert S3Storage(bucket).keys("ray/") == ["ray/table.parquet"]


# -- faults -------------------------------------------------------------------------------------

FAULTS = ("503", "reset", "cut", "lose")


@pytest.mark.parametrize("fault", [*FAULTS, "truncate:10"])
def test_faults_of_reading(shaky: S3Storage, proxy: FaultProxy, fault: str, tmp_path: Path) -> None:
    data = np.random.default_rng(1).bytes(10_000)
    shaky.write("key", data)
    for read in (shaky.read, lambda key: _downloaded(shaky, key, tmp_path / "file")):
        proxy.heal()
        proxy.fail("^GET", fault, times=2)
        assert read("key") == data
        assert sum(line.startswith("GET") for line in proxy.log) == 3
    proxy.fail("list-type", fault if ":" not in fault else "503")
    assert shaky.keys("") == ["key"]
    proxy.fail("^HEAD", "reset")
    assert shaky.size("key") == len(data)


def _downloaded(storage: Storage, key: str, path: Path) -> bytes:
    storage.download(key, path)
    return path.read_bytes()


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_writing(shaky: S3Storage, proxy: FaultProxy, fault: str, tmp_path: Path) -> None:
    data = np.random.default_rng(2).bytes(300_000)
    proxy.fail("^PUT", fault, times=2)
    shaky.write("one", data)
    (tmp_path / "file").write_bytes(data)
    proxy.fail("^PUT", fault, times=2)
    shaky.upload("two", tmp_path / "file")
    assert shaky.read("one") == shaky.read("two") == data
    proxy.fail("^DELETE", fault)
    shaky.delete("one")
    assert shaky.keys("") == ["two"]


@pytest.mark.parametrize("fault", FAULTS)
def test_who_creates_is_told_so(shaky: S3Storage, proxy: FaultProxy, fault: str) -> None:
    """Also when the answer is lost and the SDK, asking again, is told that somebody else won."""
    proxy.fail("^PUT", fault)
    assert shaky.create("key", b"mine")
    assert shaky.read("key") == b"mine" and sum(ln.startswith("PUT") for ln in proxy.log) == 2
    assert not S3Storage(shaky.url).create("key", b"theirs")


def test_parts_that_are_cut_off(shaky: S3Storage, proxy: FaultProxy, tmp_path: Path) -> None:
    data = np.random.default_rng(3).bytes(20 << 20)
    (tmp_path / "file").write_bytes(data)
    proxy.fail("partNumber=2", "cut")
    proxy.fail("POST .*uploadId", "lose")
    shaky.upload("large", tmp_path / "file")
    proxy.fail("^GET", "truncate:100000", times=2)
    assert _downloaded(shaky, "large", tmp_path / "back") == data


def test_attempts_are_bounded(shaky: S3Storage, proxy: FaultProxy, tmp_path: Path) -> None:
    shaky.write("key", b"0123456789" * 10)
    proxy.fail("^GET", "truncate:10", times=99)
    with pytest.raises(Damaged, match=r"/key: .*\(4 tries\)"):
        shaky.read("key")
    (tmp_path / "file").write_bytes(b"before")
    with pytest.raises(UserError, match="/key: "):
        shaky.download("key", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1
    proxy.heal()
    proxy.fail("", "503", times=99)
    with pytest.raises(UserError, match=r"overloaded or failing \(.*, 8 tries\); run the same"):
        shaky.write("key", b"x")
    assert len(proxy.log) == ATTEMPTS
    with pytest.raises(UserError, match="overloaded or failing"):
        S3Storage(shaky.url)


def test_content_that_changed(
    server: Endpoint, bucket: str, benchmark: Benchmark, tmp_path: Path
) -> None:
    """Bytes that are not those written: said, and a run that needs them starts again."""
    storage = S3Storage(bucket)
    name, _, prefix = bucket.removeprefix("s3://").partition("/")

    def damage(key: str) -> None:
        place = {"Bucket": name, "Key": f"{prefix}/{key}"}
        old = server.client().get_object(**place)
        body = b"X" + old["Body"].read()[1:]
        server.client().put_object(**place, Body=body, Metadata=old["Metadata"])

    storage.write("key", b"content")
    damage("key")
    for read in (storage.read, lambda key: storage.download(key, tmp_path / "file")):
        with pytest.raises(Damaged, match=r"/key: the content has SHA-256 .*… was written"):
            read("key")
    folder = RunFolder(storage, make_task(benchmark))
    folder.begin()
    state = State(best_epoch=0, files={})
    folder.save(state, {"w": torch.ones(3)}, {"m": torch.ones(3)})
    state.history = []
    damage(f"{folder.prefix}/{state.files['last']}")
    with pytest.raises(KeyError):
        folder._tensors(state, "last")


def test_pyarrow_through_faults(shaky: S3Storage, proxy: FaultProxy) -> None:
    """Three refusals in a row: with its own settings it would have given up."""
    place = shaky.arrow("ray")
    assert place is not None
    path, system = place
    with system.open_output_stream(f"{path}/file") as out:
        out.write(b"0123456789")
    proxy.fail("^(GET|HEAD)", "503", times=3)
    with pickle.loads(pickle.dumps(system)).open_input_stream(f"{path}/file") as handle:  # noqa: S301
        assert handle.read() == b"0123456789"
    proxy.fail("^(GET|HEAD)", "truncate:4", times=1)
    with system.open_input_stream(f"{path}/file") as handle:
        assert handle.read() == b"0123456789"


# -- refusals -----------------------------------------------------------------------------------


def test_unknown_buckets_and_servers(server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^s3://avzero-absent/x: no such bucket; create it"):
        S3Storage("s3://avzero-absent/x")
    with pytest.raises(UserError, match="Invalid bucket name"):
        S3Storage("s3://Not_A_Bucket!/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match=r"cannot be reached .*check AWS_ENDPOINT_URL_S3"):
        S3Storage(server.bucket)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, str]]]:
    """A moto server that checks signatures and policies; yields credentials by what they may."""
    import boto3

    folder = tmp_path_factory.mktemp("guarded")
    # One call to see whether it is there, three per user, one for the bucket; then it checks.
    moto = Moto(folder, free_port(), {"INITIAL_NO_AUTH_ACTION_COUNT": "8"})
    moto.start()
    iam = boto3.client("iam", endpoint_url=moto.url)
    actions = {"owner": "s3:*", "reader": ["s3:Get*", "s3:List*"]}
    users = {}
    for name, action in actions.items():
        iam.create_user(UserName=name)
        policy = {"Effect": "Allow", "Action": action, "Resource": "*"}
        iam.put_user_policy(
            UserName=name,
            PolicyName="own",
            PolicyDocument=str({"Version": "2012-10-17", "Statement": [policy]}).replace("'", '"'),
        )
        key = iam.create_access_key(UserName=name)["AccessKey"]
        users[name] = s3_environment(moto.url) | {
            "AWS_ACCESS_KEY_ID": key["AccessKeyId"],
            "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"],
        }
    boto3.client("s3", endpoint_url=moto.url).create_bucket(Bucket="lab")
    try:
        yield users
    finally:
        moto.stop()


@pytest.fixture
def act_as(
    guarded: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """Return what takes up a user's credentials, with changes."""

    def take(name: str, **changes: str) -> None:
        for key, value in (guarded[name] | changes).items():
            monkeypatch.setenv(key, value)

    return take


def test_credentials(act_as: Callable[..., None], avzero: Run) -> None:
    """One line that says which half is wrong, exit 2."""
    for changes, message in (
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "the secret key is wrong; check AWS_SECRET_ACCESS"),
        ({"AWS_ACCESS_KEY_ID": "NOBODY"}, "the server does not know this access key; check AWS"),
    ):
        act_as("owner", **changes)
        code, _, err = avzero("data", "list", "--store", "s3://lab/x")
        assert code == 2 and err.startswith(f"avzero: s3://lab/x: {message}"), err
        assert err.count("\n") == 1


def test_no_credentials_at_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, avzero: Run
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    code, _, err = avzero("data", "list", "--store", "s3://lab/x")
    assert code == 2 and "there are no credentials; set AWS_ACCESS_KEY_ID" in err


@pytest.mark.ray
def test_bucket_that_may_only_be_read(
    ray_local: None, act_as: Callable[..., None], release: Path, tmp_path: Path, avzero: Run
) -> None:
    """Ingesting and sweeping are refused in one line, and nothing is written."""
    act_as("owner")
    FeatureStore("s3://lab/x").put(read_avca(release, "tiny", "main", name="tiny"))
    before = S3Storage("s3://lab/x").keys("")
    act_as("reader")
    ingest: list[Any] = ["ingest", "avca", release, "--features", "tiny", "--split", "main"]
    job = tmp_path / "job.yaml"
    job.write_text(str(SETTINGS | {"store": "s3://lab/x", "tracking": {"uri": "off"}}))
    for command in ([*ingest, "--to", "s3://lab/x", "--name", "other"], ["sweep", job]):
        code, _, err = avzero(*command)
        assert code == 2 and "may be read but not written with these credentials" in err, err
        assert err.startswith("avzero: s3://lab/x/") and err.count("\n") == 1
    assert S3Storage("s3://lab/x").keys("") == before
