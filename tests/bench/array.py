"""The array: K configurations trained stacked against one alone.

    make bench B=array

AVCA (preset paper, main features 512/512) at UCF's size, one thread, runs that differ in seed and
learning rate. CPU time is that of the product's ``_train`` (draws, stacking, gathering, steps,
losses), all K in turn in one process. Operations are counted as dispatched below autograd and
vmap, in a step's full run (gather, loss, backward, optimiser, settle); views and the profiler's
marks are left out, because they compute nothing. Peak memory is that of fresh processes that train,
evaluate and checkpoint at batch 256, 16 runs in one or one run in each; its second figure leaves
out what lies in files (libraries, features), which 16 processes on one machine would share.

Goals (issue 4): CPU per configuration at K = 8 at most 1.15 of K = 1 at batch 256, at most 0.8 at
16; operations at K = 16 at most 1.1 of K = 1, and 100 per configuration; memory at most 0.35. At
the end all systems, on a tiny benchmark: their operations, and whether three stacked come out as
alone, bit for bit.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from avzero.data.avca import read_avca
from avzero.data.benchmark import Benchmark
from avzero.data.simulate import simulate
from avzero.data.store import FeatureStore
from avzero.models._registry import model_files
from avzero.spec import Preset, Task
from avzero.train import array
from avzero.train.folder import RunFolder
from avzero.train.gemm import use
from avzero.train.loop import Trainer
from tests.bench._measure import in_fresh_process, machine, memory, ratio_line, rounds
from tests.bench._ucf import avca_task, ucf_size

WIDTHS = (1, 2, 4, 8, 16)
STEPS = {256: 6, 64: 12, 16: 30}
"""Batch -> steps of an epoch: what an epoch costs besides its steps is spread over few."""
GOALS = {256: "at most 1.15", 64: "none", 16: "at most 0.8"}
_COUNTED = 10


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that compute: no views, no marks of the profiler."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        aliases = (result.alias_info for result in func._schema.returns)
        view = any(alias is not None and not alias.is_write for alias in aliases)
        # A view that its schema does not call one, because nobody else holds what it looks at.
        view = view or func is torch.ops.aten._unsafe_view.default
        self.count += not view and func.namespace != "profiler"
        return func(*args, **(kwargs or {}))


def trainers_of(tasks: Sequence[Task], benchmark: Benchmark, store: FeatureStore) -> list[Trainer]:
    """Return a trainer per task; all read the same data."""
    out: list[Trainer] = []
    for task in tasks:
        folder = RunFolder(store.storage, task)
        shared = out[0].data if out else None
        out.append(Trainer(task, benchmark, folder, data=shared))
    return out


def others(task: Task, count: int) -> list[Task]:
    """Return runs that differ in seed and learning rate."""
    return [
        task.model_copy(
            update={"seed": n, "train": task.train.model_copy(update={"lr": 1e-3 * 0.9**n})}
        )
        for n in range(count)
    ]


def ucf_trainers(
    benchmark: Benchmark, store: FeatureStore, batch: int, steps: int, count: int
) -> list[Trainer]:
    """Return runs of AVCA at UCF's size."""
    task = avca_task(benchmark, batch, steps, Preset.PAPER)
    return trainers_of(others(task, count), benchmark, store)


def compare_cpu(benchmark: Benchmark, store: FeatureStore, batch: int, count: int) -> None:
    """Print CPU time per configuration and step at every width."""
    steps = STEPS[batch]
    trainers = ucf_trainers(benchmark, store, batch, steps, max(WIDTHS))
    variants: dict[str, Callable[[], object]] = {
        str(width): partial(array._train, trainers[:width]) for width in WIDTHS
    }
    rounds(variants, 1)
    taken = rounds(variants, count)
    each = {w: [seconds / w for seconds in taken[str(w)]] for w in WIDTHS}
    line = ", ".join(
        f"K={w} {1e3 * statistics.median(each[w]) / steps:.1f} ({1e3 * max(each[w]) / steps:.1f})"
        for w in WIDTHS
    )
    print(f"batch {batch}: CPU-ms per configuration-step, median (worst round): {line}")
    print("  " + ratio_line("K = 8 / K = 1", each[8], each[1], GOALS[batch]), flush=True)


def operations(make: Callable[[int], Sequence[Trainer]], widths: Sequence[int]) -> list[float]:
    """Return operations per step at every width.

    Args:
        make: returns trainers with epochs of so many steps. Two lengths are compared, so that what
            an epoch does once is left out.
        widths: how many of the trainers are stacked.
    """
    counts = []
    short, long = make(2), make(2 + _COUNTED)
    for width in widths:
        totals = []
        for trainers in (short, long):
            array._train(trainers[:width])
            with Operations() as mode:
                array._train(trainers[:width])
            totals.append(mode.count)
        counts.append((totals[1] - totals[0]) / _COUNTED)
    return counts


def show_operations(benchmark: Benchmark, store: FeatureStore) -> None:
    """Print AVCA's operations per step."""
    make = partial(ucf_trainers, benchmark, store, 16, count=16)
    counts = operations(lambda steps: make(steps=steps), WIDTHS)
    line = ", ".join(f"K={w} {count:.0f}" for w, count in zip(WIDTHS, counts, strict=True))
    print(
        f"operations per step: {line}; K = 16 / K = 1: {counts[-1] / counts[0]:.3f} (goal at most "
        f"1.1), {counts[-1] / 16:.1f} per configuration (goal at most 100)"
    )


def train_once(url: str, name: str, width: int) -> None:
    """Train, evaluate and checkpoint one epoch of an array; print this process's peak memory."""
    torch.set_num_threads(1)
    store = FeatureStore(url)
    trainers = ucf_trainers(store.open(name), store, 256, 10, width)
    list(array.run_epoch(trainers))
    print(json.dumps(memory()))


def show_memory(url: str, name: str, count: int) -> None:
    """Print peak memory of one process with 16 runs against 16 processes with one."""
    taken: dict[int, list[dict[str, Any]]] = {1: [], 16: []}
    for _ in range(count):
        for width, found in taken.items():
            found.append(in_fresh_process("tests.bench.array", "memory", url, name, str(width)))
    for part in ("peak", "own"):
        above = [one[part] for one in taken[16]]
        below = [16 * one[part] for one in taken[1]]
        print(
            f"memory ({part}): one run {below[0] / 16 / 2**20:.0f} MiB, an array of 16 "
            f"{above[0] / 2**20:.0f} MiB"
        )
        goal = "at most 0.35" if part == "peak" else "none"
        print("  " + ratio_line("array of 16 / 16 processes", above, below, goal), flush=True)


def show_systems(scratch: str) -> None:
    """Print every system's operations, and whether stacking changes a bit."""
    from tests.conftest import make_task

    store = FeatureStore(f"{scratch}/tiny")
    simulate(Path(scratch) / "TINY", "tiny")
    info, _ = store.put(read_avca(Path(scratch) / "TINY", "tiny", "main", name="tiny"))
    benchmark = store.open(info.name)
    print("system            K=1   K=16  ratio  per configuration  K = 3 bit for bit as alone")
    for system in model_files():

        def make(steps: int, count: int = 16, system: str = system) -> list[Trainer]:
            task = make_task(benchmark, system, train={"batches_per_epoch": steps})
            return trainers_of(others(task, count), benchmark, store)

        one, many = operations(make, (1, 16))
        print(
            f"{system:15} {one:6.0f} {many:6.0f} {many / one:6.3f} {many / 16:18.1f}  "
            f"{'yes' if same_bits(partial(make, 5, 3)) else 'NO'}",
            flush=True,
        )


def same_bits(make: Callable[[], list[Trainer]]) -> bool:
    """Return whether an epoch of a stack gives every run the losses and weights it gets alone."""
    stacked, alone = make(), make()
    together = array._train(stacked)
    apart = [array._train([trainer])[0] for trainer in alone]
    return together == apart and all(
        torch.equal(mine, other)
        for a, b in zip(stacked, alone, strict=True)
        for mine, other in zip(a._weights().values(), b._weights().values(), strict=True)
    )


def main() -> None:
    """Run everything, or (``memory URL NAME K``) one process of the memory figures."""
    if sys.argv[1:2] == ["memory"]:
        url, name, width = sys.argv[2:5]
        train_once(url, name, int(width))
        return
    torch.set_num_threads(1)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    print(machine())
    with tempfile.TemporaryDirectory() as scratch, use("full") as path:
        print(f"matrix products: {path.as_dict()}")
        store, benchmark = ucf_size(scratch)
        show_operations(benchmark, store)
        show_memory(f"{scratch}/store", benchmark.info.name, 3)
        show_systems(scratch)
        for batch in (16, 64, 256):
            compare_cpu(benchmark, store, batch, count)


if __name__ == "__main__":
    main()
