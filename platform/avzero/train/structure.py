"""Which configurations can be stacked: the structure of a run, without its continuous values.

Two runs share a stack when one program trains both: the same modules of the same sizes with the
same switches, the same batch and precision. Everything else (learning rate, dropout, momentum,
margins, weights, decay, seed, stage, budget) a slot carries in tensors of its own. The structure is
read off the built system rather than declared, so a switch cannot be forgotten: any plain Python
attribute of a module counts, unless the system says that only scoring reads it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from avzero.canon import identity
from avzero.models._basic import memory
from avzero.models._contract import Model, Shapes
from avzero.models._random import Dropout, Site
from avzero.spec import Task

_OWN = frozenset(vars(nn.Module())) | {"training", "site"}
"""Attributes that every module has, or that follow from the modules."""


def structure(model: Model, task: Task, shapes: Shapes, classes: int, steps: int = 0) -> str:
    """Return the identity of a run's structure.

    Args:
        model: the built system. On ``meta`` tensors momenta are unknown and left out.
        task: the run.
        shapes: what the system was built for.
        classes: number of training classes; counts where the loss reads their table.
        steps: padded length of sequences.
    """
    train = task.train
    return identity(
        [
            task.model,
            [train.batch_size, train.batches_per_epoch, train.precision, train.matmul],
            [sorted(shapes.features.items()), shapes.text, steps],
            classes if model.reads_table else 0,
            None if next(model.parameters()).is_meta else memory(model),
            [[path, _module(module, model)] for path, module in model.named_modules()],
        ]
    )


def _module(module: nn.Module, model: Model) -> list[Any]:
    """Return what a module is: its class, sizes and plain attributes."""
    skip = _OWN | (model.scoring if module is model else frozenset())
    if isinstance(module, Dropout):
        skip |= {"off"}  # a rate of 0 is a mask of ones: the same bits
    tensors = [
        [name, list(tensor.shape)]
        for table in (module._parameters, module._buffers)
        for name, tensor in table.items()
        if tensor is not None
    ]
    values = [
        [name, _plain(value)] for name, value in sorted(vars(module).items()) if name not in skip
    ]
    return [type(module).__qualname__, isinstance(module, Site), tensors, values]


def _plain(value: Any) -> Any:
    """Return a value as JSON; a function is its name."""
    if isinstance(value, str | bool | int | float | None):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return getattr(value, "__qualname__", repr(value))
