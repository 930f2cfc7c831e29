"""Driving the loop: in this process, or by Ray Train workers; both yield the same records."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch

from avzero.data.store import FeatureStore
from avzero.errors import UserError
from avzero.spec import Resources, Task
from avzero.train.folder import RunFolder
from avzero.train.loop import Trainer
from avzero.train.records import Epoch, TrainingFailed
from avzero.train.world import global_world

_POLL_SECONDS = 0.1


def drive(store: FeatureStore, task: Task, resources: Resources) -> Iterator[Epoch]:
    """Run a task with the workers its resources ask for; yield its epochs.

    Closing the iterator stops the workers after their current epoch.

    Raises:
        UserError: something a person must correct.
        TrainingFailed: the configuration diverged.
    """
    if resources.workers > 1:
        return _with_ray_train(store, task, resources)
    return _in_process(store, task, resources)


def _in_process(store: FeatureStore, task: Task, resources: Resources) -> Iterator[Epoch]:
    """Run the loop here, with the threads a worker would have: they decide the last bits."""
    torch.set_num_threads(max(1, int(resources.cpus)))
    device = "cuda" if resources.gpus and torch.cuda.is_available() else "cpu"
    folder = RunFolder(store.storage, task)
    yield from Trainer(task, store.open(task.benchmark), folder, None, device).epochs()


class _Mailbox:
    """A Ray actor between the workers and whoever consumes their records."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._stop = False

    def put(self, row: dict[str, Any]) -> bool:
        """Take a record; return whether the workers should stop."""
        self._rows.append(row)
        return self._stop

    def after(self, count: int) -> list[dict[str, Any]]:
        """Return the records after the first ``count``."""
        return self._rows[count:]

    def stop(self) -> None:
        """Ask the workers to stop after their current epoch."""
        self._stop = True


def _worker(config: dict[str, Any]) -> None:
    """Run the loop on one Ray Train worker."""
    import ray
    import ray.train
    import ray.train.torch

    torch.set_num_threads(max(1, int(config["cpus"])))
    world = global_world()
    mailbox = config["mailbox"]
    first = world is None or world.rank == 0
    try:
        store = FeatureStore(config["store"])
        task = Task.model_validate(config["task"])
        folder = RunFolder(store.storage, task)
        device = str(ray.train.torch.get_device()) if config["gpus"] else "cpu"
        trainer = Trainer(task, store.open(task.benchmark), folder, world, device)
        for epoch in trainer.epochs():
            stop = False
            if first:
                row = {"epoch": epoch.as_dict(), "replayed": epoch.replayed}
                stop = ray.get(mailbox.put.remote(row))
            ray.train.report({"epoch": epoch.epoch, "loss": epoch.loss, **epoch.val})
            if world is not None:
                stop = world.from_first(stop)
            if stop:
                return
    except (UserError, TrainingFailed) as error:
        # Every worker fails alike, and trying again is vain: report instead of raising.
        if first:
            ray.get(mailbox.put.remote({"failed": type(error).__name__, "message": str(error)}))


def _with_ray_train(store: FeatureStore, task: Task, resources: Resources) -> Iterator[Epoch]:
    """Run the loop on several Ray Train workers; the records come through a mailbox."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    mailbox = ray.remote(num_cpus=0)(_Mailbox).remote()
    with tempfile.TemporaryDirectory(prefix="avzero-train-") as scratch:
        trainer = TorchTrainer(
            _worker,
            train_loop_config={
                "store": store.storage.url,
                "task": task.model_dump(mode="json"),
                "mailbox": mailbox,
                "cpus": resources.cpus,
                "gpus": resources.gpus,
            },
            torch_config=TorchConfig(backend="nccl" if resources.gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=resources.workers,
                use_gpu=bool(resources.gpus),
                resources_per_worker={"CPU": resources.cpus}
                | ({"GPU": resources.gpus} if resources.gpus else {}),
            ),
            run_config=RunConfig(
                name=task.id,
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=resources.max_failures),
            ),
        )
        yield from _follow(trainer, mailbox)


def _follow(trainer: Any, mailbox: Any) -> Iterator[Epoch]:
    """Yield the records of a fit that runs in a thread; each epoch once."""
    import ray

    outcome: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # noqa: BLE001 - handed to the consumer below
            outcome.append(error)

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    taken, last = 0, -1
    try:
        while True:
            alive = thread.is_alive()
            rows = ray.get(mailbox.after.remote(taken))
            taken += len(rows)
            for row in rows:
                if "failed" in row:
                    kind = UserError if row["failed"] == "UserError" else TrainingFailed
                    raise kind(row["message"])
                epoch = Epoch.from_dict(row["epoch"], replayed=row["replayed"])
                if epoch.epoch > last:  # a restarted group replays what was seen
                    last = epoch.epoch
                    yield epoch
            if not alive and not rows:
                break
            time.sleep(_POLL_SECONDS)
    finally:
        ray.get(mailbox.stop.remote())
        thread.join(timeout=120)
    if outcome:
        raise outcome[0]
