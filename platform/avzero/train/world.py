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
    def forward(ctx: Any, values: Tensor) -> Tensor:
        del ctx
        out = values.clone()
        dist.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        del ctx
        out = gradients[0].clone()
        dist.all_reduce(out)
        return out


class _Gather(torch.autograd.Function):
    """All-gather of rows; every worker computes with all rows, so gradients of a row add up."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, values.contiguous())
        ctx.rows = len(values)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        out = gradients[0].clone()
        dist.all_reduce(out)
        start = dist.get_rank() * ctx.rows
        return out[start : start + ctx.rows]


class TorchWorld:
    """The process group Ray Train has set up (gloo on CPU, NCCL on GPU)."""

    def __init__(self) -> None:
        self.size = dist.get_world_size()
        self.rank = dist.get_rank()

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all workers; gradients pass through."""
        out: Tensor = _Sum.apply(values)  # type: ignore[no-untyped-call]
        return out

    def gather(self, values: Tensor) -> Tensor:
        """Return all workers' rows in rank order; gradients pass through."""
        out: Tensor = _Gather.apply(values)  # type: ignore[no-untyped-call]
        return out

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its mean over the workers, with one message for all."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        at = 0
        for tensor in tensors:
            tensor.copy_(flat[at : at + tensor.numel()].view(tensor.shape))
            at += tensor.numel()

    def from_first(self, value: Any) -> Any:
        """Return rank 0's value on every worker."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def global_world() -> TorchWorld | None:
    """Return the world of the current process group; None where there is one worker."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return TorchWorld()
    return None
