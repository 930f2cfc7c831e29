"""A queue emptied by one background thread: who adds to it never waits, and never fails.

Items are delivered in the order they fall due. Those of one key keep the order in which they were
put, whatever fails: there is one entry per key, and it delivers its oldest item until that is done.
An item put ``behind`` waits for all that was there before it. A delivery that fails is tried again,
after a pause that doubles from half a second to eight; the first trouble is reported in one line,
not every time. Delivering twice must be harmless: an item is delivered again after it failed
half-way, or when it fell due again meanwhile.
"""

from __future__ import annotations

import heapq
import itertools
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Generic, TypeVar

from avzero.errors import UserError

Item = TypeVar("Item")

_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)
_TRIES = 3
"""After so many failures an item lets the others go first, and a refused one is given up."""
_REFUSALS_TOLD = 3


@dataclass
class _Entry(Generic[Item]):
    key: str
    items: deque[Item]
    """The one to deliver, then what was put for the same key since."""
    born: int
    """Its place for items that go behind all others."""
    order: int
    """Its place among entries that fall due at the same moment."""
    due: float | None = None
    """When to deliver, by the monotonic clock; None: nothing to deliver at present."""
    last: bool = False
    """Of the newest item."""
    behind: bool = False
    failures: int = 0
    kept: bool = False
    """Its items are on disk."""


class Outbox(Generic[Item]):
    """Delivers items from a thread of its own, which lives while there is something to deliver.

    Args:
        deliver: called in the thread, one item at a time.
        expected: errors that mean the receiver cannot be reached at the moment.
        refused: whether such an error is about the item alone, so that trying again is vain.
        receiver: named in messages, e.g. ``MLflow at http://…``.
        say: takes a line for the user; standard error unless given.
        keep: puts an item on disk and returns what stands for it; may raise ``OSError`` or
            ``UserError``. Called in the thread while deliveries fail and more than ``room``
            finished items wait, and for all of them when ``drain`` gives up.
    """

    room = 50
    """Finished items that wait in memory; those that are still added to come on top."""

    patience = 15.0
    """Seconds ``drain`` goes on while deliveries fail."""
    limit = 600.0
    """Seconds ``drain`` waits at most."""
    quiet = 3.0
    """Seconds ``drain`` waits without saying so."""

    def __init__(
        self,
        deliver: Callable[[Item], None],
        expected: tuple[type[Exception], ...],
        refused: Callable[[Exception], bool],
        receiver: str,
        say: Callable[[str], object] | None = None,
        keep: Callable[[Item], Item] = lambda item: item,
    ) -> None:
        self._deliver = deliver
        self._expected = expected
        self._refused = refused
        self._receiver = receiver
        self._say = say or (lambda line: sys.stderr.write(f"avzero: {line}\n"))
        self._keep = keep
        self._keeping = Lock()
        self._changed = threading.Condition()
        self._entries: dict[str, _Entry[Item]] = {}
        self._calendar: list[tuple[float, int, str]] = []
        """A heap of (due, order, key); lines that an entry no longer agrees with are skipped."""
        self._orders = itertools.count()
        self._thread: threading.Thread | None = None
        self._waiting = 0
        """Entries that are due or being delivered."""
        self._failures = 0
        self._failing_since = self._failed_at = 0.0
        self._not_before = 0.0
        self._hurry = False
        self._gave_up = False
        self._told = self._unkept = False
        self._dropped = 0

    def put(
        self, key: str, item: Item, wait: float = 0.0, last: bool = False, behind: bool = False
    ) -> None:
        """Have an item delivered.

        Args:
            key: what identifies it; an item that is here already falls due at the earlier time,
                another one of the same key goes first.
            item: what to deliver.
            wait: seconds to wait, so that what is added meanwhile goes with it.
            last: nothing will be added to the item any more: forget it once it is delivered.
            behind: not before everything that was put earlier is delivered or given up.
        """
        with self._changed:
            entry = self._entries.get(key)
            if entry is None:
                order = next(self._orders)
                entry = self._entries[key] = _Entry(key, deque([item]), order, order)
            elif entry.items[-1] is not item:
                entry.items.append(item)
                entry.last = entry.kept = False
            entry.last |= last
            if behind:
                entry.behind, entry.born = True, self._move_back(entry)
            self._schedule(entry, time.monotonic() + wait)
            if self._thread is None:
                # A daemon: a receiver that hangs must not keep the program from ending.
                self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def _schedule(self, entry: _Entry[Item], due: float) -> None:
        """Let an entry fall due, no later than it does already; the lock is held."""
        self._waiting += entry.due is None
        if entry.due is None or due < entry.due:
            entry.due = due
            heapq.heappush(self._calendar, (due, entry.order, entry.key))

    def _move_back(self, entry: _Entry[Item]) -> int:
        """Take an entry off the calendar and give it the last place; the lock is held."""
        self._waiting -= entry.due is not None
        entry.due, entry.order = None, next(self._orders)
        return entry.order

    def _blockers(self, entry: _Entry[Item]) -> list[float]:
        """Return when those fall due that an entry must let go first; the lock is held."""
        if not entry.behind:
            return []
        others = (o for o in self._entries.values() if o.born < entry.born)
        return [other.due for other in others if other.due is not None]

    def drain(self) -> bool:
        """Wait until everything is delivered; return whether it is.

        Gives up, and says so, when deliveries keep failing for ``patience`` seconds (at the first
        failure, if it gave up before and nothing went well since), or after ``limit`` seconds.
        What is left is still tried while the program lives.
        """
        start = time.monotonic()
        told = False
        patience = 0.0 if self._gave_up else self.patience
        with self._changed:
            self._hurry, self._not_before = True, 0.0
            self._changed.notify_all()
            while self._waiting:
                now = time.monotonic()
                failing = self._failures > 1 and self._failed_at > start
                since = max(start, self._failing_since) if failing else now
                if now - since > patience or now - start > self.limit:
                    self._gave_up = True
                    break
                if not told and now - start > self.quiet:
                    told = True
                    self._say(f"{self._receiver}: sending {_runs(self._waiting)} …")
                self._changed.wait(0.2)
            self._hurry = False
            left = self._waiting
        if left:
            self._make_room(0)  # first: whoever reads the line may end the program
            self._say(
                f"{self._receiver}: {_runs(left)} could not be sent; results are in the store, "
                "and the next avzero sweep or test fills in what is missing"
            )
        with self._changed:
            self._report()
            return not self._waiting

    def _make_room(self, room: int) -> None:
        """Put finished items on disk, the newest first, until ``room`` wait in memory."""
        with self._keeping:
            while True:
                with self._changed:
                    large = [e for e in self._entries.values() if e.last and not e.kept]
                    if sum(len(entry.items) for entry in large) <= room:
                        return
                    entry, items = large[-1], list(large[-1].items)
                try:
                    # Without the lock: it may take a while, and who adds items must not wait.
                    kept = [self._keep(item) for item in items]
                except (OSError, UserError) as error:
                    if not self._unkept:
                        self._unkept = True
                        self._say(
                            f"{self._receiver}: {items[0]} cannot be kept on disk meanwhile "
                            f"({error}); it waits in memory"
                        )
                    return
                instead = {id(old): new for old, new in zip(items, kept, strict=True)}
                with self._changed:
                    entry.items = deque(instead.get(id(item), item) for item in entry.items)
                    entry.kept = entry.last and len(entry.items) <= len(items)

    def _report(self) -> None:
        """Say what the lines so far leave open; the lock is held."""
        if self._dropped > _REFUSALS_TOLD:
            self._say(f"{self._receiver}: {_runs(self._dropped)} refused in all")
        self._dropped = 0
        if self._told and not self._waiting:
            self._told = False
            self._say(f"{self._receiver} answers again; nothing is missing there")

    def _run(self) -> None:
        """Deliver until there is nothing left."""
        while self._step():
            pass

    def _step(self) -> bool:
        """Wait for the next item and deliver it; return whether there was one."""
        entry = self._next()
        if entry is None:
            return False
        error: Exception | None = None
        try:
            self._deliver(entry.items[0])
        except Exception as problem:  # noqa: BLE001 - reported in _note, whatever it is
            error = problem
        with self._changed:
            self._waiting -= 1
            self._note(entry, error)
            if not self._waiting:
                self._changed.notify_all()
        if error is not None:
            self._make_room(self.room)
        return True

    def _next(self) -> _Entry[Item] | None:
        """Wait for the next item to deliver; None, and the thread ends, when all are forgotten."""
        with self._changed:
            while self._entries:
                if not self._calendar:
                    self._changed.wait()
                    continue
                due, order, key = self._calendar[0]
                entry = self._entries.get(key)
                if entry is None or (entry.due, entry.order) != (due, order):
                    heapq.heappop(self._calendar)
                    continue
                if blockers := self._blockers(entry):
                    self._move_back(entry)
                    self._schedule(entry, max(due, *blockers))
                    continue
                start = max(0.0 if self._hurry else due, self._not_before)
                if (pause := start - time.monotonic()) > 0:
                    self._changed.wait(pause)
                    continue
                heapq.heappop(self._calendar)
                entry.due = None  # still counted in _waiting, until _run has delivered it
                return entry
            self._thread = None
            return None

    def _note(self, entry: _Entry[Item], error: Exception | None) -> None:
        """Take note of how a delivery went; the lock is held."""
        if error is None:
            self._failures, self._gave_up, entry.failures = 0, False, 0
            if len(entry.items) > 1 or (entry.last and entry.due is None):
                self._done(entry)
            return
        now = time.monotonic()
        expected = isinstance(error, self._expected)
        refused = expected and self._refused(error)
        why = next(iter(str(error).splitlines()), "") or type(error).__name__
        entry.failures += 1
        if not expected or (refused and entry.failures >= _TRIES):
            self._drop(entry, why if expected else f"{type(error).__name__}: {why}")
            return
        if not self._failures:
            self._failing_since = now
        self._failures += 1
        self._failed_at = now
        self._not_before = now + _PAUSES[min(self._failures, len(_PAUSES)) - 1]
        if entry.failures >= _TRIES:
            self._move_back(entry)
        self._schedule(entry, now if entry.failures >= _TRIES else 0.0)
        # The first failure may be a connection that was closed while idle: nothing to report.
        if self._failures > 1 and not refused and not self._told:
            self._told = True
            self._say(
                f"{self._receiver} has stopped answering ({why}); the sweep goes on, results are "
                "in the store, and it is tried again"
            )

    def _drop(self, entry: _Entry[Item], why: str) -> None:
        """Give up an item that can never be delivered; the lock is held."""
        item = entry.items[0]
        self._done(entry)
        self._dropped += 1
        if self._dropped <= _REFUSALS_TOLD:
            self._say(f"{self._receiver}: {item} is not logged ({why})")

    def _done(self, entry: _Entry[Item]) -> None:
        """Forget an entry's oldest item, and the entry with its only one; the lock is held."""
        entry.items.popleft()
        entry.failures = 0
        if entry.items:
            self._schedule(entry, time.monotonic())
            return
        self._waiting -= entry.due is not None
        del self._entries[entry.key]


def _runs(count: int) -> str:
    return f"{count} run{'s' * (count != 1)}"
