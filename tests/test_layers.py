"""Shared layers against the framework's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from avzero.models._contract import Context
from avzero.models._layers import MLP, BatchNorm, Dropout, Transformer, number_sites
from avzero.models._losses import mse, triplets
from avzero.protocol.counter import fold, site_keys

KEYS = site_keys(fold(0), 1, 8, torch.device("cpu"))[0]
CONTEXT = Context(KEYS)


@pytest.mark.parametrize("momentum", [0.1, 0.99])
def test_groups_equal_calls_one_after_the_other(momentum: float) -> None:
    torch.manual_seed(0)
    ours = BatchNorm(6, momentum).double().train()
    theirs = nn.BatchNorm1d(6, momentum=momentum).double().train()
    for _ in range(3):
        x = torch.randn(9, 4, 6, dtype=torch.float64, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        out = ours(x, CONTEXT)
        expected = torch.stack([theirs(y[:, g]) for g in range(4)], 1)
        torch.testing.assert_close(out, expected)
        weight = torch.randn_like(out)
        (out * weight).sum().backward()
        (expected * weight).sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    ours.eval(), theirs.eval()
    x = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


class TwoHalves:
    """A world of two workers in one process: the sum is done by hand on both halves."""

    size = 2
    rank = 0

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values


def test_world_statistics_are_those_of_the_whole_batch() -> None:
    """With every worker holding the same rows, statistics over the world equal the local ones."""

    class Same(TwoHalves):
        def sum(self, values: torch.Tensor) -> torch.Tensor:
            return 2 * values

    x = torch.randn(8, 6, dtype=torch.float64)
    alone, shared = (BatchNorm(6).double().train() for _ in range(2))
    a = alone(torch.cat([x, x]), CONTEXT)[:8]
    b = shared(x, CONTEXT._replace(world=Same(8)))
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(alone.running_var, shared.running_var)


def test_dropout_modes() -> None:
    layer = Dropout(0.25)
    x = torch.ones(64, 32)
    number_sites(nn.Sequential(layer))
    out = layer.train()(x, CONTEXT)
    assert out.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    torch.testing.assert_close(layer(x, CONTEXT), out, rtol=0, atol=0)  # same key, same mask
    assert not torch.equal(layer(x, CONTEXT.salted(1)), out)
    assert torch.equal(layer.eval()(x, CONTEXT), x)
    assert torch.equal(Dropout(0.0).train()(x, CONTEXT), x)


def test_sites_differ() -> None:
    model = nn.Sequential(Dropout(0.5), Dropout(0.5))
    assert number_sites(model) == 2
    x = torch.ones(64, 32)
    a, b = (layer.train()(x, CONTEXT) for layer in model)
    assert not torch.equal(a, b)


def test_mlp_is_the_framework_stack() -> None:
    torch.manual_seed(1)
    ours = MLP(5, 7, 3, 0.0, 0.5).double().train()
    theirs = (
        nn.Sequential(
            nn.Linear(5, 7),
            nn.BatchNorm1d(7),
            nn.ReLU(),
            nn.Dropout(0.0),
            nn.Linear(7, 3),
            nn.BatchNorm1d(3, momentum=0.5),
            nn.ReLU(),
            nn.Dropout(0.0),
        )
        .double()
        .train()
    )
    theirs.load_state_dict(
        {k.removeprefix("fc."): v for k, v in ours.state_dict().items()}, strict=False
    )
    x = torch.randn(11, 5, dtype=torch.float64)
    torch.testing.assert_close(ours(x, CONTEXT), theirs(x))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    assert list(MLP(5, 0, 3, 0.1).fc) == ["0", "1", "3"]


@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("shape", [(11, 5), (11, 3, 5)])
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_block_is_its_layers(rate: float, shape: tuple[int, ...], tracked: bool) -> None:
    """Output, gradients and statistics are those of the four layers one after the other."""
    torch.manual_seed(3)
    context = CONTEXT._replace(tracked=tracked)
    ours = MLP(5, 0, 7, rate, 0.3).double().train()
    number_sites(ours)
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    theirs = copy.deepcopy(ours)
    linear, norm, dropout = theirs.fc.values()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out = ours(x, context)
    expected = dropout(nn.functional.relu(norm(linear(y), context)), context)
    torch.testing.assert_close(out, expected)
    assert rate == 0 or 0.3 < (out == 0).double().mean() < 0.95
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, msg=name)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=name)
    assert (norm.running_mean.abs().max() > 0) == tracked  # type: ignore[operator]


def test_second_derivatives_are_refused() -> None:
    layer = MLP(5, 0, 7, 0.4).train()
    number_sites(layer)
    x = torch.randn(64, 5, requires_grad=True)
    total = layer(x, CONTEXT).square().sum()
    with pytest.raises(RuntimeError, match="differentiation"):
        torch.autograd.grad(total, x, create_graph=True)


def test_divergence_is_not_hidden_by_dropout() -> None:
    """What is not a number stays so: a run that diverges must fail, whatever is dropped."""
    layer = MLP(5, 0, 7, 0.4).train()
    number_sites(layer)
    x = torch.randn(64, 5)
    x[3] = torch.nan
    assert not torch.isfinite(layer(x, CONTEXT)).all()


def test_transformer_attention_is_the_framework_attention() -> None:
    torch.manual_seed(2)
    block = Transformer(12, 1, 3, 4, 8, 0.0).double().train()
    attention = block.layers[0][0].fn  # type: ignore[index]
    theirs = nn.MultiheadAttention(12, 3, bias=True, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(attention.to_qkv.weight)
        theirs.in_proj_bias.zero_()
        theirs.out_proj.weight.copy_(attention.to_out[0].weight)
        theirs.out_proj.bias.copy_(attention.to_out[0].bias)
    x = torch.randn(5, 2, 12, dtype=torch.float64)
    torch.testing.assert_close(attention(x, CONTEXT), theirs(x, x, x, need_weights=False)[0])
    grouped = x.view(5, 1, 2, 12).expand(5, 3, 2, 12)
    torch.testing.assert_close(block(grouped, CONTEXT)[:, 2], block(x, CONTEXT))


def test_triplets_and_mse_equal_the_framework() -> None:
    a, p, n = torch.randn(3, 10, 4, 6, dtype=torch.float64)
    plan = [(t, 4 + t, 8 + t) for t in range(4)]
    ours = triplets(torch.cat([a, p, n], 1), plan, torch.tensor(0.7, dtype=torch.float64))
    for t in range(4):
        theirs = nn.functional.triplet_margin_loss(a[:, t], p[:, t], n[:, t], margin=0.7)
        torch.testing.assert_close(ours[t], theirs)
    torch.testing.assert_close(mse(a, p), nn.functional.mse_loss(a, p))
