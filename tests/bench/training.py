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
from pathlib import Path

import torch

from avzero.data.avca import read_avca
from avzero.data.simulate import simulate
from avzero.data.store import FeatureStore
from avzero.models._contract import Context
from avzero.models._registry import make_config
from avzero.protocol.counter import fold, site_keys
from avzero.spec import Preset, Protocol, Task, TrainConfig
from avzero.train.folder import RunFolder
from avzero.train.loop import Trainer
from tests.bench._measure import machine, ratio_line, rounds
from tests.toys import taken

STEPS = 12


def compare(trainer: Trainer, count: int) -> None:
    """Print the ratio of the two rates over interleaved rounds."""
    batch = trainer.task.train.batch_size
    draws = trainer.data.sampler.epoch(0, 1, 0, STEPS, batch)
    ready = [taken(trainer.data, draws, step, 0, 1) for step in range(STEPS)]
    keys = site_keys(fold(0), STEPS, trainer.sites, trainer.device)

    def bare() -> None:
        trainer.model.train()
        for step in range(STEPS):
            terms = trainer.model.loss(ready[step], Context(keys[step]))
            trainer.optimizer.zero_grad(set_to_none=True)
            torch.stack(list(terms.values())).sum().backward()
            trainer.optimizer.step()

    def loop() -> None:
        trainer._train(0, 1e-3)

    taken = rounds({"bare": bare, "loop": loop}, count)
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
        store = FeatureStore(f"{scratch}/store")
        simulate(Path(scratch) / "UCF", "UCF-main")
        info, _ = store.put(read_avca(Path(scratch) / "UCF", "main", "main"))
        benchmark = store.open(info.name)
        for batch in (256, 64):
            config = make_config("avca", {}, Preset.PAPER, "bench").model_dump()
            train = TrainConfig(batch_size=batch, batches_per_epoch=STEPS, weight_decay=1e-5)
            task = Task(
                benchmark=info.digest,
                model="avca",
                config=config,
                train=train,
                protocol=Protocol(),
                seed=0,
            )
            compare(Trainer(task, benchmark, RunFolder(store.storage, task)), count)


if __name__ == "__main__":
    main()
