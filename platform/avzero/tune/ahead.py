"""Stage-2 runs trained side by side, before the loop that scores them asks for each.

Every run is one process with one worker and its own folder, so nothing is shared but the store;
the scoring loop then finds finished folders. What a failed run wanted to say is said when its turn
comes, by running it again in the loop: same task, same failure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from avzero.data.storage import open_storage
from avzero.data.store import FeatureStore
from avzero.errors import UserError
from avzero.spec import Resources, Task
from avzero.train.drive import drive
from avzero.train.folder import RunFolder
from avzero.train.records import Epoch, TrainingFailed

_POLL_SECONDS = 1.0


class Ahead:
    """Runs being trained on the connected Ray cluster; none without one.

    Args:
        store: where the benchmarks and the run folders are.
        tasks: runs to train, in the order they will be asked for; finished ones are skipped.
        need: what one run needs.
        slots: how many are trained at once.
    """

    def __init__(
        self, store: FeatureStore, tasks: Sequence[Task], need: Resources, slots: int
    ) -> None:
        self._store, self._need, self._slots = store, need, slots
        done = {task.id: _epochs(store, task) for task in tasks}
        self._before = {name: count for name, count in done.items() if count is not None}
        self._waiting = deque(task for task in tasks if task.id in self._before)
        self._train: Any = None
        self._running: dict[str, Any] = {}
        if slots < 2 or len(self._waiting) < 2:
            self._before.clear()

    def follow(self, folder: RunFolder) -> Iterator[Epoch]:
        """Yield a run's epochs as its folder shows them, until it has ended, well or not."""
        task = folder.task.id
        before, seen = self._before.pop(task, None), 0
        ended = before is None
        while not ended:
            ended = self._advance(task)
            state = folder.load_state()
            for epoch in [] if state is None else state.history[seen:]:
                yield replace(epoch, replayed=seen < (before or 0))
                seen += 1

    def _advance(self, task: str) -> bool:
        """Fill free slots, wait a moment; return whether a run has ended."""
        import ray

        if self._train is None:
            self._train = ray.remote(
                num_cpus=self._need.cpus,
                num_gpus=self._need.gpus,
                max_retries=self._need.max_failures,
            )(train)
        while self._waiting and len(self._running) < self._slots:
            run = self._waiting.popleft()
            self._running[run.id] = self._train.remote(
                self._store.storage.url, run.model_dump_json(), self._need.model_dump_json()
            )
        handles = list(self._running.values())
        done = set(ray.wait(handles, num_returns=len(handles), timeout=_POLL_SECONDS)[0])
        self._running = {k: handle for k, handle in self._running.items() if handle not in done}
        return task not in self._running and all(run.id != task for run in self._waiting)


def train(url: str, task: str, need: str) -> bool:
    """Train one run to its end; return whether it got there."""
    try:
        resources = Resources.model_validate_json(need)
        for _ in drive(
            FeatureStore(open_storage(url, check=False)), Task.model_validate_json(task), resources
        ):
            pass
    except (UserError, TrainingFailed):
        return False
    return True


def _epochs(store: FeatureStore, task: Task) -> int | None:
    """Return how many epochs of a run are done; None where it is finished."""
    state = RunFolder(store.storage, task).load_state()
    if state is None:
        return 0
    return None if state.finished else len(state.history)
