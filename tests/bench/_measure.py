"""Measuring: CPU time of this process and peak memory, and where the numbers come from."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def cpu_of(action: Callable[[], object]) -> float:
    """Return the CPU seconds (user and system, all threads) an action takes in this process."""
    before = time.process_time()
    action()
    return time.process_time() - before


def rounds(variants: dict[str, Callable[[], object]], count: int) -> dict[str, list[float]]:
    """Run the variants in turn, ``count`` times; return CPU seconds of every round by variant."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(count):
        for name, action in variants.items():
            taken[name].append(cpu_of(action))
    return taken


def ratio_line(label: str, above: Sequence[float], below: Sequence[float], goal: str) -> str:
    """Return median and worst of the per-round ratios, beside the goal."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return (
        f"{label}: median {statistics.median(ratios):.3g}, lowest {min(ratios):.3g}, "
        f"highest {max(ratios):.3g} over {len(ratios)} rounds (goal {goal})"
    )


def in_fresh_process(module: str, *arguments: str) -> dict[str, Any]:
    """Run ``python -m module arguments`` and return the JSON of its last line."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{module} {arguments} failed:\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def peak_bytes() -> int:
    """Return the highest resident memory of this program (``ru_maxrss`` would count the parent's
    before exec)."""
    return _status_bytes("VmHWM")


def memory() -> dict[str, int]:
    """Return bytes: ``peak`` (see ``peak_bytes``), and ``own``, the peak without what now lies in
    files (libraries, mapped features), which other processes share."""
    return {"peak": peak_bytes(), "own": peak_bytes() - _status_bytes("RssFile")}


def _status_bytes(field: str) -> int:
    """Return a field of this process's status."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(ln.split()[1]) for ln in status.splitlines() if ln.startswith(field))


class Family:
    """CPU seconds of this process and all it starts, also of those that end while a block runs.

        with Family() as family: ...
        family.seconds

    A look every 0.2 s: what a process does after the last look at it is lost.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._ticks: dict[tuple[int, str], int] = {}
        self._over = threading.Event()

    def __enter__(self) -> Family:
        self._look()
        self._before = sum(self._ticks.values())
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()
        spent = sum(self._ticks.values()) - self._before
        self.seconds = spent / os.sysconf("SC_CLK_TCK")

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            self._look()

    def _look(self) -> None:
        """Note what every process of the family has used."""
        children: dict[int, list[int]] = {}
        found: dict[int, tuple[str, int]] = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has just ended
            process = int(path.parent.name)
            children.setdefault(int(fields[1]), []).append(process)
            found[process] = fields[19], int(fields[11]) + int(fields[12])
        waiting = [os.getpid()]
        while waiting:
            process = waiting.pop()
            if process in found:
                start, ticks = found[process]
                self._ticks[process, start] = ticks
            waiting += children.get(process, [])


def machine() -> str:
    """Return the processor, cores and library versions of this machine."""
    import numpy
    import pyarrow
    import torch

    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    cores = len(Path("/proc/cpuinfo").read_text().split("processor\t:")) - 1
    return (
        f"{model}, {cores} cores, Python {platform.python_version()}, torch {torch.__version__}, "
        f"numpy {numpy.__version__}, pyarrow {pyarrow.__version__}; "
        f"{time.strftime('%Y-%m-%d %H:%M')}"
    )
