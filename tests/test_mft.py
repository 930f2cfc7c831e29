"""MFT: our reconstruction against its formulas in numpy and the parameter counts of its spec."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from avzero.data.benchmark import Benchmark
from avzero.data.store import FeatureStore
from avzero.errors import UserError
from avzero.models._contract import Context, Shapes
from avzero.models.mft import MFT, MFTConfig, kl, same_class_gap
from avzero.protocol.counter import fold, site_keys
from tests import toys
from tests.conftest import make_task
from tests.test_world import both

CLIPCLAP = Shapes({"audio": 1024, "video": 512}, 1536)
TINY = Shapes({"audio": 5, "video": 4}, 6)


def build(shapes: Shapes, **values: object) -> MFT:
    return MFT(MFTConfig.model_validate(values), shapes).train()


@pytest.mark.parametrize(
    ("values", "count"),
    [
        ({}, 11_697_024),
        ({"layers": 1}, 3_814_784),
        ({"variant": "av_tokens"}, 11_699_072),
        ({"variant": "av_tokens", "layers": 1}, 3_816_832),
        ({"attention": False}, 2_237_824),
        ({"attention": False, "modality": "audio"}, 1_713_536),
        ({"attention": False, "modality": "video"}, 1_189_248),
        ({"heads": 4}, 11_697_024),
    ],
)
def test_parameter_counts(values: dict[str, object], count: int) -> None:
    """Those of mft.md section 7; without attention the network is ClipClap's."""
    assert toys.parameters(build(CLIPCLAP, **values)) == count


def test_parameter_names_are_the_siblings() -> None:
    keys = {
        "pos_emb1D": (1, 512),
        **dict(toys.block_keys("O_enc", 1536, 512)),
        **dict(toys.block_keys("W_enc", 1536, 512)),
        **dict(toys.block_keys("O_proj", 512, 512, 64)),
        **dict(toys.block_keys("D_o", 64, 512, 512)),
        **dict(toys.block_keys("W_proj", 512, 64)),
        **dict(toys.block_keys("D_w", 64, 512)),
    }
    for layer in range(6):
        keys |= dict(toys.layer_keys("cross_attention", layer, 512, 512, 512))
    ours = {k: tuple(v.shape) for k, v in build(CLIPCLAP).state_dict().items()}
    assert ours == {k: v for k, v in keys.items() if not k.endswith("num_batches_tracked")}


def sample_embedding(
    s: toys.State, values: dict[str, object], a: toys.Array, v: toys.Array
) -> toys.Array:
    """theta_o in numpy."""
    modality, attended = values.get("modality", "both"), values.get("attention", True)
    if values.get("variant") == "av_tokens":
        parts = []
        if modality != "video":
            parts.append(toys.mlp(s, "A_enc", a))
        if modality != "audio":
            parts.append(toys.mlp(s, "V_enc", v))
    else:
        x = {"both": np.concatenate([v, a], 1), "audio": a, "video": v}[str(modality)]
        parts = [toys.mlp(s, "O_enc", x)]
    tokens = np.stack(parts, 1)
    if attended:
        tokens = toys.transformer(s, "cross_attention", tokens + s["pos_emb1D"], 2, 8)
    return toys.mlp(s, "O_proj", tokens.mean(1))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"variant": "av_tokens"},
        {"variant": "av_tokens", "modality": "audio"},
        {"variant": "av_tokens", "attention": False},
        {"attention": False, "modality": "video"},
        {"kl_on": "class", "cosine_on": "pairs"},
    ],
)
def test_loss_terms(values: dict[str, object]) -> None:
    model = build(TINY, layers=2, ff_width=16, lambda_kl=0.3, lambda_cos=0.9, **values)
    context, s = toys.ready(model)
    data = toys.batch(5, 4, 6)
    a, v, w, y, table = toys.anchors(data)
    theta_o = sample_embedding(s, values, a, v)
    omega = toys.mlp(s, "W_enc", w)
    theta_w = toys.mlp(s, "W_proj", omega)
    classes = toys.mlp(s, "W_proj", toys.mlp(s, "W_enc", table))
    rows = len(y)
    on_class = values.get("kl_on") == "class"
    p = toys.softmax(theta_o @ classes.T if on_class else theta_o)
    q = toys.softmax(theta_w @ classes.T if on_class else theta_w)
    o_unit, w_unit = toys.norm_rows(theta_o), toys.norm_rows(theta_w)
    if values.get("cosine_on") == "pairs":
        pairs = [(i, j) for i in range(rows) for j in range(i) if y[i] == y[j]]
        gap = np.mean([1 - o_unit[i] @ o_unit[j] for i, j in pairs])
    else:
        gap = np.mean([1 - o_unit[i] @ w_unit[i] for i in range(rows)])
    expected = {
        "ce": toys.cross_entropy(theta_o @ classes.T, y),
        "reg": toys.mse(theta_o, theta_w),
        "rec_o": toys.mse(omega, toys.mlp(s, "D_o", theta_o)),
        "rec_w": toys.mse(omega, toys.mlp(s, "D_w", theta_w)),
        "kl": 0.3 * (q * (np.log(q) - np.log(p))).sum() / rows,
        "cos": 0.9 * gap,
    }
    terms = model.loss(data, context)
    assert {k: t.item() for k, t in terms.items()} == pytest.approx(expected, rel=1e-9)


def test_divergence_pulls_both_sides_and_divides_by_rows_only() -> None:
    p = torch.tensor([[0.0, 1.0], [2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([[0.0, 0.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    value = kl(p, q)
    by_hand = [
        sum(0.5 * (np.log(0.5) - np.log(np.exp(x) / (1 + np.exp(g)))) for x in (0.0, g))
        for g in (1.0, 2.0)
    ]
    assert value.item() == pytest.approx(np.mean(by_hand))
    value.backward()  # type: ignore[no-untyped-call]
    assert p.grad is not None and q.grad is not None
    assert p.grad.abs().max() > 0 and q.grad.abs().max() > 0


def test_pairs_by_hand_without_pairs_and_with_empty_rows() -> None:
    theta = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0], [3.0, 0.0]], requires_grad=True)
    # Rows 0, 1 and 3 are of one class: cosines 1/sqrt 2, 1 and 1/sqrt 2.
    expected = (2 * (1 - 0.5**0.5) + 0) / 3
    assert same_class_gap(theta, torch.tensor([4, 4, 1, 4])).item() == pytest.approx(expected)
    assert same_class_gap(theta, torch.tensor([0, 1, 2, 3])).item() == 0
    rectified = torch.relu(torch.tensor([[-1.0, -2.0], [1.0, 0.5]], requires_grad=True))
    value = same_class_gap(rectified, torch.tensor([0, 0]))
    assert value.item() == 1, "an all-zero row has no direction"


def test_all_zero_embeddings_have_finite_gradients() -> None:
    for on in ("text", "pairs"):
        model = build(TINY, layers=1, cosine_on=on).float()
        with torch.no_grad():
            model.get_parameter("O_proj.fc.5.weight").zero_()
            model.get_parameter("O_proj.fc.5.bias").fill_(-1)
        context = Context(site_keys(fold(1), 1, 99, torch.device("cpu"))[0])
        data = toys.batch(5, 4, 6)
        data = data._replace(
            features={m: x.float() for m, x in data.features.items()},
            text=data.text.float(),
            class_text=data.class_text.float(),
        )
        toys.total(model.loss(data, context)).backward()  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_one_token_makes_attention_a_linear_map_and_two_do_not() -> None:
    """mft.md section 3: queries and keys of a single token change nothing."""
    data = toys.batch(5, 4, 6)
    features = {m: x[:, 0] for m, x in data.features.items()}
    for variant, matters in (("fused", False), ("av_tokens", True)):
        model = build(TINY, layers=1, variant=variant)
        toys.ready(model)
        model.eval()
        before = model.embed(features)["both"]
        with torch.no_grad():
            model.get_parameter("cross_attention.layers.0.0.fn.to_qkv.weight")[:1024].mul_(-3)
        assert torch.allclose(before, model.embed(features)["both"]) is not matters


def test_outputs_are_non_negative_and_text_parts_follow_the_modality() -> None:
    for modality, words in (("both", 1536), ("audio", 1024), ("video", 512)):
        model = build(CLIPCLAP, layers=1, modality=modality).eval()
        z = model.embed({"audio": torch.rand(3, 1024), "video": torch.rand(3, 512)})
        assert (z["both"] >= 0).all() and (model.embed_classes(torch.rand(4, 1536)) >= 0).all()
        assert model.get_parameter("W_enc.fc.0.weight").shape == (512, words)
    assert build(TINY, layers=1, modality="audio").get_parameter("W_enc.fc.0.weight").shape[1] == 6


@pytest.mark.parametrize(
    "values",
    [
        {"variant": "av_tokens", "kl_on": "class", "cosine_on": "pairs"},
        {"attention": False, "modality": "audio"},
        {"heads": 4},
    ],
)
def test_stacks(values: dict[str, object]) -> None:
    toys.assert_stacks(lambda: build(TINY, layers=1, **values), toys.batch(5, 4, 6))


def test_says_what_it_is() -> None:
    assert MFT.card.evidence == "reconstruction" and MFT.beta_grid.count == 76
    with pytest.raises(UserError, match="MFT: no public code"):
        build(TINY, layers=1).load_reference({})


def test_pairs_on_two_workers(benchmark: Benchmark, store: FeatureStore, tmp_path: Path) -> None:
    """Pairs are formed over the global batch, so two workers see those one sees."""
    task = make_task(
        benchmark,
        "mft",
        seed=6201,
        config={"layers": 1, "cosine_on": "pairs", "kl_on": "class", "variant": "av_tokens"},
        train={"epochs": 2, "batches_per_epoch": 2, "batch_size": 24, "precision": "float64"},
    )
    (one, _), (two, _), _ = both(task, store, tmp_path)
    for (losses, _, _), (losses_2, _, _) in zip(one, two, strict=True):
        assert losses_2 == pytest.approx(losses, rel=1e-5, abs=1e-9)
