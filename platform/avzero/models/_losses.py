"""Loss terms shared by the systems, as means over the rows of the batch or row by row."""

from __future__ import annotations

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


def triplets(anchors: Tensor, positives: Tensor, negatives: Tensor, margin: Tensor) -> Tensor:
    """Return the means over rows [T] of the losses of T triplets at once (see ``hinge``).

    Args:
        anchors: [B, T, o]; positives and negatives likewise.
        positives: see anchors.
        negatives: see anchors.
        margin: 0-d.
    """
    return hinge(anchors, positives, negatives, margin).mean(0)


def mse(left: Tensor, right: Tensor) -> Tensor:
    """Return the mean squared difference over all elements."""
    return (left - right).square().mean()
