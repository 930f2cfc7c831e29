"""Sequences of features: which steps are real, and attention that respects a mask (tcaf.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from avzero.models._basic import LayerNorm, Linear
from avzero.models._contract import Context
from avzero.models._layers import Dropout, FeedForward

Pairs = Literal["cross_only", "full", "self_only"]
"""Which tokens may attend to each other: those of different modalities, all, those of one."""


def real_steps(x: Tensor, length: Tensor) -> Tensor:
    """Return which steps of ``x`` [..., T, d] are real, bool [..., T]; ``length``: int64 [...]."""
    return torch.arange(x.shape[-2], device=x.device) < length[..., None]


def one_vector(features: Mapping[str, Tensor], modality: str) -> Tensor:
    """Return a modality's vectors [..., d]: sequences [..., T, d] as the mean of their real steps.

    A sequence without any is zeros.
    """
    x, length = features[modality], features.get(f"{modality}_length")
    if length is None:
        return x
    total = (x * real_steps(x, length)[..., None]).sum(-2)
    return total / length.clamp_min(1)[..., None]


def attention_bias(audio: Tensor, video: Tensor, pairs: Pairs, dtype: torch.dtype) -> Tensor:
    """Return what is added to attention logits [n, S, S] over [class token ; audio ; video].

    0 where i may attend to j: both real, and one of them the class token or ``pairs`` allows it.
    Elsewhere half the most negative number, which neither overflows with a logit added nor leaves
    anything of it; a padded row becomes uniform, which is harmless as nobody attends to it.

    Args:
        audio: bool [n, T_a], which tokens are real.
        video: bool [n, T_v], likewise.
        pairs: see ``Pairs``.
        dtype: of the logits.
    """
    real = torch.cat([torch.ones_like(audio[:, :1]), audio, video], dim=1)
    numbers = [0] + [1] * audio.shape[1] + [2] * video.shape[1]
    kind = torch.tensor(numbers, device=real.device)
    same = kind[:, None] == kind
    token = (kind[:, None] == 0) | (kind == 0)
    free = {"cross_only": ~same, "self_only": same, "full": torch.ones_like(same)}[pairs] | token
    allowed = free & real[:, :, None] & real[:, None, :]
    return (~allowed).to(dtype) * (torch.finfo(dtype).min / 2)


class MaskedAttention(nn.Module):
    """Multi-head attention with an additive mask."""

    def __init__(self, width: int, heads: int, dim_head: int, dropout: float) -> None:
        super().__init__()
        self.to_q = Linear(width, heads * dim_head, bias=False)
        self.to_k = Linear(width, heads * dim_head, bias=False)
        self.to_v = Linear(width, heads * dim_head, bias=False)
        self.to_out = nn.ModuleList([Linear(heads * dim_head, width), Dropout(dropout)])
        self.heads = heads
        self.dim_head = dim_head

    def forward(self, x: Tensor, bias: Tensor, context: Context | None) -> Tensor:
        """Map [n, S, D] to the same shape; ``bias`` [n, S, S] is added to the logits."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, self.dim_head)).transpose(-2, -3)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        logits = q @ k.transpose(-1, -2) * self.dim_head**-0.5 + bias[..., None, :, :]
        joined = (logits.softmax(-1) @ v).transpose(-2, -3).flatten(-2)
        out: Tensor = self.to_out[0](joined)
        return out if context is None else self.to_out[1](out, context)


class MaskedBlock(nn.Module):
    """Attention, then feed-forward; one LayerNorm serves both."""

    def __init__(self, width: int, heads: int, dim_head: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attn = MaskedAttention(width, heads, dim_head, dropout)
        self.ff = FeedForward(width, hidden, dropout)
        self.norm = LayerNorm(width)

    def forward(self, x: Tensor, bias: Tensor, context: Context | None) -> Tensor:
        """Map [n, S, D] to the same shape."""
        x = x + self.attn(self.norm(x), bias, context)
        out: Tensor = x + self.ff(self.norm(x), context)
        return out
