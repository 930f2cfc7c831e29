"""Layers shared by the systems: normalisation with explicit groups, counter-based dropout, MLPs.

Parameter names follow the released checkpoints (``fc.0``, ``fc.1``, ``fc.4``, ``fc.5``), so that
those load without a translation table.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avzero.models._contract import Context, scalar
from avzero.models._random import Dropout, Noise, Site, number_sites

__all__ = [
    "MLP",
    "BatchNorm",
    "Dropout",
    "FeedForward",
    "Noise",
    "Projection",
    "Site",
    "Transformer",
    "number_sites",
]


class BatchNorm(nn.Module):
    """Batch normalisation over dimension 0 with explicit groups.

    An input [B, G, d] holds G batches side by side (say anchors and negatives): each is
    normalised with its own statistics, and the running statistics take them in order, exactly as
    G calls on [B, d] would. With a world, statistics span all workers.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    momentum: Tensor

    def __init__(self, width: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        scalar(self, "momentum", momentum)
        self.eps = eps

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Normalise [B, d] or [B, G, d]; ``context`` is needed in training only."""
        width = x.shape[-1]
        if not self.training:
            flat = x.reshape(-1, width)
            out = F.batch_norm(
                flat, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
            return out.view(x.shape)
        rows = x.shape[0]
        flat = x.reshape(rows, -1)
        groups = flat.shape[1] // width
        weight, bias = self.weight.repeat(groups), self.bias.repeat(groups)
        world = None if context is None else context.world
        if world is None:
            out, mean, inverse_std = torch.native_batch_norm(
                flat, weight, bias, None, None, True, 0.0, self.eps
            )
            var = inverse_std.detach().pow(-2) - self.eps
        else:
            mean = world.sum(flat.mean(0)) / world.size
            centred = flat - mean
            var = world.sum(centred.square().mean(0)) / world.size
            out = centred * (torch.rsqrt(var + self.eps) * weight) + bias
            rows *= world.size
        self._track(mean.detach(), var.detach() * (rows / (rows - 1)), groups)
        return out.view(x.shape)

    def _track(self, mean: Tensor, var: Tensor, groups: int) -> None:
        """Move the running statistics towards those of each group, in order."""
        width = self.running_mean.shape[0]
        for running, values in ((self.running_mean, mean), (self.running_var, var)):
            for group in values.view(groups, width).unbind(0):
                running.add_((group - running) * self.momentum)


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
        self.fc[str(at)] = nn.Linear(width, out)
        self.fc[str(at + 1)] = BatchNorm(out, momentum)
        self.fc[str(at + 3)] = Dropout(dropout)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Map [..., width] to [..., out]; all outputs are non-negative."""
        for layer in self.fc.values():
            if isinstance(layer, nn.Linear):
                x = layer(x)
            elif isinstance(layer, BatchNorm):
                x = F.relu(layer(x, context))
            elif context is not None:
                x = layer(x, context)
        return x


class Projection(nn.Module):
    """Linear -> [BatchNorm] -> ReLU -> Dropout -> Linear (avgzslnet.md section 1)."""

    def __init__(
        self, width: int, hidden: int, out: int, dropout: float, use_bn: bool = True
    ) -> None:
        super().__init__()
        at = 1 + use_bn
        self.fc = nn.ModuleDict({"0": nn.Linear(width, hidden)})
        if use_bn:
            self.fc["1"] = BatchNorm(hidden)
        self.fc[str(at + 1)] = Dropout(dropout)
        self.fc[str(at + 2)] = nn.Linear(hidden, out)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Map [..., width] to [..., out], linear at the end."""
        *first, last = self.fc.values()
        x = first[0](x)
        for layer in first[1:]:
            if isinstance(layer, BatchNorm):
                x = layer(x, context)
            else:
                x = F.relu(x)
                x = x if context is None else layer(x, context)
        out: Tensor = last(x)
        return out


class _Attention(nn.Module):
    """Multi-head self-attention over tokens with one joint bias-free qkv projection."""

    def __init__(self, width: int, heads: int, head_width: int, dropout: float) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(width, 3 * heads * head_width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(heads * head_width, width), Dropout(dropout)])
        self.heads = heads
        self.head_width = head_width

    def forward(self, x: Tensor, context: Context | None) -> Tensor:
        """Map [..., tokens, width] to the same shape."""
        split = (*x.shape[:-1], 3, self.heads, self.head_width)
        q, k, v = self.to_qkv(x).view(split).movedim(-2, -4).unbind(-2)
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
                "0": nn.Linear(width, hidden),
                "2": Dropout(dropout),
                "3": nn.Linear(hidden, width),
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
        self.norm = nn.LayerNorm(width)
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
            for block in layer:  # type: ignore[attr-defined]
                x = block(x, context)
        return x
