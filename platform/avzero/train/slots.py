"""The runs an array is training: loaded, trained an epoch at a time, concluded, refilled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from avzero.canon import canonical
from avzero.data.benchmark import Benchmark
from avzero.data.store import FeatureStore
from avzero.spec import Resources, Task
from avzero.train.array import run_epoch
from avzero.train.data import StageData
from avzero.train.drive import device_of, set_threads
from avzero.train.folder import RunFolder
from avzero.train.loop import Trainer
from avzero.train.outcome import conclude_stage_1
from avzero.train.records import Epoch, TrainingFailed


class Outcome(NamedTuple):
    """What there is to say of a run: an epoch, that it is concluded, or why it failed."""

    task: str
    epoch: Epoch | None = None
    finished: bool = False
    failed: str = ""


class Slots:
    """Holds the runs of an array; each call of ``round`` trains one epoch of those it names.

    Runs keep their own checkpoints, so a run that is not named any more is let go of at once and
    can be taken up here or elsewhere.

    Args:
        store: where the benchmarks and the run folders are.
        need: device and threads.
    """

    def __init__(self, store: FeatureStore, need: Resources) -> None:
        set_threads(need.cpus)
        self._store = store
        self._device = device_of(need)
        self._benchmarks: dict[str, Benchmark] = {}
        self._trainers: dict[str, Trainer] = {}
        self._data: dict[str, StageData] = {}

    def round(self, orders: Sequence[tuple[Task, int]]) -> Iterator[Outcome]:
        """Train one epoch of every run; yield what is new.

        A run that an earlier attempt took further than is known is not trained: whether it goes on
        may depend on what it has to tell.

        Args:
            orders: runs, and how many of their epochs are known already.

        Raises:
            UserError: the surroundings failed.
        """
        names = {task.id for task, _ in orders}
        self._trainers = {name: t for name, t in self._trainers.items() if name in names}
        waiting = []
        for task, known in orders:
            if task.id not in self._trainers:
                self._trainers[task.id] = self._load(task)
            trainer = self._trainers[task.id]
            if known < trainer.epoch or known == task.train.epochs:
                yield from self._replayed(trainer, known)
            else:
                waiting.append(trainer)
        for trainer, outcome in run_epoch(waiting):
            if isinstance(outcome, TrainingFailed):
                yield Outcome(trainer.task.id, failed=str(outcome))
            else:
                yield self._said(trainer, outcome)

    def _load(self, task: Task) -> Trainer:
        """Build a run, or take it up from its folder."""
        benchmark = self._open(task)
        # Whatever StageData depends on; runs that agree in it share one.
        key = canonical(
            [
                task.model_dump(include={"benchmark", "model", "protocol", "seed", "stage"}),
                task.config.get("input_scaling"),
                task.train.precision,
            ]
        )
        folder = RunFolder(self._store.storage, task)
        trainer = Trainer(task, benchmark, folder, None, self._device, self._data.get(key))
        self._data = {key: trainer.data} | self._data
        return trainer

    def _open(self, task: Task) -> Benchmark:
        """Return a run's benchmark; a task names it by content, so it is opened once."""
        if task.benchmark not in self._benchmarks:
            self._benchmarks[task.benchmark] = self._store.open(task.benchmark)
        return self._benchmarks[task.benchmark]

    def _replayed(self, trainer: Trainer, known: int) -> Iterator[Outcome]:
        """Yield what an earlier attempt did and nobody has been told."""
        history = trainer.state.history
        for epoch in history[known:]:
            yield self._said(trainer, epoch)
        if known == len(history) == trainer.task.train.epochs:
            yield self._said(trainer, None)

    def _said(self, trainer: Trainer, epoch: Epoch | None) -> Outcome:
        """Return an epoch's outcome; after a run's last, the run is concluded."""
        task = trainer.task
        last = epoch is None or epoch.epoch + 1 == task.train.epochs
        if last:
            trainer.finish()
            conclude_stage_1(trainer.folder, self._open(task))
        return Outcome(task.id, epoch, last)
