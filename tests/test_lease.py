"""One driver at a time, on any machine: taking over, being replaced, coming back too late."""

from __future__ import annotations

import errno
import fcntl
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from avzero.data.benchmark import Benchmark
from avzero.data.storage import LocalStorage
from avzero.errors import UserError
from avzero.train.folder import RunFolder
from avzero.train.loop import Trainer
from avzero.tune import journal_file, lease
from avzero.tune.journal import Journal
from avzero.tune.lease import Lease, read_beat, read_claim
from tests.conftest import make_task

GROUP: Any = SimpleNamespace(
    key="g", job=SimpleNamespace(search=SimpleNamespace(objectives=["hm"]))
)
"""What a journal asks of a group."""


class Bucket(LocalStorage):
    """A folder that behaves as object storage: no object is a local file; it can be cut off."""

    cut = False

    def local_path(self, key: str) -> Path | None:
        """Return None."""
        return None

    def _path(self, key: str) -> Path:
        if self.cut:
            raise UserError("the store cannot be reached")
        return super()._path(key)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Seconds become hundredths."""
    for name, seconds in (
        ("BEAT_SECONDS", 0.02),
        ("DEADLINE", 0.3),
        ("_SAFE", 0.2),
        ("_SETTLE", 0.02),
        ("_POLL", 0.02),
    ):
        monkeypatch.setattr(lease, name, seconds)
    monkeypatch.setenv("AVZERO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A function that gives this process another host's name and cache."""

    def move(name: str) -> None:
        monkeypatch.setattr(lease.socket, "gethostname", lambda: name)
        monkeypatch.setenv("AVZERO_CACHE", str(tmp_path / name))

    return move


def until(ready: Any) -> None:
    limit = time.monotonic() + 10
    while not ready():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_a_living_driver_elsewhere_is_left_alone(tmp_path: Path) -> None:
    storage = Bucket(tmp_path / "store")
    first = Lease(storage, "s", "lock-of-host-1")
    first.claim("k")
    with pytest.raises(UserError, match=r"another avzero is running it on .* \(process \d+"):
        Lease(storage, "s", "lock-of-host-2")
    first.end("finished")
    began = time.monotonic()
    Lease(storage, "s", "lock-of-host-2").claim("k")
    assert time.monotonic() - began < 0.2, "who signed off need not be watched"


def test_a_dead_driver_elsewhere_is_replaced(tmp_path: Path) -> None:
    """Its heartbeat does not change for the deadline; the one that comes back stops."""
    storage = Bucket(tmp_path / "store")
    first = Lease(storage, "s", "lock-1", lambda: {"epochs": 3})
    first.claim("k")
    storage.cut = True  # the first driver's network is gone
    time.sleep(0.1)
    storage_2 = Bucket(tmp_path / "store")
    second = Lease(storage_2, "s", "lock-2")
    second.claim("k")
    storage.cut = False
    with pytest.raises(UserError, match="another avzero has taken over"):
        until(first.guard)
    assert read_claim(storage_2, "s")["attempt"] == second.attempt
    assert read_claim(storage_2, "s")["after"] == first.attempt
    assert read_beat(storage_2, "s", first.attempt)["epochs"] == 3
    second.guard()
    first.end("interrupted")
    second.end("finished")
    assert read_beat(storage_2, "s", second.attempt)["state"] == "finished"


def test_a_driver_without_a_store_waits(tmp_path: Path) -> None:
    storage = Bucket(tmp_path / "store")
    mine = Lease(storage, "s", "lock")
    mine.claim("k")
    storage.cut = True
    time.sleep(0.3)
    passed = threading.Event()
    threading.Thread(target=lambda: (mine.guard(), passed.set()), daemon=True).start()
    assert not passed.wait(0.1), "it decides nothing while it cannot renew"
    storage.cut = False
    assert passed.wait(5)
    mine.end("finished")


def test_of_two_that_claim_at_once_one_remains(tmp_path: Path) -> None:
    storage = Bucket(tmp_path / "store")
    both = [Lease(storage, "s", f"lock-{n}") for n in range(2)]  # neither sees the other's claim
    said: list[str] = []

    def claim(one: Lease) -> None:
        try:
            one.claim("k")
        except UserError as error:
            said.append(str(error))

    threads = [threading.Thread(target=claim, args=(one,)) for one in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) == 1 and "has taken over" in said[0]
    for one in both:
        one.end("finished")


def test_the_journal_of_a_replaced_driver_does_not_count(tmp_path: Path, elsewhere: Any) -> None:
    """Both write; what the successor and every reader see is the successor's alone."""
    first_storage, storage = Bucket(tmp_path / "store"), Bucket(tmp_path / "store")
    elsewhere("one")
    old = Journal(first_storage, "s")
    with old.exclusive():
        old.path.write_text('{"op": 1}\n')
        old.publish()
        first_storage.cut = True
        elsewhere("two")
        new = Journal(storage, "s")
        with new.exclusive():
            assert new.path.read_text() == '{"op": 1}\n', "begun with its predecessor's"
            new.path.write_text('{"op": 1}\n{"op": 2}\n')
            new.publish()
            first_storage.cut = False
            old.path.write_text('{"op": 1}\n{"op": "late"}\n')
            first_storage.upload(old._key, old.path)  # a zombie that is past its guard
            elsewhere("three")
            assert Journal(storage, "s").path.read_text() == '{"op": 1}\n{"op": 2}\n'
            with pytest.raises(UserError, match="has taken over"):
                until(old.publish)
    assert read_beat(storage, "s", read_claim(storage, "s")["attempt"])["state"] == "interrupted"
    elsewhere("four")
    last = Journal(storage, "s")
    with last.exclusive():
        assert last.path.read_text() == '{"op": 1}\n{"op": 2}\n'
    left = {key.split("/")[-1].split(".")[0] for key in storage.keys("sweeps/s/drivers/")}
    assert len(left) == 2, "of the drivers before the last two nothing is kept"


def test_a_replaced_driver_writes_nothing_into_a_shared_journal(
    tmp_path: Path, elsewhere: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system of several hosts, where a lock may lapse while its holder is frozen."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    storage = LocalStorage(tmp_path / "store")
    elsewhere("one")
    old, new = Journal(storage, "s"), Journal(storage, "s")
    with old.exclusive():
        study = old.create(GROUP)
        old.commit()
        study.set_user_attr("before", 1)
        assert old.lease is not None and old.lease._thread is not None
        old.lease._over.set()  # frozen
        old.lease._thread.join()
        elsewhere("two")
        with new.exclusive():
            new.create(GROUP).set_user_attr("new", 1)
            new.commit()
            written = new.path.read_bytes()
            old.lease._check()  # its heartbeat goes on
            with pytest.raises(UserError, match="has taken over"):
                old.commit()
            old._close()
            assert old.path == new.path and new.path.read_bytes() == written
    seen = Journal(storage, "s").load(GROUP)
    assert seen is not None and seen.user_attrs == {"new": 1}


def test_a_full_disk_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    journal = Journal(LocalStorage(tmp_path / "store"), "s")
    with journal.exclusive():
        study = journal.create(GROUP)
        with monkeypatch.context() as patch:
            patch.setattr(journal_file.os, "write", full)
            with pytest.raises(UserError, match=r"study\.journal: no space left .*; free some"):
                journal.commit()
        study.set_user_attr("after", 1)
        journal.commit()
    seen = journal.load(GROUP)
    assert seen is not None and seen.user_attrs == {"after": 1}


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ('{"op_code": 0, "wor\n{"op_code": 1}\n', " in line 1"),
        ('{"op_code": 0}\n', ""),
        ("\0\n{}\n", " in line 1"),
        ("[]\n", " in line 1"),
    ],
)
def test_a_damaged_journal_is_said_in_one_line(tmp_path: Path, content: str, where: str) -> None:
    storage = LocalStorage(tmp_path / "store")
    journal = Journal(storage, "s")
    journal.path.parent.mkdir(parents=True)
    journal.path.write_text(content)
    with pytest.raises(UserError, match=rf"sweeps/s/study\.journal: damaged{where}; restore it"):
        journal.load(GROUP)


def test_a_killed_driver_on_this_machine_is_replaced_at_once(tmp_path: Path) -> None:
    """The kernel has given up its lock, so it is dead for certain."""
    storage = LocalStorage(tmp_path / "store")
    first = Journal(storage, "s")
    with first.exclusive():
        assert first.lease is not None
        first.lease._over.set()  # killed: no sign-off
        first.lease._thread = None
    began = time.monotonic()
    with Journal(storage, "s").exclusive():
        assert time.monotonic() - began < 0.2


def test_a_replaced_worker_does_not_take_a_run_back(
    benchmark: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A zombie's late epoch neither moves the state back nor removes what counts."""
    monkeypatch.setattr("avzero.train.folder._ALONE_SECONDS", 0.0)
    task = make_task(benchmark, seed=911, train={"epochs": 4})
    storage = LocalStorage(tmp_path / "store")

    def trainer() -> Trainer:
        return Trainer(task, benchmark, RunFolder(storage, task))

    zombie = trainer()
    epochs = zombie.epochs()
    next(epochs)
    replacement = trainer()
    assert len(list(replacement.epochs())) == 4
    before = storage.keys(f"runs/{task.id}/")
    state = storage.read(f"runs/{task.id}/state.json")
    next(epochs)  # trained before it was cut off, written after
    assert storage.read(f"runs/{task.id}/state.json") == state
    assert storage.keys(f"runs/{task.id}/") == before
    list(epochs)
    final = RunFolder(storage, task).load_state()
    assert final is not None and final.finished
    assert RunFolder(storage, task).best_weights(final)
