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

from avzero.models._basic import BatchNorm, Linear, call
from avzero.models._contract import Context
from avzero.models._random import Dropout
from avzero.protocol.counter import dropout_gate


def block(
    x: Tensor, linear: Linear, norm: BatchNorm, dropout: Dropout, context: Context | None
) -> Tensor:
    """Map [B, ..., in] to [B, ..., out]; the groups of BatchNorm lie between B and ``in``."""
    if context is None or context.world is not None or not norm.training or len(linear.weight) == 1:
        x = F.relu(norm(linear(x), context))
        return x if context is None else dropout(x, context)
    draws = None if dropout.off else (context.keys[dropout.site], dropout.threshold, dropout.kept)
    out, mean, var = call(
        _Block,
        x if x.dim() == 2 else x.reshape(-1, x.shape[-1]),
        linear.weight,
        linear.bias,
        norm.weight,
        norm.bias,
        x.shape[0],
        norm.eps,
        *(draws or ()),
    )
    if context.tracked:
        norm.track((mean + linear.bias.detach())[0], var[0], x.shape[0])
    return out if x.dim() == 2 else out.view(*x.shape[:-1], -1)  # type: ignore[no-any-return]


def _to_rows(x: Tensor) -> Tensor:
    """Return a parameter [..., d] so that it broadcasts against rows [..., B, G, d]."""
    return x if x.dim() == 1 else x[:, None, None]


class _Block(torch.autograd.Function):
    """See ``block``; rows are [..., B * G, d], everything else [..., d] or [...].

    With c the centred products, s their inverse standard deviation, n = B and k = 1 / (1 - p),
    out = m (a + b c) where m is 1 for kept elements above 0, a = k beta and b = k gamma s. The
    gradient of c's rows is b (g - mean(g) - s^2 c mean(g c)) where g has been multiplied by m.
    Returned are also the products' mean and (biased) variance, [..., 1, G, d].
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        gamma: Tensor,
        beta: Tensor,
        rows: int,
        eps: float,
        *draws: Tensor,
    ) -> tuple[Tensor, ...]:
        del bias  # it has no part in the output, and a gradient of zeros
        products = x @ weight.mT
        if products.dtype != gamma.dtype:  # autocast has rounded them
            products = products.to(gamma.dtype)
        centred = products.view(*products.shape[:-2], rows, -1, weight.shape[-2])
        mean = centred.sum(-3, keepdim=True).mul_(1 / rows)
        centred -= mean
        room = centred * centred
        var = room.sum(-3, keepdim=True).mul_(1 / rows)
        scale = (var + eps).rsqrt_()
        factor, shift = _to_rows(gamma) * scale, _to_rows(beta)
        kept = None
        if draws:
            key, threshold, kept = draws
            kept = kept[:, None, None, None] if kept.dim() else kept
            factor, shift = factor * kept, shift * kept
            shape = centred.shape[-3:]
            gate = dropout_gate(key, shape, threshold, 0, shape.numel())
            gate = gate if gate.dtype == gamma.dtype else gate.to(gamma.dtype)
            torch.addcmul(shift, centred, factor, out=room)
            out = torch.minimum(room, gate, out=room)
        else:
            out = torch.addcmul(shift, centred, factor, out=room)
        out = out.relu_().view(products.shape)
        ctx.save_for_backward(x, weight, out, centred, factor, scale, kept)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return out, mean, var

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, out, centred, factor, scale, kept = ctx.saved_tensors
        g = torch.ops.aten.threshold_backward(gradients[0], out, 0).contiguous()
        rows = g.view(centred.shape)
        d_beta = rows.sum(-3, keepdim=True)
        d_gamma = (rows * centred).sum(-3, keepdim=True).mul_(scale)
        small = factor / -centred.shape[-3]
        # Refused where a second derivative is asked for: this one is not written for it.
        torch.addcmul(d_beta * small, rows, factor, out=rows)
        rows.addcmul_(centred, (d_gamma * scale).mul_(small))
        if kept is not None:
            d_beta, d_gamma = d_beta.mul_(kept), d_gamma.mul_(kept)
        return (
            g @ weight if ctx.needs_input_grad[0] else None,
            g.mT @ x,
            g.new_zeros(weight.shape[:-1]),
            d_gamma.sum((-3, -2)),
            d_beta.sum((-3, -2)),
            *(None,) * (len(ctx.needs_input_grad) - 5),
        )
