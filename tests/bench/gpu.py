"""For a day with a GPU: what an array is worth there.

    make bench B=gpu                                            # needs CUDA
    .venv/bin/python -m tests.bench.gpu --device cpu --tiny     # the same, small, anywhere

AVCA (preset paper, main features) at UCF's size, batch 256, K runs of different seed and learning
rate. ``eager`` is the product's training loop as it is. ``graph`` records one step (gather, losses,
gradients, Adam) as a CUDA graph and replays it: what graphs would be worth; the product does not
use them. Products are exact (``full``) or TF32. All variants run in turn, a number of rounds, by
wall time until the device is done: nobody else should use it. Then memory per slot, and one process
with an array of 8 against four such processes at once. Goals (issue 4), configuration-steps per
second at K = 32 against K = 1 eager: at least 12 times eager, 30 times with graphs.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from avzero.data.avca import read_avca
from avzero.data.benchmark import Benchmark
from avzero.data.simulate import simulate
from avzero.data.store import FeatureStore
from avzero.spec import Matmul, Preset, Task
from avzero.train import array
from avzero.train.feed import Feed
from avzero.train.folder import RunFolder
from avzero.train.gemm import use
from avzero.train.loop import Trainer
from tests.bench._measure import machine, ratio_line
from tests.bench._ucf import avca_task, ucf_size


@dataclass(frozen=True)
class Plan:
    """Sizes of a measurement."""

    device: str
    batch: int
    steps: int
    widths: tuple[int, ...]
    rounds: int
    seconds: float
    """How long the arrays of the concurrent measurement run."""

    @classmethod
    def of(cls, device: str, tiny: bool) -> Plan:
        """Return the sizes for a GPU's day, or tiny ones."""
        if tiny:
            return cls(device, 8, 3, (1, 2, 3), 2, 1.0)
        return cls(device, 256, 50, (1, 8, 32), 9, 20.0)


def trainers_of(plan: Plan, store: FeatureStore, benchmark: Benchmark, width: int) -> list[Trainer]:
    """Return runs of different seeds and learning rates that read the same data."""
    base = avca_task(benchmark, plan.batch, plan.steps, Preset.PAPER)
    out: list[Trainer] = []
    for n in range(width):
        train = base.train.model_copy(update={"lr": 1e-3 * 0.97**n})
        task: Task = base.model_copy(update={"seed": n, "train": train})
        data = out[0].data if out else None
        folder = RunFolder(store.storage, task)
        out.append(Trainer(task, benchmark, folder, device=plan.device, data=data))
    return out


def done(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def eager(trainers: list[Trainer]) -> None:
    """Train an epoch as the product does."""
    array._train(trainers)


def graphed(trainers: list[Trainer]) -> Callable[[], None]:
    """Return what trains an epoch by replaying one recorded step.

    The step's batch is gathered outside, into memory the graph reads. Learning rates are recorded
    as numbers: a product would hand them over in tensors.
    """
    first = trainers[0]
    steps = first.task.train.batches_per_epoch
    feed = Feed([(trainer.data, trainer.draws()) for trainer in trainers])
    keys = torch.stack([array._keys(trainer, steps) for trainer in trainers], dim=1)
    stack = array.Stack([trainer.model for trainer in trainers])
    for trainer in trainers:
        trainer.begin_epoch()
        for group in trainer.optimizer.param_groups:
            group["capturable"] = True
    batch, key = feed.batch(0), keys[0].clone()
    flat = [*batch.features.values(), *batch[1:]]

    def step() -> None:
        _, values = stack.losses(batch, key)
        stack.backward(values)
        for trainer in trainers:
            trainer.optimizer.step()

    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def epoch() -> None:
        for number in range(steps):
            new = feed.batch(number)
            for old, value in zip(flat, [*new.features.values(), *new[1:]], strict=True):
                old.copy_(value)
            key.copy_(keys[number])
            graph.replay()

    return epoch


def rates(plan: Plan, store: FeatureStore, benchmark: Benchmark, matmul: Matmul) -> None:
    """Print configuration-steps per second at every width, eager and as a graph."""
    variants: dict[tuple[str, int], Callable[[], object]] = {}
    for width in plan.widths:
        variants["eager", width] = partial(eager, trainers_of(plan, store, benchmark, width))
        if plan.device == "cuda":
            variants["graph", width] = graphed(trainers_of(plan, store, benchmark, width))
    taken: dict[tuple[str, int], list[float]] = {name: [] for name in variants}
    with use(matmul, plan.device) as path:
        print(f"\nmatrix products {matmul}: {path.as_dict()}")
        for number in range(plan.rounds + 1):
            for name, action in variants.items():
                done(plan.device)
                start = time.perf_counter()
                action()
                done(plan.device)
                if number:
                    taken[name].append((time.perf_counter() - start) / name[1])
    for (kind, width), each in taken.items():
        print(f"  {kind} K={width}: {plan.steps / statistics.median(each):,.0f} per second")
    alone, most = taken["eager", 1], plan.widths[-1]
    for kind, goal in (("eager", "at least 12"), ("graph", "at least 30")):
        if (kind, most) in taken:
            label = f"  {kind} K = {most} / eager K = 1"
            print(ratio_line(label, alone, taken[kind, most], goal), flush=True)


def show_memory(plan: Plan, store: FeatureStore, benchmark: Benchmark) -> None:
    """Print peak device memory at every width, and what one more slot adds."""
    if plan.device != "cuda":
        print("\nmemory per slot: measured on CUDA only (tests/bench/array.py has the CPU's)")
        return
    peaks = {}
    for width in plan.widths:
        torch.cuda.empty_cache()
        trainers = trainers_of(plan, store, benchmark, width)
        torch.cuda.reset_peak_memory_stats()
        eager(trainers)
        peaks[width] = torch.cuda.max_memory_allocated() / 2**20
        del trainers
    line = ", ".join(f"K={width} {peak:,.0f} MiB" for width, peak in peaks.items())
    few, many = plan.widths[0], plan.widths[-1]
    slot = (peaks[many] - peaks[few]) / (many - few)
    print(f"\npeak device memory: {line}; {slot:,.0f} MiB per slot")


def worker(plan: Plan, url: str, name: str) -> None:
    """Be one of several processes: get ready, say so, wait for a line, train for a while."""
    store = FeatureStore(url)
    trainers = trainers_of(plan, store, store.open(name), plan.widths[1])
    eager(trainers)
    done(plan.device)
    print("ready", flush=True)
    sys.stdin.readline()
    start, epochs = time.perf_counter(), 0
    while (lasted := time.perf_counter() - start) < plan.seconds:
        eager(trainers)
        done(plan.device)
        epochs += 1
    print(epochs * plan.steps * len(trainers) / lasted)


def concurrent(plan: Plan, arguments: list[str], count: int) -> float:
    """Return configuration-steps per second of so many processes together."""
    command = [sys.executable, "-m", "tests.bench.gpu", *arguments]
    processes: list[Any] = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    try:
        for process in processes:
            if process.stdout.readline().strip() != "ready":
                raise SystemExit("a process could not start; its error is above")
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        return sum(float(process.communicate()[0]) for process in processes)
    finally:
        for process in processes:
            process.kill()


def ready_store(scratch: str, tiny: bool) -> tuple[FeatureStore, Benchmark]:
    """Return a store with a benchmark of UCF's size, or a tiny one."""
    if not tiny:
        return ucf_size(scratch)
    store = FeatureStore(f"{scratch}/store")
    simulate(Path(scratch) / "TINY", "tiny")
    info, _ = store.put(read_avca(Path(scratch) / "TINY", "tiny", "main", name="tiny"))
    return store, store.open(info.name)


def main() -> None:
    """Run everything, or (``--worker URL NAME``) one of several processes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--worker", nargs=2, metavar=("URL", "NAME"))
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "no GPU: torch sees no CUDA device; the same code path runs with --device cpu --tiny"
        )
    torch.set_num_threads(1)
    plan = Plan.of(given.device, given.tiny)
    if given.worker:
        worker(plan, *given.worker)
        return
    device = torch.cuda.get_device_name() if given.device == "cuda" else "the CPU"
    print(f"{machine()}\n{device}, batch {plan.batch}, {plan.steps} steps an epoch")
    with tempfile.TemporaryDirectory() as scratch:
        store, benchmark = ready_store(scratch, given.tiny)
        for matmul in ("full", "tf32"):
            rates(plan, store, benchmark, matmul)
        show_memory(plan, store, benchmark)
        arguments = ["--device", given.device, *["--tiny"] * given.tiny]
        arguments += ["--worker", store.storage.url, benchmark.info.name]
        one, four = (concurrent(plan, arguments, count) for count in (1, 4))
        print(
            f"arrays of {plan.widths[1]} in 1 process: {one:,.0f} configuration-steps per second; "
            f"in 4 at once: {four:,.0f} together, {four / one:.2f} times"
        )


if __name__ == "__main__":
    main()
