"""The fill rule of ``golden/*.json``: parameters and inputs as waves, so no weights are shipped."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from avzero.models._contract import Context, Model
from avzero.models._layers import number_sites
from tests.conftest import ROOT

ROWS = 6


def load(name: str) -> dict[str, Any]:
    """Return a fixture."""
    return dict(json.loads((ROOT / "tests" / "golden" / f"{name}.json").read_text()))


def wave(shape: tuple[int, ...], phase: float, amplitude: float, step: float = 0.7) -> Tensor:
    """Return amplitude * sin(step * i + phase) for flat elements i = 1, 2, …."""
    index = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    return (amplitude * torch.sin(step * index + phase)).view(shape)


def inputs(width: int, phase: float) -> Tensor:
    """Return a feature block [6, width]."""
    return 0.5 + wave((ROWS, width), phase, 0.5, 0.9)


def words(rows: int, phase: float, step: float) -> Tensor:
    """Return unit-norm word vectors [rows, 300]."""
    block = wave((rows, 300), phase, 1.0, step)
    return block / block.norm(dim=1, keepdim=True)


def fill(model: Model) -> Context:
    """Set every parameter and statistic by the rule; return a context without dropout."""
    state = model.state_dict()
    # The rule numbers the reference's keys, which include BatchNorm counters we do not keep.
    counters = [
        k.replace("running_mean", "num_batches_tracked")
        for k in state
        if k.endswith("running_mean")
    ]
    filled: dict[str, Tensor] = {}
    for number, key in enumerate(sorted([*state, *counters])):
        if key not in state:
            continue
        shape, phase = tuple(state[key].shape), 1.3 * (number + 1)
        if key.endswith("running_var"):
            filled[key] = 1 + 0.5 * wave(shape, phase, 1.0) ** 2
        elif key.endswith("running_mean"):
            filled[key] = wave(shape, phase, 0.1)
        elif len(shape) >= 2:
            filled[key] = wave(shape, phase, 2 / math.sqrt(math.prod(shape[1:])))
        elif key.endswith(".weight"):
            filled[key] = 1 + wave(shape, phase, 0.1)
        else:
            filled[key] = wave(shape, phase, 0.1)
    model.double().load_state_dict(filled)
    return Context(torch.zeros(max(number_sites(model), 1), 2, dtype=torch.int32))


def assert_close(name: str, ours: float, theirs: float, scale: float | None = None) -> None:
    """Compare with relative tolerance 1e-8; ``scale`` is the size of what a sum cancels from."""
    size = max(abs(theirs), scale or 0.0, 1e-9)
    assert abs(ours - theirs) <= 1e-8 * size, f"{name}: {ours!r} != {theirs!r}"


def assert_summary(name: str, tensor: Tensor, expected: dict[str, Any]) -> None:
    """Compare a tensor with its summary in a fixture."""
    assert list(tensor.shape) == expected["shape"], name
    # A sum of n terms cancels from about sqrt(n * sum of squares).
    scale = math.sqrt(tensor.numel() * expected["sumsq"])
    assert_close(f"{name}.sum", tensor.sum().item(), expected["sum"], scale)
    assert_close(f"{name}.sumsq", tensor.square().sum().item(), expected["sumsq"])
    for i, value in enumerate(expected["first"]):
        assert_close(f"{name}[{i}]", tensor.flatten()[i].item(), value, 1e-2)
    assert int((tensor == 0).sum()) == expected["zeros"], f"{name}: zeros"
