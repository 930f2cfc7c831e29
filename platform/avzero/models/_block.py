"""Linear -> BatchNorm -> ReLU -> Dropout in training, as one function with its own gradient.

Most of a step that is not matrix products is passes over these layers' rows, and every pass costs
as much as every other. Together they need half of what they need one after the other: the output
alone says which elements live, dropout's factor and the normalisation's are one, and the linear
map's bias, which the normalisation takes away again, is added to the running mean only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from avzero.models._basic import BatchNorm, Linear, stacked
from avzero.models._contract import Context
from avzero.models._random import Dropout
from avzero.protocol.counter import dropout_gate


def block(
    x: Tensor, linear: Linear, norm: BatchNorm, dropout: Dropout, context: Context | None
) -> Tensor:
    """Map [B, ..., in] to [B, ..., out]; the groups of BatchNorm lie between B and ``in``."""
    alone = context is not None and context.world is None
    if context is None or not alone or not norm.training or len(linear.weight) == 1:
        x = F.relu(norm(linear(x), context))
        return x if context is None else dropout(x, context)
    rows, shape = x.shape[0], (*x.shape[:-1], len(linear.weight))
    out, mean, var, *_ = _Block.apply(  # type: ignore[no-untyped-call]
        x.reshape(-1, x.shape[-1]),
        linear.weight,
        linear.bias,
        norm.weight,
        norm.bias,
        context.keys[dropout.site],
        dropout.threshold,
        dropout.kept,
        rows,
        not dropout.off,
        norm.eps,
    )
    if context.tracked:
        mean = mean.view(-1, shape[-1]) + linear.bias.detach()
        norm.track(mean.view(-1), var.view(-1), rows)
    return out.view(shape)  # type: ignore[no-any-return]


def _over_groups(x: Tensor, groups: int) -> Tensor:
    """Return a parameter [..., d] for G groups side by side, [..., 1, G * d]."""
    x = x.unsqueeze(-2)
    return x if groups == 1 else x.repeat(*(1,) * (x.dim() - 1), groups)


def _of_groups(x: Tensor, width: int) -> Tensor:
    """Return a parameter's gradient [..., d] out of those of its groups, [..., 1, G * d]."""
    return x.view(*x.shape[:-2], -1, width).sum(-2)


class _Block(torch.autograd.Function):
    """See ``block``; rows are [..., B * G, d], everything else [..., d] or [...].

    With c the centred products, s their inverse standard deviation, n = B and k = 1 / (1 - p),
    out = m (a + b c) where m is 1 for kept elements above 0, a = k beta and b = k gamma s. The
    gradient of c's rows is b (g - mean(g) - s^2 c mean(g c)) where g has been multiplied by m.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        gamma: Tensor,
        beta: Tensor,
        key: Tensor,
        threshold: Tensor,
        kept: Tensor,
        rows: int,
        dropping: bool,
        eps: float,
    ) -> tuple[Tensor, ...]:
        del bias
        products = (x @ weight.mT).to(x.dtype)  # autocast may have rounded them
        centred = products.view(*products.shape[:-2], rows, -1)
        groups = centred.shape[-1] // weight.shape[-2]
        mean = centred.mean(-2, keepdim=True)
        centred -= mean
        var = (centred * centred).mean(-2, keepdim=True)
        scale = torch.rsqrt(var + eps)
        gamma, beta = _over_groups(gamma, groups), _over_groups(beta, groups)
        if dropping:
            kept = kept[..., None, None]
            gamma, beta = gamma * kept, beta * kept
        out = torch.addcmul(beta, centred, gamma * scale)
        if dropping:
            shape = centred.shape[-2:]
            gate = dropout_gate(key, shape, threshold, 0, shape.numel())
            torch.minimum(out, gate.to(out.dtype), out=out)
        return out.relu_(), mean, var, centred, scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, _, gamma, _, _, _, kept, _, dropping, _ = inputs
        out, _, _, centred, scale = output
        ctx.save_for_backward(x, weight, gamma, kept, out, centred, scale)
        ctx.dropping = dropping
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gamma, kept, out, centred, scale = ctx.saved_tensors
        rows, width = centred.shape[-2], weight.shape[-2]
        g = torch.ops.aten.threshold_backward(gradients[0], out, 0).contiguous()
        d_beta = g.sum(-2, keepdim=True)
        d_gamma = (g * centred).sum(-2, keepdim=True) * scale
        factor = _over_groups(gamma, centred.shape[-1] // width) * scale
        if ctx.dropping:
            factor = factor * kept[..., None, None]
        small = factor / -rows
        torch.addcmul(d_beta * small, g, factor, out=g)
        g.addcmul_(centred, d_gamma * scale * small)
        if ctx.dropping:
            d_beta, d_gamma = (d * kept[..., None, None] for d in (d_beta, d_gamma))
        g = g.view(*g.shape[:-2], -1, width)
        return (
            g @ weight if ctx.needs_input_grad[0] else None,
            g.mT @ x,
            g.new_zeros(weight.shape[:-1]),
            _of_groups(d_gamma, width),
            _of_groups(d_beta, width),
            *(None,) * 6,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        out = _Block.apply(*stacked(info, in_dims, inputs))  # type: ignore[no-untyped-call]
        return out, (0,) * 5
