"""Is a sweep's driver alive? Known from its heartbeat in the store.

The Jobs API cannot say: it goes on reporting RUNNING when head and driver are gone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from avzero.data.storage import Storage
from avzero.report.units import duration
from avzero.tune.lease import BEAT_SECONDS, read_beat, read_claim

SILENT = 60.0
"""Seconds without a heartbeat after which a driver is replaced."""
STARTING = 240.0
"""So long a driver may take to its first one: Ray prepares the environment, Python imports."""


@dataclass(frozen=True)
class Sign:
    """A sweep's last sign of life; nothing in it where no driver ever ran."""

    claim: dict[str, Any]
    beat: dict[str, Any]

    @property
    def state(self) -> str:
        """``running``, ``finished``, ``interrupted``, ``failed``; empty: never driven."""
        return str(self.beat.get("state", "running")) if self.claim else ""

    @property
    def age(self) -> float:
        """Seconds since the last heartbeat, by this machine's clock."""
        return time.time() - float(self.beat.get("time", 0))

    @property
    def silent(self) -> bool:
        """Whether a driver that has not signed off looks dead."""
        return self.state == "running" and self.age > SILENT

    def reached(self) -> str:
        """Return how far the sweep has come, in words."""
        beat = self.beat
        if "wanted" not in beat:
            return "just started"
        best = ", ".join(f"{k} {100 * v:.2f}" for k, v in sorted(beat.get("best", {}).items()))
        return (
            f"{beat['ended']} of {beat['wanted']} trials ended, {beat['epochs']} epochs by this "
            f"driver{'; best VAL HM: ' + best if best else ''}"
        )

    def line(self, sweep: str) -> str:
        """Return the sweep's state in a line."""
        if not self.claim:
            return f"sweep {sweep}: no driver has started yet"
        where = f"on {self.claim['host']}"
        if self.claim.get("submission"):
            where += f" (job {self.claim['submission']})"
        if self.state != "running":
            why = f": {self.beat['message']}" if self.beat.get("message") else ""
            return f"sweep {sweep}: {self.state} {where}{why}; {self.reached()}"
        if self.silent:
            return (
                f"sweep {sweep}: no sign of life for {duration(self.age)}: the driver {where} or "
                f"its network is gone; {self.reached()}. Submit the job again to go on from the "
                "store"
            )
        return f"sweep {sweep}: running {where}, {self.reached()}; heard {self.age:.0f} s ago"


def last_sign(storage: Storage, sweep: str) -> Sign:
    """Return a sweep's last sign of life."""
    claim = read_claim(storage, sweep)
    beat = read_beat(storage, sweep, claim["attempt"]) if claim else {}
    return Sign(claim, beat)


class Watch:
    """Measures silence by this machine's clock alone.

    Args:
        storage: the sweep's.
        sweep: its name.
        job_id: the submission whose driver is watched; an earlier one's heartbeat says nothing.
    """

    def __init__(self, storage: Storage, sweep: str, job_id: str) -> None:
        self._storage, self._sweep, self._job_id = storage, sweep, job_id
        self._changed = time.monotonic()
        self._limit = STARTING
        self.sign = Sign({}, {})

    def look(self) -> float:
        """Read the heartbeat; return by how many seconds the driver is overdue, 0 if it is not."""
        sign, now = last_sign(self._storage, self._sweep), time.monotonic()
        mine = sign.claim.get("submission") == self._job_id
        if mine:
            if sign != self.sign:
                self.sign, self._changed = sign, now
            # Signed off, it has yet to empty its outbox and exit.
            self._limit = SILENT if sign.state == "running" else STARTING
        quiet = now - self._changed
        if mine and quiet > 2 * BEAT_SECONDS:
            quiet = max(quiet, sign.age)  # it has been quiet before this watch began
        return quiet if quiet > self._limit else 0.0
