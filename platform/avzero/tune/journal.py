"""The journal file of a sweep: one Optuna study per group, written before anything acts on it."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from avzero.canon import identity
from avzero.data.cache import cache_root
from avzero.data.storage import Storage, disk_errors
from avzero.errors import UserError
from avzero.tune.space import Group

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Journal:
    """The journal file of a sweep; for object storage a local copy that is mirrored.

    One driver writes a sweep at a time (``exclusive``); the mirror is replaced whole after every
    change.
    """

    def __init__(self, storage: Storage, sweep: str) -> None:
        self._storage = storage
        self._key = f"sweeps/{sweep}/study.journal"
        own = storage.local_path(self._key)
        self._mirrored = own is None
        self.path = own or cache_root() / "sweeps" / identity([storage.url, sweep]) / "journal"
        self._sweep = sweep
        if self._mirrored:
            self._fetch()

    def _fetch(self) -> None:
        """Bring the local copy up to date with object storage."""
        with disk_errors(self.path, "set AVZERO_CACHE to another folder"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._storage.download(self._key, self.path)
        except KeyError:
            self.path.unlink(missing_ok=True)

    def load(self, group: Group) -> optuna.Study | None:
        """Return a group's study for reading; None when there is none yet."""
        if not self.path.exists():
            return None
        storage = self._open()
        if group.key not in {s.study_name for s in optuna.get_all_study_summaries(storage)}:
            return None
        return optuna.load_study(study_name=group.key, storage=storage)

    def create(self, group: Group) -> optuna.Study:
        """Return a group's study for writing, made if needed."""
        return optuna.create_study(
            study_name=group.key,
            storage=self._open(),
            directions=["maximize"] * len(group.job.search.objectives),
            load_if_exists=True,
        )

    def _open(self) -> JournalStorage:
        return JournalStorage(JournalFileBackend(str(self.path)))

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Be the sweep's only driver on this machine.

        Raises:
            UserError: another process is.
        """
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = self.path.with_name("driver.lock").open("w")
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"sweep {self._sweep}: another avzero is running it on this machine; wait for "
                    "it, or stop it"
                ) from error
            if self._mirrored:
                self._fetch()
            self._repair()
            yield

    def _repair(self) -> None:
        """Undo what a driver leaves that was killed while it wrote: its lock, half a line."""
        for stale in self.path.parent.glob(f"{self.path.name}*.lock"):
            stale.unlink(missing_ok=True)
        if self.path.exists():
            data = self.path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole != len(data):
                self.path.write_bytes(data[:whole])

    def publish(self) -> None:
        """Copy the journal to object storage."""
        if self._mirrored and self.path.exists():
            self._storage.upload(self._key, self.path)
