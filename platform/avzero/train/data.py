"""A benchmark as a stage of training sees it: tensors on the device and rows to take from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from avzero.data.benchmark import Benchmark, BenchmarkInfo, Part
from avzero.errors import UserError
from avzero.models._contract import Batch, Model, Shapes
from avzero.protocol.sampling import ClassUniformSampler, Draws
from avzero.protocol.scoring import Nearest
from avzero.protocol.stages import STAGES, Stage
from avzero.spec import Protocol, Task

_ROWS = 4096
"""Rows embedded at once in evaluation."""


@dataclass(frozen=True)
class Scaling:
    """Input scaling per modality (P-17): subtract ``shift``, divide by ``scale``, or unit norm."""

    shift: Mapping[str, Tensor]
    scale: Mapping[str, Tensor]
    unit_norm: bool
    dtype: torch.dtype

    def apply(self, modality: str, rows: Tensor) -> Tensor:
        """Return scaled rows [..., d] in the run's precision."""
        rows = rows.to(self.dtype)
        if self.unit_norm:
            return torch.nn.functional.normalize(rows, dim=-1)
        if modality in self.shift:
            return (rows - self.shift[modality]) / self.scale[modality]
        return rows


@dataclass(frozen=True)
class EvaluationSet:
    """Rows to score and the classes they may be assigned to."""

    features: Mapping[str, Tensor]
    rows: Tensor
    target: Tensor
    seen_ids: Tensor
    unseen_ids: Tensor

    def chunks(self, scaling: Scaling) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield (features by modality, targets) of at most ``_ROWS`` samples."""
        for start in range(0, len(self.rows), _ROWS):
            rows = self.rows[start : start + _ROWS]
            taken = {m: scaling.apply(m, x.index_select(0, rows)) for m, x in self.features.items()}
            yield taken, self.target[start : start + _ROWS]


class StageData:
    """Everything a stage needs of a benchmark's open part, on one device.

    Args:
        benchmark: the open part.
        task: gives the stage, the precision, and text set, alignment and scaling.
        device: where to train.
    """

    def __init__(self, benchmark: Benchmark, task: Task, device: torch.device) -> None:
        protocol, stage = task.protocol, task.stage
        self.info = benchmark.info
        self.stage = STAGES[stage]
        self.device = device
        self.dtype: torch.dtype = getattr(torch, task.train.precision)
        vectors = benchmark.info.class_vectors(protocol.text, protocol.text_alignment)
        self.class_text = torch.from_numpy(vectors).to(device, self.dtype)
        self.features = _tensors(benchmark.part, device)
        samples = benchmark.part.samples
        rows = samples.rows(*self.stage.train)
        if not len(rows):
            raise UserError(f"benchmark {self.info.name}: no training samples in stage {stage}")
        self.sampler = ClassUniformSampler(
            torch.from_numpy(samples.class_id[rows].astype(np.int64)).to(device),
            torch.from_numpy(rows).to(device),
        )
        self.train_text = self.class_text[self.sampler.classes]
        _require_text(self.train_text, self.sampler.classes, self.info)
        self.scaling = _fit_scaling(self.features, rows, protocol, self.dtype)

    @property
    def shapes(self) -> Shapes:
        """Sizes a system must be built for."""
        return Shapes(dict(self.info.dims), self.class_text.shape[1])

    def batch(self, draws: Draws, step: int, rank: int, size: int) -> Batch:
        """Gather one worker's share of a step's global batch."""
        share = draws.row.shape[1] // size
        mine = slice(rank * share, (rank + 1) * share)
        row, label = draws.row[step, mine], draws.label[step, mine]
        flat_row, flat_label = row.reshape(-1), label.reshape(-1)
        features = {
            m: self.scaling.apply(m, x.index_select(0, flat_row).view(share, 2, -1))
            for m, x in self.features.items()
        }
        text = self.train_text.index_select(0, flat_label).view(share, 2, -1)
        return Batch(features, text, label, self.train_text)

    def evaluation(self, benchmark: Benchmark, stage: Stage) -> EvaluationSet:
        """Return the evaluation set of ``stage`` (VAL or TEST) from a benchmark part."""
        return evaluation_set(benchmark, stage, self.class_text, self.device)


def evaluation_set(
    benchmark: Benchmark, stage: Stage, text: Tensor, device: torch.device
) -> EvaluationSet:
    """Return the rows of a stage's evaluation roles and their candidate classes."""
    samples = benchmark.part.samples
    rows = samples.rows(*stage.evaluate)
    if not len(rows):
        raise UserError(
            f"benchmark {benchmark.info.name}: no samples to evaluate in stage {stage.number}"
        )
    seen = torch.from_numpy(benchmark.info.classes.ids(*stage.seen).astype(np.int64)).to(device)
    unseen = torch.from_numpy(benchmark.info.classes.ids(*stage.unseen).astype(np.int64))
    unseen = unseen.to(device)
    for ids in (seen, unseen):
        _require_text(text[ids], ids, benchmark.info)
    return EvaluationSet(
        _tensors(benchmark.part, device),
        torch.from_numpy(rows).to(device),
        torch.from_numpy(samples.class_id[rows].astype(np.int64)).to(device),
        seen,
        unseen,
    )


@torch.no_grad()
def nearest(
    model: Model, data: EvaluationSet, text: Tensor, scaling: Scaling, protocol: Protocol
) -> tuple[dict[str, Nearest], float]:
    """Score a model on an evaluation set, in eval mode.

    Returns:
        What scoring needs, by modality, and the scale of the class embeddings: the median over
        unseen classes of the distance to their nearest seen class (for ``calibration: scaled``).
    """
    was_training = model.training
    model.eval()
    try:
        classes = torch.cat([data.seen_ids, data.unseen_ids])
        embedded = model.embed_classes(text[classes])
        n_seen = len(data.seen_ids)
        blocks: dict[str, list[Nearest]] = {}
        for features, target in data.chunks(scaling):
            distances = model.distances(
                model.embed(features), embedded, protocol.distance == "squared_l2"
            )
            for name, d in distances.items():
                facts = Nearest.of(
                    d[:, :n_seen], d[:, n_seen:], target, data.seen_ids, data.unseen_ids
                )
                blocks.setdefault(name, []).append(facts)
        gaps = torch.cdist(embedded[n_seen:], embedded[:n_seen]).amin(dim=1)
        scale = float(gaps.median())
    finally:
        model.train(was_training)
    return {name: Nearest.concatenate(parts) for name, parts in blocks.items()}, scale


def _tensors(part: Part, device: torch.device) -> dict[str, Tensor]:
    """Return the features as tensors; on the CPU they stay the cache's shared memory map."""
    return {m: torch.from_numpy(np.asarray(a)).to(device) for m, a in part.features.items()}


def _require_text(vectors: Tensor, ids: Tensor, info: BenchmarkInfo) -> None:
    """Refuse classes without a text vector before anything is trained."""
    missing = torch.isnan(vectors).any(dim=1)
    if missing.any():
        name = info.classes.names[int(ids[int(missing.nonzero()[0])])]
        raise UserError(
            f"benchmark {info.name}: class {name!r} has no text vector in the chosen text set; "
            "choose another 'text', or ingest with a complete text file"
        )


def _fit_scaling(
    features: Mapping[str, Tensor], rows: np.ndarray, protocol: Protocol, dtype: torch.dtype
) -> Scaling:
    """Fit input scaling on the training rows of the stage only."""
    if protocol.input_scaling != "standard":
        return Scaling({}, {}, protocol.input_scaling == "l2", dtype)
    shift, scale = {}, {}
    for modality, table in features.items():
        index = torch.from_numpy(rows).to(table.device)
        total = torch.zeros(table.shape[1], dtype=torch.float64, device=table.device)
        square = torch.zeros_like(total)
        for start in range(0, len(index), _ROWS):
            block = table.index_select(0, index[start : start + _ROWS]).to(torch.float64)
            total += block.sum(0)
            square += block.square().sum(0)
        mean = total / len(index)
        std = (square / len(index) - mean.square()).clamp_min(0).sqrt()
        shift[modality] = mean.to(dtype)
        # A constant dimension carries nothing; dividing by 1 leaves it at zero.
        scale[modality] = torch.where(std < 1e-6, torch.ones_like(std), std).to(dtype)
    return Scaling(shift, scale, False, dtype)
