"""The journal file of a sweep: one Optuna study per group, on disk before anything acts on it.

On a file system it is ``sweeps/<name>/study.journal``. In object storage every driver has one of
its own, begun with its predecessor's, and the claim (``tune.lease``) names the one that counts: a
driver that was given up for dead and is not cannot write into its successor's.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from avzero.canon import identity
from avzero.data.cache import cache_root
from avzero.data.storage import Storage, disk_errors
from avzero.errors import UserError
from avzero.tune.journal_file import OnlyWriter
from avzero.tune.lease import Lease, Numbers, read_claim
from avzero.tune.space import Group

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Journal:
    """The journal file of a sweep; for object storage a local copy that is mirrored.

    One driver writes a sweep at a time (``exclusive``); the mirror is replaced whole after every
    change.
    """

    def __init__(self, storage: Storage, sweep: str) -> None:
        self._storage = storage
        self._sweep = sweep
        self._folder = f"sweeps/{sweep}"
        self._key = f"{self._folder}/study.journal"
        own = storage.local_path(self._key)
        self._mirrored = own is None
        self.path = own or cache_root() / "sweeps" / identity([storage.url, sweep]) / "journal"
        self.lease: Lease | None = None
        """While driving: the right to."""
        self.numbers: Numbers = dict
        """What the sweep has reached, for the heartbeat."""
        self.outcome = "interrupted"
        """How this call ended, for whoever looks at the heartbeat."""
        self._file: OnlyWriter | None = None
        self._studies: JournalStorage | None = None
        """While driving: what all groups' studies write to; reading needs neither."""
        if self._mirrored:
            self._fetch(read_claim(storage, sweep).get("journal", self._key))

    def _fetch(self, key: str) -> None:
        """Bring the local copy up to date with object storage."""
        with disk_errors(self.path, "set AVZERO_CACHE to another folder"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._storage.download(key, self.path)
        except KeyError:
            self.path.unlink(missing_ok=True)

    def load(self, group: Group) -> optuna.Study | None:
        """Return a group's study for reading; None when there is none yet.

        Raises:
            UserError: the journal is damaged.
        """
        if not self.path.exists():
            return None
        storage = self._open()
        if group.key not in {s.study_name for s in optuna.get_all_study_summaries(storage)}:
            return None
        return optuna.load_study(study_name=group.key, storage=storage)

    def create(self, group: Group) -> optuna.Study:
        """Return a group's study for writing, made if needed; the journal is held exclusively."""
        if self._studies is None:
            file = OnlyWriter(self.path)
            self._file, self._studies = file, JournalStorage(file)
        return optuna.create_study(
            study_name=group.key,
            storage=self._studies,
            directions=["maximize"] * len(group.job.search.objectives),
            load_if_exists=True,
        )

    def _open(self) -> JournalStorage:
        try:
            return JournalStorage(JournalFileBackend(str(self.path)))
        except (ValueError, LookupError, TypeError, AssertionError) as error:
            raise UserError(
                f"{self._storage.url}/{self._key}: damaged{self._bad_line()}; restore it, or "
                "delete it: the same command then proposes its trials again, and finds in the "
                "store what they have trained"
            ) from error

    def _bad_line(self) -> str:
        """Return which line is not a record, where one is not."""
        for number, line in enumerate(self.path.read_bytes().splitlines(), start=1):
            try:
                json.loads(line)["op_code"]
            except (ValueError, LookupError, TypeError):
                return f" in line {number}"
        return ""

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Be the sweep's only driver.

        Raises:
            UserError: another process is, here or elsewhere.
        """
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = self.path.with_name("driver.lock").open("a+")
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"sweep {self._sweep}: another avzero is running it on this machine; wait for "
                    "it, or stop it"
                ) from error
            handle.seek(0)
            lock = handle.read()
            if not lock:
                lock = uuid.uuid4().hex
                handle.write(lock)
                handle.flush()
            with self._driving(Lease(self._storage, self._sweep, lock, self.numbers)):
                yield

    @contextmanager
    def _driving(self, lease: Lease) -> Iterator[None]:
        """Take over from the last driver; sign off at the end."""
        if self._mirrored:
            # Readers on this machine refresh their copy whenever they like.
            for old in self.path.parent.glob("*.journal*"):
                old.unlink(missing_ok=True)
            self.path = self.path.with_name(f"{lease.attempt}.journal")
            self._fetch(lease.before.get("journal", self._key))
            self._key = f"{self._folder}/drivers/{lease.attempt}.journal"
        self._repair()
        if self._mirrored and self.path.exists():
            self._storage.upload(self._key, self.path)
        lease.claim(self._key)
        self._forget({lease.attempt, lease.before.get("attempt", "")})
        self.lease, self.outcome, message = lease, "interrupted", ""
        try:
            yield
        except UserError as error:
            self.outcome, message = "failed", str(error)
            raise
        finally:
            self._close()
            self.lease = None
            lease.end(self.outcome, message)

    def _forget(self, attempts: set[str]) -> None:
        """Remove what drivers before the last one left."""
        for key in self._storage.keys(f"{self._folder}/drivers/"):
            if key.rpartition("/")[2].partition(".")[0] not in attempts:
                self._storage.delete(key)

    def _repair(self) -> None:
        """Undo what a driver leaves that was killed while it wrote: its lock, half a line."""
        for stale in self.path.parent.glob(f"{self.path.name}*.lock"):
            stale.unlink(missing_ok=True)
        if self.path.exists():
            data = self.path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole != len(data):
                os.truncate(self.path, whole)

    def commit(self) -> None:
        """Put on disk what has been written: what happened may be acted on only then.

        Raises:
            UserError: another driver has taken over, and writes this file; the disk is full.
        """
        if self.lease is not None:
            self.lease.guard()
        if self._file is not None:
            with disk_errors(self.path):
                self._file.commit()

    def _close(self) -> None:
        """Commit what is left, unless that is refused; later writing begins anew."""
        with contextlib.suppress(OSError, UserError):
            self.commit()
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = self._studies = None

    def publish(self) -> None:
        """Put on disk what has been written, and copy the journal to object storage.

        Raises:
            UserError: another driver has taken over.
        """
        self.commit()
        if self._mirrored and self.path.exists():
            self._storage.upload(self._key, self.path)
