"""KDA against its formulas in numpy, its parameter counts and its released keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from avzero.errors import UserError
from avzero.models._contract import Batch, Shapes
from avzero.models.kda import KDA, KDAConfig
from avzero.tune.space import load_space
from tests import toys

MAIN = Shapes({"audio": 512, "video": 512}, 512)
CLS = Shapes({"audio": 128, "video": 4096}, 512)
TINY = Shapes({"audio": 5, "video": 4}, 6)
UNUSED = 1_054_720
"""Parameters of the nets the release builds and never calls."""


def build(shapes: Shapes, **values: object) -> KDA:
    return KDA(KDAConfig.model_validate(values), shapes).train()


@pytest.mark.parametrize(("shapes", "count"), [(MAIN, 4_898_370), (CLS, 8_371_778)])
def test_parameter_counts(shapes: Shapes, count: int) -> None:
    assert toys.parameters(build(shapes)) == count - UNUSED
    for values in ({"loss_variant": "released"}, {"margin": "fixed"}, {"margin": "none"}):
        assert toys.parameters(build(shapes, **values)) == count - UNUSED - 2, "a and b"


def embedding(s: toys.State, data: Batch, norm_inputs: bool) -> toys.Array:
    """Rho in numpy."""
    a, v, *_ = toys.anchors(data)
    phi = np.stack([toys.mlp(s, "A_enc", a), toys.mlp(s, "V_enc", v)], 1)
    fused = phi + toys.transformer(s, "cross_attention", phi + s["pos_emb1D"], 1, 3)
    theta_a, theta_v = toys.mlp(s, "A_proj", fused[:, 0]), toys.mlp(s, "V_proj", fused[:, 1])
    x = np.concatenate([theta_v, theta_a], 1)
    return (toys.norm_rows(x) if norm_inputs else x) @ s["ALE_vector"].T


@pytest.mark.parametrize("norm_inputs", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("margin", ["adaptive", "fixed", "none"])
def test_loss_terms(norm_inputs: bool, normalise: bool, margin: str) -> None:
    model = build(
        TINY,
        norm_inputs=norm_inputs,
        normalise_prototypes=normalise,
        margin=margin,
        align_weight=2.5,
    )
    context, s = toys.ready(model)
    data = toys.batch(5, 4, 6)
    _, _, w, y, table = toys.anchors(data)
    if normalise:
        w, table = toys.norm_rows(w), toys.norm_rows(table)
    rho = embedding(s, data, norm_inputs)
    scores = toys.softmax(rho @ table.T)
    for i, true in enumerate(y):
        for j, prototype in enumerate(table):
            if margin == "fixed":
                scores[i, j] -= 0.3 if j != true else 0
            elif margin == "adaptive":
                one, other = table[true], prototype
                cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
                a, b = s["margin_generator.a"], s["margin_generator.b"]
                scores[i, j] += a * cosine + b - (j == true)
    expected = {"align": 2.5 * toys.mse(rho, w), "kaml": toys.cross_entropy(scores, y)}
    terms = model.loss(data, context)
    assert {k: t.item() for k, t in terms.items()} == pytest.approx(expected, rel=1e-9)


def test_released_objective_is_the_alignment_alone() -> None:
    assert KDA.compat == {"loss_variant": "released"}
    data, terms = toys.batch(5, 4, 6), {}
    for variant in ("paper", "released"):
        model = build(TINY, loss_variant=variant)
        context, s = toys.ready(model)
        rho = embedding(s, data, True)
        terms[variant] = model.loss(data, context)
        expected = 5 * toys.mse(rho, toys.anchors(data)[2])
        assert terms[variant]["align"].item() == pytest.approx(expected, rel=1e-9)
    assert set(terms["paper"]) == {"align", "kaml"} and set(terms["released"]) == {"align"}


def test_offset_is_inert_and_a_lowers_the_margin() -> None:
    """kda.md section 4: b shifts all scores alike; a lets wrong classes come nearer."""
    model = build(TINY)
    context, _ = toys.ready(model)
    data = toys.batch(5, 4, 6)
    toys.total(model.loss(data, context)).backward()  # type: ignore[no-untyped-call]
    a, b = (model.get_parameter(f"margin_generator.{k}") for k in "ab")
    assert a.grad is not None and b.grad is not None
    assert b.grad.abs() < 1e-12 < a.grad.abs()
    with torch.no_grad():
        before = model.loss(data, context)["kaml"].item()
        b.add_(5)
        assert model.loss(data, context)["kaml"].item() == pytest.approx(before, rel=1e-12)


def test_initial_values() -> None:
    model = build(MAIN)
    w = model.ALE_vector
    assert w.shape == (512, 1024) and w.min() >= 0 and w.max() <= 2e-4
    assert w.mean().item() == pytest.approx(1e-4, rel=0.01)
    assert model.get_parameter("margin_generator.a").item() == 1
    assert model.get_parameter("margin_generator.b").item() == 0


def test_prototypes_are_the_text_and_distances_euclidean() -> None:
    text = torch.randn(4, 6)
    features = {"audio": torch.rand(3, 5), "video": torch.rand(3, 4)}
    for normalise in (False, True):
        model = build(TINY, normalise_prototypes=normalise).eval()
        prototypes = text / text.norm(dim=1, keepdim=True) if normalise else text
        torch.testing.assert_close(model.embed_classes(text), prototypes)
        z = model.embed(features)
        by_hand = (z["both"][:, None] - prototypes).square().sum(-1)
        ours = model.distances(z, model.embed_classes(text), True)
        assert set(ours) == {"both"}, "one head serves all modalities"
        torch.testing.assert_close(ours["both"], by_hand, rtol=1e-4, atol=1e-5)


def test_norm_inputs_bounds_the_embedding_only_where_it_is_on() -> None:
    features = {"audio": torch.rand(3, 5), "video": torch.rand(3, 4)}
    for on in (False, True):
        model = build(TINY, norm_inputs=on)
        toys.ready(model)
        model.eval()
        with torch.no_grad():
            model.ALE_vector.copy_(torch.eye(6, 1024))
            before = model.embed({m: x.double() for m, x in features.items()})["both"].norm(dim=1)
        assert bool((before <= 1 + 1e-9).all()) is on


def test_word_vectors_of_300_work() -> None:
    model = build(Shapes({"audio": 128, "video": 4096}, 300))
    assert model.ALE_vector.shape == (300, 1024)


@pytest.mark.parametrize(
    "values", [{}, {"margin": "fixed"}, {"loss_variant": "released"}, {"norm_inputs": False}]
)
def test_stacks(values: dict[str, object]) -> None:
    toys.assert_stacks(lambda: build(TINY, **values), toys.batch(5, 4, 6))


def released(audio: int, video: int) -> dict[str, torch.Tensor]:
    """A checkpoint as the release saves it, text tower included."""
    keys: dict[str, toys.Shape] = {
        **dict(toys.block_keys("A_enc", audio, 512, 512)),
        **dict(toys.block_keys("V_enc", video, 1024, 512)),
        "pos_emb1D": (2, 512),
        "ALE_vector": (512, 1024, 1, 1),
        "margin_generator.a": (),
        "margin_generator.b": (),
        **dict(toys.layer_keys("cross_attention", 0, 512, 300, 64)),
        "clip.text_model.embeddings.token_embedding.weight": (9, 4),
        "clip.text_projection.weight": (4, 4),
    }
    for name in ("A_proj", "V_proj", "av2com", "t2com"):
        keys |= dict(toys.block_keys(name, 512, 512, 512))
    return toys.checkpoint(keys)


def test_released_keys() -> None:
    state = released(128, 4096)
    tower = ("clip.", "av2com.", "t2com.")
    toys.assert_taken(build(CLS), state, tower)
    toys.assert_taken(build(CLS, loss_variant="released"), state, (*tower, "margin_generator."))
    wrong = state | {"module.D.fc.0.weight": torch.zeros(1)}
    del wrong["module.ALE_vector"]
    with pytest.raises(UserError, match=r"KDA.*missing: ALE_vector; extra: D\.fc\.0\.weight"):
        build(CLS).load_reference(wrong)
    with pytest.raises(UserError, match=r"V_enc\.fc\.0\.weight is \[1024, 4096\], expected"):
        build(MAIN).load_reference(state)


def test_adam_of_the_release() -> None:
    space = load_space("kda")
    assert space.defaults["beta1"] == 0.5 and space.defaults["patience"] == 4
