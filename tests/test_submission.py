"""Submitting: what is sent, what is found again, what is refused, when a driver is replaced."""

from __future__ import annotations

import io
import json
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from avzero.canon import canonical
from avzero.cluster import signs, submission
from avzero.cluster.jobs import JobInfo, JobsApi
from avzero.cluster.package import build_package
from avzero.cluster.signs import Sign, Watch
from avzero.cluster.submission import (
    Submission,
    next_step,
    passed_on,
    portable,
    verdict,
)
from avzero.data.storage import LocalStorage
from avzero.errors import UserError
from avzero.spec import Job
from tests.conftest import Run
from tests.fake_ray import FakeRay
from tests.sweeps import SETTINGS

NOBODY = Sign({}, {})


@pytest.fixture
def ray_api() -> Iterator[FakeRay]:
    """A fresh fake cluster."""
    fake = FakeRay()
    yield fake
    fake.close()


@pytest.fixture
def job_file(place: Path, tmp_path: Path) -> Path:
    return write_job(tmp_path, place)


def write_job(folder: Path, place: Path, **changes: Any) -> Path:
    """Write a job whose store is the module's."""
    path = folder / "job.yaml"
    own = {"name": "away", "store": str(place / "store"), "tracking": {"uri": "off"}}
    path.write_text(yaml.safe_dump(SETTINGS | own | changes))
    return path


def beat(storage: LocalStorage, job_id: str, **numbers: Any) -> None:
    """Write what a driver of ``job_id`` would."""
    row = {"beat": 1, "time": time.time(), "state": "running"} | numbers
    claim = {"attempt": "a1", "host": "head", "pid": 1, "lock": "x", "since": "now"}
    place = "sweeps/away"
    storage.write(f"{place}/drivers/a1.json", canonical(row).encode())
    storage.write(f"{place}/driver.json", canonical(claim | {"submission": job_id}).encode())


# -- submitting --------------------------------------------------------------------------------


def test_submit_sends_code_and_job_once(
    ray_api: FakeRay, avzero: Run, job_file: Path, place: Path
) -> None:
    """The second call attaches; nothing secret and no other file travels."""
    code, out, err = avzero(
        "submit", job_file, "--address", ray_api.address, "--no-follow", "--env", "COLOUR=blue"
    )
    assert (code, err) == (0, "")
    ((name, job),) = ray_api.jobs.items()
    assert f"Sweep away: submitted as {name}." in out and "avzero stop away" in out
    assert name.startswith("away-") and name.endswith("-1")
    assert job["entrypoint"] == "python -m avzero.cluster.driver"
    variables = job["runtime_env"]["env_vars"]
    assert variables["COLOUR"] == "blue" and variables["AVZERO_SUBMISSION"] == name
    assert not any("SECRET" in key or "AWS" in key for key in variables)
    sent = Job.model_validate_json(variables["AVZERO_JOB"])
    assert sent.name == "away" and sent.store == str(place / "store")
    (uri,) = job["runtime_env"]["py_modules"]
    archive = zipfile.ZipFile(io.BytesIO(ray_api.packages[uri.removeprefix("gcs://")]))
    names = set(archive.namelist())
    assert {"avzero/cli.py", "avzero/_search_spaces/avca.yaml", "avzero/_shipped.json"} <= names
    assert all(name.startswith("avzero/") for name in names)
    about = json.loads(archive.read("avzero/_shipped.json"))
    assert any(line.startswith("torch") for line in about["requirements"]) and about["revision"]
    code, out, _ = avzero("submit", job_file, "--address", ray_api.address, "--no-follow")
    assert code == 0 and f"attached as {name}" in out and len(ray_api.jobs) == 1


def test_the_package_is_the_same_every_time() -> None:
    first, second = build_package(), build_package()
    assert first.name == second.name and len(first.data) < 2_000_000


def test_a_system_of_ones_own_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, file in (("models", "mine.py"), ("search_spaces", "mine.yaml")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("x")
    (tmp_path / "data.h5").write_bytes(b"0" * 1000)
    monkeypatch.setenv("AVZERO_PATH", str(tmp_path))
    names = zipfile.ZipFile(io.BytesIO(build_package().data)).namelist()
    own = sorted(name for name in names if "_own" in name)
    assert own == ["avzero/_own/0/models/mine.py", "avzero/_own/0/search_spaces/mine.yaml"]


def job_info(status: str, number: int = 1, key: str = "k" * 16, code: int | None = None) -> JobInfo:
    return JobInfo(f"away-{key[:8]}-{number}", status, "", code, {"avzero_job": key})


def test_what_submitting_again_means() -> None:
    """Attach to what runs; after a failure another attempt; finished is finished."""
    key = "k" * 16
    fresh = next_step("away", [], NOBODY, key, False)
    assert (fresh.action, fresh.job_id) == ("start", "away-kkkkkkkk-1")
    assert next_step("away", [job_info("RUNNING")], NOBODY, key, False).action == "attach"
    failed = [job_info("FAILED", 1, code=137), job_info("STOPPED", 2)]
    again = next_step("away", failed, NOBODY, key, False)
    assert (again.action, again.job_id) == ("start", "away-kkkkkkkk-3")
    assert next_step("away", [job_info("SUCCEEDED")], NOBODY, key, True).action == "finished"
    other = [job_info("RUNNING", 4, "other" * 4)]
    with pytest.raises(UserError, match="another version of the job"):
        next_step("away", other, NOBODY, key, False)
    # A head that lost its jobs: the store remembers the last attempt.
    claim = {"attempt": "a", "host": "h", "submission": "away-kkkkkkkk-7"}
    gone = Sign(claim, {"time": 0.0, "state": "running"})
    assert next_step("away", [], gone, key, False).job_id == "away-kkkkkkkk-8"
    assert next_step("away", other, gone, key, False).action == "start"  # it runs in name only


def test_when_a_driver_is_replaced() -> None:
    assert verdict(job_info("RUNNING"), 0)[0] == "wait"
    assert verdict(job_info("PENDING"), 0)[0] == "wait"
    decision, why = verdict(job_info("RUNNING"), 95)
    assert decision == "restart" and "no sign of life for 1 min 35 s although" in why
    assert verdict(None, 0)[0] == "restart"
    assert verdict(job_info("FAILED", code=137), 0)[0] == "restart"
    assert verdict(job_info("FAILED", code=None), 0)[0] == "restart"
    assert verdict(job_info("FAILED", code=2), 0) == ("ended", "it ended with exit code 2")
    assert verdict(job_info("STOPPED"), 0)[0] == "stopped"
    assert verdict(job_info("SUCCEEDED"), 95)[0] == "done"


def test_silence_is_measured_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the watched submission's own heartbeat counts, and its clock need not be right."""
    storage, now = LocalStorage(tmp_path), [1000.0]
    monkeypatch.setattr(signs.time, "monotonic", lambda: now[0])
    watch = Watch(storage, "away", "away-k-2")
    beat(storage, "away-k-1")  # an earlier attempt's
    now[0] += signs.SILENT + 1
    assert watch.look() == 0, "it may take longer to start"
    now[0] += signs.STARTING
    assert watch.look() > signs.STARTING
    beat(storage, "away-k-2", time=time.time() - 5)
    assert watch.look() == 0
    now[0] += signs.SILENT - 1
    assert watch.look() == 0
    now[0] += 2
    assert watch.look() > signs.SILENT
    beat(storage, "away-k-2", beat=2)
    assert watch.look() == 0


def follow(run: Submission) -> tuple[threading.Thread, list[int]]:
    """Follow in a thread."""
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(run.follow()), daemon=True)
    thread.start()
    return thread, codes


def until(ready: Any) -> None:
    limit = time.monotonic() + 20
    while not ready():
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_following_replaces_a_dead_driver(
    ray_api: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, then silent while the cluster says RUNNING, then the head away; then it ends."""
    monkeypatch.setattr(submission, "_POLL", 0.02)
    monkeypatch.setattr(signs, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(signs, "SILENT", 0.3)
    job = Job.model_validate(SETTINGS | {"name": "away", "store": str(tmp_path)})
    storage, said = LocalStorage(tmp_path), list[str]()
    api = JobsApi(ray_api.address)
    run = Submission(api, job, storage, build_package(), {}, said.append)
    run.place()
    first = run.id
    thread, codes = follow(run)
    ray_api.logs[first] = "[1/5] trial\nhalf a li"
    until(lambda: "[1/5] trial" in said)
    ray_api.jobs[first] |= {"status": "FAILED", "message": "killed", "driver_exit_code": -9}
    until(lambda: len(ray_api.jobs) == 2)
    second = run.id
    assert second == first[:-1] + "2" and "half a li" in said
    ray_api.jobs[second]["status"] = "RUNNING"
    beat(storage, second, epochs=3)
    until(lambda: len(ray_api.jobs) == 3)
    assert ray_api.jobs[second]["status"] == "STOPPED", "the cluster is told"
    assert any("no sign of life" in line and "says RUNNING" in line for line in said)
    ray_api.down = True
    until(lambda: any("asking on" in line for line in said))
    ray_api.down = False
    until(lambda: any("answers again" in line for line in said))
    ray_api.logs[run.id] = "done\n"
    ray_api.jobs[run.id] |= {"status": "SUCCEEDED", "driver_exit_code": 0}
    thread.join(20)
    assert codes == [0] and said[-1] == "done"


def test_a_driver_that_always_dies_is_given_up(
    ray_api: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "_POLL", 0.01)
    monkeypatch.setattr(
        ray_api, "jobs", _Dying()
    )  # every job that is submitted has failed when it is looked at
    job = Job.model_validate(SETTINGS | {"name": "away", "store": str(tmp_path)})
    run = Submission(
        JobsApi(ray_api.address), job, LocalStorage(tmp_path), build_package(), {}, lambda _: None
    )
    run.place()
    with pytest.raises(UserError, match="4 drivers in a row died before they had trained"):
        run.follow()
    assert len(ray_api.jobs) == 4


class _Dying(dict[str, dict[str, Any]]):
    def __setitem__(self, key: str, value: dict[str, Any]) -> None:
        super().__setitem__(key, value | {"status": "FAILED", "message": "Killed"})


def test_a_refusal_on_the_cluster_is_not_repeated(
    ray_api: FakeRay, avzero: Run, job_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "_POLL", 0.02)
    done = threading.Thread(target=lambda: _refuse(ray_api), daemon=True)
    done.start()
    code, out, _ = avzero("submit", job_file, "--address", ray_api.address)
    assert code == 2 and "avzero: on the cluster: torch is 2.5.0" in out
    assert len(ray_api.jobs) == 1


def _refuse(fake: FakeRay) -> None:
    until(lambda: fake.jobs)
    (name,) = fake.jobs
    fake.logs[name] = "avzero: on the cluster: torch is 2.5.0 (…)\n"
    fake.jobs[name] |= {"status": "FAILED", "driver_exit_code": 2}


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("ray://host:10001", "give the address of the cluster's dashboard, http://HOST:8265"),
        ("http://127.0.0.1:1", "no answer (connection refused); check that the cluster runs"),
        ("http://no-such-host.invalid:8265", "check that the cluster runs"),
    ],
)
def test_wrong_address(avzero: Run, job_file: Path, given: str, message: str) -> None:
    code, out, err = avzero("submit", job_file, "--address", given, "--shared-folder")
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


def test_no_address(avzero: Run, job_file: Path) -> None:
    code, _, err = avzero("submit", job_file)
    assert code == 2 and "--address is missing" in err


def test_tokens(
    ray_api: FakeRay, avzero: Run, job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Missing and wrong are told apart; a file works as the variable does."""
    ray_api.token = "right"
    command = ("submit", job_file, "--address", ray_api.address, "--no-follow")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    code, _, err = avzero(*command)
    assert code == 2 and "wants a token; set RAY_AUTH_TOKEN" in err
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    code, _, err = avzero(*command)
    assert code == 2 and "refuses this token; correct RAY_AUTH_TOKEN" in err
    assert not ray_api.jobs and not ray_api.packages
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    code, _, err = avzero(*command)
    assert code == 2 and "RAY_AUTH_TOKEN_PATH" in err and "cannot be read" in err
    (tmp_path / "token").write_text("right\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert avzero(*command)[0] == 0 and len(ray_api.jobs) == 1


def test_something_else_answers(
    ray_api: FakeRay, avzero: Run, job_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = avzero("submit", job_file, "--address", ray_api.address + "/elsewhere")
    assert code == 2 and "unexpected answer 404" in err
    ray_api.version = "2.40.0"
    code, _, err = avzero("submit", job_file, "--address", ray_api.address)
    assert code == 2 and "the cluster runs Ray 2.40.0, avzero needs 2.60 <= Ray < 3" in err


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ({"gpus": 1}, "a run needs 1 GPU (on 1 worker), the cluster has 0"),
        ({"cpus": 5}, "a worker needs 5 CPU on one node and a run 1 worker; the cluster's nodes "),
        ({"cpus": 3, "workers": 3}, "a run needs 9 CPU (on 3 workers), the cluster has 8"),
    ],
)
def test_a_job_that_cannot_be_placed(
    ray_api: FakeRay,
    avzero: Run,
    tmp_path: Path,
    place: Path,
    resources: dict[str, Any],
    message: str,
) -> None:
    path = write_job(tmp_path, place, resources=resources)
    code, _, err = avzero("submit", path, "--address", ray_api.address)
    assert code == 2 and message in err and not ray_api.jobs and not ray_api.packages


def test_nothing_is_submitted_that_a_sweep_refuses(
    ray_api: FakeRay, avzero: Run, tmp_path: Path, place: Path
) -> None:
    path = write_job(tmp_path, place, benchmarks=["nowhere"])
    code, _, err = avzero("submit", path, "--address", ray_api.address)
    assert code == 2 and "nowhere" in err and not ray_api.jobs


def test_places_only_this_machine_sees() -> None:
    job = Job.model_validate(SETTINGS | {"store": "s3://lab/avzero"})
    with pytest.raises(UserError, match=r"mlflow\.db is a file on this machine"):
        portable(job, "head.lab")
    off = job.model_copy(update={"tracking": job.tracking.model_copy(update={"uri": "off"})})
    assert portable(off, "head.lab").store == "s3://lab/avzero"
    folder = off.model_copy(update={"store": "results"})
    with pytest.raises(UserError, match=r"the cluster at head\.lab cannot see it"):
        portable(folder, "head.lab")
    assert portable(folder, "head.lab", shared_folder=True).store == str(Path("results").absolute())
    here = portable(job.model_copy(update={"store": "results"}), "127.0.0.1")
    assert here.store == str(Path("results").absolute())
    assert here.tracking.uri == f"sqlite:///{Path('mlflow.db').absolute()}"


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVZ_HERE", "1")
    assert passed_on(["AVZ_HERE", "B=2=3"]) == {"AVZ_HERE": "1", "B": "2=3"}
    with pytest.raises(UserError, match="--env AVZ_NOT: not set here"):
        passed_on(["AVZ_NOT"])


def test_a_rayjob_instead(avzero: Run, job_file: Path) -> None:
    pytest.importorskip("avzero.cluster.kubernetes")
    code, out, err = avzero("submit", job_file, "--kubernetes", "--store", "s3://lab/avzero")
    kinds = [document["kind"] for document in yaml.safe_load_all(out)]
    assert (code, err) == (0, "") and kinds == ["ConfigMap", "RayJob"]
    code, _, err = avzero("submit", job_file, "--kubernetes", "--template", "/nowhere")
    assert code == 2 and "/nowhere: cannot be read as a template" in err


# -- looking after it --------------------------------------------------------------------------


def test_status_logs_stop(ray_api: FakeRay, avzero: Run, job_file: Path, place: Path) -> None:
    to = ("--address", ray_api.address)
    code, _, err = avzero("status", job_file, *to)
    assert code == 2 and "no sweep 'away' was submitted here" in err
    avzero("submit", job_file, *to, "--no-follow")
    (name,) = ray_api.jobs
    ray_api.jobs[name]["status"] = "RUNNING"
    storage = LocalStorage(place / "store")
    beat(storage, name, ended=2, wanted=5, epochs=9, best={"tiny--avca": 0.25})
    code, out, _ = avzero("status", "away", *to)
    assert code == 0 and f"{name}: RUNNING according to the cluster" in out
    assert "2 of 5 trials ended, 9 epochs by this driver; best VAL HM: tiny--avca 25.00" in out
    beat(storage, name, ended=2, wanted=5, epochs=9, time=time.time() - 300)
    code, out, _ = avzero("status", job_file)  # without the cluster
    assert code == 1 and "no sign of life for 5 min 00 s" in out and "Submit the job again" in out
    ray_api.logs[name] = "[1/5] trial 0\n"
    assert avzero("logs", "away", *to)[1] == "[1/5] trial 0\n"
    code, out, _ = avzero("stop", "away", *to)
    assert code == 0 and f"{name} stopped. Submit it again to go on." in out
    code, out, _ = avzero("stop", "away", *to)
    assert code == 0 and "is not running (STOPPED)" in out
    for key in storage.keys("sweeps/away/"):
        storage.delete(key)
