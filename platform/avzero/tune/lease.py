"""Who drives a sweep: one driver at a time, on whatever machine, known from the store alone.

Below ``sweeps/<name>/``::

    driver.json              the claim: which attempt drives the sweep, and where
    drivers/<attempt>.json   its heartbeat, with what the sweep has reached

A claim is written once, by whoever takes over; only its owner writes a heartbeat. Nothing here
needs an atomic conditional write or clocks that agree: a driver is given up for dead when its beat
has not changed while another one watched, and one that was not dead learns from the claim that it
has been replaced, before it decides anything else (``guard``). What it may write until then goes
under its own attempt's keys (``journal``, ``train.folder``).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from avzero.canon import canonical
from avzero.data.storage import Storage
from avzero.errors import UserError

BEAT_SECONDS = 5.0
"""From one heartbeat to the next."""
DEADLINE = 30.0
"""A driver whose heartbeat has not changed for so many seconds is dead."""
_SAFE = 20.0
"""A driver that could not renew for so long decides nothing until it has."""
_PATIENCE = 600.0
_SETTLE = 1.0
"""Longer than a write to the store takes: of two that claim at once, both see the later claim."""
_POLL = 1.0

Numbers = Callable[[], dict[str, Any]]


def read_claim(storage: Storage, sweep: str) -> dict[str, Any]:
    """Return who drives a sweep or drove it last; nothing if nobody ever did."""
    return _read(storage, f"sweeps/{sweep}/driver.json")


def read_beat(storage: Storage, sweep: str, attempt: str) -> dict[str, Any]:
    """Return an attempt's last heartbeat, or nothing."""
    return _read(storage, f"sweeps/{sweep}/drivers/{attempt}.json")


def _read(storage: Storage, key: str) -> dict[str, Any]:
    try:
        return dict(json.loads(storage.read(key)))
    except KeyError:
        return {}


class Lease:
    """The right to drive a sweep.

    Args:
        storage: the sweep's.
        sweep: its name.
        lock: identity of the lock file this process holds; a predecessor that held the same file
            on this host is dead for certain.
        numbers: what the sweep has reached, for the heartbeat.

    Raises:
        UserError: another driver is alive.
    """

    def __init__(self, storage: Storage, sweep: str, lock: str, numbers: Numbers = dict) -> None:
        self._storage, self._sweep, self._numbers = storage, sweep, numbers
        self.attempt = uuid.uuid4().hex[:12]
        self._claim_key = f"sweeps/{sweep}/driver.json"
        self._beat_key = f"sweeps/{sweep}/drivers/{self.attempt}.json"
        self._lock = lock
        self._beats = 0
        self._lost = ""
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._renewed = time.monotonic()
        self.before = read_claim(storage, sweep)
        """The claim this one follows."""
        if self.before:
            self._wait_for_silence(self.before)

    def _wait_for_silence(self, holder: dict[str, Any]) -> None:
        """Return once the holder has signed off or is dead."""
        if (holder["host"], holder["lock"]) == (socket.gethostname(), self._lock):
            return
        beat = read_beat(self._storage, self._sweep, holder["attempt"])
        if beat.get("state", "running") != "running":
            return
        sys.stderr.write(
            f"sweep {self._sweep} was driven on {holder['host']}; looking for a sign of life "
            f"(up to {DEADLINE:.0f} s) …\n"
        )
        until = time.monotonic() + DEADLINE
        while time.monotonic() < until:
            time.sleep(_POLL)
            now = read_beat(self._storage, self._sweep, holder["attempt"])
            if now.get("state", "running") != "running":
                return
            if now != beat:
                raise UserError(
                    f"sweep {self._sweep}: another avzero is running it on {holder['host']} "
                    f"(process {holder['pid']}, since {holder['since']}); wait for it, or stop it"
                )

    def claim(self, journal: str) -> None:
        """Take over, and begin to give signs of life.

        Args:
            journal: key of the journal in the store.

        Raises:
            UserError: another driver claimed the sweep at the same moment.
        """
        mine = {
            "attempt": self.attempt,
            "after": self.before.get("attempt"),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "lock": self._lock,
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "journal": journal,
            "submission": os.environ.get("AVZERO_SUBMISSION", ""),
        }
        self._beat()
        self._storage.write(self._claim_key, canonical(mine).encode())
        if self._storage.local_path(self._claim_key) is None:
            time.sleep(_SETTLE)
        self._check()
        if self._lost:
            raise UserError(self._lost)
        self._thread = threading.Thread(target=self._keep, name="heartbeat", daemon=True)
        self._thread.start()

    def _check(self) -> None:
        """Note whether somebody else has taken over."""
        now = read_claim(self._storage, self._sweep)
        if now.get("attempt") != self.attempt:
            self._lost = (
                f"sweep {self._sweep}: another avzero has taken over on {now.get('host', '?')} "
                f"(since {now.get('since', '?')}); this one stops"
            )

    def _beat(self, state: str = "running", message: str = "") -> None:
        self._beats += 1
        row = {
            "beat": self._beats,
            "time": time.time(),
            "every": BEAT_SECONDS,
            "state": state,
            "message": message,
        }
        self._storage.write(self._beat_key, canonical(row | self._numbers()).encode())

    def _keep(self) -> None:
        """Give a sign of life every few seconds, as long as the claim is ours."""
        while not self._over.wait(BEAT_SECONDS) and not self._lost:
            with contextlib.suppress(UserError):  # unreachable: ``guard`` waits, then says so
                self._check()
                if not self._lost:
                    self._beat()
                    self._renewed = time.monotonic()

    def guard(self) -> None:
        """Return when this driver may go on deciding.

        Raises:
            UserError: another one has taken over, or the store cannot be reached for minutes.
        """
        while not self._lost:
            silent = time.monotonic() - self._renewed
            if silent < _SAFE or self._thread is None:
                return
            if silent > _PATIENCE:
                raise UserError(
                    f"{self._storage.url}: no heartbeat could be written for {silent:.0f} s; check "
                    "the store, then run the same command to go on"
                )
            time.sleep(_POLL / 5)
        raise UserError(self._lost)

    def end(self, state: str, message: str = "") -> None:
        """Sign off: the next driver need not wait.

        Args:
            state: ``finished``, ``interrupted`` or ``failed``.
            message: why it failed.
        """
        self._over.set()
        if self._thread is None:
            return
        self._thread.join(timeout=2 * BEAT_SECONDS)
        if not self._lost:
            with contextlib.suppress(UserError):
                self._beat(state, message)
