"""AVCA's step against its own matrix products.

    make bench B=step
    .venv/bin/python -m tests.bench.step 11 profile    # and where a step's time goes

A step is loss, backward and Adam (preset paper, main features 512/512) on batches that lie ready.
Every matrix product of one step, forward and backward, is recorded with its shapes and strides and
replayed in order on tensors allocated once, each call having its own, so that caches are as cold
as in the step. All in one process, one thread, in turn. Goals (issue 4): step at most 2.0 times
the replay at batch 256, at most 2.4 times at 64. The last line compares with the same step under
``matmul: bf16``, which is faster only where the processor has it.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from avzero.data.benchmark import Benchmark
from avzero.spec import Preset
from avzero.train.gemm import path_of, use
from tests.bench._measure import machine, ratio_line, rounds
from tests.bench._ucf import BareSteps, avca_task, ucf_size

STEPS = 10
GOALS = {256: "at most 2.0", 64: "at most 2.4"}
_ATEN = torch.ops.aten
PRODUCTS = {op.default: op.out for op in (_ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm)}


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps every matrix product that is dispatched: operator, arguments, keywords, result."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, tuple[Any, ...], Mapping[str, Any], Tensor]] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in PRODUCTS:
            self.calls.append((func, args, kwargs or {}, result))
        return result


def replay_of(step: Callable[[], object]) -> tuple[Callable[[], None], float]:
    """Return a function that repeats a step's matrix products, and their GFLOP."""
    with Recorder() as recorder:
        step()
    ready, flop = [], 0
    for func, args, kwargs, result in recorder.calls:
        own = tuple(_copy(a) if isinstance(a, Tensor) else a for a in args)
        ready.append((PRODUCTS[func], own, {**kwargs, "out": torch.empty_like(result)}))
        flop += 2 * result.numel() * args[-2].shape[-1]

    def replay() -> None:
        for func, own, keywords in ready:
            func(*own, **keywords)

    return replay, flop / 1e9


def _copy(x: Tensor) -> Tensor:
    """Return a copy with the same strides: a transposed or cut operand stays one."""
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return torch.zeros(last + 1).as_strided(x.shape, x.stride()).copy_(x.detach())


def compare(benchmark: Benchmark, batch: int, count: int) -> BareSteps:
    """Print the ratio of step and replay, and of the reduced precision; return the steps."""
    steps = BareSteps(benchmark, avca_task(benchmark, batch, STEPS, Preset.PAPER))
    steps.all()
    replay, gflop = replay_of(lambda: steps.step(0))

    def products() -> None:
        for _ in range(STEPS):
            replay()

    def reduced() -> None:
        with use("bf16"):
            steps.all()

    variants: dict[str, Callable[[], object]] = {
        "step": steps.all,
        "products": products,
        "bf16": reduced,
    }
    rounds(variants, 1)
    taken = rounds(variants, count)
    step, alone = (1e3 * statistics.median(taken[n]) / STEPS for n in ("step", "products"))
    print(f"batch {batch}: step {step:.1f} CPU-ms; its {gflop:.2f} GFLOP of products {alone:.1f}")
    print("  " + ratio_line("step / products", taken["step"], taken["products"], GOALS[batch]))
    label = f"full / bf16 products (error {path_of('bf16', 'cpu').error:.1e})"
    print("  " + ratio_line(label, taken["step"], taken["bf16"], "none"))
    return steps


def show_profile(steps: BareSteps) -> None:
    """Print the operators of a step by their own CPU time."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        steps.all()
    events = sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    print(f"  {'operator':44} share  CPU-ms a step  calls a step   (profiling included)")
    for e in events[:25]:
        taken = e.self_cpu_time_total
        calls = e.count / STEPS
        print(f"  {e.key[:44]:44} {taken / total:5.1%} {taken / 1e3 / STEPS:14.2f} {calls:13.0f}")


def main() -> None:
    """Run at batch 256 and 64."""
    torch.set_num_threads(1)
    count = next((int(a) for a in sys.argv[1:] if a.isdigit()), 11)
    print(machine())
    with tempfile.TemporaryDirectory() as scratch, use("full") as path:
        print(f"matrix products: {path.as_dict()}")
        _, benchmark = ucf_size(scratch)
        for batch in (256, 64):
            steps = compare(benchmark, batch, count)
            if "profile" in sys.argv:
                show_profile(steps)


if __name__ == "__main__":
    main()
