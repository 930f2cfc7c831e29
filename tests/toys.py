"""Networks of the CLIP/CLAP-era systems once more, in numpy: what their tests compare with.

Nothing here is shared with the package: blocks in train mode (batch statistics, no dropout), the
transformer, the usual losses, tables of checkpoint keys. At the end, what the tests of adversarial
systems share: a small batch, training rows, two workers.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import erf

from avzero.models._contract import Batch, Context, Model, Shapes
from avzero.models._layers import Dropout, number_sites
from avzero.protocol.counter import fold, site_keys
from avzero.protocol.sampling import Draws
from avzero.train.data import StageData
from avzero.train.feed import Feed, slot

Array = np.ndarray
State = dict[str, Array]
Shape = tuple[int, ...]


def ready(model: Model) -> tuple[Context, State]:
    """Fill a model with random numbers, switch dropout off; return a context and its parameters.

    The waves of ``parity`` make matrices of rank 2, in which attention hardly depends on its input.
    """
    generator = torch.Generator().manual_seed(11)
    model.double()
    for key, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        if key.endswith("running_var"):
            value.copy_(1 + noise.square())
        elif value.dim() >= 2:
            value.copy_(1.5 * noise / value.shape[-1] ** 0.5)
        else:
            value.copy_(float(key.endswith(".weight")) + 0.2 * noise)
    for module in model.modules():
        if isinstance(module, Dropout):
            module.off = True
    context = Context(torch.zeros(max(number_sites(model), 1), 2, dtype=torch.int32))
    return context, {key: value.numpy().copy() for key, value in model.state_dict().items()}


def batch(audio: int, video: int, text: int, rows: int = 7, classes: int = 3) -> Batch:
    """Return a float64 batch; its class text is not of unit length, so that it matters."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    table = draw(classes, text)
    anchor = torch.arange(rows) % classes
    label = torch.stack([anchor, (anchor + 1) % classes], 1)
    features = {"audio": draw(rows, 2, audio).abs(), "video": draw(rows, 2, video).abs()}
    return Batch(features, table[label], label, table)


def anchors(data: Batch) -> tuple[Array, Array, Array, Array, Array]:
    """Return audio, video, text and labels of the anchors, and the class table."""
    a, v = data.features["audio"][:, 0], data.features["video"][:, 0]
    parts = (a, v, data.text[:, 0], data.label[:, 0], data.class_text)
    return tuple(part.numpy() for part in parts)  # type: ignore[return-value]


def mlp(s: State, name: str, x: Array) -> Array:
    """One or two blocks Linear, BatchNorm with the batch's statistics, ReLU."""
    for at in (0, 4):
        if f"{name}.fc.{at}.weight" in s:
            x = x @ s[f"{name}.fc.{at}.weight"].T + s[f"{name}.fc.{at}.bias"]
            x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
            x = x * s[f"{name}.fc.{at + 1}.weight"] + s[f"{name}.fc.{at + 1}.bias"]
            x = np.maximum(x, 0)
    return x


def first_mean(s: State, name: str, x: Array) -> Array:
    """The mean a block's first BatchNorm sees."""
    mean: Array = (x @ s[f"{name}.fc.0.weight"].T + s[f"{name}.fc.0.bias"]).mean(0)
    return mean


def softmax(x: Array) -> Array:
    """Over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    out: Array = e / e.sum(-1, keepdims=True)
    return out


def cross_entropy(scores: Array, label: Array) -> float:
    """Mean over rows of -log softmax at the label."""
    return float(-np.mean([np.log(softmax(row)[y]) for row, y in zip(scores, label, strict=True)]))


def mse(x: Array, y: Array) -> float:
    """Mean of squares."""
    return float(((x - y) ** 2).mean())


def norm_rows(x: Array) -> Array:
    """Rows of unit length."""
    out: Array = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return out


def layer_norm(s: State, name: str, x: Array) -> Array:
    """Over the last axis."""
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    out: Array = x * s[f"{name}.weight"] + s[f"{name}.bias"]
    return out


def attention(s: State, name: str, x: Array, heads: int) -> Array:
    """Self-attention of every sample [tokens, d], head by head."""
    qkv = x @ s[f"{name}.to_qkv.weight"].T
    inner = qkv.shape[-1] // 3
    d = inner // heads
    out = np.zeros((*x.shape[:-1], inner))
    for i in range(len(x)):
        for h in range(heads):
            q, k, v = (qkv[i, :, p * inner + h * d : p * inner + (h + 1) * d] for p in range(3))
            out[i, :, h * d : (h + 1) * d] = softmax(q @ k.T / np.sqrt(d)) @ v
    return out @ s[f"{name}.to_out.0.weight"].T + s[f"{name}.to_out.0.bias"]


def transformer(s: State, name: str, x: Array, layers: int, heads: int) -> Array:
    """Pre-norm blocks with residuals and exact GELU."""
    for i in range(layers):
        at, ff = f"{name}.layers.{i}.0", f"{name}.layers.{i}.1"
        x = x + attention(s, f"{at}.fn", layer_norm(s, f"{at}.norm", x), heads)
        y = layer_norm(s, f"{ff}.norm", x) @ s[f"{ff}.fn.net.0.weight"].T
        y = y + s[f"{ff}.fn.net.0.bias"]
        y = y * (1 + erf(y / np.sqrt(2))) / 2
        x = x + y @ s[f"{ff}.fn.net.3.weight"].T + s[f"{ff}.fn.net.3.bias"]
    return x


def triplet(x: Array, p: Array, n: Array) -> float:
    """Mean over rows of max(0, 1 + |x - p| - |x - n|)."""
    gaps = [
        1 + np.linalg.norm(a - b + 1e-6) - np.linalg.norm(a - c + 1e-6)
        for a, b, c in zip(x, p, n, strict=True)
    ]
    return float(np.maximum(gaps, 0).mean())


def parameters(model: Model) -> int:
    """Count a model's parameters."""
    return sum(p.numel() for p in model.parameters())


def total(terms: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the objective."""
    return torch.stack(list(terms.values())).sum()


def block_keys(name: str, *widths: int) -> Iterator[tuple[str, Shape]]:
    """Yield keys and shapes of a released block of one or two Linear + BatchNorm."""
    for at, (width, out) in zip((0, 4), itertools.pairwise(widths), strict=False):
        yield f"{name}.fc.{at}.weight", (out, width)
        yield f"{name}.fc.{at}.bias", (out,)
        for key in ("weight", "bias", "running_mean", "running_var"):
            yield f"{name}.fc.{at + 1}.{key}", (out,)
        yield f"{name}.fc.{at + 1}.num_batches_tracked", ()


def layer_keys(
    name: str, layer: int, width: int, inner: int, hidden: int
) -> Iterator[tuple[str, Shape]]:
    """Yield keys and shapes of one released transformer layer."""
    at = f"{name}.layers.{layer}"
    for half in (0, 1):
        for key in ("weight", "bias"):
            yield f"{at}.{half}.norm.{key}", (width,)
    yield f"{at}.0.fn.to_qkv.weight", (3 * inner, width)
    yield f"{at}.0.fn.to_out.0.weight", (width, inner)
    yield f"{at}.0.fn.to_out.0.bias", (width,)
    yield f"{at}.1.fn.net.0.weight", (hidden, width)
    yield f"{at}.1.fn.net.0.bias", (hidden,)
    yield f"{at}.1.fn.net.3.weight", (width, hidden)
    yield f"{at}.1.fn.net.3.bias", (width,)


def checkpoint(keys: dict[str, Shape]) -> dict[str, torch.Tensor]:
    """Return random tensors under released names, as a data-parallel run saves them."""
    generator = torch.Generator().manual_seed(1)
    return {
        f"module.{key}": torch.tensor(12)
        if key.endswith("num_batches_tracked")
        else torch.rand(shape, generator=generator)
        for key, shape in keys.items()
    }


def assert_taken(model: Model, state: dict[str, torch.Tensor], dropped: tuple[str, ...]) -> None:
    """Load a checkpoint; every tensor arrives but counters and keys that start with ``dropped``."""
    model.load_reference(state)
    ours = model.state_dict()
    kept = {
        key: value
        for key, value in ((k.removeprefix("module."), v) for k, v in state.items())
        if not key.endswith("num_batches_tracked") and not key.startswith(dropped)
    }
    assert ours.keys() == kept.keys()
    for key, value in kept.items():
        assert torch.equal(ours[key].flatten(), value.flatten()), key


def assert_stacks(make: Callable[[], Model], data: Batch) -> None:
    """Two differing models in one vmapped call give the losses and gradients each gives alone."""
    models, keys, alone = [], [], []
    for number in (0, 1):
        torch.manual_seed(number)
        model = make().double().train()
        models.append(model)
        keys.append(site_keys(fold(number), 1, number_sites(model), torch.device("cpu"))[0])
        twin = copy.deepcopy(model)
        value = total(twin.loss(data, Context(keys[-1])))
        value.backward()  # type: ignore[no-untyped-call]
        alone.append((value.detach(), {k: p.grad for k, p in twin.named_parameters()}))
    params, buffers = torch.func.stack_module_state(models)
    skeleton = copy.deepcopy(models[0])

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = skeleton

        def forward(self, key: torch.Tensor) -> torch.Tensor:
            return total(skeleton.loss(data, Context(key)))

    def one(
        p: dict[str, torch.Tensor], b: dict[str, torch.Tensor], k: torch.Tensor
    ) -> torch.Tensor:
        named = {f"model.{key}": value for key, value in (p | b).items()}
        out: torch.Tensor = torch.func.functional_call(Loss(), named, (k,))
        return out

    values = torch.vmap(one)(params, buffers, torch.stack(keys))
    found = torch.autograd.grad(values.sum(), list(params.values()), allow_unused=True)
    gradients = dict(zip(params, found, strict=True))
    for number, (value, own) in enumerate(alone):
        torch.testing.assert_close(values[number], value)
        for key, gradient in own.items():
            stacked = gradients[key]
            if gradient is None or stacked is None:
                assert gradient is stacked, key
            else:
                torch.testing.assert_close(stacked[number], gradient, rtol=1e-6, atol=1e-10)


SMALL = Shapes({"audio": 5, "video": 6}, 7)


def small_batch(rows: int = 8) -> Batch:
    """Return a float64 batch of ``SMALL``: three classes, features in 0 … 1, text of length 1."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    table = F.normalize(draw(3, SMALL.text), dim=1)
    label = torch.stack([torch.arange(rows) % 3, (torch.arange(rows) + 1) % 3], 1)
    features = {m: draw(rows, 2, d) for m, d in SMALL.features.items()}
    return Batch(features, table[label], label, table)


def drawing(part: str = "", world: object = None) -> Context:
    """Return a context with keys for four random sites."""
    keys = site_keys(fold(3), 1, 4, torch.device("cpu"))[0]
    return Context(keys, world, part)  # type: ignore[arg-type]


def taken(data: StageData, draws: Draws, step: int, rank: int = 0, size: int = 1) -> Batch:
    """Return a lone run's batch of a step, or a worker's share of it."""
    return slot(Feed([(data, draws)], rank, size).batch(step), 0)


class Rows:
    """Training rows of seen classes, in blocks."""

    def __init__(
        self, features: Mapping[str, torch.Tensor], label: torch.Tensor, seed: int = 5
    ) -> None:
        self.features, self.label, self.seed = features, label, seed

    def blocks(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        for start in range(0, len(self.label), 5):
            part = slice(start, start + 5)
            yield {m: x[part] for m, x in self.features.items()}, self.label[part]


def seen_rows(data: Batch, seen: int, seed: int = 5) -> Rows:
    """Return the anchors of the first ``seen`` classes."""
    label = data.label[:, 0]
    mine = label < seen
    return Rows({m: x[:, 0][mine] for m, x in data.features.items()}, label[mine], seed)


def assert_passes_reach(model: Model, data: Batch, reached: dict[str, tuple[str, ...]]) -> None:
    """A pass gives gradients to parameters whose names start as given, and to no others."""
    for part, prefixes in reached.items():
        model.zero_grad(set_to_none=True)
        total(model.loss(data, drawing(part))).backward()  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == name.startswith(prefixes), (part, name)


class HalfWorld:
    """One of two workers: a first run records what it would send, a second one receives."""

    size = 2

    def __init__(self, rank: int, sent: dict[int, list[torch.Tensor]]) -> None:
        self.rank, self.sent, self.calls = rank, sent, 0
        self.recording = rank not in sent
        sent.setdefault(rank, [])

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        raise AssertionError("not needed")

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        if self.recording:
            self.sent[self.rank].append(values.detach())
            return torch.cat([values, values])
        other = self.sent[1 - self.rank][self.calls]
        self.calls += 1
        return torch.cat([values, other] if self.rank == 0 else [other, values])


def assert_workers_average(model: Model, data: Batch, part: str) -> dict[int, list[torch.Tensor]]:
    """Two workers' terms average to those of one; return what each of them sent."""
    half = len(data.label) // 2
    sent: dict[int, list[torch.Tensor]] = {}

    def share(rank: int) -> dict[str, torch.Tensor]:
        mine = slice(half * rank, half * rank + half)
        features = {m: x[mine] for m, x in data.features.items()}
        rows = Batch(features, data.text[mine], data.label[mine], data.class_text)
        return model.loss(rows, drawing(part, HalfWorld(rank, sent)))

    for rank in range(2):
        share(rank)
    first, second = (share(rank) for rank in range(2))
    for name, value in model.loss(data, drawing(part)).items():
        torch.testing.assert_close((first[name] + second[name]) / 2, value)
    return sent
