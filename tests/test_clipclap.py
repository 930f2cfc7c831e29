"""ClipClap-GZSL against its formulas in numpy, its parameter counts and its released keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from avzero.errors import UserError
from avzero.models._contract import Shapes
from avzero.models.clipclap import ClipClap, ClipClapConfig
from tests import toys

CLIPCLAP = Shapes({"audio": 1024, "video": 512}, 1536)
SMALL = {"d_model": 10, "d_hidden": 9, "d_out": 8}


def build(shapes: Shapes, **values: object) -> ClipClap:
    return ClipClap(ClipClapConfig.model_validate(values), shapes).train()


@pytest.mark.parametrize(
    ("values", "count"),
    [
        ({}, 2_237_824),
        ({"modality": "audio"}, 1_713_536),
        ({"modality": "video"}, 1_189_248),
        ({"word_embeddings": "clip"}, 1_713_536),
        ({"word_embeddings": "wavcaps"}, 1_975_680),
    ],
)
def test_parameter_counts(values: dict[str, object], count: int) -> None:
    assert toys.parameters(build(CLIPCLAP, **values)) == count


@pytest.mark.parametrize("modality", ["both", "audio", "video"])
def test_loss_terms_and_running_statistics(modality: str) -> None:
    weights = {"w_ce": 0.7, "w_reg": 2.0, "w_rec": 3.0}
    model = build(
        Shapes({"audio": 5, "video": 4}, 6),
        modality=modality,
        extra_bn_pass=True,
        **SMALL,
        **weights,
    )
    context, s = toys.ready(model)
    data = toys.batch(5, 4, 6)
    a, v, w, y, table = toys.anchors(data)
    x = {"both": np.concatenate([v, a], 1), "audio": a, "video": v}[modality]
    theta_o = toys.mlp(s, "O_proj", toys.mlp(s, "O_enc", x))
    omega = toys.mlp(s, "W_enc", w)
    theta_w = toys.mlp(s, "W_proj", omega)
    classes = toys.mlp(s, "W_proj", toys.mlp(s, "W_enc", table))
    expected = {
        "ce": 0.7 * toys.cross_entropy(theta_o @ classes.T, y),
        "reg": 2.0 * toys.mse(theta_o, theta_w),
        "rec_o": 3.0 * toys.mse(omega, toys.mlp(s, "D_o", theta_o)),
        "rec_w": 3.0 * toys.mse(omega, toys.mlp(s, "D_w", theta_w)),
    }
    terms = model.loss(data, context)
    assert {k: t.item() for k, t in terms.items()} == pytest.approx(expected, rel=1e-10)
    with torch.no_grad():
        model.settle(data, context)
    # clipclap.md section 6: with the extra pass twice for the samples, three times for words.
    means = {"O_enc": [x, x], "O_proj": [toys.mlp(s, "O_enc", x)] * 2, "W_enc": [w, table, w]}
    means["W_proj"] = [omega, toys.mlp(s, "W_enc", table), omega]
    for name, passes in means.items():
        running = s[f"{name}.fc.1.running_mean"]
        for rows in passes:
            running = running + 0.1 * (toys.first_mean(s, name, rows) - running)
        ours = model.get_buffer(f"{name}.fc.1.running_mean").numpy()
        np.testing.assert_allclose(ours, running, rtol=1e-10)


def test_extra_pass_is_off_by_default_and_on_in_compat() -> None:
    assert not ClipClapConfig().extra_bn_pass
    assert ClipClap.compat == {"extra_bn_pass": True}
    model = build(Shapes({"audio": 5, "video": 4}, 6), **SMALL)
    context, _ = toys.ready(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.settle(toys.batch(5, 4, 6), context)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_nothing_is_detached_from_the_reconstruction_target() -> None:
    model = build(Shapes({"audio": 5, "video": 4}, 6), **SMALL)
    context, _ = toys.ready(model)
    target = model.loss(toys.batch(5, 4, 6), context)["rec_o"]
    target.backward()  # type: ignore[no-untyped-call]
    gradient = model.get_parameter("W_enc.fc.0.weight").grad
    assert gradient is not None and gradient.abs().max() > 1e-6


@pytest.mark.parametrize(
    ("values", "columns"),
    [
        ({}, range(1536)),
        ({"word_embeddings": "clip"}, range(512)),
        ({"word_embeddings": "wavcaps"}, range(512, 1536)),
        ({"modality": "audio"}, range(512, 1536)),
        ({"modality": "video"}, range(512)),
        ({"modality": "video", "word_embeddings": "clip"}, range(512)),
    ],
)
def test_text_columns_read(values: dict[str, object], columns: range) -> None:
    model = build(CLIPCLAP, **values, **SMALL).double().eval()
    text = torch.rand(2, 1536, dtype=torch.float64, requires_grad=True)
    model.embed_classes(text).square().sum().backward()  # type: ignore[no-untyped-call]
    assert text.grad is not None
    read = text.grad.abs().amax(0).nonzero().flatten().tolist()
    assert read and set(read) <= set(columns) and len(read) > 0.9 * len(columns)


@pytest.mark.parametrize(
    ("text", "values", "message"),
    [
        (300, {"word_embeddings": "clip"}, r"'clip' needs class text of 1536 columns.*has 300"),
        (1024, {"word_embeddings": "wavcaps"}, r"'wavcaps' needs class text of 1536 columns"),
        (1536, {"word_embeddings": "clip", "modality": "audio"}, r"'audio' reads .*'wavcaps', not"),
    ],
)
def test_impossible_text_parts_are_refused(
    text: int, values: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(Shapes({"audio": 1024, "video": 512}, text), **values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("audio", "video"), [(512, 512), (128, 4096), (1024, 512)])
@pytest.mark.parametrize("text", [300, 512])
def test_every_feature_set_and_text_width(audio: int, video: int, text: int) -> None:
    model = build(Shapes({"audio": audio, "video": video}, text)).eval()
    z = model.embed({"audio": torch.rand(3, audio), "video": torch.rand(3, video)})
    classes = model.embed_classes(torch.rand(4, text))
    assert (z["both"] >= 0).all() and (classes >= 0).all()
    assert model.distances(z, classes, False)["both"].shape == (3, 4)


@pytest.mark.parametrize("values", [{}, {"modality": "audio"}, {"extra_bn_pass": True}])
def test_stacks(values: dict[str, object]) -> None:
    shapes = Shapes({"audio": 5, "video": 4}, 6)
    toys.assert_stacks(lambda: build(shapes, **SMALL, **values), toys.batch(5, 4, 6))


def test_calibration_grid_is_the_released_one() -> None:
    values = ClipClap.beta_grid.values()
    assert len(values) == 76 and values[-1] == 5 and values[1] == pytest.approx(1 / 15)


def test_released_keys() -> None:
    keys = {
        **dict(toys.block_keys("O_enc", 1536, 512)),
        **dict(toys.block_keys("W_enc", 1536, 512)),
        **dict(toys.block_keys("O_proj", 512, 512, 64)),
        **dict(toys.block_keys("D_o", 64, 512, 512)),
        **dict(toys.block_keys("W_proj", 512, 64)),
        **dict(toys.block_keys("D_w", 64, 512)),
    }
    state = toys.checkpoint(keys)
    toys.assert_taken(build(CLIPCLAP), state, ())
    wrong = state | {"module.fusenet.weight": torch.zeros(1)}
    del wrong["module.D_w.fc.0.bias"]
    message = r"ClipClap-GZSL.*missing: D_w\.fc\.0\.bias; extra: fusenet\.weight"
    with pytest.raises(UserError, match=message):
        build(CLIPCLAP).load_reference(wrong)
    with pytest.raises(UserError, match=r"O_enc\.fc\.0\.weight is \[512, 1536\], expected"):
        build(CLIPCLAP, modality="audio").load_reference(state)
