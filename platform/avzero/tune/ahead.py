"""Stage-2 runs trained side by side, before the loop that scores them asks for each.

Every run is one process with one worker and its own folder, so nothing is shared but the store;
the scoring loop then finds finished folders. What a failed run wanted to say is said when its turn
comes, by running it again in the loop: same task, same failure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from avzero.data.store import FeatureStore
from avzero.errors import UserError
from avzero.spec import Resources, Task
from avzero.train.drive import drive
from avzero.train.folder import RunFolder
from avzero.train.records import Epoch, TrainingFailed

_POLL_SECONDS = 1.0


class Ahead:
    """Runs being trained on the connected Ray cluster; empty without one.

    Args:
        store: where the benchmarks and the run folders are.
        tasks: runs to train; finished ones are skipped.
        need: what one run needs.
    """

    def __init__(self, store: FeatureStore, tasks: Sequence[Task], need: Resources) -> None:
        self._running: dict[str, Any] = {}
        waiting = [task for task in tasks if not _finished(store, task)]
        if need.workers > 1 or len(waiting) < 2:
            return
        import ray

        if not ray.is_initialized():
            return
        remote = ray.remote(num_cpus=need.cpus, num_gpus=need.gpus)(train)
        for task in waiting:
            self._running[task.id] = remote.remote(
                store.storage.url, task.model_dump_json(), need.model_dump_json()
            )

    def follow(self, folder: RunFolder) -> Iterator[Epoch]:
        """Yield a run's epochs as its folder shows them, until it has ended, well or not."""
        handle = self._running.pop(folder.task.id, None)
        seen, ended = 0, handle is None
        while not ended:
            import ray

            ended = bool(ray.wait([handle], timeout=_POLL_SECONDS)[0])
            state = folder.load_state()
            history = [] if state is None else state.history[seen:]
            yield from history
            seen += len(history)


def train(url: str, task: str, need: str) -> bool:
    """Train one run to its end; return whether it got there."""
    try:
        resources = Resources.model_validate_json(need)
        for _ in drive(FeatureStore(url), Task.model_validate_json(task), resources):
            pass
    except (UserError, TrainingFailed):
        return False
    return True


def _finished(store: FeatureStore, task: Task) -> bool:
    state = RunFolder(store.storage, task).load_state()
    return state is not None and state.finished
