"""Driving the loop: in this process, or by Ray Train workers; both yield the same records."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from avzero.data.storage import Storage, open_storage
from avzero.data.store import FeatureStore
from avzero.errors import UserError
from avzero.spec import Resources, Task
from avzero.train.folder import RunFolder
from avzero.train.loop import Trainer
from avzero.train.records import Epoch, TrainingFailed
from avzero.train.world import global_world, working_world

_POLL_SECONDS = 0.1
_STOP_SECONDS = 120
_WAIT_SECONDS = 6 * 3600


def drive(
    store: FeatureStore, task: Task, resources: Resources, on_cluster: bool = False
) -> Generator[Epoch, None, None]:
    """Run a task with the workers its resources ask for; yield its epochs.

    Closing the iterator stops the workers after their current epoch.

    Args:
        store: where the benchmark is and the run's folder will be.
        task: the run.
        resources: how many workers, and what each gets.
        on_cluster: use Ray Train even for one worker, so that it runs where the resources are.

    Raises:
        UserError: something a person must correct.
        TrainingFailed: the configuration diverged.
    """
    if resources.workers > 1 or on_cluster:
        return _with_ray_train(store, task, resources)
    return _in_process(store, task, resources)


def device_of(resources: Resources) -> str:
    """Return where one worker trains.

    Raises:
        UserError: a GPU is asked for and torch sees none.
    """
    if not resources.gpus:
        return "cpu"
    if not torch.cuda.is_available():
        raise UserError(
            "resources.gpus: torch sees no GPU here; install a CUDA build of torch, or set gpus: 0"
        )
    return "cuda"


def set_threads(cpus: float) -> None:
    """Use the threads a worker has: their number decides the last bits of a result."""
    torch.set_num_threads(max(1, int(cpus)))


def _in_process(
    store: FeatureStore, task: Task, resources: Resources
) -> Generator[Epoch, None, None]:
    """Run the loop here; the process has its own number of threads back afterwards."""
    before = torch.get_num_threads()
    set_threads(resources.cpus)
    try:
        folder = RunFolder(store.storage, task)
        trainer = Trainer(task, store.open(task.benchmark), folder, None, device_of(resources))
        yield from trainer.epochs()
    finally:
        torch.set_num_threads(before)


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

    def stopped(self) -> bool:
        """Return whether the workers should stop."""
        return self._stop


def _worker(config: dict[str, Any]) -> None:
    """Run the loop on one Ray Train worker."""
    import ray

    mailbox = config["mailbox"]
    if ray.get(mailbox.stopped.remote()):
        return  # a group restarted after its run was given up
    try:
        _run_worker(config)
    except (UserError, TrainingFailed) as error:
        # Said at once, from whichever worker; the exception then takes down the group, whose
        # other workers may be waiting for this one.
        row = {"failed": isinstance(error, TrainingFailed), "message": str(error)}
        ray.get(mailbox.put.remote(row))
        ray.get(mailbox.stop.remote())
        raise


def _run_worker(config: dict[str, Any]) -> None:
    import ray
    import ray.train

    set_threads(config["resources"]["cpus"])
    task = Task.model_validate(config["task"])
    everyone = global_world()
    world, active = working_world(task.train.batch_size)
    if not active:
        while (said := everyone.from_first(None) if everyone else None) is not None:
            ray.train.report(said["metrics"])
            if said["stop"]:
                return
        return
    store = FeatureStore(open_storage(config["store"], check=False))
    folder = RunFolder(store.storage, task)
    device = device_of(Resources.model_validate(config["resources"]))
    trainer = Trainer(task, store.open(task.benchmark), folder, world, device)
    for epoch in trainer.epochs():
        said = {"metrics": {"epoch": epoch.epoch, "loss": epoch.loss, **epoch.val}, "stop": False}
        if trainer.first:
            row = {"epoch": epoch.as_dict(), "replayed": epoch.replayed}
            said["stop"] = ray.get(config["mailbox"].put.remote(row))
        if everyone is not None:
            said = everyone.from_first(said)
        ray.train.report(said["metrics"])
        if said["stop"]:
            return
    if everyone is not None:
        everyone.from_first(None)  # those that look on are done too


def _with_ray_train(
    store: FeatureStore, task: Task, resources: Resources
) -> Generator[Epoch, None, None]:
    """Run the loop on Ray Train workers; the records come through a mailbox."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    mailbox = ray.remote(num_cpus=0)(_Mailbox).remote()
    workers: Any = resources.worker_range  # Ray's annotations lack (fewest, most)
    with _notes_of_ray(store.storage, task) as (path, system):
        trainer = TorchTrainer(
            _worker,
            train_loop_config={
                "store": store.storage.url,
                "task": task.model_dump(mode="json"),
                "mailbox": mailbox,
                "resources": resources.model_dump(mode="json"),
            },
            # Workers wait for rank 0 while it evaluates; fitted classifiers can take long.
            torch_config=TorchConfig(
                backend="nccl" if resources.gpus else "gloo", timeout_s=_WAIT_SECONDS
            ),
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=bool(resources.gpus),
                resources_per_worker={"CPU": resources.cpus}
                | ({"GPU": resources.gpus} if resources.gpus else {}),
            ),
            run_config=RunConfig(
                name=task.id,
                storage_path=path,
                storage_filesystem=system,
                failure_config=FailureConfig(max_failures=resources.max_failures),
            ),
        )
        yield from _follow(trainer, mailbox)


@contextmanager
def _notes_of_ray(storage: Storage, task: Task) -> Iterator[tuple[str, Any]]:
    """Yield where Ray keeps its notes on a fit: in the bucket, so that they outlive the head's
    machine while it lasts, or in scratch. Nothing is read back: runs keep their own checkpoints.
    """
    notes = f"ray/{task.id}/"
    place = storage.arrow("ray")
    if place is None:
        with tempfile.TemporaryDirectory(prefix="avzero-train-") as scratch:
            yield scratch, None
        return
    try:
        yield place
    finally:
        # pyarrow also marks the folder itself, as an object of no bytes; it is nothing to anybody.
        for key in [*storage.keys(notes), "ray/"]:
            storage.delete(key)


def _follow(trainer: Any, mailbox: Any) -> Generator[Epoch, None, None]:
    """Yield the records of a fit that runs in a thread; each epoch once."""
    import ray

    outcome: list[Exception] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:  # noqa: BLE001 - handed to the consumer below
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
                    raise (TrainingFailed if row["failed"] else UserError)(row["message"])
                epoch = Epoch.from_dict(row["epoch"], replayed=row["replayed"])
                if epoch.epoch > last:  # a restarted group replays what was seen
                    last = epoch.epoch
                    yield epoch
            if not alive and not rows:
                break
            time.sleep(_POLL_SECONDS)
    finally:
        ray.get(mailbox.stop.remote())
        thread.join(timeout=_STOP_SECONDS)
    if outcome:
        lines = [line for line in str(outcome[0]).splitlines() if line.strip()]
        raise UserError(
            f"Ray Train gave up ({lines[-1].strip() if lines else type(outcome[0]).__name__}); run "
            "the same command to go on from the last checkpoint"
        ) from outcome[0]
