"""The loop's overhead: samples per second of training against the bare compute of its steps.

    make bench B=training

Both run AVCA on a simulated benchmark of UCF's size (main features), in one process, one thread,
in turn. "Bare" is loss, backward and optimiser on batches that lie in memory already; "loop" is
the product: sampling, gathering, random keys, accumulating and checking losses. Goal (issue 2):
the loop reaches at least 0.85 of the bare rate.
"""

from __future__ import annotations

import sys
import tempfile

import torch

from avzero.data.benchmark import Benchmark
from avzero.data.store import FeatureStore
from avzero.spec import Preset
from avzero.train import array
from avzero.train.folder import RunFolder
from avzero.train.loop import Trainer
from tests.bench._measure import machine, ratio_line, rounds
from tests.bench._ucf import BareSteps, avca_task, ucf_size

STEPS = 12


def compare(store: FeatureStore, benchmark: Benchmark, batch: int, count: int) -> None:
    """Print the ratio of the two rates over interleaved rounds."""
    task = avca_task(benchmark, batch, STEPS, Preset.PAPER)
    trainer = Trainer(task, benchmark, RunFolder(store.storage, task))
    bare = BareSteps(benchmark, task)
    taken = rounds({"bare": bare.all, "loop": lambda: array._train([trainer])}, count)
    pairs = STEPS * batch
    print(
        f"batch {batch}: bare {pairs / min(taken['bare']):,.0f}, loop "
        f"{pairs / min(taken['loop']):,.0f} pairs per CPU second (best round)"
    )
    print("  " + ratio_line("loop rate / bare rate", taken["bare"], taken["loop"], "at least 0.85"))


def main() -> None:
    """Run at batch 256 and 64."""
    torch.set_num_threads(1)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 11
    print(machine())
    with tempfile.TemporaryDirectory() as scratch:
        store, benchmark = ucf_size(scratch)
        for batch in (256, 64):
            compare(store, benchmark, batch, count)


if __name__ == "__main__":
    main()
