"""Runs that wait for MLflow on disk: out of memory while it is away, sent by the next call.

A file per run, written whole or not at all: what a draft holds as JSON, and the files its run is to
get. Epochs keep the time at which they ended. Sending a file twice is harmless, so none of this
needs a transaction; and were the folder lost, the store could still fill in every run.
"""

from __future__ import annotations

import fcntl
import io
import itertools
import json
import os
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from avzero.canon import identity
from avzero.data.cache import cache_root
from avzero.spec import Task
from avzero.track.payload import RUNNING, Draft, Outcome, parent_draft
from avzero.train.records import Epoch
from avzero.tune.space import Group

_DRAFT = "draft.json"
_OWN, _OUTCOME, _SHARED, _MODEL = "own/", "outcome/", "shared/", "model/"
"""Folders of the draft's files and of its outcome's three kinds."""
_RUN = "id-of-the-run"
"""Stands in tags for MLflow's id of a run that is not made yet."""


@dataclass
class Ticket:
    """Stands in the outbox for a draft that is on disk."""

    path: Path
    group: Group
    identity: str
    kind: str
    name: str

    def __str__(self) -> str:
        return f"run {self.name!r}"

    def draft(self) -> Draft:
        """Read the draft.

        Raises:
            ValueError: the file is damaged; it is removed, for the store can fill in the run.
        """
        try:
            data = _read(self.path)
        except (zipfile.BadZipFile, KeyError, ValueError) as error:
            self.done()
            raise ValueError(f"{self.path} is damaged") from error
        outcome = Outcome(**data.pop("outcome"))
        outcome.files, outcome.shared = self._files(_OUTCOME), self._files(_SHARED)
        outcome.model = self._files(_MODEL)
        tags = outcome.tags

        def make_outcome(run: str) -> Outcome:
            outcome.tags = {key: text.replace(_RUN, run) for key, text in tags.items()}
            return outcome

        task, epochs, began = data.pop("task"), data.pop("epochs"), data.pop("began")
        draft = Draft(group=self.group, **data)
        draft.task = None if task is None else Task.model_validate(task)
        if began is not None:  # should the sweep's own run be made for this one
            draft.parent = parent_draft(self.group.job, self.group)
            draft.parent.started = began
        draft.epochs = [(at, Epoch.from_dict(row)) for at, row in epochs]
        draft.files, draft.make_outcome = self._files(_OWN), make_outcome
        # A run that is closed by now was sent whole; a sweep's own run is closed by every call.
        draft.only_missing = draft.kind != "sweep"
        return draft

    def _files(self, folder: str) -> Callable[[], dict[str, bytes]]:
        def read() -> dict[str, bytes]:
            with zipfile.ZipFile(self.path) as archive:
                names = [name for name in archive.namelist() if name.startswith(folder)]
                return {name.removeprefix(folder): archive.read(name) for name in names}

        return read

    def done(self) -> None:
        """Forget the run: it is sent."""
        self.path.unlink(missing_ok=True)


class Spool:
    """The folder of a job's runs that wait for one MLflow.

    Args:
        uri: MLflow's tracking URI.
        store: URL of the job's store.
        sweep: the job's name.
    """

    def __init__(self, uri: str, store: str, sweep: str) -> None:
        self.folder = cache_root() / "spool" / identity([uri, store, sweep])
        self._numbers = itertools.count()
        self._lock: IO[str] | None = None

    def keep(self, draft: Draft | Ticket) -> Draft | Ticket:
        """Write a draft that is closed to disk and return its ticket; others stay as they are.

        Raises:
            OSError: the disk is full, or the store its files come from does not answer.
        """
        if isinstance(draft, Ticket) or draft.status == RUNNING:
            return draft
        outcome = draft.make_outcome(_RUN)
        data = {key: getattr(draft, key) for key in _PLAIN} | {
            "began": None if draft.parent is None else draft.parent.started,
            "task": None if draft.task is None else draft.task.model_dump(mode="json"),
            "epochs": [[at, epoch.as_dict()] for at, epoch in draft.epochs],
            "outcome": {key: getattr(outcome, key) for key in ("metrics", "tags", "also")},
        }
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(_DRAFT, json.dumps(data))
            for folder, files in (
                (_OWN, draft.files),
                (_OUTCOME, outcome.files),
                (_SHARED, outcome.shared),
                (_MODEL, outcome.model),
            ):
                for name, file in files().items():
                    archive.writestr(folder + name, file)
        place = self.folder / draft.group.key
        place.mkdir(parents=True, exist_ok=True)
        path = place / f"{time.time_ns():020d}-{os.getpid()}-{next(self._numbers)}.zip"
        scratch = path.with_suffix(".tmp")
        try:
            scratch.write_bytes(content.getvalue())
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
        return Ticket(path, draft.group, draft.identity, draft.kind, draft.name)

    def left(self, group: Group) -> Iterator[Ticket]:
        """Yield what earlier calls left of a group, oldest first; another process's it leaves."""
        place = self.folder / group.key
        if not place.is_dir() or not self._mine():
            return
        for path in sorted(place.glob("*.zip")):
            try:
                data = _read(path)
            except (OSError, zipfile.BadZipFile, KeyError, ValueError):
                path.unlink(missing_ok=True)
                continue
            yield Ticket(path, group, data["identity"], data["kind"], data["name"])

    def _mine(self) -> bool:
        """Return whether this process is the one that sends what lies here."""
        if self._lock is None:
            handle = (self.folder / "lock").open("w")
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.close()
                return False
            self._lock = handle  # held until the process ends
        return True


_PLAIN = ("identity", "kind", "name", "tags", "marks", "started", "status", "ended")


def _read(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        return dict(json.loads(archive.read(_DRAFT)))
