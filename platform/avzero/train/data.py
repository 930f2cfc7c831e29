"""A benchmark as a stage of training sees it: tensors on the device and rows to take from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from avzero.data.benchmark import MODALITIES, Benchmark, BenchmarkInfo
from avzero.errors import UserError
from avzero.models._contract import Batch, Model, Shapes
from avzero.models._registry import model_class
from avzero.protocol.calibration import BOTH, MISSING
from avzero.protocol.retrieval import Gallery
from avzero.protocol.sampling import ClassUniformSampler
from avzero.protocol.scoring import Blocks, Nearest
from avzero.protocol.stages import STAGES, Stage
from avzero.spec import InputScaling, Protocol, Task
from avzero.train.steps import Steps, Table, Window, rows_at_once, tables, take, vectors

_CELLS = 1 << 19
"""Distances taken at once on a CPU: they should stay in the cache."""
_CELLS_ELSEWHERE = 1 << 26
_ROWS = 256
"""Samples compared at once even if there are more distances: each time all classes are read."""


@dataclass(frozen=True)
class Scaling:
    """Input scaling per modality (P-17), and which modality is withheld.

    ``rule``: see ``spec.InputScaling``; ``shift`` and ``scale`` are fitted on training rows for
    the rules that need it. Rows of an ``absent`` modality are zeros.
    """

    rule: InputScaling
    dtype: torch.dtype
    shift: Mapping[str, Tensor] = field(default_factory=dict)
    scale: Mapping[str, Tensor] = field(default_factory=dict)
    absent: frozenset[str] = frozenset()

    def apply(self, modality: str, rows: Tensor) -> Tensor:
        """Return scaled rows [..., d] in the run's precision."""
        rows = rows.to(self.dtype)
        if modality in self.absent:
            return torch.zeros_like(rows)
        if self.rule == "l2":
            return torch.nn.functional.normalize(rows, dim=-1)
        if self.rule == "none":
            return rows
        rows = (rows - self.shift[modality]) / self.scale[modality]
        return rows.clamp(0, 1) if self.rule == "minmax" else rows

    def without(self, modality: str) -> Scaling:
        """Return the same scaling with one more modality withheld."""
        return replace(self, absent=self.absent | {modality})


@dataclass(frozen=True)
class EvaluationSet:
    """Rows to score and the classes they may be assigned to."""

    features: Mapping[str, Table]
    rows: Tensor
    target: Tensor
    seen_ids: Tensor
    unseen_ids: Tensor
    window: Window = field(default_factory=Window)

    def facts(self, distances: Tensor, target: Tensor) -> Nearest:
        """Return what scoring needs of distances [b, C (+ U)] and true classes [b]."""
        return Nearest.of(distances, target, self.seen_ids, self.unseen_ids)

    def facts_of_many(self, distances: Tensor, target: Tensor) -> list[Nearest | None]:
        """Likewise for M systems at once, from [M, b, C (+ U)]; None where a distance is NaN."""
        return Nearest.of_many(distances, target, self.seen_ids, self.unseen_ids)

    def blocks(self, count: int) -> Iterator[slice]:
        """Yield even parts of ``count`` samples whose distances are to be taken at once.

        Even, because few samples at the end would be compared by another formula (torch.cdist).
        """
        classes = len(self.seen_ids) + len(self.unseen_ids)
        cells = _CELLS if self.rows.device.type == "cpu" else _CELLS_ELSEWHERE
        parts = max(1, -(-count // max(_ROWS, cells // classes)))
        for i in range(parts):
            yield slice(i * count // parts, (i + 1) * count // parts)

    def chunks(self, scaling: Scaling) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield (features by modality, targets) of as many samples as fit at once."""
        count = rows_at_once(self.features, self.rows, self.window)
        for start in range(0, len(self.rows), count):
            rows = self.rows[start : start + count]
            taken = take(self.features, rows, scaling, self.window)
            yield taken, self.target[start : start + count]


class StageData:
    """Everything a stage needs of a benchmark's open part, on one device.

    Args:
        benchmark: the open part.
        task: gives the stage, the precision, and text set, alignment and scaling.
        device: where to train.
    """

    def __init__(self, benchmark: Benchmark, task: Task, device: torch.device) -> None:
        protocol, stage = task.protocol, task.stage
        require_features(task.model, benchmark.info, protocol)
        self.info = benchmark.info
        self.stage = STAGES[stage]
        self.device = device
        self.dtype: torch.dtype = getattr(torch, task.train.precision)
        vectors = benchmark.info.class_vectors(protocol.text, protocol.text_alignment)
        self.class_text = torch.from_numpy(vectors).to(device, self.dtype)
        self.features = tables(benchmark.part, device)
        steps, seconds = protocol.max_steps, benchmark.info.step_seconds
        self.window = Window(steps, seconds)
        self.evaluation_window = Window(protocol.max_steps_eval or steps, seconds)
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
        self.seed = task.seed
        self.scaling = _fit_scaling(self.features, rows, task, self.dtype)
        self._rows, self._class_id = rows, samples.class_id[rows]
        _require_nonnegative(task, self)
        every = torch.from_numpy(rows).to(device)
        # One length for all batches: padding that varied would change the last bits of sums.
        spans = self.window.spans(self.features, every)
        self.longest = {m: int(length.max()) for m, (_, length) in spans.items()}

    def training_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Return class ids [n] and row numbers [n] of the stage's training samples."""
        return self._class_id, self._rows

    @property
    def shapes(self) -> Shapes:
        """Sizes a system must be built for."""
        return Shapes(dict(self.info.dims), self.class_text.shape[1], self.info.temporal)

    def low(self) -> float:
        """Return the smallest scaled feature of the training rows."""
        return min(float(x.min()) for block, _ in self.blocks(self._rows) for x in block.values())

    def blocks(self, rows: np.ndarray) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield (scaled features, row numbers) of as many samples as fit at once."""
        every = torch.from_numpy(rows).to(self.device)
        count = rows_at_once(self.features, every, self.window)
        for start in range(0, len(rows), count):
            index = every[start : start + count]
            yield take(self.features, index, self.scaling, self.window), index

    def gather(self, rows: Tensor, label: Tensor, draw: tuple[int, Tensor], mine: slice) -> Batch:
        """Gather the pairs of one or several slots.

        Args:
            rows: int64 [k, B, 2], row numbers of the global batches.
            label: int64 [k, B, 2], positions in the ascending list of training classes.
            draw: key and counters [B * 2] of random windows of sequences (then k is 1).
            mine: this worker's pairs, of B.

        Returns:
            Everything with a leading dimension k.
        """
        k, share = len(rows), mine.stop - mine.start
        part = slice(None)
        if self.info.temporal:  # the window of a pair depends on its place in the global batch
            part = slice(2 * mine.start, 2 * mine.stop)
        else:
            rows = rows[:, mine]
        label = label[:, mine]
        flat = rows.reshape(-1)
        taken = take(self.features, flat, self.scaling, self.window, draw, part, self.longest)
        features = {name: x.view(k, share, 2, *x.shape[1:]) for name, x in taken.items()}
        text = self.train_text.index_select(0, label.reshape(-1)).view(k, share, 2, -1)
        return Batch(features, text, label, self.train_text.expand(k, -1, -1))

    def evaluation(self, benchmark: Benchmark, stage: Stage) -> EvaluationSet:
        """Return the evaluation set of ``stage`` (VAL or TEST) from a benchmark part."""
        return evaluation_set(
            benchmark, stage, self.class_text, self.device, self.evaluation_window
        )


def evaluation_set(
    benchmark: Benchmark,
    stage: Stage,
    text: Tensor,
    device: torch.device,
    window: Window | None = None,
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
        tables(benchmark.part, device),
        torch.from_numpy(rows).to(device),
        torch.from_numpy(samples.class_id[rows].astype(np.int64)).to(device),
        seen,
        unseen,
        window or Window(),
    )


class SeenRows:
    """The stage's training samples of some seen classes (``models._contract.TrainingRows``).

    Found when they are first asked for: most systems never do, and evaluate every epoch.
    """

    def __init__(self, data: StageData, seen_ids: Tensor) -> None:
        self._data, self._seen = data, seen_ids.cpu().numpy()
        self.seed = data.seed

    @cached_property
    def _kept(self) -> tuple[np.ndarray, np.ndarray]:
        """Class ids and row numbers of the samples."""
        classes, rows = self._data.training_rows()
        keep = np.isin(classes, self._seen)
        return classes[keep], rows[keep]

    @cached_property
    def label(self) -> Tensor:
        """int64 [n], positions among the seen candidate classes."""
        return torch.from_numpy(np.searchsorted(self._seen, self._kept[0])).to(self._data.device)

    def blocks(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield (features, labels) of all rows, in a fixed order."""
        start = 0
        for features, index in self._data.blocks(self._kept[1]):
            yield features, self.label[start : start + len(index)]
            start += len(index)


@contextmanager
def _eval_mode(models: Sequence[Model]) -> Iterator[None]:
    """Put systems into eval mode, and back as they were."""
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


@torch.no_grad()
def headline(
    models: Sequence[Model], stage: StageData, data: EvaluationSet, squared: bool
) -> list[Nearest | None]:
    """Score systems trained side by side on one evaluation set, in eval mode.

    Rows are taken once for all, and distances reduced in one pass; each system's facts are those
    that ``nearest`` has of it alone.

    Args:
        models: the systems; alike in what they return.
        stage: what all were trained on.
        data: rows to score and their candidate classes.
        squared: compare squared distances.

    Returns:
        Per system what scoring needs of ``both``; None where a distance is NaN.
    """
    text = stage.class_text[torch.cat([data.seen_ids, data.unseen_ids])]
    found: list[Blocks | None] = [Blocks(len(data.rows)) for _ in models]
    with _eval_mode(models):
        rows_of_seen = SeenRows(stage, data.seen_ids)
        tables = [m.candidates(text, len(data.seen_ids), rows_of_seen) for m in models]
        for features, labels in data.chunks(stage.scaling):
            embedded = [model.embed(features) for model in models]
            for rows in data.blocks(len(labels)):
                distances = []
                for model, z, table in zip(models, embedded, tables, strict=True):
                    own = model.distances({k: x[rows] for k, x in z.items()}, table, squared)
                    distances.append(of_present(own, stage.scaling.absent)[BOTH])
                facts = data.facts_of_many(torch.stack(distances), labels[rows])
                for m, block in enumerate(facts):
                    if (blocks := found[m]) is not None and block is not None:
                        blocks.add(block)
                    else:
                        found[m] = None
    return [None if blocks is None else blocks.whole() for blocks in found]


@torch.no_grad()
def nearest(
    model: Model,
    stage: StageData,
    data: EvaluationSet,
    protocol: Protocol,
    every: bool = False,
    keep: Gallery | None = None,
) -> dict[str, Nearest]:
    """Score a model on an evaluation set, in eval mode.

    Args:
        model: the system.
        stage: what it was trained on.
        data: rows to score and their candidate classes.
        protocol: gives the distance.
        every: score every modality the system has distances of, and the whole with each
            modality missing, as ``missing_<modality>``; else only ``both``.
        keep: takes embeddings and distances of the whole samples, for retrieval.

    Returns:
        What scoring needs, by modality.

    Raises:
        FloatingPointError: a distance that is scored is NaN.
    """
    with _eval_mode([model]):
        text = stage.class_text[torch.cat([data.seen_ids, data.unseen_ids])]
        table = model.candidates(text, len(data.seen_ids), SeenRows(stage, data.seen_ids))
        squared = protocol.distance == "squared_l2"
        found: dict[str, Blocks] = {}

        def score(scaling: Scaling, missing: str = "") -> None:
            for features, labels in data.chunks(scaling):
                embedded = model.embed(features)
                for rows in data.blocks(len(labels)):
                    z, target = {name: x[rows] for name, x in embedded.items()}, labels[rows]
                    whole = model.distances(z, table, squared)
                    if keep is not None and not missing:
                        keep.add(z, {name: d[:, : len(text)] for name, d in whole.items()}, target)
                    for name, d in of_present(whole, scaling.absent).items():
                        if name == BOTH or (every and not missing):
                            blocks = found.setdefault(missing or name, Blocks(len(data.rows)))
                            blocks.add(data.facts(d, target))

        score(stage.scaling)
        for modality in data.features if every and not stage.scaling.absent else ():
            try:
                score(stage.scaling.without(modality), MISSING + modality)
            except FloatingPointError:
                # It says something of the system without that modality, and nothing of the run.
                found.pop(MISSING + modality, None)
    return {name: blocks.whole() for name, blocks in found.items()}


def of_present(distances: dict[str, Tensor], absent: frozenset[str]) -> dict[str, Tensor]:
    """Return the distances that mean something where a modality is absent.

    A system with a distance per modality is then judged by the one it has: a sum with, or a gate
    towards, the embedding of zeros would not be what "audio only" means.
    """
    present = [m for m in MODALITIES if m in distances and m not in absent]
    if not absent or not present:
        return distances
    return {present[0]: distances[present[0]], BOTH: distances[present[0]]}


def require_features(model: str, info: BenchmarkInfo, protocol: Protocol) -> None:
    """Refuse a benchmark of a kind a system does not take.

    Raises:
        UserError: sequences for a system of vectors, or the reverse; a window on vectors.
    """
    if not info.temporal and (protocol.max_steps or protocol.max_steps_eval):
        raise UserError(
            f"protocol.max_steps: benchmark {info.name} has one vector per video, nothing to cut; "
            "remove it"
        )
    kinds = model_class(model).card.features
    if ("temporal" in kinds) if info.temporal else set(kinds) - {"temporal"}:
        return
    has = "temporal features" if info.temporal else "one vector per video"
    raise UserError(
        f"{model} takes {' and '.join(kinds)} features, and benchmark {info.name} has {has}; "
        "choose another feature set, or another system (avzero models)"
    )


def _require_text(vectors: Tensor, ids: Tensor, info: BenchmarkInfo) -> None:
    """Refuse classes without a text vector before anything is trained."""
    missing = torch.isnan(vectors).any(dim=1)
    if missing.any():
        name = info.classes.names[int(ids[int(missing.nonzero()[0])])]
        raise UserError(
            f"benchmark {info.name}: class {name!r} has no text vector in the chosen text set; "
            "choose another 'text', or ingest with a complete text file"
        )


def _require_nonnegative(task: Task, data: StageData) -> None:
    """Refuse features a system cannot use, with its own words."""
    why = model_class(task.model).needs_nonnegative
    if why and (low := data.low()) < 0:
        raise UserError(
            f"{task.model} cannot use the features of benchmark {data.info.name} (smallest value "
            f"{low:.3g}): {why}"
        )


def _fit_scaling(
    features: Mapping[str, Table], rows: np.ndarray, task: Task, dtype: torch.dtype
) -> Scaling:
    """Fit input scaling on the training rows of the stage only."""
    protocol = task.protocol
    rule = task.config.get("input_scaling", "protocol")
    rule = protocol.input_scaling if rule == "protocol" else rule
    absent = frozenset(m for m in features if protocol.modality not in ("both", m))
    if rule in ("none", "l2"):
        return Scaling(rule, dtype, absent=absent)
    shift, scale = {}, {}
    for modality, table in features.items():
        shift[modality], width = _fit(table, rows, rule)
        # A constant dimension carries nothing; dividing by 1 leaves it at zero.
        scale[modality] = torch.where(width < 1e-6, torch.ones_like(width), width).to(dtype)
        shift[modality] = shift[modality].to(dtype)
    return Scaling(rule, dtype, shift, scale, absent)


def _fit(table: Table, rows: np.ndarray, rule: str) -> tuple[Tensor, Tensor]:
    """Return mean and deviation, or minimum and range, of each dimension over ``rows``.

    Of sequences every step counts once.
    """
    values = table.values if isinstance(table, Steps) else table
    device = values.device
    total = torch.zeros(values.shape[1], dtype=torch.float64, device=device)
    square, low, high = torch.zeros_like(total), total + torch.inf, total - torch.inf
    count = 0
    for some in vectors(table, torch.from_numpy(rows).to(device)):
        block = some.to(torch.float64)
        count += len(block)
        total += block.sum(0)
        square += block.square().sum(0)
        low = torch.minimum(low, block.amin(0))
        high = torch.maximum(high, block.amax(0))
    if rule == "minmax":
        return low, high - low
    mean = total / count
    return mean, (square / count - mean.square()).clamp_min(0).sqrt()
