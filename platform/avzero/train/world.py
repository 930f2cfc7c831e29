"""The workers a batch is split over, when there is more than one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Sum(torch.autograd.Function):
    """All-reduce whose gradient is the all-reduce of the gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        out = values.clone()
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        out = gradients[0].clone()
        dist.all_reduce(out, group=ctx.group)
        return out, None


class _Gather(torch.autograd.Function):
    """All-gather of rows; every worker computes with all rows, so gradients of a row add up."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, values.contiguous(), group=group)
        ctx.rows, ctx.group = len(values), group
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        out = gradients[0].clone()
        dist.all_reduce(out, group=ctx.group)
        start = dist.get_rank(ctx.group) * ctx.rows
        return out[start : start + ctx.rows], None


class TorchWorld:
    """The process group Ray Train has set up (gloo on CPU, NCCL on GPU), or the head of it.

    Args:
        group: a group that begins with rank 0; None: all.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all workers; gradients pass through."""
        out: Tensor = _Sum.apply(values, self._group)  # type: ignore[no-untyped-call]
        return out

    def gather(self, values: Tensor) -> Tensor:
        """Return all workers' rows in rank order; gradients pass through."""
        out: Tensor = _Gather.apply(values, self._group)  # type: ignore[no-untyped-call]
        return out

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its mean over the workers, with one message for all."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat, group=self._group)
        flat /= self.size
        at = 0
        for tensor in tensors:
            tensor.copy_(flat[at : at + tensor.numel()].view(tensor.shape))
            at += tensor.numel()

    def from_first(self, value: Any) -> Any:
        """Return rank 0's value on every worker."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]


def global_world() -> TorchWorld | None:
    """Return the world of the current process group; None where there is one worker."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return TorchWorld()
    return None


def working_world(batch: int) -> tuple[TorchWorld | None, bool]:
    """Return the workers a batch is split over, and whether this one is among them.

    A group that grows and shrinks may have a size that does not divide the batch: then as many
    work as do, and the rest look on.
    """
    everyone = global_world()
    if everyone is None:
        return None, True
    used = max(size for size in range(1, everyone.size + 1) if batch % size == 0)
    if used == everyone.size:
        return everyone, True
    group = dist.new_group(list(range(used)))  # every worker takes part in making it
    active = everyone.rank < used
    return (TorchWorld(group) if active and used > 1 else None), active
