"""TCaF against its specification written out once more, token by token and without padding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from avzero.errors import UserError
from avzero.models._contract import Batch, Context, Shapes
from avzero.models._layers import number_sites
from avzero.models._sequences import MaskedBlock, Pairs, attention_bias
from avzero.models.tcaf import TCAF, TCAFConfig
from tests import parity
from tests.test_contract import normalised

TEMPORAL = Shapes({"audio": 7, "video": 9}, 12, temporal=True)
AVERAGED = Shapes({"audio": 7, "video": 9}, 12)
STILL = {"p_emb": 0, "p_transformer": 0, "p_pos": 0, "p_dec": 0, "p_add": 0}
SMALL = STILL | {"layers": 2, "heads": 2, "dim_head": 5, "H": 10, "K": 11}
PAIRS: list[Pairs] = ["cross_only", "full", "self_only"]
PAD = "position_encoder_block.pad_embedding.weight"


def build(shapes: Shapes = TEMPORAL, **values: object) -> tuple[TCAF, Context]:
    model = TCAF(TCAFConfig.model_validate(SMALL | values), shapes)
    return model, parity.fill(model)


def sequences(rows: int = 4, extra: int = 0) -> dict[str, Tensor]:
    """Return zero-padded sequences of lengths 1 … 5 (audio) and 2 … 4 (video), one group."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for modality, steps, low in (("audio", 5, 1), ("video", 4, 2)):
        length = torch.randint(low, steps + 1, (rows,), generator=generator)
        length[0] = steps
        x = torch.rand(rows, steps, TEMPORAL.features[modality], generator=generator)
        x = x * (torch.arange(steps) < length[:, None])[..., None]
        found[modality] = F.pad(x.double(), (0, 0, 0, extra))
        found[f"{modality}_length"] = length
    return found


def batch(features: Mapping[str, Tensor], classes: int = 3) -> Batch:
    rows = len(features["audio"])
    table = F.normalize(parity.wave((classes, 12), 0.8, 1.0, 1.7), dim=1)
    label = torch.stack([torch.arange(rows) % classes, (torch.arange(rows) + 1) % classes], 1)
    pairs = {m: torch.stack([x, x], 1) for m, x in features.items()}
    return Batch(pairs, table[label], label, table)


@pytest.mark.parametrize(
    ("audio", "video", "values", "count"),
    [
        (128, 4096, {"H": 512, "layers": 8, "heads": 8, "dim_head": 64}, 8_655_028),
        (128, 4096, {"H": 512, "layers": 6, "heads": 8, "dim_head": 64}, 7_269_972),
        (512, 512, {"H": 128, "layers": 8, "heads": 6, "dim_head": 128}, 8_848_308),
        (512, 512, {"H": 256, "layers": 5, "heads": 8, "dim_head": 64}, 4_521_764),
        (512, 512, {"H": 128, "layers": 8, "heads": 3, "dim_head": 128}, 5_161_908),
    ],
)
def test_parameter_counts(audio: int, video: int, values: dict[str, int], count: int) -> None:
    """tcaf.md section 5, all six configurations (two are alike)."""
    config = TCAFConfig.model_validate(values | {"K": 512})
    model = TCAF(config, Shapes({"audio": audio, "video": video}, 300, temporal=True))
    assert sum(p.numel() for p in model.parameters()) == count


def plain_attention(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    kinds: list[int | None],
    config: TCAFConfig,
) -> Tensor:
    """Return what each token takes from those it may attend to, one by one, [S, heads * d].

    ``q``, ``k`` and ``v`` hold [S, d] per head; ``kinds`` the tokens' modalities, None for the
    class token.
    """
    rows = []
    for s, mine in enumerate(kinds):
        seen = [
            t
            for t, other in enumerate(kinds)
            if mine is None
            or other is None
            or config.attention == "full"
            or (mine == other) == (config.attention == "self_only")
        ]
        parts = []
        for head in range(config.heads):
            logits = torch.stack([q[head][s] @ k[head][t] for t in seen]) / config.dim_head**0.5
            weights = torch.softmax(logits, 0)
            parts.append(sum(w * v[head][t] for w, t in zip(weights, seen, strict=True)))
        rows.append(torch.cat(parts))  # type: ignore[arg-type]
    return torch.stack(rows)


def plain_theta(
    state: Mapping[str, Tensor],
    config: TCAFConfig,
    audio: Tensor,
    video: Tensor,
    seconds: tuple[float, float],
) -> Tensor:
    """Return theta_o [64] of one clip of real tokens [T_a, d_a], [T_v, d_v], in eval mode."""

    def linear(name: str, x: Tensor) -> Tensor:
        weight = state[f"{name}.weight"]
        bias = state.get(f"{name}.bias", torch.zeros(len(weight), dtype=weight.dtype))
        return x @ weight.T + bias

    def norm(name: str, x: Tensor) -> Tensor:
        scale = state[f"{name}.weight"] / torch.sqrt(state[f"{name}.running_var"] + 1e-5)
        return (x - state[f"{name}.running_mean"]) * scale + state[f"{name}.bias"]

    def two(name: str, x: Tensor) -> Tensor:
        for at in (0, 4):
            x = norm(f"{name}.fc.{at + 1}", linear(f"{name}.fc.{at}", x)).clamp(min=0)
        return x

    def layer_norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        spread = torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)
        return centred / spread * state[f"{name}.weight"] + state[f"{name}.bias"]

    axis = 0 if config.video_norm_axis == "time" else 1
    inputs = [audio / 255, video / video.norm(dim=axis, keepdim=True)]
    tokens = [state["cls_token"][0, 0]]
    kinds: list[int | None] = [None]
    at = "position_encoder_block"
    for m, (name, x) in enumerate(zip(("A_enc", "V_enc"), inputs, strict=True)):
        for k, feature in enumerate(two(name, x)):
            rate = state[f"{at}.fourier_randn"][0] + state[f"{at}.fourier_randn"][1]
            phase = 2 * math.pi * k * seconds[m] * rate
            code = linear(f"{at}.fourier_embeddings", torch.cat([phase.sin(), phase.cos()]))
            code = code + state[f"{at}.modal_embedding.weight"][m]
            projection = f"{at}.out_proj_{('audio', 'video')[m]}"
            tokens.append(linear(projection, torch.cat([feature, code])))
            kinds.append(m)
    x = torch.stack(tokens)
    for i in range(config.layers):
        layer = f"Audio_visual_transformer.layers.{i}"
        h = layer_norm(f"{layer}.norm", x)
        q, k, v = (linear(f"{layer}.attn.to_{n}", h).chunk(config.heads, 1) for n in "qkv")
        x = x + linear(f"{layer}.attn.to_out.0", plain_attention(q, k, v, kinds, config))
        h = linear(f"{layer}.ff.net.0", layer_norm(f"{layer}.norm", x))
        h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
        x = x + linear(f"{layer}.ff.net.3", h)
    return two("O_proj", x[:1])[0]


@pytest.mark.parametrize("attention", PAIRS)
@pytest.mark.parametrize(
    ("axis", "eval_time"), [("time", "seconds"), ("channel", "index"), ("time", "index")]
)
def test_embedding_is_that_of_the_specification(
    attention: Pairs, axis: str, eval_time: str
) -> None:
    """A padded batch against every clip alone, so neither padding nor company matters."""
    values = {"attention": attention, "video_norm_axis": axis, "eval_time": eval_time}
    model, _ = build(**values)
    model.eval()
    x = sequences()
    with torch.no_grad():
        ours = model.embed(x)["both"]
    config = TCAFConfig.model_validate(SMALL | values)
    seconds = (0.96, 0.64) if eval_time == "seconds" else (1.0, 1.0)
    for i in range(len(ours)):
        audio, video = (x[m][i, : int(x[f"{m}_length"][i])] for m in ("audio", "video"))
        expected = plain_theta(model.state_dict(), config, audio, video, seconds)
        torch.testing.assert_close(ours[i], expected)
    assert ours.any()


@pytest.mark.parametrize("attention", PAIRS)
def test_padding_never_matters(attention: Pairs) -> None:
    """Neither more of it nor what is in it."""
    model, _ = build(attention=attention)
    model.eval()
    with torch.no_grad():
        ours = model.embed(sequences())["both"]
        longer = sequences(extra=3)
        for m in ("audio", "video"):
            beyond = torch.arange(longer[m].shape[1]) >= longer[f"{m}_length"][:, None]
            longer[m] = longer[m] + 9 * beyond[..., None]
        theirs = model.embed(longer)["both"]
    torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize("attention", PAIRS)
def test_attention_really_blocks(attention: Pairs) -> None:
    """Derivatives of one block's outputs: tokens 0 class, 1-3 audio (3 padding), 4-5 video."""
    torch.manual_seed(1)
    audio, video = torch.tensor([[True, True, False]]), torch.tensor([[True, True]])
    bias = attention_bias(audio, video, attention, torch.float64)
    block = MaskedBlock(12, 2, 5, 16, 0).double()
    x = torch.randn(1, 6, 12, dtype=torch.float64)
    slopes = torch.autograd.functional.jacobian(lambda rows: block(rows, bias, None)[0], x)
    reached = slopes.abs().sum((1, 2, 4)) > 0
    others = {"cross_only": {4, 5}, "self_only": {2}, "full": {2, 4, 5}}[attention]
    assert set(reached[1].nonzero().flatten().tolist()) == {0, 1} | others
    assert set(reached[0].nonzero().flatten().tolist()) == {0, 1, 2, 4, 5}
    assert (bias[0, 1, 1] == 0) == (attention != "cross_only")


def test_averaged_features_are_sequences_of_one() -> None:
    """And their video is normalised over channels whatever is asked."""
    long, _ = build(video_norm_axis="channel")
    x = sequences()
    first = {m: x[m][:, 0] for m in ("audio", "video")}
    ones = {f"{m}_length": torch.ones(4, dtype=torch.int64) for m in ("audio", "video")}
    with torch.no_grad():
        expected = long.eval().embed({m: f[:, None] for m, f in first.items()} | ones)["both"]
        for axis in ("time", "channel"):
            short, _ = build(AVERAGED, video_norm_axis=axis)
            torch.testing.assert_close(short.eval().embed(first)["both"], expected)


def test_loss_terms_are_those_of_the_specification() -> None:
    model, context = build()
    data = batch(sequences())
    twin, _ = build()
    terms = model.loss(data, context)
    theta_o = twin._theta(sequences(), context)
    text, label = data.text[:, 0], data.label[:, 0]

    def one(name: str, x: Tensor) -> Tensor:
        """Linear, batch statistics, ReLU."""
        fc = twin.get_submodule(name).fc  # type: ignore[union-attr]
        h = x @ fc["0"].weight.T + fc["0"].bias  # type: ignore[index]
        h = (h - h.mean(0)) / torch.sqrt(h.var(0, correction=0) + 1e-5)
        return (h * fc["1"].weight + fc["1"].bias).clamp(min=0)  # type: ignore[index]

    theta_w, table = one("W_proj", text), one("W_proj", data.class_text)
    logits = theta_o @ table.T
    log_share = logits - logits.exp().sum(1, keepdim=True).log()
    expected = {
        "ce": -log_share[torch.arange(4), label].mean(),
        "reg": ((theta_o - theta_w) ** 2).mean(),
        "rec_o": ((twin.D_o(theta_o, context) - text) ** 2).mean(),
        "rec_w": ((one("D_w", theta_w) - text) ** 2).mean(),
    }
    assert terms.keys() == expected.keys()
    for name, value in terms.items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_negatives_are_unused() -> None:
    data = batch(sequences())
    other = {m: x.clone() for m, x in data.features.items()}
    for m in ("audio", "video"):
        other[m][:, 1] = 1.0
    found = []
    for features in (data.features, other):
        model, context = build()
        found.append(model.loss(data._replace(features=features), context))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("eval_time", ["seconds", "index"])
def test_training_always_uses_seconds(eval_time: str) -> None:
    model, context = build(eval_time=eval_time, audio_seconds=0.5, video_seconds=0.25)
    times: list[Tensor] = []
    model.position_encoder_block.register_forward_pre_hook(lambda _, args: times.append(args[1]))
    model.loss(batch(sequences()), context)
    model.eval().embed(sequences())
    steps = [torch.arange(5).double(), torch.arange(4).double()]
    expected = [steps[0] * 0.5, steps[1] * 0.25]
    expected += steps if eval_time == "index" else expected
    assert all(torch.equal(a, b) for a, b in zip(times, expected, strict=True))


def test_padding_enters_batch_statistics_and_its_code_learns_nothing() -> None:
    model, context = build()
    x = sequences()
    before = model.A_enc.fc["1"].running_mean.clone()
    first = model.A_enc.fc["0"]
    torch.stack(list(model.loss(batch(x), context).values())).sum().backward()
    rows = x["audio"].flatten(0, 1) / 255 @ first.weight.T + first.bias
    torch.testing.assert_close(
        model.A_enc.fc["1"].running_mean, 0.9 * before + 0.1 * rows.detach().mean(0)
    )
    assert model.frozen() == {PAD}
    gradient = model.get_parameter(PAD).grad
    assert gradient is not None and not gradient.any()
    for name, parameter in model.named_parameters():
        if name != PAD:
            assert parameter.grad is not None, name
            assert parameter.grad.any() or name in normalised(model), name


@pytest.mark.parametrize("extra", [False, True])
def test_extra_pass_moves_statistics_only(extra: bool) -> None:
    model, context = build(extra_bn_pass=extra)
    data = batch(sequences())
    model.loss(data, context)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        model.settle(data, context)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    expected = {
        f"{m}.fc.{at}.{kind}"
        for m, places in (
            ("A_enc", (1, 5)),
            ("V_enc", (1, 5)),
            ("O_proj", (1, 5)),
            ("W_proj", (1,)),
        )
        for at in places
        for kind in ("running_mean", "running_var")
    }
    assert changed == (expected if extra else set())
    assert TCAF.compat == {"eval_time": "index", "extra_bn_pass": True}


def test_a_release_checkpoint_loads() -> None:
    """Doubled position block, 1x1 kernels and step counters included; a missing key is named."""
    source, _ = build()
    state: dict[str, Tensor] = {}
    for key, value in source.state_dict().items():
        kernel = key.startswith("position_encoder_block.out_proj") and key.endswith("weight")
        state[key] = value[..., None].clone() if kernel else value.clone()
        if key.endswith("running_mean"):
            state[key.replace("running_mean", "num_batches_tracked")] = torch.tensor(7)
    block = "position_encoder_block."
    state |= {
        k.replace(block, "audiovisual_embeddings."): v for k, v in state.items() if block in k
    }
    torch.manual_seed(3)
    target = TCAF(TCAFConfig.model_validate(SMALL), TEMPORAL).double()
    number_sites(target)
    target.load_reference(state)
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value), key
    del state["cls_token"]
    with pytest.raises(UserError, match="missing: cls_token"):
        target.load_reference(state)


def test_checkpoint_shapes() -> None:
    """tcaf.md section 7, UCF cls."""
    model = TCAF(TCAFConfig(), Shapes({"audio": 128, "video": 4096}, 300, temporal=True))
    layer = "Audio_visual_transformer.layers.5"
    expected = {
        "cls_token": (1, 1, 300),
        "position_encoder_block.fourier_randn": (2, 32),
        "position_encoder_block.modal_embedding.weight": (2, 64),
        "position_encoder_block.fourier_embeddings.weight": (64, 64),
        "position_encoder_block.pad_embedding.weight": (1, 64),
        "position_encoder_block.out_proj_audio.weight": (300, 364),
        "position_encoder_block.out_proj_video.bias": (300,),
        f"{layer}.attn.to_q.weight": (512, 300),
        f"{layer}.attn.to_out.0.weight": (300, 512),
        f"{layer}.attn.to_out.0.bias": (300,),
        f"{layer}.ff.net.0.weight": (128, 300),
        f"{layer}.ff.net.3.weight": (300, 128),
        f"{layer}.norm.weight": (300,),
        "W_proj.fc.0.weight": (64, 300),
        "D_w.fc.1.running_var": (300,),
        "D_o.fc.4.weight": (300, 512),
        "O_proj.fc.5.bias": (64,),
    }
    state = model.state_dict()
    assert {key: tuple(state[key].shape) for key in expected} == expected
    assert model.position_encoder_block.fourier_randn.std().item() == pytest.approx(10, rel=0.5)
