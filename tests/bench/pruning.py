"""Pruning: epochs trained, slots used, and the sampler's share of a sweep, without training.

    make bench B=pruning

Studies and desk are the product's; arrays answer with made-up learning curves on a simulated
clock, so every count comes out the same each time. A round of an array takes one unit of time
whatever its slots hold, as on a GPU, or a third more where its speed is 0.75. An array that has
to wait asks again a little later. Systems search their own spaces with TPE, 200 trials in all;
halving has rungs at 1, 3, 9, ... epochs. Several groups share the slots. Columns:

seats    ``search.seats``: more than there are slots keep a fast array from waiting for a slow one
epochs   trained, as a share of those without pruning (goal at most 0.55)
best     HM of the winners, as a share of the winners' of a sweep without pruning
use      share of the slots of all arrays, from start to end, that trained an epoch (goal at least
         0.85); begun: until the last trial was begun; tail: units of time after that; desk: what
         ``Desk.use`` says, which leaves out the rounds in which an array had to wait
stacks   runs per stack: of those in an array, only runs of one structure are stacked
sampler  CPU-ms per trial, and as a share of the CPU time of training with 50 ms a step, 60 steps
         an epoch (goal at most 1 %); others: CPU-ms per trial of all else in studies and desk
"""

from __future__ import annotations

import heapq
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from avzero.data.avca import read_avca
from avzero.data.simulate import simulate
from avzero.data.store import FeatureStore
from avzero.protocol.counter import fold
from avzero.spec import Job, Task
from avzero.train.records import Epoch
from avzero.tune.desk import Desk, Orders, as_row
from avzero.tune.study import GroupStudy
from avzero.tune.sweep import Sweep
from tests.bench._measure import machine

TRIALS = 200
STEP_SECONDS, STEPS = 0.05, 60
"""AVCA's step on a CPU core at batch 256 (50 to 90 ms), and the shortest epochs in use."""
SYSTEMS = ("avca", "cjme", "avgzslnet", "kda")
SLOWER = 4 / 3
_POLL = 0.02
Rows = list[dict[str, Any]]


def curve(task: Task) -> list[float]:
    """Return VAL HM after every epoch of a run: up to its own height, at its own pace, with noise.

    Height falls with the distance (in decades) of lr from 5e-4, and has a share of chance.
    """
    chance = [fold(int(task.id, 16) & 0xFFFF, n) / 2**64 for n in range(2 + task.train.epochs)]
    far = math.log10(task.train.lr / 5e-4)
    height = 0.35 * math.exp(-0.5 * far * far) * (0.6 + 0.4 * chance[0])
    pace = 1.5 + 4.5 * chance[1]
    return [
        height * (1 - math.exp(-(e + 1) / pace)) + 0.01 * (noise - 0.5)
        for e, noise in enumerate(chance[2:])
    ]


@dataclass
class Found:
    """What a sweep came to; times are units of the simulated clock, seconds those of CPU."""

    trials: int
    trained: int = 0
    """Epochs."""
    stacks: int = 0
    """Stacks of all rounds of all arrays."""
    best: float = 0.0
    """HM of the winner, the mean over groups."""
    end: float = 0.0
    begun: float = 0.0
    """When the last trial was begun."""
    by_then: int = 0
    """Epochs trained until then."""
    desk: float = 0.0
    """``Desk.use``."""
    sampler: float = 0.0
    others: float = 0.0


def answers(orders: Orders) -> Rows:
    """Return what an array says of a round in which it trained an epoch of every ordered run."""
    rows = []
    for order in orders:
        task, known = Task.model_validate_json(order["task"]), order["known"]
        hm = curve(task)
        val = dict.fromkeys(("S", "U", "HM", "ZSL"), hm[known]) | {"beta": 0.5}
        best = hm[known] > max(hm[:known], default=-1.0)
        epoch = Epoch(known, {"all": 1.0}, task.train.lr, val, best, 1.0, 1.0)
        rows.append(as_row(task.id, epoch, known + 1 == task.train.epochs, ""))
    return rows


@contextmanager
def timed_samplers(found: Found) -> Iterator[None]:
    """Count the CPU seconds of proposing trials."""
    own = GroupStudy._next_trial

    def wrapped(study: GroupStudy) -> Any:
        before = time.thread_time()
        try:
            return own(study)
        finally:
            found.sampler += time.thread_time() - before

    # An attribute of the class, so that it gets the study.
    with mock.patch.object(GroupStudy, "_next_trial", wrapped):
        yield


def play(sweep: Sweep, slots: int, lasts: Sequence[float]) -> Found:
    """Run a sweep on simulated arrays; ``lasts`` is how long a round of each takes."""
    found = Found(sum(group.trials for group in sweep.groups))
    alike: dict[str, str] = {}
    with sweep.journal.exclusive(), timed_samplers(found):
        desk = Desk(sweep.studies, lambda view: None, [], slots, len(lasts))
        queue: list[tuple[float, int, Rows]] = [(0.0, number, []) for number in range(len(lasts))]
        asked = 0
        while True:
            found.end, number, rows = heapq.heappop(queue)
            found.trained += len(rows)
            name, before = f"array-{number}", time.thread_time()
            desk.take(name, rows)
            orders = desk.orders(name)
            found.others += time.thread_time() - before
            if desk.over:
                break
            if asked < (asked := sum(len(study._trials()) for study in sweep.studies.values())):
                found.begun, found.by_then = found.end, found.trained
            held = desk._held.get(name, {})
            alike |= {t: view.likeness for t, view in held.items() if t not in alike}
            found.stacks += len({alike[task] for task in held})
            then = found.end + (lasts[number] if orders else _POLL)
            heapq.heappush(queue, (then, number, answers(orders)))
        desk.raise_trouble()
    found.desk, found.others = desk.use, found.others - found.sampler
    winners = [study.winner() for study in sweep.studies.values()]
    found.best = statistics.mean([max(curve(w.task)) for w in winners if w is not None])
    return found


def sweep_of(name: str, store: FeatureStore, systems: int, epochs: int, **search: Any) -> Sweep:
    """Return a sweep of one or several systems."""
    job = Job.model_validate(
        {
            "name": name,
            "store": store.storage.url,
            "benchmarks": ["bench"],
            "models": SYSTEMS[:systems],
            "train": {"epochs": epochs},
            "search": {"trials": TRIALS // systems, "min_epochs": 1} | search,
            "tracking": {"uri": "off"},
        }
    )
    return Sweep(job, store)


def show(found: Found, whole: Found, room: float) -> None:
    """Print what a sweep came to; ``room`` is how many epochs fit into a unit of time."""
    each, training = 1e3 / found.trials, found.trained * STEPS * STEP_SECONDS
    print(
        f"{found.trained / whole.trained:8.3f} {found.best / whole.best:6.3f} "
        f"{found.trained / (room * found.end):6.3f} {found.by_then / (room * found.begun):6.3f} "
        f"{found.end - found.begun:5.0f} {found.desk:6.3f} {found.trained / found.stacks:6.2f} "
        f"{each * found.sampler:8.1f} {found.sampler / training:6.2%} {each * found.others:7.1f}",
        flush=True,
    )


def compare(store: FeatureStore, epochs: int, systems: int) -> None:
    """Print rows of sweeps with rungs, compared with one without."""
    name = f"e{epochs}-g{systems}"
    whole = play(sweep_of(name, store, systems, epochs, pruner="none"), 16, [1.0])
    arrays = ([1.0], [1.0, 1.0], [1.0, SLOWER])
    for number, (slots, lasts) in enumerate(itertools.product((4, 8, 16), arrays)):
        for spare in (0,) if len(lasts) == 1 else (0, slots * len(lasts) * 3 // 2):
            sweep = sweep_of(f"{name}-{number}-{spare}", store, systems, epochs, seats=spare)
            print(f"{epochs:6} {systems:6} {slots:5} {spare or '':>5} ", end="")
            print(f"{' '.join(f'{1 / last:.2f}' for last in lasts):9}", end="")
            show(play(sweep, slots, lasts), whole, slots * sum(1 / last for last in lasts))


def main() -> None:
    """Print the table."""
    print(machine())
    with tempfile.TemporaryDirectory() as scratch:
        simulate(Path(scratch) / "TINY", "tiny")
        store = FeatureStore(f"{scratch}/store")
        store.put(read_avca(Path(scratch) / "TINY", "tiny", "main", name="bench"))
        print(
            "epochs groups slots seats speeds     epochs   best    use  begun  tail   desk stacks"
            "  sampler  share  others"
        )
        for epochs, systems in itertools.product((12, 27), (1, 4)):
            compare(store, epochs, systems)


if __name__ == "__main__":
    main()
