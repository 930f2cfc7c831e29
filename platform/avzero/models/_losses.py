"""Loss terms shared by the systems, as means over the rows of the batch or row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_EPS = 1e-6
"""Added to differences inside triplet distances, as the framework's pairwise distance does."""


def hinge(anchor: Tensor, near: Tensor, far: Tensor, margin: Tensor) -> Tensor:
    """Return Euclidean triplet losses [...] of embeddings [..., o], one per row.

    max(0, margin + ||a - near + eps|| - ||a - far + eps||) (avca.md section 3).
    """
    gaps = [torch.linalg.vector_norm(anchor - x + _EPS, dim=-1) for x in (near, far)]
    loss: Tensor = (margin + gaps[0] - gaps[1]).clamp_min(0)
    return loss


def triplets(rows: Tensor, plan: Sequence[tuple[int, int, int]], margin: Tensor) -> Tensor:
    """Return the means over the batch [T] of the losses of T triplets at once (see ``hinge``).

    Args:
        rows: [B, R, o], what the triplets are made of.
        plan: which of the R are anchor, positive and negative of each triplet. Picking them from
            one tensor, rather than stacking tensors that occur several times, adds up their
            gradients in one order, whatever the batch is trained with.
        margin: 0-d.
    """
    # One pick for all: each would give back a gradient of the size of all rows.
    picked = pick(rows, [at for role in zip(*plan, strict=True) for at in role])
    anchors, positives, negatives = picked.view(-1, 3, len(plan), rows.shape[-1]).unbind(1)
    return hinge(anchors, positives, negatives, margin).mean(0)


def pick(rows: Tensor, which: Sequence[int]) -> Tensor:
    """Return rows [B, len(which), o] of [B, R, o]."""
    return rows.index_select(1, torch.tensor(which, device=rows.device))


def mse(left: Tensor, right: Tensor) -> Tensor:
    """Return the mean squared difference over all elements."""
    out: tuple[Tensor, Tensor] = _MeanSquare.apply(left, right)  # type: ignore[no-untyped-call]
    return out[0]


class _MeanSquare(torch.autograd.Function):
    """Mean squared difference over all elements; gradient 2 (left - right) / n.

    The framework's takes twice as many passes over the rows.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        gap = left - right
        return gap.square().mean(), gap

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        del inputs
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (gap,) = ctx.saved_tensors
        left = gap * (gradients[0] * (2 / gap.numel()))
        need_left, need_right = ctx.needs_input_grad
        return (left if need_left else None), (-left if need_right else None)


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Return the mean over rows of -log softmax(logits)[label], for logits [B, C]."""
    # Not the framework's: its mean is added up differently in a stack of configurations.
    return -torch.log_softmax(logits, dim=1).gather(1, label[:, None]).mean()
