"""The array: K runs trained at once, stacked; K = 1 is the same code.

A step of these systems is about a thousand small operations. Stacked, K configurations need the
same thousand: ``torch.func.vmap`` runs one system's forward over parameters [K, ...], and one
backward gives every slot its gradients, because slots do not touch each other. What a slot
computes does not depend on where it lies or who lies beside it, bit for bit (``models._basic``;
tests hold it for all systems), so slots are refilled at any epoch and a lone run is a stack of one.

Optimiser, learning rate, evaluation and checkpoints stay with each run's ``Trainer``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from avzero.models._basic import memory
from avzero.models._contract import Batch, Context, Model, World, trainable
from avzero.models._random import Dropout
from avzero.protocol.counter import fold, site_keys
from avzero.protocol.scoring import Nearest
from avzero.train.data import headline
from avzero.train.feed import Feed, slot
from avzero.train.gemm import use
from avzero.train.records import Epoch, TrainingFailed

if TYPE_CHECKING:
    from avzero.train.loop import Trainer

_DROPOUT = 0x44524F50
Log = list[tuple[int, list[str], Tensor]]
"""Per pass: step, names of the terms, values [K, terms]."""


def run_epoch(trainers: Sequence[Trainer]) -> Iterator[tuple[Trainer, Epoch | TrainingFailed]]:
    """Train one epoch of every run, stacked where they can be; yield each one's record.

    A run that diverges yields the failure; the others are not touched by it.
    """
    stacks: dict[str, list[Trainer]] = {}
    for trainer in trainers:
        stacks.setdefault(trainer.structure, []).append(trainer)
    for members in stacks.values():
        started = time.perf_counter()
        outcomes = list(zip(members, _train(members), strict=True))
        seconds = (time.perf_counter() - started) / len(members)
        for (trainer, losses), facts in zip(outcomes, _look(outcomes), strict=True):
            if isinstance(losses, TrainingFailed):
                yield trainer, losses
                continue
            try:
                yield trainer, trainer.close_epoch(losses, seconds, facts)
            except TrainingFailed as error:
                yield trainer, error


def _look(outcomes: Sequence[tuple[Trainer, Any]]) -> list[Nearest | None]:
    """Return what scoring needs of VAL for the runs of a stack that have just been trained.

    Runs on the same data are looked at together. None: failed, not due, or a distance is NaN.
    """
    together: dict[tuple[int, bool], list[int]] = {}
    for at, (trainer, losses) in enumerate(outcomes):
        if trainer.due and trainer.first and not isinstance(losses, TrainingFailed):
            squared = trainer.task.protocol.distance == "squared_l2"
            together.setdefault((id(trainer.data), squared), []).append(at)
    found: list[Nearest | None] = [None] * len(outcomes)
    for (_, squared), members in together.items():
        first = outcomes[members[0]][0]
        if first.val is None:
            continue
        models = [outcomes[at][0].model for at in members]
        facts = headline(models, first.data, first.val, squared)
        for at, one in zip(members, facts, strict=True):
            found[at] = one
    return found


class _Call(nn.Module):
    """Lets ``functional_call`` reach a system's methods by name."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, method: str, batch: Batch, context: Context) -> Any:
        """Call the method."""
        return getattr(self.model, method)(batch, context)


class Stack:
    """K systems of one structure whose parameters and buffers lie in one tensor per name [K, ...].

    The systems stay usable: their tensors become views of the stack's.
    """

    def __init__(self, models: Sequence[Model], world: World | None = None) -> None:
        self._models = models
        self._world = world
        self._state: dict[str, Tensor] = {}
        learning = [[p for _, p in trainable(model)] for model in models]
        self._leaves: Sequence[Tensor] = learning[0]
        if len(models) > 1:
            self._call = _Call(models[0])
            self._stack()
            self._leaves = [
                self._state[f"model.{name}"].requires_grad_() for name, _ in trainable(models[0])
            ]
        self._slots = list(zip(*learning, strict=True))

    def _stack(self) -> None:
        """Lay every tensor of the systems into one, and make theirs views of it."""
        tables = [dict(m.named_parameters()) | dict(m.named_buffers()) for m in self._models]
        for name in tables[0]:
            together = torch.stack([table[name].detach() for table in tables])
            path, _, own = name.rpartition(".")
            for model, view in zip(self._models, together.unbind(), strict=True):
                owner = model.get_submodule(path)
                if own in owner._parameters:
                    owner._parameters[own].data = view  # type: ignore[union-attr]
                else:
                    owner._buffers[own] = view
            self._state[f"model.{name}"] = together
        dropouts = [[s for s in m.modules() if isinstance(s, Dropout)] for m in self._models]
        for site in zip(*dropouts, strict=True):
            # The first system's code stands for all: a layer may be left out if all leave it out.
            site[0].off = all(one.off for one in site)

    def losses(
        self, batch: Batch, keys: Tensor, part: str = "", salt: int = 0, tracked: bool = True
    ) -> tuple[list[str], Tensor]:
        """Return names and values [K, terms] of the loss terms of one pass.

        Args:
            batch: everything with a leading dimension K.
            keys: int32 [K, sites, 2].
            part: the pass.
            salt: sets the random numbers of a pass apart from those of the step's others.
            tracked: see ``Context``.
        """
        names: list[str] = []

        def one(table: dict[str, Tensor], mine: Batch, key: Tensor) -> Tensor:
            context = Context(key, self._world, part, tracked).salted(salt)
            terms = self._reach("loss", table, mine, context)
            names[:] = terms
            return torch.stack(list(terms.values()))

        values = self._over(one, batch, keys)
        return names, values

    def settle(self, batch: Batch, keys: Tensor) -> None:
        """Do what the released code does after an optimiser step."""

        def one(table: dict[str, Tensor], mine: Batch, key: Tensor) -> Tensor:
            self._reach("settle", table, mine, Context(key, self._world))
            return key

        with torch.no_grad():
            self._over(one, batch, keys)

    def _reach(
        self, method: str, table: dict[str, Tensor], batch: Batch, context: Context
    ) -> dict[str, Tensor]:
        """Call a system's method: the first system itself, or a slot in its place."""
        if not table:
            return getattr(self._models[0], method)(batch, context)  # type: ignore[no-any-return]
        return functional_call(self._call, table, (method, batch, context))  # type: ignore[no-any-return]

    def _over(self, one: Any, batch: Batch, keys: Tensor) -> Tensor:
        """Run a function of one slot over all."""
        if len(self._models) > 1:
            return vmap(one)(self._state, batch, keys)  # type: ignore[no-any-return]
        out: Tensor = one({}, slot(batch, 0), keys[0])
        return out[None]

    def backward(self, values: Tensor) -> None:
        """Give every system the gradients of its own losses; what none reaches has none.

        Slots are independent, so the gradient of the sum over slots is each one's own.
        """
        found = torch.autograd.grad(values.sum(), self._leaves, allow_unused=True)
        # The fused optimiser reads memory as it lies: a transposed gradient would be misread.
        gradients = [None if g is None else g.contiguous() for g in found]
        for slots, gradient in zip(self._slots, gradients, strict=True):
            several = len(slots) > 1
            parts = (gradient,) if gradient is None or not several else gradient.unbind()
            for parameter, mine in zip(slots, parts * (len(slots) // len(parts)), strict=True):
                parameter.grad = mine
        if self._world is not None:
            self._world.average([p.grad for (p,) in self._slots if p.grad is not None])


def _train(trainers: Sequence[Trainer]) -> list[dict[str, float] | TrainingFailed]:
    """Run the steps of an epoch; return per run the mean of every loss term, or its failure."""
    first = trainers[0]
    train, world = first.task.train, first.world
    steps = train.batches_per_epoch
    rank, size = (0, 1) if world is None else (world.rank, world.size)
    feed = Feed([(trainer.data, trainer.draws()) for trainer in trainers], rank, size)
    keys = torch.stack([_keys(trainer, steps) for trainer in trainers], dim=1)
    stack = Stack([trainer.model for trainer in trainers], world)
    for trainer in trainers:
        trainer.begin_epoch()
    log: Log = []
    remembered = memory(first.model) or steps  # alike in a stack: part of its structure
    with use(train.matmul, first.device.type):
        for step in range(steps):
            batch: Batch | None = None
            tracked = step >= steps - remembered
            for number, part in enumerate(first.model.passes(step)):
                batch = batch or feed.batch(step)
                names, values = stack.losses(batch, keys[step], part, 3 * number, tracked)
                stack.backward(values)
                for trainer in trainers:
                    trainer.optimizer.step()
                log.append((step, names, values.detach()))
            if batch is not None and tracked:
                stack.settle(batch, keys[step])
    return _mean_losses(log, trainers, world)


def _keys(trainer: Trainer, steps: int) -> Tensor:
    """Return the random keys [steps, sites, 2] of a run's next epoch."""
    task = trainer.task
    stream = fold(_DROPOUT, task.seed, task.stage, trainer.epoch)
    return site_keys(stream, steps, trainer.sites, trainer.device)


def _mean_losses(
    log: Log, trainers: Sequence[Trainer], world: Any
) -> list[dict[str, float] | TrainingFailed]:
    """Return per run the mean of every term over the steps that had it; refuse what is not
    finite."""
    table = torch.cat([values for _, _, values in log], dim=1)
    if world is not None:
        world.average([table])
    places = [(step, name) for step, names, _ in log for name in names]
    index: dict[str, list[int]] = {}
    for i, (_, name) in enumerate(places):
        index.setdefault(name, []).append(i)
    rows = table.to(torch.float64).cpu()
    return [
        _means(row, places, index, trainer.epoch)
        for row, trainer in zip(rows, trainers, strict=True)
    ]


def _means(
    row: Tensor, places: list[tuple[int, str]], index: Mapping[str, list[int]], epoch: int
) -> dict[str, float] | TrainingFailed:
    """Return one run's means, or why it failed."""
    if not torch.isfinite(row).all():
        step, name = places[int((~torch.isfinite(row)).nonzero()[0])]
        return TrainingFailed(
            f"loss term {name} is not finite in epoch {epoch}, step {step}; "
            "lower lr, or standardise the inputs (protocol.input_scaling)"
        )
    return {name: float(row[at].mean()) for name, at in index.items()}
