"""What a run costs on the hardware at hand: a few steps of the array a sweep would begin with.

The very code of a sweep is timed (``train.array``, checkpoints and scoring included), on the real
benchmark and with as many runs side by side; run folders lie in a temporary place. Times are wall
times, because those are what a cluster is held for; ``crowded`` says whether others computed
meanwhile. Calibrated steps keep running statistics, which those early in a long epoch leave out
(``train.array``): 1 % of a step, but a fifth of one with AVCA's ``bn_legacy_updates``, whose
epochs of 500 steps are therefore estimated about 15 % too long.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from avzero.canon import canonical
from avzero.data.storage import LocalStorage
from avzero.data.store import FeatureStore
from avzero.errors import UserError
from avzero.models._contract import Model
from avzero.spec import Resources, Task
from avzero.train.array import run_epoch
from avzero.train.data import StageData
from avzero.train.drive import device_of, set_threads
from avzero.train.folder import RunFolder
from avzero.train.loop import Trainer
from avzero.train.outcome import conclude_stage_1
from avzero.train.records import Epoch, TrainingFailed

_STEPS = range(4, 13)
"""Steps of a calibration epoch; how many depends on the rhythm of the system's passes."""
_ROUNDS = 5
_SECONDS = 3.0
"""No further round is begun after so long."""
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Cost:
    """What runs of one group cost. Times in seconds, sizes in bytes."""

    runs: int
    """Runs that were trained side by side, in one process."""
    stacks: int
    """How many stacks they made: runs of different structure are trained one after the other."""
    step: float
    """One step of one run: the array's time, divided by its runs."""
    look: float
    """One evaluation on VAL and one checkpoint of a run."""
    alone: float
    """One step of a run with no others beside it: stage 2 is trained so."""
    start: float
    """Building a run."""
    close: float
    """Calibrating and scoring a finished run."""
    memory: int
    """Of the process, without the files it maps: those are shared by a node's processes."""
    mapped: int
    device_memory: int
    """Highest on the GPU, the driver's own apart; 0 without one."""
    device_share: int
    """What the job's ``resources.gpus`` lets an array have of it."""
    weights: int
    """Of a checkpoint, mean over the runs."""
    optimizer: int
    kept: int
    """Everything that stays of a finished run."""
    crowded: float
    """Wall time over CPU time: far above 1, others were computing. 1 where that cannot be told."""

    def as_dict(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return asdict(self)


def measure(store: FeatureStore, tasks: Sequence[Task], need: Resources) -> Cost:
    """Train the runs for a few steps, side by side, and score one; nothing in the store changes.

    Args:
        store: holds the benchmark.
        tasks: stage-1 runs of one group.
        need: device and threads.

    Raises:
        UserError: no GPU where one is asked for, features a system cannot use, or every one of
            the runs diverges within these steps.
    """
    threads = torch.get_num_threads()
    set_threads(need.cpus)
    try:
        with _fresh_memory(), tempfile.TemporaryDirectory(prefix="avzero-plan-") as scratch:
            return _Calibration(store, tasks, need, LocalStorage(Path(scratch))).cost()
    finally:
        torch.set_num_threads(threads)


def measure_on_worker(url: str, tasks: Sequence[str], need: str) -> dict[str, Any]:
    """Do what ``measure`` does, with plain values: for a Ray task.

    Trouble comes back as ``trouble``, for an exception would arrive wrapped in Ray's.
    """
    try:
        runs = [Task.model_validate_json(task) for task in tasks]
        return measure(FeatureStore(url), runs, Resources.model_validate_json(need)).as_dict()
    except UserError as error:
        return {"trouble": str(error)}


class _Calibration:
    """The runs being timed."""

    def __init__(
        self, store: FeatureStore, tasks: Sequence[Task], need: Resources, scratch: LocalStorage
    ) -> None:
        self._need, self._scratch = need, scratch
        self._device = device_of(need)
        self._benchmark = store.open(tasks[0].benchmark)
        self._steps = tasks[0].train.batches_per_epoch
        self._data: dict[str, StageData] = {}
        # A system has to be there to be asked for its passes; the data are read by then, too.
        self._count = few_steps(self._build(tasks[0], 1).model, self._steps)
        started = time.perf_counter()
        self._trainers = [self._build(task, self._count) for task in tasks]
        self._start = (time.perf_counter() - started) / len(tasks)

    def _build(self, task: Task, steps: int) -> Trainer:
        """Build a run with short epochs; runs that see the same data share it, as in an array."""
        update = {"batches_per_epoch": steps, "epochs": 1000, "evaluate_every": 1}
        task = task.model_copy(update={"train": task.train.model_copy(update=update)})
        key = canonical([task.config.get("input_scaling"), task.train.precision])
        folder = RunFolder(self._scratch, task)
        data = self._data.get(key)
        trainer = Trainer(task, self._benchmark, folder, None, self._device, data)
        self._data[key] = trainer.data
        return trainer

    def cost(self) -> Cost:
        """Time everything."""
        everyone = list(self._trainers)
        stacks = len({trainer.structure for trainer in everyone})
        self._round(self._trainers)  # libraries set themselves up, caches fill
        rounds: list[tuple[float, float]] = []
        wall, cpu = time.perf_counter(), time.process_time()
        while len(rounds) < _ROUNDS and time.perf_counter() - wall < _SECONDS:
            rounds.append(self._round(self._trainers))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        first = self._trainers[0]
        # Passes are not spread evenly over an epoch by every system.
        passes = _passes(first.model, self._steps) / self._steps
        weight = passes / (_passes(first.model, self._count) / self._count)
        step = weight * statistics.median(trained for trained, _ in rounds)
        alone = step
        if len(everyone) > 1:
            alone = weight * min(self._round([first])[0] for _ in range(2))
        sizes = [_sizes(trainer.folder) for trainer in self._trainers]
        weights = round(statistics.fmean(size["last"] for size in sizes))
        close, beside = self._close(first)
        memory, mapped = _memory()
        return Cost(
            runs=len(everyone),
            stacks=stacks,
            step=step,
            look=statistics.median(look for _, look in rounds),
            alone=alone,
            start=self._start,
            close=close,
            memory=memory,
            mapped=mapped,
            **_on_device(self._device, self._need),
            weights=weights,
            optimizer=round(statistics.fmean(size["optimizer"] for size in sizes)),
            kept=weights + beside,
            crowded=wall / max(cpu, 1e-9) if self._need.cpus < 2 and self._device == "cpu" else 1,
        )

    def _round(self, trainers: list[Trainer]) -> tuple[float, float]:
        """Train an epoch of few steps; return seconds per run and step, and per run besides."""
        started, outcomes = time.perf_counter(), list(run_epoch(trainers))
        wall = time.perf_counter() - started
        failed = {t.task.id: o for t, o in outcomes if isinstance(o, TrainingFailed)}
        self._trainers = [t for t in self._trainers if t.task.id not in failed]
        if not self._trainers:
            task, why = next(iter(failed.items()))
            raise UserError(
                f"calibration: every run diverges within a few steps; run {task}: {why}"
            )
        trained = [o.seconds for _, o in outcomes if isinstance(o, Epoch)]
        mean = statistics.fmean(trained) if trained else 0.0
        return mean / self._count, max(0.0, wall / len(outcomes) - mean)

    def _close(self, trainer: Trainer) -> tuple[float, int]:
        """Finish a run; return the seconds that takes, and the bytes that stay beside weights."""
        started = time.perf_counter()
        trainer.finish()
        # A modality beside the headline may be NaN this early; the time until then is near enough.
        with contextlib.suppress(TrainingFailed):
            conclude_stage_1(trainer.folder, self._benchmark)
        seconds = time.perf_counter() - started
        return seconds, size_of(trainer.folder) - _sizes(trainer.folder)["best"]


def few_steps(model: Model, steps: int) -> int:
    """Return how many first steps stand best for an epoch of ``steps``.

    Adversarial systems update the generator in some of their steps only: its share of the few
    should be its share of all.
    """
    whole = Counter(part for step in range(steps) for part in model.passes(step))

    def off(count: int) -> float:
        some = Counter(part for step in range(count) for part in model.passes(step))
        return max(abs(some[part] / count - whole[part] / steps) for part in whole)

    choices = [count for count in _STEPS if count < steps]
    return min(choices, key=off) if choices else steps


def _passes(model: Model, steps: int) -> int:
    """Return the number of passes in the first steps of an epoch."""
    return sum(len(model.passes(step)) for step in range(steps))


def size_of(folder: RunFolder) -> int:
    """Return the bytes of everything in a run's folder."""
    return sum(folder.storage.size(k) or 0 for k in folder.storage.keys(f"{folder.prefix}/"))


def _sizes(folder: RunFolder) -> dict[str, int]:
    """Return the bytes of a run's files by role."""
    state = folder.load_state()
    files = {} if state is None else state.files
    return {
        role: folder.storage.size(f"{folder.prefix}/{name}") or 0 for role, name in files.items()
    }


@contextlib.contextmanager
def _fresh_memory() -> Iterator[None]:
    """Forget the highest use of memory so far, where the system lets one; tidy up behind."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what an earlier group has left behind
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield
    gc.collect()


def _memory() -> tuple[int, int]:
    """Return the highest use of memory, without mapped files, and the size of those."""
    if not _STATUS.is_file():  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    lines = (line.split() for line in _STATUS.read_text().splitlines())
    found = {words[0]: 1024 * int(words[1]) for words in lines if words[-1] == "kB"}
    mapped = found.get("RssFile:", 0)
    return found["VmHWM:"] - mapped, mapped


def _on_device(device: str, need: Resources) -> dict[str, int]:
    """Return the GPU memory used and what an array may use."""
    if device == "cpu":
        return {"device_memory": 0, "device_share": 0}
    total = torch.cuda.get_device_properties(0).total_memory
    return {
        "device_memory": torch.cuda.max_memory_reserved(),
        "device_share": int(total * min(1.0, need.gpus)),
    }
