"""Loss terms shared by the systems; every one is a mean over the rows of the batch."""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = 1e-6
"""Added to differences inside triplet distances, as the framework's pairwise distance does."""


def triplets(anchors: Tensor, positives: Tensor, negatives: Tensor, margin: Tensor) -> Tensor:
    """Return Euclidean triplet losses [T] of T triplets at once.

    mean over rows of max(0, margin + ||a - p + eps|| - ||a - n + eps||) (avca.md section 3).

    Args:
        anchors: [B, T, o]; positives and negatives likewise.
        positives: see anchors.
        negatives: see anchors.
        margin: 0-d.
    """
    near = torch.linalg.vector_norm(anchors - positives + _EPS, dim=-1)
    far = torch.linalg.vector_norm(anchors - negatives + _EPS, dim=-1)
    loss: Tensor = (margin + near - far).clamp_min(0).mean(0)
    return loss


def mse(left: Tensor, right: Tensor) -> Tensor:
    """Return the mean squared difference over all elements."""
    return (left - right).square().mean()
