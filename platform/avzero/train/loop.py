"""The one training loop: a generator of epoch records.

It runs unchanged in a single process, inside a Ray Tune trial and on every Ray Train worker; the
drivers differ only in who consumes the records. Whatever is random is a function of (seed, stage,
epoch, step), so a run resumed from its folder continues with the same numbers it would have drawn.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from avzero.data.benchmark import Benchmark
from avzero.errors import UserError
from avzero.models._contract import Batch, Context, Model, trainable
from avzero.models._layers import Site
from avzero.models._registry import build
from avzero.protocol.calibration import BOTH, calibrate
from avzero.protocol.counter import fold, site_keys
from avzero.protocol.stages import STAGE_1
from avzero.spec import Task
from avzero.train.data import EvaluationSet, StageData, nearest
from avzero.train.folder import RunFolder, State, Tensors
from avzero.train.records import Epoch, TrainingFailed
from avzero.train.schedule import Plateau
from avzero.train.world import TorchWorld

_DROPOUT = 0x44524F50


class Trainer:
    """Model, optimiser and data of one run; ``epochs`` is the loop.

    Args:
        task: the run.
        benchmark: open part of the benchmark the task names.
        folder: where checkpoints go; only rank 0 writes.
        world: the workers the global batch is split over; None for one.
        device: where to train.
    """

    def __init__(
        self,
        task: Task,
        benchmark: Benchmark,
        folder: RunFolder,
        world: TorchWorld | None = None,
        device: str = "cpu",
    ) -> None:
        if task.train.batch_size % (world.size if world else 1):
            raise UserError(
                f"batch_size {task.train.batch_size} cannot be split evenly over "
                f"{world.size if world else 1} workers; choose a multiple"
            )
        self.task = task
        self.folder = folder
        self.world = world
        self.device = torch.device(device)
        self.data = StageData(benchmark, task, self.device)
        self.model: Model = build(task, self.data.shapes).to(self.device)
        self.sites = sum(isinstance(m, Site) for m in self.model.modules())
        named = list(trainable(self.model))
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.optimizer = torch.optim.Adam(
            self.parameters,
            lr=task.train.lr,
            betas=(task.train.beta1, task.train.beta2),
            weight_decay=task.train.weight_decay,
            fused=True,
        )
        # Stage 2 with replayed rates has nothing to select on: VAL is part of its training set.
        self.val: EvaluationSet | None = None
        if task.lr_plan is None:
            self.val = self.data.evaluation(benchmark, STAGE_1)
        self.state = self._resume()

    @property
    def first(self) -> bool:
        """Whether this worker writes and evaluates."""
        return self.world is None or self.world.rank == 0

    def epochs(self) -> Iterator[Epoch]:
        """Yield every epoch, those of an earlier attempt first (marked ``replayed``).

        Raises:
            TrainingFailed: a loss term became NaN or infinite.
        """
        yield from list(self.state.history)
        while len(self.state.history) < self.task.train.epochs:
            yield self._epoch(len(self.state.history))
        if self.first and not self.state.finished:
            self.folder.finish(self.state)

    def _epoch(self, epoch: int) -> Epoch:
        """Train one epoch, evaluate, checkpoint; return its record."""
        train = self.task.train
        lr = self._learning_rate(epoch)
        started = time.perf_counter()
        losses = self._train(epoch, lr)
        seconds = time.perf_counter() - started
        # The last epoch is always looked at, so that every run has a best one.
        due = (epoch + 1) % train.evaluate_every == 0 or epoch + 1 == train.epochs
        val = self._evaluate() if due else {}
        # Stage 2 has as many epochs as stage 1 needed to its best, and ends with the last one:
        # VAL is part of its training data and chooses nothing (protocol.md section 5, step 2).
        score = val.get("HM", float(epoch))
        best = self.task.stage == 2 or (bool(val) and score > self.state.best_hm)
        if best:
            self.state.best_epoch, self.state.best_hm = epoch, score
        if self.state.plateau is not None and val:
            self.state.plateau.step(score)
        record = Epoch(
            epoch,
            losses,
            lr,
            val,
            best,
            round(seconds, 4),
            round(train.batches_per_epoch * train.batch_size / seconds, 1),
        )
        self.state.history.append(record)
        if self.first:
            self.folder.save(self.state, self._weights(), self._optimizer_tensors())
        return record

    def _learning_rate(self, epoch: int) -> float:
        """Return the epoch's learning rate: replayed, constant, or from the plateau rule."""
        if self.task.lr_plan is not None:
            return self.task.lr_plan[epoch]
        if self.state.plateau is None and self.task.train.schedule == "plateau":
            train = self.task.train
            self.state.plateau = Plateau(train.lr, train.patience, train.factor)
        return self.task.train.lr if self.state.plateau is None else self.state.plateau.lr

    def _train(self, epoch: int, lr: float) -> dict[str, float]:
        """Run the steps of an epoch; return the mean of every loss term."""
        task, train = self.task, self.task.train
        size, rank = (1, 0) if self.world is None else (self.world.size, self.world.rank)
        steps = train.batches_per_epoch
        draws = self.data.sampler.epoch(task.seed, task.stage, epoch, steps, train.batch_size)
        stream = fold(_DROPOUT, task.seed, task.stage, epoch)
        keys = site_keys(stream, steps, self.sites, self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        log: list[tuple[int, list[str], Tensor]] = []
        for step in range(steps):
            context = Context(keys[step], self.world)
            batch: Batch | None = None
            for number, part in enumerate(self.model.passes(step)):
                batch = batch or self.data.batch(draws, step, rank, size)
                terms = self.model.loss(batch, context.salted(3 * number)._replace(part=part))
                values = torch.stack(list(terms.values()))
                self.optimizer.zero_grad(set_to_none=True)
                values.sum().backward()  # type: ignore[no-untyped-call]
                self._share_gradients()
                self.optimizer.step()
                log.append((step, list(terms), values.detach()))
            if batch is not None:
                with torch.no_grad():
                    self.model.settle(batch, context)
        return self._mean_losses(log, epoch)

    def _share_gradients(self) -> None:
        """Average gradients over the workers; what a pass does not reach has none anywhere."""
        if self.world is not None:
            self.world.average([p.grad for p in self.parameters if p.grad is not None])

    def _mean_losses(
        self, log: list[tuple[int, list[str], Tensor]], epoch: int
    ) -> dict[str, float]:
        """Return the mean of every term over the steps that had it; refuse what is not finite."""
        flat = torch.cat([values for _, _, values in log])
        if self.world is not None:
            self.world.average([flat])
        flat = flat.to(torch.float64).cpu()
        places = [(step, name) for step, names, _ in log for name in names]
        if not torch.isfinite(flat).all():
            step, name = places[int((~torch.isfinite(flat)).nonzero()[0])]
            raise TrainingFailed(
                f"loss term {name} is not finite in epoch {epoch}, step {step}; "
                "lower lr, or standardise the inputs (protocol.input_scaling)"
            )
        index: dict[str, list[int]] = {}
        for i, (_, name) in enumerate(places):
            index.setdefault(name, []).append(i)
        return {name: float(flat[at].mean()) for name, at in index.items()}

    def _evaluate(self) -> dict[str, float]:
        """Return the VAL scores at the best grid value; rank 0 computes, all workers agree."""
        if self.val is None:
            return {}
        scores: dict[str, float] | None = {}
        if self.first:
            try:
                facts, scale = nearest(self.model, self.data, self.val, self.task.protocol)
                grid = self.task.protocol.beta_grid or self.model.beta_grid
                scores = calibrate(facts, grid, scale)[1][BOTH].as_dict()
            except FloatingPointError:
                scores = None  # the other workers wait for an answer: none is one too
        if self.world is not None:
            scores = self.world.from_first(scores)
        if scores is None:
            raise TrainingFailed(
                f"a distance on VAL is NaN after epoch {len(self.state.history)}; lower lr, or "
                "standardise the inputs (protocol.input_scaling)"
            )
        return scores

    def _weights(self) -> Tensors:
        """Return parameters and BatchNorm statistics by name."""
        return dict(self.model.state_dict())

    def _optimizer_tensors(self) -> Tensors:
        """Return Adam's moments and step by parameter name."""
        out: Tensors = {}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            for key, value in self.optimizer.state[parameter].items():
                out[f"{key}/{name}"] = value
        return out

    def _resume(self) -> State:
        """Take up the folder's last whole epoch, or start."""
        loaded = None
        if self.first:
            self.folder.begin()
            loaded = self.folder.load()
        if self.world is not None:
            # Workers may see different states of a folder somebody is still writing: rank 0's
            # view decides, and its tensors travel with it.
            loaded = self.world.from_first(loaded)
        if loaded is None:
            return State()
        state, weights, moments = loaded
        if weights:
            self.model.load_state_dict(weights)
            for name, parameter in zip(self.names, self.parameters, strict=True):
                # A parameter no pass has reached yet has no moments.
                self.optimizer.state[parameter] = {
                    key: moments[f"{key}/{name}"].to(self.device)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if f"{key}/{name}" in moments
                }
        return state


def lr_sequence(history: list[Epoch]) -> tuple[float, ...]:
    """Return the learning rate of every epoch of a stage-1 run."""
    return tuple(epoch.lr for epoch in history)
