"""Linear maps and normalisations whose bits do not depend on what is trained beside them.

Many configurations are trained stacked under ``torch.func.vmap`` (``train.array``), and a trial
must come out the same alone or among others. The framework's layers do not promise that: it
merges the slots of a stack into columns or rows of one operation, whose edges are summed in
another order than its middle. Here every reduction runs over one dimension of [..., B, d], so a
slot's numbers are added in one order wherever it lies; tests compare all systems bit for bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from avzero.models._contract import Context, scalar


class Linear(nn.Linear):
    """y = x W^T + b on rows [..., in]: one matrix product for all rows, then the bias."""

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b for rows [..., in], weight [out, in] and bias [out]."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    out: Tensor
    if len(weight) == 1:
        # A product with a single column is another routine alone than in a stack.
        out = (flat * weight).sum(-1, keepdim=True)
        out = out if bias is None else out + bias
    else:
        out = _Affine.apply(flat, weight, bias)  # type: ignore[no-untyped-call]
    return out if x.dim() == 2 else out.view(*x.shape[:-1], len(weight))


def sigmoid(x: Tensor) -> Tensor:
    """Return 1 / (1 + exp(-x)).

    Not the framework's: it computes the last few elements of a tensor by another formula.
    """
    return 0.5 * (1 + torch.tanh(0.5 * x))


class _Affine(torch.autograd.Function):
    """x W^T + b of rows [..., B, in]; the weight's gradient comes out in the weight's layout.

    The framework's comes out transposed in a stack, and its optimiser reads memory as it lies.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = x @ weight.mT
        return out if bias is None else out.add_(bias.unsqueeze(-2))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        ctx.save_for_backward(*inputs[:2])
        ctx.bias = inputs[2] is not None

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            g @ weight if need_x else None,
            g.mT @ x if need_weight else None,
            g.sum(-2) if ctx.bias and need_bias else None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        return _Affine.apply(*stacked(info, in_dims, inputs)), 0  # type: ignore[no-untyped-call]


def stacked(info: Any, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]) -> list[Any]:
    """Return the tensors among a function's inputs with the slots in front."""
    out = []
    for x, at in zip(inputs, in_dims, strict=True):
        if not isinstance(x, Tensor) or at == 0:
            out.append(x)
        else:
            out.append(x.expand(info.batch_size, *x.shape) if at is None else x.movedim(at, 0))
    return out


class _Standardise(torch.autograd.Function):
    """Standardise [..., B, d] over B or d, then scale and shift: forward, and its closed form
    backward.

    With n the size of the reduced dimension, c the centred and h = s c the standardised values,
    dx = s (g - mean(g) - h mean(g h)) where g already has the weight of the layer in it and s is
    the inverse standard deviation. Factors are put on small tensors where they can be: every pass
    over the rows costs as much as a normalisation's sums.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, dim: int, eps: float) -> tuple[Any, ...]:
        mean = x.mean(dim, keepdim=True)
        centred = x - mean
        var = (centred * centred).mean(dim, keepdim=True)
        scale = torch.rsqrt(var + eps)
        row, shift = weight.unsqueeze(-2), bias.unsqueeze(-2)
        if dim == -2:
            out = torch.addcmul(shift, centred, scale * row)
        else:
            centred *= scale  # kept standardised: it is needed twice
            out = torch.addcmul(shift, centred, row)
        return out, mean.squeeze(dim), var.squeeze(dim), centred, scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(output[3], output[4], inputs[1])
        ctx.dim = inputs[3]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        g = gradients[0]
        centred, scale, weight = ctx.saved_tensors
        row = weight.unsqueeze(-2)
        d_bias = g.sum(-2)
        if ctx.dim == -2:
            # The sums over rows are the parameters' gradients: nothing is reduced twice.
            d_weight = (g * centred).sum(-2) * scale.squeeze(-2)
            factor = scale * row
            mean, product = ((x / g.shape[-2]).unsqueeze(-2) for x in (d_bias, d_weight))
            out = torch.addcmul(-mean * factor, g, factor)
            out.addcmul_(centred, product * scale * factor, value=-1)
        else:
            d_weight = (g * centred).sum(-2)
            g = g * row
            out = g - g.mean(-1, keepdim=True)
            out.addcmul_(centred, (g * centred).mean(-1, keepdim=True), value=-1)
            out *= scale
        return out, d_weight, d_bias, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        out = _Standardise.apply(*stacked(info, in_dims, inputs))  # type: ignore[no-untyped-call]
        return out, (0,) * 5


def _standardise(
    x: Tensor, weight: Tensor, bias: Tensor, dim: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the layer's output, and mean and (biased) variance without gradient."""
    out: tuple[Tensor, ...] = _Standardise.apply(x, weight, bias, dim, eps)  # type: ignore[no-untyped-call]
    return out[0], out[1], out[2]


class LayerNorm(nn.Module):
    """Layer normalisation over the last dimension, with weight and bias."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., d]."""
        flat = x.reshape(-1, x.shape[-1])
        return _standardise(flat, self.weight, self.bias, -1, self.eps)[0].view(x.shape)


_REMEMBERS = 2.0**-24
"""Weight below which something has no part in a float32 number."""
_USUAL_MOMENTUM = 0.1


def memory(model: nn.Module) -> int:
    """Return how many steps the running statistics of a model remember; 0 = more than usual.

    With momentum m the weight of the step n updates ago is at most (1 - m)^n, and every step
    updates at least once: 158 steps for m = 0.1, which the first layer of most systems has.
    """
    momenta = [float(m.momentum) for m in model.modules() if isinstance(m, BatchNorm)]
    if min(momenta, default=1.0) < _USUAL_MOMENTUM * (1 - 1e-6):  # 0.1 in float32 is not 0.1
        return 0
    return math.ceil(math.log(_REMEMBERS) / math.log(1 - _USUAL_MOMENTUM))


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
        if not self.training:
            scale = self.weight * torch.rsqrt(self.running_var + self.eps)
            return torch.addcmul(self.bias - self.running_mean * scale, x, scale)
        width, rows = x.shape[-1], x.shape[0]
        flat = x.reshape(rows, -1)
        groups = flat.shape[1] // width
        weight, bias = self.weight.repeat(groups), self.bias.repeat(groups)
        world = None if context is None else context.world
        if world is None:
            out, mean, var = _standardise(flat, weight, bias, -2, self.eps)
        else:
            mean = world.sum(flat.mean(0)) / world.size
            centred = flat - mean
            var = world.sum(centred.square().mean(0)) / world.size
            out = centred * (torch.rsqrt(var + self.eps) * weight) + bias
            rows *= world.size
        if context is None or context.tracked:
            self.track(mean.detach(), var.detach(), rows)
        return out.view(x.shape)

    def track(self, mean: Tensor, var: Tensor, rows: int) -> None:
        """Move the running statistics towards those of each group, in order.

        Args:
            mean: [G * d], of G groups side by side.
            var: likewise, biased.
            rows: how many rows a group has.
        """
        width = self.running_mean.shape[0]
        var = var * (rows / (rows - 1))
        for running, values in ((self.running_mean, mean), (self.running_var, var)):
            for group in values.view(-1, width).unbind(0):
                running.add_((group - running) * self.momentum)
