"""Doctor: every check against servers that are well, and against those that are not."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from avzero.cluster import checks, doctor, driver, package
from avzero.cluster.checks import (
    check_environment,
    check_store,
    check_tracker,
    clock_check,
    guarded,
)
from avzero.cluster.jobs import JobsApi
from avzero.cluster.probe import MARK, findings
from avzero.errors import UserError
from avzero.spec import Job
from tests.conftest import Run
from tests.fake_ray import FakeRay
from tests.sweeps import SETTINGS


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A moto server with a bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    boto3.client("s3", endpoint_url=url).create_bucket(Bucket="lab")
    yield url
    server.stop()


class Tracker(ThreadingHTTPServer):
    """Answers as an MLflow server in the state a test sets."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.status = 200
        self.blocked = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_port}"


class _Answer(BaseHTTPRequestHandler):
    server: Tracker

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        if self.server.status == 0:  # its database is down: it takes the request and is silent
            self.server.blocked.wait(5)
        self.send_response(self.server.status or 500)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")


@pytest.fixture
def tracker() -> Iterator[Tracker]:
    made = Tracker()
    yield made
    made.blocked.set()
    made.shutdown()
    made.server_close()


def test_s3_is_well(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3)
    found = guarded("store", lambda: check_store("s3://lab/avzero"))
    assert [check.state for check in found] == ["ok"] * 3
    assert [check.what for check in found] == ["store", "conditional", "clock"]
    assert "the second of two is refused" in found[1].text
    left = boto3.client("s3", endpoint_url=s3).list_objects_v2(Bucket="lab")
    assert left["KeyCount"] == 0, "nothing is left behind"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://none/avzero", "no such bucket; create it, or correct the URL"),
        ("gs://lab/avzero", "unknown kind of storage"),
    ],
)
def test_wrong_stores(s3: str, monkeypatch: pytest.MonkeyPatch, url: str, message: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3)
    (found,) = guarded("store", lambda: check_store(url))
    assert found.state == "fail" and message in found.text


def test_a_bucket_that_may_only_be_read(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from botocore.client import BaseClient
    from botocore.exceptions import ClientError

    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3)
    real = BaseClient._make_api_call

    def readonly(client: Any, operation: str, arguments: Any) -> Any:
        if operation == "PutObject":
            answer: Any = {"Error": {"Code": "AccessDenied"}, "ResponseMetadata": {}}
            raise ClientError(answer, operation)
        return real(client, operation, arguments)

    monkeypatch.setattr(BaseClient, "_make_api_call", readonly)
    (found,) = guarded("store", lambda: check_store("s3://lab/avzero"))
    assert found.state == "fail" and "may be read but not written" in found.text


def test_a_store_that_ignores_conditions(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3)
    real = boto3.client

    def careless(*args: Any, **more: Any) -> Any:
        client = real(*args, **more)
        put = client.put_object
        client.put_object = lambda IfNoneMatch=None, **kw: put(**kw)
        return client

    monkeypatch.setattr(boto3, "client", careless)
    found = guarded("store", lambda: check_store("s3://lab/avzero"))
    assert found[1].state == "ok" and "ignored" in found[1].text


def test_a_folder(tmp_path: Path) -> None:
    found = guarded("store", lambda: check_store(str(tmp_path / "store")))
    assert [check.what for check in found] == ["store", "space"]
    (tmp_path / "file").write_text("")
    (wrong,) = guarded("store", lambda: check_store(str(tmp_path / "file")))
    assert wrong.state == "fail" and "cannot be written" in wrong.text


@pytest.mark.parametrize(
    ("skew", "state"), [(1, "ok"), (-40, "warn"), (1200, "fail"), (-1200, "fail")]
)
def test_clocks(skew: float, state: str) -> None:
    found = clock_check(skew)
    assert found.state == state and ("NTP" in found.text) == (state != "ok")
    assert ("behind" if skew < 0 else "ahead of") in found.text


@pytest.mark.parametrize(
    ("status", "state", "message"),
    [
        (200, "ok", "answers in"),
        (401, "fail", "MLFLOW_TRACKING_USERNAME"),
        (403, "fail", "--allowed-hosts"),
        (404, "fail", "no MLflow server"),
        (500, "fail", "answers 500"),
        (0, "fail", "no answer within 1 s; its database may be down"),
    ],
)
def test_trackers(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch, status: int, state: str, message: str
) -> None:
    monkeypatch.setattr(checks, "_TRACKER_TIMEOUT", 1.0)
    tracker.status = status
    (found,) = check_tracker(tracker.address)
    assert found.state == state and message in found.text


def test_tracker_nowhere_or_off() -> None:
    (down,) = check_tracker("http://127.0.0.1:1")
    assert down.state == "fail" and "cannot be reached" in down.text
    assert next(check_tracker("off")).state == "ok"
    assert next(check_tracker("sqlite:///x.db")).state == "ok"


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that does not fit and a package that is missing are named with what is needed."""
    assert next(check_environment(package.unmet())).state == "ok"
    monkeypatch.setattr(package, "_requirements", lambda: ["torch>=99,<100", "no-such-thing>=1"])
    found = next(check_environment(package.unmet()))
    assert found.state == "fail"
    assert "(torch<100,>=99 is needed)" in found.text and "no-such-thing is missing" in found.text


def test_the_driver_refuses_before_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the cluster: a tracker that is down, a version that is wrong."""
    settings = {"store": str(tmp_path / "store"), "tracking": {"uri": "http://127.0.0.1:1"}}
    job = Job.model_validate(SETTINGS | settings)
    monkeypatch.setenv("AVZERO_JOB", job.model_dump_json())
    monkeypatch.setattr(driver.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        driver.main()
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("avzero: on the cluster: http://127.0.0.1:1: cannot be reached")
    assert err.count("\n") == 1
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    monkeypatch.setattr(package, "_requirements", lambda: ["torch>=99"])
    with pytest.raises(SystemExit):
        driver.main()
    assert "torch is " in capsys.readouterr().err


def test_doctor_command(
    avzero: Run, tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here and on the cluster; the first failure ends with 2 after everything was looked at."""
    fake = FakeRay()
    monkeypatch.setattr(doctor, "_POLL", 0.01)
    store = str(tmp_path / "store")
    threading.Thread(target=lambda: _run_probe(fake), daemon=True).start()
    code, out, err = avzero(
        "doctor", "--address", fake.address, "--store", store, "--tracking", tracker.address
    )
    assert (code, err) == (0, ""), out
    assert "ok    here     cluster: " in out and "ok    here     placement: 2 nodes with 8" in out
    assert "ok    cluster  store: " in out and "ok    cluster  tracker: " in out
    fake.token = "secret"
    code, out, err = avzero("doctor", "--address", fake.address, "--store", store)
    assert code == 2 and "1 check failed" in err
    assert "fail  here     cluster: " in out and "wants a token" in out
    fake.close()
    code, out, err = avzero("doctor")
    assert code == 2 and "nothing to check" in err


def _run_probe(fake: FakeRay) -> None:
    """Do what the cluster would do with the probe's job."""
    while not fake.jobs:
        time.sleep(0.01)
    ((name, job),) = fake.jobs.items()
    wanted = json.loads(job["runtime_env"]["env_vars"]["AVZERO_PROBE"])
    rows = [check.as_dict() for check in findings(wanted)]
    fake.logs[name] = f"starting\n{MARK}{json.dumps(rows)}\n"
    job["status"] = "SUCCEEDED"


def test_a_cluster_that_cannot_run_the_probe(tmp_path: Path, monkeypatch: Any) -> None:
    fake = FakeRay()
    monkeypatch.setattr(doctor, "_POLL", 0.01)

    def fail() -> None:
        while not fake.jobs:
            time.sleep(0.01)
        ((name, job),) = fake.jobs.items()
        fake.logs[name] = "Traceback\nModuleNotFoundError: No module named 'torch'\n"
        job["status"] = "FAILED"

    threading.Thread(target=fail, daemon=True).start()
    api = JobsApi(fake.address)
    found = guarded("probe", lambda: doctor._ask_cluster(api, None, None, {}))
    assert found[-1].state == "fail" and "No module named 'torch'" in found[-1].text
    fake.close()


def test_gpus_asked_for_and_not_seen() -> None:
    (found,) = checks.check_gpus(1)
    import torch

    assert found.state == ("ok" if torch.cuda.is_available() else "fail")


def test_require_takes_the_first_failure() -> None:
    found = [checks.Check("warn", "a", "1"), checks.Check("fail", "b", "2")]
    with pytest.raises(UserError, match="2"):
        checks.require(found)
