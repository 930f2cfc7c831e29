"""Loss terms shared by the systems, as means over the rows of the batch or row by row."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from avzero.models._basic import call

_EPS = 1e-6
"""Added to differences inside triplet distances, as the framework's pairwise distance does."""


def hinge(anchor: Tensor, near: Tensor, far: Tensor, margin: Tensor) -> Tensor:
    """Return Euclidean triplet losses [...] of embeddings [..., o], one per row.

    max(0, margin + ||a - near + eps|| - ||a - far + eps||) (avca.md section 3).
    """
    return _hinge(_gap(anchor, near), _gap(anchor, far), margin)


def _gap(anchor: Tensor, other: Tensor) -> Tensor:
    """Return Euclidean distances [...] of rows [..., o], as the triplet losses take them."""
    gap: Tensor = torch.linalg.vector_norm((anchor - other).add_(_EPS), dim=-1)
    return gap


def _hinge(near: Tensor, far: Tensor, margin: Tensor) -> Tensor:
    """Return triplet losses of distances."""
    return (margin + near - far).clamp_min(0)


def triplets(rows: Tensor, plan: Sequence[tuple[int, int, int]], margin: Tensor) -> Tensor:
    """Return the means over the batch [T] of the losses of T triplets at once (see ``hinge``).

    Args:
        rows: [B, R, o], what the triplets are made of.
        plan: which of the R are anchor, positive and negative of each triplet. Picking them from
            one tensor, rather than stacking tensors that occur several times, adds up their
            gradients in one order, whatever the batch is trained with.
        margin: 0-d.
    """
    # A distance that several triplets share is taken once; and one pick does for all, because each
    # would give back a gradient of the size of all rows.
    sides = [(anchor, other) for anchor, *others in plan for other in others]
    pairs = sorted(set(sides))
    ends = pick(rows, [at for pair in pairs for at in pair])
    anchors, others = ends.view(-1, len(pairs), 2, rows.shape[-1]).unbind(-2)
    gaps = pick(_gap(anchors, others)[..., None], [pairs.index(side) for side in sides])
    near, far = gaps.view(-1, len(plan), 2).unbind(-1)
    return _hinge(near, far, margin).mean(0)


def pick(rows: Tensor, which: Sequence[int]) -> Tensor:
    """Return rows [B, len(which), o] of [B, R, o]."""
    return rows.index_select(1, _index(tuple(which), rows.device))


@functools.lru_cache(maxsize=64)
def _index(which: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(which, device=device)


def mse(left: Tensor, right: Tensor) -> Tensor:
    """Return the mean squared difference over all elements."""
    return mses(left.reshape(len(left), 1, -1), right.reshape(len(right), 1, -1)).squeeze(0)


def mses(left: Tensor, right: Tensor) -> Tensor:
    """Return the mean squared differences [T] of T pairs of rows [B, T, d]; ``right`` may be one
    [B, 1, d] for all."""
    out: Tensor = call(_MeanSquares, left, right)
    return out


class _MeanSquares(torch.autograd.Function):
    """See ``mses``; with slots in front, or without. Gradient 2 (left - right) / (B d).

    The framework's takes twice as many passes over the rows.
    """

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        gap = left - right
        ctx.save_for_backward(gap)
        ctx.shared = right.shape[-2] < left.shape[-2]
        return (gap * gap).mean(-1).mean(-2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (gap,) = ctx.saved_tensors
        need_left, need_right = ctx.needs_input_grad
        factor = gradients[0] * (2 / (gap.shape[-3] * gap.shape[-1]))
        left = gap * factor[..., None, :, None]
        if not need_right:
            return left, None
        right = left.sum(-2, keepdim=True) if ctx.shared else left
        return (left if need_left else None), -right


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Return the mean over rows of -log softmax(logits)[label], for logits [B, C]."""
    # Not the framework's: its mean is added up differently in a stack of configurations.
    return -torch.log_softmax(logits, dim=1).gather(1, label[:, None]).mean()
