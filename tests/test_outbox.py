"""The outbox by itself: order, repetition, failures, messages, threads."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import pytest

from avzero.track import outbox
from avzero.track.outbox import Outbox


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the pauses after failures."""
    monkeypatch.setattr(outbox, "_PAUSES", (0.01, 0.02))


def ended(box: Outbox[Any]) -> bool:
    """Return whether an outbox's thread ends, as it should when all items are forgotten."""
    deadline = time.monotonic() + 5
    while box._thread is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    return box._thread is None


class _Box:
    """An outbox of lists, and what came of it."""

    def __init__(self) -> None:
        self.delivered: list[list[int]] = []
        self.errors: list[Exception] = []
        self.lines: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.box: Outbox[list[int]] = Outbox(
            self.deliver, (OSError,), lambda error: "never" in str(error), "Box", self.lines.append
        )

    def deliver(self, item: list[int]) -> None:
        self.gate.wait()
        if self.errors:
            raise self.errors.pop(0)
        self.delivered.append(list(item))


def test_outbox_delivers_in_order_of_time() -> None:
    case = _Box()
    case.gate.clear()
    case.box.put("a", [0])
    case.box.put("late", [9], wait=60)
    for n in range(1, 4):
        case.box.put(str(n), [n])
    case.gate.set()
    assert case.box.drain()
    assert case.delivered == [[0], [1], [2], [3], [9]], "and a drain does not wait for what lingers"


def test_outbox_delivers_again_what_is_added_meanwhile() -> None:
    case = _Box()
    case.gate.clear()
    item = [1]
    case.box.put("a", item)
    time.sleep(0.05)  # it is being delivered
    item.append(2)
    case.box.put("a", item, last=True)
    case.gate.set()
    assert case.box.drain() and case.delivered[-1] == [1, 2]
    assert ended(case.box), "nothing left, no thread"
    case.box.put("b", [3], last=True)
    assert case.box.drain() and case.delivered[-1] == [3], "and a new one when there is"


def test_outbox_tries_again_quietly_once() -> None:
    case = _Box()
    case.errors = [OSError("closed while idle")]
    case.box.put("a", [1], last=True)
    assert case.box.drain() and case.delivered == [[1]] and case.lines == []


def test_outbox_lets_others_go_before_what_keeps_failing() -> None:
    case = _Box()
    case.gate.clear()
    case.errors = [OSError("no")] * 3
    for n in range(3):
        case.box.put(str(n), [n], last=True)
    case.gate.set()
    assert case.box.drain() and case.delivered == [[1], [2], [0]]
    assert [line.split(" (")[0] for line in case.lines] == [
        "Box has stopped answering",
        "Box answers again; nothing is missing there",
    ]


def test_outbox_reports_what_nobody_expected() -> None:
    """A mistake in the program costs one item and is said, it neither spreads nor hides."""
    case = _Box()
    case.gate.clear()
    case.errors = [ZeroDivisionError("by zero")]
    case.box.put("a", [1], last=True)
    case.box.put("b", [2], last=True)
    case.gate.set()
    assert case.box.drain() and case.delivered == [[2]]
    assert case.lines == ["Box: [1] is not logged (ZeroDivisionError: by zero)"]


def test_outbox_tells_of_three_refusals_and_counts_the_rest() -> None:
    case = _Box()
    case.gate.clear()
    case.errors = [OSError("never")] * 15
    for n in range(6):
        case.box.put(str(n), [n], last=True)
    case.gate.set()
    assert case.box.drain() and case.delivered == [[5]]
    assert len(case.lines) == 4 and case.lines[-1] == "Box: 5 runs refused in all"


def test_outbox_gives_up_a_hanging_receiver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Outbox, "limit", 0.3)
    monkeypatch.setattr(Outbox, "quiet", 0.1)
    case = _Box()
    case.gate.clear()
    case.box.put("a", [1], last=True)
    assert not case.box.drain()
    assert case.lines[0] == "Box: sending 1 run …" and "1 run could not be sent" in case.lines[1]
    case.gate.set()
    assert case.box.drain() and case.delivered == [[1]], "it was still tried"


def test_outbox_under_many_writers() -> None:
    """No item is lost or forgotten early while several threads add to the same ones."""
    case = _Box()
    items: dict[str, list[int]] = {str(n): [] for n in range(20)}
    old = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:

        def write(key: str) -> None:
            for n in range(50):
                items[key].append(n)
                case.box.put(key, items[key], wait=0.001 * (n % 3), last=n == 49)

        writers = [threading.Thread(target=write, args=(key,)) for key in items]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
    finally:
        sys.setswitchinterval(old)
    assert case.box.drain()
    whole = list(range(50))
    assert sum(d == whole for d in case.delivered) >= 20
    assert ended(case.box) and case.box._entries == {} and case.box._waiting == 0


def test_outbox_keeps_the_order_of_a_key() -> None:
    """Another item of the same key waits for the one before it, even one that keeps failing."""
    case = _Box()
    case.gate.clear()
    case.errors = [OSError("no")] * 5
    case.box.put("a", [1])
    case.box.put("b", [9], last=True)
    time.sleep(0.05)  # the first is being delivered
    case.box.put("a", [2], last=True)
    case.box.put("a", [3], last=True)
    case.gate.set()
    assert case.box.drain() and [d for d in case.delivered if d != [9]] == [[1], [2], [3]]
    assert ended(case.box)


def test_outbox_drops_a_refused_item_not_those_after_it() -> None:
    case = _Box()
    case.gate.clear()
    case.errors = [OSError("never")] * 3
    for n in range(2):
        case.box.put("a", [n], last=True)
    case.gate.set()
    assert case.box.drain() and case.delivered == [[1]]
    assert case.lines == ["Box: [0] is not logged (never)"]


def test_outbox_delivers_behind_everything_put_before() -> None:
    """Not at the place where the item was first put, nor before what lingers or fails."""
    case = _Box()
    case.gate.clear()
    whole = [0]
    case.box.put("whole", whole)
    case.box.put("late", [1], wait=0.1)
    case.box.put("failing", [2])
    whole.append(9)
    case.box.put("whole", whole, last=True, behind=True)
    case.box.put("after", [3], last=True)
    case.errors = [OSError("no")] * 4
    case.gate.set()
    deadline = time.monotonic() + 5
    while [0, 9] not in case.delivered[-1:] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert case.delivered[-1] == [0, 9] and sorted(case.delivered[:-1])[-3:] == [[1], [2], [3]]
