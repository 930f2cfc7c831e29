"""A simulated benchmark of UCF's size (main features), and AVCA's bare step on it."""

from __future__ import annotations

from pathlib import Path

import torch

from avzero.data.avca import read_avca
from avzero.data.benchmark import Benchmark
from avzero.data.simulate import simulate
from avzero.data.store import FeatureStore
from avzero.models._basic import memory
from avzero.models._contract import Context, trainable
from avzero.models._layers import Site
from avzero.models._registry import build, make_config
from avzero.protocol.counter import fold, site_keys
from avzero.spec import Preset, Protocol, Task, TrainConfig
from avzero.train.data import StageData
from tests.toys import taken


def ucf_size(scratch: str) -> tuple[FeatureStore, Benchmark]:
    """Simulate the release, ingest it; return its store and its open part."""
    store = FeatureStore(f"{scratch}/store")
    simulate(Path(scratch) / "UCF", "UCF-main")
    info, _ = store.put(read_avca(Path(scratch) / "UCF", "main", "main"))
    return store, store.open(info.name)


def avca_task(benchmark: Benchmark, batch: int, steps: int, preset: Preset) -> Task:
    """Return AVCA with the settings published for UCF, main features (avca.md section 6)."""
    return Task(
        benchmark=benchmark.info.digest,
        model="avca",
        config=make_config("avca", {}, preset, "bench").model_dump(mode="json"),
        train=TrainConfig(batch_size=batch, batches_per_epoch=steps, weight_decay=1e-5),
        protocol=Protocol(),
        seed=0,
    )


class BareSteps:
    """Loss, backward and Adam on batches that lie ready: no sampling, no gathering, no log."""

    def __init__(self, benchmark: Benchmark, task: Task) -> None:
        data = StageData(benchmark, task, torch.device("cpu"))
        count, size = task.train.batches_per_epoch, task.train.batch_size
        draws = data.sampler.epoch(0, 1, 0, count, size)
        self.batches = [taken(data, draws, step, 0, 1) for step in range(count)]
        self.model = build(task, data.shapes).train()
        sites = sum(isinstance(module, Site) for module in self.model.modules())
        self.keys = site_keys(fold(0), count, sites, torch.device("cpu"))
        learning = [parameter for _, parameter in trainable(self.model)]
        # As many of these as of an epoch's 500 steps move statistics that are still remembered.
        self._tracked = round(memory(self.model) / 500 * count)
        self.optimizer = torch.optim.Adam(learning, lr=1e-3, weight_decay=1e-5, fused=True)

    def step(self, number: int) -> None:
        """Take one step."""
        tracked = number >= len(self.batches) - self._tracked
        context = Context(self.keys[number], tracked=tracked)
        terms = self.model.loss(self.batches[number], context)
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def all(self) -> None:
        """Take as many steps as there are batches."""
        for number in range(len(self.batches)):
            self.step(number)
