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
from torch.autograd.function import once_differentiable

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
        out = call(_Affine, flat, weight, bias)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], len(weight))


def sigmoid(x: Tensor) -> Tensor:
    """Return 1 / (1 + exp(-x)).

    Not the framework's: it computes the last few elements of a tensor by another formula.
    """
    return 0.5 * (1 + torch.tanh(0.5 * x))


def call(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """Call an autograd function that takes its tensors with slots in front or without.

    Under ``vmap`` all of them get the slots in front. The framework's own way to write such a
    function reads its signature at every call, which takes longer than most of their work.
    """
    if torch._C._are_functorch_transforms_active():
        return _Slots.apply(function, *inputs)  # type: ignore[no-untyped-call]
    return function.apply(*inputs)  # type: ignore[no-untyped-call]


class _Slots(torch.autograd.Function):
    """See ``call``; it is reached under ``vmap`` alone."""

    @staticmethod
    def forward(function: type[torch.autograd.Function], *inputs: Any) -> Any:
        raise NotImplementedError("under a transform: only vmap, over an input of this function")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        function: type[torch.autograd.Function],
        *inputs: Any,
    ) -> tuple[Any, Any]:
        def in_front(x: Any, at: int | None) -> Any:
            if not isinstance(x, Tensor) or at == 0:
                return x
            return x.expand(info.batch_size, *x.shape) if at is None else x.movedim(at, 0)

        out = function.apply(*map(in_front, inputs, in_dims[1:]))  # type: ignore[no-untyped-call]
        return out, 0 if isinstance(out, Tensor) else (0,) * len(out)


class _Affine(torch.autograd.Function):
    """x W^T + b of rows [..., B, in]; the weight's gradient comes out in the weight's layout.

    The framework's comes out transposed in a stack, and its optimiser reads memory as it lies.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        out = x @ weight.mT
        return out if bias is None else out.add_(bias.unsqueeze(-2))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            g @ weight if need_x else None,
            g.mT @ x if need_weight else None,
            g.sum(-2) if need_bias else None,
        )


class _Standardise(torch.autograd.Function):
    """Standardise [..., B, d] over B, then scale and shift: forward, and its closed form backward.

    Returns the output, the mean and the (biased) variance. With c the centred values and s their
    inverse standard deviation, dx = s w (g - mean(g) - s^2 c mean(g c)), w being the weight.
    Factors are put on small tensors where they can be: a pass over the rows costs as much as a sum.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, ...]:
        mean = x.mean(-2, keepdim=True)
        centred = x - mean
        var = (centred * centred).mean(-2, keepdim=True)
        scale = torch.rsqrt(var + eps)
        factor = scale * weight.unsqueeze(-2)
        mean, var = mean.squeeze(-2), var.squeeze(-2)
        ctx.save_for_backward(centred, scale, factor)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return torch.addcmul(bias.unsqueeze(-2), centred, factor), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        g = gradients[0]
        centred, scale, factor = ctx.saved_tensors
        # The sums over rows are the parameters' gradients: nothing is reduced twice.
        d_bias = g.sum(-2, keepdim=True)
        d_weight = (g * centred).sum(-2, keepdim=True) * scale
        small = factor / -g.shape[-2]
        out = torch.addcmul(d_bias * small, g, factor)
        out.addcmul_(centred, d_weight * scale * small)
        return out, d_weight.squeeze(-2), d_bias.squeeze(-2), None


class _Rows(torch.autograd.Function):
    """Standardise every row of [..., B, d], then scale and shift.

    The framework's layer takes rows one by one, so that a row's numbers depend on nothing beside
    it; only its weights, which it would share between slots, are applied here.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        row = weight.unsqueeze(-2)
        x = x if x.dtype == weight.dtype else x.to(weight.dtype)  # autocast has rounded it
        out, mean, scale = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        ctx.save_for_backward(x, out, mean, scale, row)
        return torch.addcmul(bias.unsqueeze(-2), out, row)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        x, standard, mean, scale, row = ctx.saved_tensors
        out, _, _ = torch.ops.aten.native_layer_norm_backward(
            g * row, x, x.shape[-1:], mean, scale, None, None, [True, False, False]
        )
        return out, (g * standard).sum(-2), g.sum(-2), None


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
        out: Tensor = call(_Rows, flat, self.weight, self.bias, self.eps)
        return out.view(x.shape)


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
            out, mean, var = call(_Standardise, flat, weight, bias, self.eps)
        else:
            mean = world.sum(flat.mean(0)) / world.size
            centred = flat - mean
            var = world.sum(centred.square().mean(0)) / world.size
            out = centred * (torch.rsqrt(var + self.eps) * weight) + bias
            rows *= world.size
        if context is None or context.tracked:
            self.track(mean.detach().view(-1, width), var.detach().view(-1, width), rows)
        return out.view(x.shape)  # type: ignore[no-any-return]

    def track(self, mean: Tensor, var: Tensor, rows: int) -> None:
        """Move the running statistics towards those of each group, in order.

        Args:
            mean: [G, d].
            var: [G, d], biased.
            rows: how many rows a group has.
        """
        var = var * (rows / (rows - 1))
        for running, values in ((self.running_mean, mean), (self.running_var, var)):
            for group in values.unbind(0):
                running.add_((group - running) * self.momentum)
