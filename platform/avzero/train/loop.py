"""The one training loop: a generator of epoch records.

It runs unchanged in a single process, inside a Ray Tune trial and on every Ray Train worker, alone
or stacked with others (``train.array`` has the steps); the drivers differ only in who consumes the
records. Whatever is random is a function of (seed, stage, epoch, step), so a run resumed from its
folder continues with the same numbers it would have drawn.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from avzero.data.benchmark import Benchmark
from avzero.errors import UserError
from avzero.models._contract import Model, trainable
from avzero.models._layers import Site
from avzero.models._registry import build
from avzero.protocol.sampling import Draws
from avzero.protocol.scoring import Nearest
from avzero.protocol.stages import STAGE_1
from avzero.spec import Task
from avzero.train.array import run_epoch
from avzero.train.data import EvaluationSet, StageData
from avzero.train.folder import RunFolder, State, Tensors
from avzero.train.records import Epoch, TrainingFailed
from avzero.train.schedule import Plateau
from avzero.train.structure import structure
from avzero.train.world import TorchWorld


class Trainer:
    """Model, optimiser and data of one run; ``epochs`` is the loop.

    Args:
        task: the run.
        benchmark: open part of the benchmark the task names.
        folder: where checkpoints go; only rank 0 writes.
        world: the workers the global batch is split over; None for one.
        device: where to train.
        data: the benchmark as the task's stage sees it, where several runs share it.
    """

    def __init__(
        self,
        task: Task,
        benchmark: Benchmark,
        folder: RunFolder,
        world: TorchWorld | None = None,
        device: str = "cpu",
        data: StageData | None = None,
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
        self.data = data or StageData(benchmark, task, self.device)
        self.model: Model = build(task, self.data.shapes, self.device)
        classes, steps = len(self.data.train_text), max(self.data.longest.values(), default=0)
        self.structure = structure(self.model, task, self.data.shapes, classes, steps)
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
        self._lr = task.train.lr
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
        while self.epoch < self.task.train.epochs:
            for _, outcome in run_epoch([self]):
                if isinstance(outcome, TrainingFailed):
                    raise outcome
                yield outcome
        self.finish()

    @property
    def epoch(self) -> int:
        """Number of the next epoch."""
        return len(self.state.history)

    def draws(self) -> Draws:
        """Return the pairs of the next epoch."""
        task, train = self.task, self.task.train
        steps, batch = train.batches_per_epoch, train.batch_size
        return self.data.sampler.epoch(task.seed, task.stage, self.epoch, steps, batch)

    def begin_epoch(self) -> None:
        """Set the next epoch's learning rate."""
        self._lr = self._learning_rate(self.epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr
        self.model.train()

    @property
    def due(self) -> bool:
        """Whether this worker scores VAL after the next epoch.

        The last epoch always has a look, so that every run has a best one.
        """
        train, after = self.task.train, self.epoch + 1
        return self.val is not None and (after % train.evaluate_every == 0 or after == train.epochs)

    def close_epoch(
        self, losses: dict[str, float], seconds: float, facts: Nearest | None = None
    ) -> Epoch:
        """Score and checkpoint a trained epoch; return its record.

        Args:
            losses: mean of every term.
            seconds: what training took; a run's share, where several are trained at once.
            facts: what scoring needs of VAL where it is due; None: a distance is NaN.
        """
        train, epoch = self.task.train, self.epoch
        val = self._scores(facts) if self.due else {}
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
            self._lr,
            val,
            best,
            round(seconds, 4),
            round(train.batches_per_epoch * train.batch_size / seconds, 1),
        )
        self.state.history.append(record)
        if self.first:
            self.folder.save(self.state, self._weights(), self._optimizer_tensors())
        return record

    def finish(self) -> None:
        """Mark the run finished."""
        if self.first and not self.state.finished:
            self.folder.finish(self.state)

    def _learning_rate(self, epoch: int) -> float:
        """Return the epoch's learning rate: replayed, constant, or from the plateau rule."""
        if self.task.lr_plan is not None:
            return self.task.lr_plan[epoch]
        if self.state.plateau is None and self.task.train.schedule == "plateau":
            train = self.task.train
            self.state.plateau = Plateau(train.lr, train.patience, train.factor)
        return self.task.train.lr if self.state.plateau is None else self.state.plateau.lr

    def _scores(self, facts: Nearest | None) -> dict[str, float]:
        """Return the VAL scores at the best grid value; rank 0 has looked, all workers agree."""
        scores = None
        if facts is not None:
            grid = self.task.protocol.beta_grid or self.model.beta_grid
            scores = facts.sweep(grid.values()).as_dict()
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
