"""Layers shared by the systems: normalisation with explicit groups, counter-based dropout, MLPs.

Parameter names follow the released checkpoints (``fc.0``, ``fc.1``, ``fc.4``, ``fc.5``), so that
those load without a translation table.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avzero.models._basic import BatchNorm, LayerNorm, Linear
from avzero.models._block import block
from avzero.models._contract import Context
from avzero.models._random import Dropout, Noise, Site, number_sites

__all__ = [
    "MLP",
    "BatchNorm",
    "Dropout",
    "FeedForward",
    "LayerNorm",
    "Linear",
    "Noise",
    "Projection",
    "Site",
    "Transformer",
    "number_sites",
]


class MLP(nn.Module):
    """One or two blocks Linear -> BatchNorm -> ReLU -> Dropout (avca.md section 1).

    With ``hidden`` there are two blocks and only the second BatchNorm uses ``momentum``; without,
    there is one block and its BatchNorm keeps momentum 0.1.
    """

    def __init__(
        self, width: int, hidden: int, out: int, dropout: float, momentum: float = 0.1
    ) -> None:
        super().__init__()
        self.fc = nn.ModuleDict()
        first = hidden or out
        self._add(0, width, first, dropout, 0.1)
        if hidden:
            self._add(4, hidden, out, dropout, momentum)

    def _add(self, at: int, width: int, out: int, dropout: float, momentum: float) -> None:
        self.fc[str(at)] = Linear(width, out)
        self.fc[str(at + 1)] = BatchNorm(out, momentum)
        self.fc[str(at + 3)] = Dropout(dropout)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Map [..., width] to [..., out]; all outputs are non-negative."""
        layers = list(self.fc.values())
        for at in range(0, len(layers), 3):
            x = block(x, *layers[at : at + 3], context)  # type: ignore[call-arg, arg-type]
        return x


class Projection(nn.Module):
    """Linear -> [BatchNorm] -> ReLU -> Dropout -> Linear (avgzslnet.md section 1)."""

    def __init__(
        self, width: int, hidden: int, out: int, dropout: float, use_bn: bool = True
    ) -> None:
        super().__init__()
        at = 1 + use_bn
        self.fc = nn.ModuleDict({"0": Linear(width, hidden)})
        if use_bn:
            self.fc["1"] = BatchNorm(hidden)
        self.fc[str(at + 1)] = Dropout(dropout)
        self.fc[str(at + 2)] = Linear(hidden, out)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Map [..., width] to [..., out], linear at the end."""
        linear, *norm, dropout, last = self.fc.values()
        if norm:
            x = block(x, linear, *norm, dropout, context)  # type: ignore[call-arg, arg-type]
        else:
            x = F.relu(linear(x))
            x = x if context is None else dropout(x, context)
        out: Tensor = last(x)
        return out


class _Attention(nn.Module):
    """Multi-head self-attention over tokens with one joint bias-free qkv projection."""

    def __init__(self, width: int, heads: int, head_width: int, dropout: float) -> None:
        super().__init__()
        self.to_qkv = Linear(width, 3 * heads * head_width, bias=False)
        self.to_out = nn.ModuleList([Linear(heads * head_width, width), Dropout(dropout)])
        self.heads = heads
        self.head_width = head_width

    def forward(self, x: Tensor, context: Context | None) -> Tensor:
        """Map [..., tokens, width] to the same shape."""
        split = (*x.shape[:-1], 3, self.heads, self.head_width)
        # Parted before anything is moved, so that the gradient is put together where it belongs.
        parts = self.to_qkv(x).view(split).unbind(-3)
        q, k, v = (part.transpose(-2, -3) for part in parts)
        weights = torch.softmax(q @ k.transpose(-1, -2) * self.head_width**-0.5, dim=-1)
        joined = (weights @ v).movedim(-3, -2).flatten(-2)
        out: Tensor = self.to_out[0](joined)
        return out if context is None else self.to_out[1](out, context)


class FeedForward(nn.Module):
    """Linear -> GELU -> Dropout -> Linear -> Dropout."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.ModuleDict(
            {
                "0": Linear(width, hidden),
                "2": Dropout(dropout),
                "3": Linear(hidden, width),
                "4": Dropout(dropout),
            }
        )

    def forward(self, x: Tensor, context: Context | None) -> Tensor:
        """Map [..., width] to the same shape."""
        x = F.gelu(self.net["0"](x))
        x = x if context is None else self.net["2"](x, context)
        x = self.net["3"](x)
        return x if context is None else self.net["4"](x, context)


class _PreNorm(nn.Module):
    """A residual block: x + fn(LayerNorm(x))."""

    def __init__(self, width: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = LayerNorm(width)
        self.fn = fn

    def forward(self, x: Tensor, context: Context | None) -> Tensor:
        """Map [..., tokens, width] to the same shape."""
        out: Tensor = x + self.fn(self.norm(x), context)
        return out


class Transformer(nn.Module):
    """``depth`` pre-norm blocks of attention and feed-forward over a token sequence."""

    def __init__(
        self, width: int, depth: int, heads: int, head_width: int, hidden: int, dropout: float
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    _PreNorm(width, _Attention(width, heads, head_width, dropout)),
                    _PreNorm(width, FeedForward(width, hidden, dropout)),
                ]
            )
            for _ in range(depth)
        )

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Map [..., tokens, width] to the same shape."""
        for layer in self.layers:
            for part in layer:  # type: ignore[attr-defined]
                x = part(x, context)
        return x
