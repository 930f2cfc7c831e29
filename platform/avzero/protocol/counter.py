"""Counter-based random numbers: a value is a hash of (seed, stage, epoch, step, site, element).

There is no generator state, so a draw does not depend on how many workers draw, on what was drawn
before, or on the device; a run resumed at an epoch continues with the very same numbers, and a
trial that shares an array with others keeps its own (design rule 4).

Two hashes are used. ``mix64`` (the finaliser of SplitMix64; Steele, Lea and Flood, OOPSLA 2014)
keys streams and draws samples. Dropout draws millions of values a step: a 32-bit mixer of the same
family, which depends on the element only, is kept between steps, and the keys of step and site turn
it into as many sets of draws.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_C1 = 0xBF58476D1CE4E5B9
_C2 = 0x94D049BB133111EB


def _signed64(value: int) -> int:
    """Return an unsigned 64-bit value as the signed one with the same bits."""
    return value - (1 << 64) if value >> 63 else value


def _signed32(value: int) -> int:
    """Return an unsigned 32-bit value as the signed one with the same bits."""
    return value - (1 << 32) if value >> 31 else value


def mix64_int(value: int) -> int:
    """Return the SplitMix64 finaliser of one integer, as an unsigned 64-bit integer."""
    value = (value + _GOLDEN) & _MASK64
    value = ((value ^ (value >> 30)) * _C1) & _MASK64
    value = ((value ^ (value >> 27)) * _C2) & _MASK64
    return value ^ (value >> 31)


def fold(*parts: int) -> int:
    """Return one unsigned 64-bit key for a tuple of integers; order matters."""
    key = 0
    for part in parts:
        key = mix64_int(key ^ (part & _MASK64))
    return key


def mix64(values: Tensor) -> Tensor:
    """Return the SplitMix64 finaliser of every element of an int64 tensor (bits in int64)."""
    x = values + _signed64(_GOLDEN)
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed64(_C1)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed64(_C2)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def uniform_below(key: int, counters: Tensor, bound: Tensor | int) -> Tensor:
    """Draw integers uniform over 0 … bound - 1, one per counter.

    Args:
        key: the stream (``fold``).
        counters: int64; equal counters give equal draws.
        bound: positive, below 2^31; a tensor must broadcast against ``counters``.

    Returns:
        int64 of the broadcast shape. The bias is below bound / 2^31.
    """
    bits = mix64(mix64(counters) ^ _signed64(key))
    return (((bits >> 33) & ((1 << 31) - 1)) * bound) >> 31


def site_keys(key: int, steps: int, sites: int, device: torch.device) -> Tensor:
    """Return int32 keys [steps, sites, 2]: two per dropout site and step of an epoch.

    Noise shifts the lattice of elements by the first and multiplies it by the second, which is odd;
    dropout multiplies only.
    """
    sites = max(sites, 1)
    counters = torch.arange(steps * sites * 2, dtype=torch.int64, device=device)
    bits = mix64(mix64(counters) ^ _signed64(key))
    keys = (bits >> 32).to(torch.int32).view(steps, sites, 2)
    keys[..., 1] |= 1
    return keys


@functools.cache
def _lattice(bits: int, device: torch.device) -> Tensor:
    """Return the first mixing round of elements 0 … 2^bits - 1 (int32).

    Sizes that change with every batch share one table. They count from 1: a word of 0 would stay 0
    under every factor.
    """
    x = torch.arange(1, (1 << bits) + 1, dtype=torch.int64, device=device)
    x = (x * 0x9E3779B1) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    return (x ^ (x >> 15)).to(torch.int32)


_GATE = 2.0**90
"""What separates kept from dropped is stretched by this: far beyond any activation. A power of two,
so that nothing is rounded, and small enough for the stretched thresholds to be finite."""


@functools.lru_cache(maxsize=256)
def _part(first: int, shape: torch.Size, total: int, device: torch.device) -> Tensor:
    """Return one worker's part of the lattice; a view, kept because a step asks for dozens."""
    table = _lattice(max(total - 1, 0).bit_length(), device)
    return table[first : first + shape.numel()].view(shape)


def dropout_words(probability: float) -> tuple[Tensor, Tensor]:
    """Return what dropout needs of a probability p: the threshold of ``dropout_gate``, and
    1 / (1 - p), which kept elements are multiplied by; float32, 0-d."""
    # A rate of 0 keeps even the highest words, which are rounded up to 2^31.
    threshold = (0.5 - probability if probability else 1.0) * 2.0**32 * _GATE
    kept = 1 / (1 - probability) if probability < 1 else math.inf
    return torch.tensor(threshold, dtype=torch.float32), torch.tensor(kept, dtype=torch.float32)


def dropout_gate(
    key: Tensor, shape: torch.Size, threshold: Tensor, first: int, total: int
) -> Tensor:
    """Return float32 values [..., *shape]: beyond any activation with probability 1 - p, else 0 or
    as far below.

    The smaller of a value and its gate, where positive, is the value or 0: a rectifier and its
    dropout are two cheap passes, and ``dropout_mask`` two others. Few passes count, because each
    costs as much as one of a normalisation's; comparing into booleans or shifting words costs
    several (docs/experiments.md). The lattice is mixed already: the odd factor of a step and site
    puts it in another order for each (``tests/test_counter.py``).

    Args:
        key: int32 [..., 2], the site's keys in this step.
        shape: shape of the values of one slot.
        threshold: [...], the probability p of 0, as ``dropout_words`` writes it.
        first: number of the first element in the global batch (0 with one worker).
        total: number of elements of the global batch, so that workers share one lattice.
    """
    words = _part(first, shape, total, key.device) * _per_slot(key[..., 1], shape)
    # Rounded to 24 bits, which moves p by 2^-25 at most. A difference of 0 stays 0: dropped.
    threshold = _per_slot(threshold.to(torch.float32), shape)
    gate = words.to(torch.float32)
    return torch.sub(threshold, gate, alpha=_GATE, out=gate)


def _per_slot(x: Tensor, shape: torch.Size) -> Tensor:
    """Return one number per slot [...] so that it broadcasts against values [..., *shape]."""
    return x.reshape(*x.shape, *(1,) * len(shape)) if x.dim() else x


def dropout_mask(
    key: Tensor, shape: torch.Size, words: tuple[Tensor, Tensor], first: int, total: int
) -> Tensor:
    """Return a float32 mask [..., *shape]: 0 with probability p, else 1 / (1 - p).

    The arguments are those of ``dropout_gate``; ``words``: both of ``dropout_words``.
    """
    threshold, kept = words
    mask = dropout_gate(key, shape, threshold, first, total)
    return mask.clamp_(0, 1).mul_(_per_slot(kept, shape))  # slots in front: not for vmap


def uniform_floats(key: Tensor, shape: torch.Size, first: int, total: int) -> Tensor:
    """Return float32 values of ``shape``, uniform over the open interval 0 … 1.

    The arguments are those of ``dropout_gate``; resolution 2^-23, so that both ends stay out.
    """
    x = _part(first, shape, total, key.device) + key[0]
    for shift in (15, 13):  # two rounds: unlike a mask, all upper 23 bits are used
        x = (x ^ _shifted(x, shift)) * key[1]
    return unit_interval(x ^ _shifted(x, 16))


def unit_interval(bits: Tensor) -> Tensor:
    """Return int32 bits as float32 values strictly between 0 and 1."""
    return (_shifted(bits, 9).to(torch.float32) + 0.5) * 2.0**-23


def _shifted(x: Tensor, by: int) -> Tensor:
    """Return int32 bits shifted right, zeros coming in (the framework's shift keeps the sign)."""
    return (x >> by) & ((1 << (32 - by)) - 1)


def normal_floats(key: Tensor, shape: torch.Size, first: int, total: int) -> Tensor:
    """Return float32 values of ``shape`` from the standard normal distribution (within 5.3)."""
    uniform = uniform_floats(key, shape, first, total)
    return torch.erfinv(2 * uniform - 1) * 2**0.5
