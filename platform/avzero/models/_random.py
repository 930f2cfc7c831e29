"""Random layers: what they draw is a hash of the step's keys, their site and the element.

Draws depend neither on the number of workers nor on other trials sharing the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from avzero.models._basic import call
from avzero.models._contract import Context
from avzero.protocol.counter import dropout_mask, dropout_words, normal_floats, uniform_floats


class Site(nn.Module):
    """A place in a system that draws random numbers in training; numbered by ``number_sites``."""

    def __init__(self) -> None:
        super().__init__()
        self.site = 0

    def lattice(self, count: int, context: Context) -> tuple[Tensor, int, int]:
        """Return this step's keys, and where this worker's ``count`` elements lie among all."""
        size, rank = (1, 0) if context.world is None else (context.world.size, context.world.rank)
        return context.keys[self.site], rank * count, size * count


class Noise(Site):
    """Standard normal, or uniform 0 … 1, noise: a hash like dropout's."""

    def __init__(self, uniform: bool = False) -> None:
        super().__init__()
        self.draw = uniform_floats if uniform else normal_floats

    def forward(self, like: Tensor, width: int, context: Context) -> Tensor:
        """Return noise [..., width] for rows ``like`` [..., d]."""
        shape = torch.Size((*like.shape[:-1], width))
        key, first, total = self.lattice(shape.numel(), context)
        return self.draw(key, shape, first, total).to(like.dtype)


class Dropout(Site):
    """Dropout whose mask is a hash of (step key, site, element of the global batch).

    The mask depends neither on the number of workers nor on other trials sharing the device. A
    rate of exactly 0 at construction removes the layer. ``threshold`` and ``kept``: see
    ``protocol.counter.dropout_words``.
    """

    threshold: Tensor
    kept: Tensor

    def __init__(self, p: float) -> None:
        super().__init__()
        for name, word in zip(("threshold", "kept"), dropout_words(p), strict=True):
            self.register_buffer(name, word, persistent=False)
        self.off = p == 0

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Return ``x`` with dropped elements zero and kept ones divided by 1 - p."""
        if self.off or not self.training:
            return x
        lattice = self.lattice(x.numel(), context)
        out: Tensor = call(_Drop, x, x.dim(), *lattice, self.threshold, self.kept)
        return out


class _Drop(torch.autograd.Function):
    """Multiply by a mask, forward and backward; values are [..., *shape] of ``dims`` dimensions."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dims: int, key: Tensor, first: int, total: int, *words: Tensor
    ) -> Tensor:
        mask = dropout_mask(key, x.shape[-dims:], (words[0], words[1]), first, total).to(x.dtype)
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return gradients[0] * mask, *(None,) * 6


def number_sites(model: nn.Module) -> int:
    """Give every random layer of a model its own site; return how many there are."""
    layers = [module for module in model.modules() if isinstance(module, Site)]
    for site, layer in enumerate(layers):
        layer.site = site
    return len(layers)
