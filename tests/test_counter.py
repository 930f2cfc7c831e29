"""Counter-based random numbers: reproducible, uniform, uncorrelated, independent of splitting."""

from __future__ import annotations

import itertools

import pytest
import torch

from avzero.protocol.counter import (
    _lattice,
    dropout_gate,
    dropout_mask,
    dropout_words,
    fold,
    mix64,
    mix64_int,
    normal_floats,
    site_keys,
    uniform_below,
    uniform_floats,
    unit_interval,
)

CPU = torch.device("cpu")


def kept(key: torch.Tensor, size: int, p: float) -> torch.Tensor:
    return dropout_mask(key, torch.Size([size]), dropout_words(p), 0, size) > 0


def test_tensor_and_integer_hash_agree() -> None:
    values = [0, 1, 2**31, 2**63 - 1, -1, -(2**63)]
    expected = [mix64_int(value & (2**64 - 1)) for value in values]
    got = mix64(torch.tensor(values, dtype=torch.int64))
    assert [value & (2**64 - 1) for value in got.tolist()] == expected


def test_reference_value_of_splitmix64() -> None:
    """First output of SplitMix64 seeded with 0 (Vigna's published test value)."""
    assert mix64_int(0) == 0xE220A8397B1DCDAF


def test_fold_depends_on_every_part_and_order() -> None:
    keys = {fold(*parts) for parts in itertools.permutations((1, 2, 3, 0))} | {fold(1, 2)}
    assert len(keys) == 25


def test_uniform_below_is_uniform() -> None:
    draws = uniform_below(fold(3, 1), torch.arange(210_000), 21)
    counts = torch.bincount(draws, minlength=21).double()
    chi2 = ((counts - 10_000) ** 2 / 10_000).sum()
    assert draws.min() == 0 and draws.max() == 20
    assert chi2 < 45.3  # 99.9 % quantile with 20 degrees of freedom


def test_mask_has_its_rate_and_scale() -> None:
    keys = site_keys(fold(1), 8, 3, CPU)
    for p in (0.05, 0.3, 0.5, 0.9):
        mask = dropout_mask(keys[0, 0], torch.Size([1 << 20]), dropout_words(p), 0, 1 << 20)
        rate = (mask > 0).double().mean().item()
        assert abs(rate - (1 - p)) < 4 * (p * (1 - p) / 2**20) ** 0.5
        assert set(mask.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 0.999])
def test_the_gate_is_the_mask(p: float) -> None:
    """The smaller of a value and its gate, above 0, is what the mask leaves of it; both keep the
    elements whose word, a product of integers, lies below the threshold."""
    key = site_keys(fold(9), 1, 1, CPU)[0, 0]
    shape = torch.Size([1 << 12, 8])
    words = dropout_words(p)
    gate = dropout_gate(key, shape, words[0], 0, shape.numel())
    mask = dropout_mask(key, shape, words, 0, shape.numel())
    assert not gate.isnan().any() and ((gate <= 0) | (gate >= 2.0**90)).all()
    word = _lattice(15, CPU).long() * int(key[1]) % 2**32
    signed = torch.where(word < 2**31, word, word - 2**32).view(shape)
    assert torch.equal(mask > 0, signed < (0.5 - p) * 2**32 - 2.0**-20)
    values = torch.randn(shape).abs() * 1e20
    torch.testing.assert_close(
        torch.minimum(values, gate).relu(), values * (mask > 0), rtol=0, atol=0
    )
    assert p > 0 or (mask == 1).all()


def test_a_rate_of_zero_drops_nothing() -> None:
    """Not even the highest word: beside other rates such a slot must get what it gets alone."""
    threshold, kept = dropout_words(0.0)
    highest = torch.tensor(2**31 - 1, dtype=torch.int32).to(torch.float32)
    assert torch.sub(threshold, highest, alpha=2.0**90) > 0 and kept == 1
    assert torch.isfinite(torch.sub(threshold, -(2.0**31) * torch.ones(()), alpha=2.0**90))


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_every_element_is_dropped_at_the_rate(p: float) -> None:
    """Over many steps; a first element that a factor cannot move would always be kept."""
    keys = site_keys(fold(8), 600, 1, CPU)[:, 0]
    rates = torch.stack([kept(key, 512, p) for key in keys]).double().mean(0)
    assert ((rates - (1 - p)).abs() < 5 * (p * (1 - p) / 600) ** 0.5).all()


def test_masks_of_steps_and_sites_are_uncorrelated() -> None:
    """With one fixed multiplier some pairs of keys gave correlations of 20 standard errors."""
    size, steps = 1 << 16, 150
    keys = site_keys(fold(5), steps, 2, CPU).view(-1, 2)
    masks = torch.stack([kept(key, size, 0.3) for key in keys]).float()
    masks = (masks - 0.7) / 0.21**0.5
    correlation = masks @ masks.T / size * size**0.5  # in standard errors
    pairs = correlation[torch.triu(torch.ones_like(correlation), 1) > 0]
    assert abs(pairs.std() - 1) < 0.03 and pairs.abs().max() < 5.5


def test_neighbouring_elements_are_uncorrelated() -> None:
    keys = site_keys(fold(6), 600, 1, CPU)[:, 0]
    masks = torch.stack([kept(key, 512, 0.5) for key in keys]).float() * 2 - 1
    correlation = masks.T @ masks / 600 * 600**0.5
    pairs = correlation[torch.triu(torch.ones_like(correlation), 1) > 0]
    assert abs(pairs.std() - 1) < 0.03 and pairs.abs().max() < 6


def test_workers_share_one_lattice() -> None:
    key = site_keys(fold(2), 1, 1, CPU)[0, 0]
    p = dropout_words(0.4)
    whole = dropout_mask(key, torch.Size([8, 5]), p, 0, 40)
    halves = [dropout_mask(key, torch.Size([4, 5]), p, rank * 20, 40) for rank in (0, 1)]
    torch.testing.assert_close(torch.cat(halves), whole, rtol=0, atol=0)


def test_masks_can_be_stacked() -> None:
    """Every slot has its own keys and rate, and gets the bits it would get alone."""
    keys = site_keys(fold(4), 3, 1, CPU)[:, 0]
    rates = [dropout_words(p) for p in (0.1, 0.5, 0.8)]
    shape = torch.Size([16, 4])
    alone = torch.stack(
        [dropout_mask(k, shape, p, 0, 64) for k, p in zip(keys, rates, strict=True)]
    )
    threshold, kept = (torch.stack(column) for column in zip(*rates, strict=True))
    stacked = dropout_mask(keys, shape, (threshold, kept), 0, 64)
    torch.testing.assert_close(stacked, alone, rtol=0, atol=0)


def _draws(count: int = 1 << 20, step: int = 0, site: int = 0) -> torch.Tensor:
    key = site_keys(fold(17, step), 1, site + 1, torch.device("cpu"))[0, site]
    return uniform_floats(key, torch.Size([count]), 0, count)


def test_uniform_floats_are_uniform() -> None:
    """Kolmogorov-Smirnov distance, moments and ends over a million draws."""
    x = _draws().sort().values.double()
    expected = (torch.arange(len(x), dtype=torch.float64) + 0.5) / len(x)
    assert (x - expected).abs().max() < 2 / len(x) ** 0.5
    assert x.mean() == pytest.approx(0.5, abs=2e-3) and x.var() == pytest.approx(1 / 12, rel=1e-2)
    assert 0 < x.min() < 1e-4 and 1 - 1e-4 < x.max() < 1


def test_normal_floats_are_normal_and_finite() -> None:
    key = site_keys(5, 1, 1, torch.device("cpu"))[0, 0]
    x = normal_floats(key, torch.Size([1 << 20]), 0, 1 << 20).double()
    assert torch.isfinite(x).all()
    assert x.mean() == pytest.approx(0, abs=5e-3) and x.std() == pytest.approx(1, rel=5e-3)
    assert (x > 0).double().mean() == pytest.approx(0.5, abs=2e-3)
    normal = torch.distributions.Normal(0.0, 1.0)
    sample, rank = x.sort().values, (torch.arange(len(x), dtype=torch.float64) + 0.5) / len(x)
    assert (normal.cdf(sample) - rank).abs().max() < 2 / len(x) ** 0.5


def test_extreme_bits_stay_inside() -> None:
    ends = unit_interval(torch.tensor([0, -1, 2**31 - 1, -(2**31)], dtype=torch.int32))
    assert (ends > 0).all() and (ends < 1).all()
    assert torch.isfinite(torch.erfinv(2 * ends - 1)).all()


def test_uniform_draws_of_sites_and_steps_are_unrelated_and_shared_by_workers() -> None:
    base = _draws(1 << 16)
    for other in (_draws(1 << 16, step=1), _draws(1 << 16, site=1)):
        correlation = torch.corrcoef(torch.stack([base, other]))[0, 1]
        assert abs(correlation) < 0.02
    assert abs(torch.corrcoef(torch.stack([base[1:], base[:-1]]))[0, 1]) < 0.02
    key = site_keys(fold(17, 0), 1, 1, torch.device("cpu"))[0, 0]
    halves = [uniform_floats(key, torch.Size([1 << 15]), i << 15, 1 << 16) for i in range(2)]
    assert torch.equal(torch.cat(halves), base)


def test_uniform_floats_under_vmap() -> None:
    keys = site_keys(3, 4, 1, torch.device("cpu"))[:, 0]
    stacked = torch.vmap(lambda key: uniform_floats(key, torch.Size([8, 5]), 0, 40))(keys)
    alone = torch.stack([uniform_floats(key, torch.Size([8, 5]), 0, 40) for key in keys])
    assert torch.equal(stacked, alone)
