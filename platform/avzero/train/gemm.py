"""Which arithmetic float32 matrix products use: full precision by the fastest path, or less.

On some processors the framework's default path runs at less than half the core's speed while its
other library is as exact (AMD Zen 5: 105 and 250 GFLOP/s, both at an error of 4e-7); on others the
same switch rounds to bfloat16 (Intel with AMX: error 2e-3). Names do not tell, so ``full`` measures
both, once per kind of processor and version of torch: the last bits of a run depend on the choice,
so it is kept in the node's cache, where every later process finds it. Reduced precision is used
where a run asks for it (``TrainConfig.matmul``) and nowhere else. float64 products are never
touched.

    with use(task.train.matmul, device.type) as path:  # in force inside, restored behind it
        ...
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path as FilePath
from typing import Literal

import torch

from avzero.canon import identity
from avzero.data.cache import cache_root
from avzero.spec import Matmul

Setting = Literal["highest", "high", "medium"]
"""Values of ``torch.set_float32_matmul_precision``. On a CPU ``medium`` goes through oneDNN; on
CUDA both lower ones are TF32."""

MOST_ERROR = 1e-5
"""Relative error up to which a product counts as full precision (float32 rounding gives 4e-7)."""
LEAST_GAIN = 1.3
"""How much faster the other path must be; true ratios are 1.0 or above 2."""
_TRIES = 15


@dataclass(frozen=True)
class Path:
    """A way to multiply matrices on a kind of device, and what was measured of it here.

    ``name``: ``default``, ``onednn``, ``tf32`` or ``bf16``. ``error``: relative, in the Frobenius
    norm, against float64. ``gflops``: of one thread on a CPU.
    """

    name: str
    setting: Setting
    error: float = float("nan")
    gflops: float = float("nan")
    autocast: bool = False
    """CUDA has no bfloat16 inside float32 products: there, the layers' inputs are rounded."""

    def as_dict(self) -> dict[str, str | float]:
        """Return what a run keeps of it: path, error, gflops."""
        return {"path": self.name, "error": self.error, "gflops": round(self.gflops, 1)}


def choose(default: Path, other: Path) -> Path:
    """Return the path for full precision: ``other`` only if it is exact and clearly faster."""
    exact = other.error < MOST_ERROR  # an error of NaN is none
    return other if exact and other.gflops >= LEAST_GAIN * default.gflops else default


@functools.cache
def path_of(matmul: Matmul, device: str) -> Path:
    """Return the path for a choice on a kind of device (``cpu``, ``cuda``); measured once.

    TF32 exists on CUDA alone: on a CPU ``tf32`` is exact.
    """
    if matmul == "tf32":
        return _measure([Path("tf32", "high")], device)[0]
    if matmul == "bf16":
        return _measure([Path("bf16", "medium", autocast=device == "cuda")], device)[0]
    default = Path("default", "highest")
    if device != "cpu":  # there, the default is the fastest that is exact
        return _measure([default], device)[0]
    return _kept(lambda: choose(*_measure([default, Path("onednn", "medium")], device)))


def _kept(measure: Callable[[], Path]) -> Path:
    """Return the choice this node has made before, or make it now; of two at once, one counts."""
    here = identity([torch.__version__, torch.backends.cpu.get_cpu_capability(), _processor()])
    file = cache_root() / "gemm" / f"{here}.json"
    found = _read(file)
    if found is None:
        found = measure()
        with contextlib.suppress(OSError):  # without a cache, every process measures
            file.parent.mkdir(parents=True, exist_ok=True)
            own = file.with_name(f"{file.name}.{os.getpid()}")
            own.write_text(json.dumps(asdict(found)))
            try:
                os.link(own, file)  # fails where another process has just done so
            finally:
                own.unlink()
        found = _read(file) or found
    return found


def _read(file: FilePath) -> Path | None:
    """Return a kept choice; None where there is none, or one that cannot be read."""
    try:
        return Path(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _processor() -> str:
    """Return the processor's name."""
    with contextlib.suppress(OSError), FilePath("/proc/cpuinfo").open() as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


@contextmanager
def use(matmul: Matmul = "full", device: str = "cpu") -> Iterator[Path]:
    """Multiply float32 matrices as asked, until the block ends; the path is the block's value.

    The setting belongs to the process, not to a thread.
    """
    path = path_of(matmul, device)
    with _applied(path, device):
        yield path


@contextmanager
def _applied(path: Path, device: str) -> Iterator[None]:
    """Put a path in force and restore what was."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(path.setting)
    try:
        # Without the cache: the weights' rounded copies would outlive the optimiser's update.
        with torch.autocast(device, torch.bfloat16, enabled=path.autocast, cache_enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _measure(paths: list[Path], device: str) -> list[Path]:
    """Return the paths with error and speed on a square product, taken in turn on one thread.

    512 is the size of AVCA's step; a GPU would show its launches at that size.
    """
    size = 512 if device == "cpu" else 4096
    draw = torch.Generator().manual_seed(0)  # the run's own generator stays where it was
    left, right = (torch.randn(size, size, generator=draw).to(device) for _ in range(2))
    exact = left.double() @ right.double()
    errors, seconds = [float("nan")] * len(paths), [float("inf")] * len(paths)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for i, path in enumerate(paths):
            with _applied(path, device):  # the first product also sets the libraries up
                errors[i] = float(((left @ right).double() - exact).norm() / exact.norm())
        for _ in range(_TRIES):
            for i, path in enumerate(paths):
                with _applied(path, device):
                    seconds[i] = min(seconds[i], _seconds(lambda: left @ right, device))
    finally:
        torch.set_num_threads(threads)
    return [
        replace(path, error=error, gflops=2e-9 * size**3 / taken)
        for path, error, taken in zip(paths, errors, seconds, strict=True)
    ]


def _seconds(action: Callable[[], object], device: str) -> float:
    """Return the seconds of an action that lasts milliseconds.

    Wall time: the shortest of many lies within one slice of the scheduler, whoever else computes.
    """
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start
