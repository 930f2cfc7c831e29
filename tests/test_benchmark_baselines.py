"""AVGZSLNet, CJME, DeViSE, ALE, SJE and APN against the reference's numbers (golden/*.json)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from avzero.errors import UserError
from avzero.models._contract import Batch, Context, Model, Shapes
from avzero.models._losses import hinge
from avzero.models._ranking import violations
from avzero.models._registry import make_config, model_class
from avzero.models.cjme import CJME, CJMEConfig
from avzero.spec import Preset
from tests import parity

MAIN = Shapes({"audio": 512, "video": 512}, 300)
RANKING = ("devise", "ale", "sje")
NO_KEYS = Context(torch.zeros(16, 2, dtype=torch.int32))


def make(name: str, shapes: Shapes = MAIN, **values: Any) -> Model:
    cls = model_class(name)
    return cls(make_config(name, values, Preset.PAPER, "test"), shapes)


def golden_batch(label: list[int] | None = None) -> Batch:
    features = {
        "audio": torch.stack([parity.inputs(512, 0.1), parity.inputs(512, 0.4)], 1),
        "video": torch.stack([parity.inputs(512, 0.2), parity.inputs(512, 0.5)], 1),
    }
    text = torch.stack([parity.words(6, 0.3, 1.1), parity.words(6, 0.6, 1.3)], 1)
    labels = torch.tensor(label or [0] * 6)
    return Batch(features, text, torch.stack([labels, labels], 1), parity.words(5, 0.8, 1.7))


def step(model: Model, loss: Tensor, golden: dict[str, Any], lr: float = 1e-3) -> None:
    """Compare gradients and the state after one Adam step."""
    loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        parity.assert_close(key, parameter.grad.norm().item(), golden["grad_norms"][key], 1e-3)
    torch.optim.Adam(model.parameters(), lr=lr).step()
    state = model.state_dict()
    for key, expected in golden["after_step"].items():
        value = state[key].reshape(expected["shape"])
        if golden["grad_norms"].get(key, 1.0) > 1e-9:
            parity.assert_summary(f"after step {key}", value, expected)
        else:
            # A bias before a BatchNorm has rounding noise for a gradient, which Adam scales up.
            first = value.flatten()[: len(expected["first"])].tolist()
            assert first == pytest.approx(expected["first"], rel=1e-7, abs=1e-8)


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


def test_avgzslnet_parity() -> None:
    golden = parity.load("avgzslnet_main")
    model: Any = make("avgzslnet", embedding_dropout=0, decoder_dropout=0)
    context = parity.fill(model)
    batch = golden_batch()
    model.eval()
    with torch.no_grad():
        for member, suffix in ((0, ""), (1, "_neg")):
            z = model.embed({m: x[:, member] for m, x in batch.features.items()})
            t = model.embed_classes(batch.text[:, member])
            named = {"a": z["audio"], "v": z["video"], "t": t}
            for key, value in named.items():
                parity.assert_summary(key, value, golden["eval"][key + suffix])
                if member == 0 or key != "t":
                    decoded = model.decode(value)
                    parity.assert_summary(
                        f"dec_{key}", decoded, golden["eval"][f"dec_{key}{suffix}"]
                    )
                    torch.testing.assert_close(decoded.norm(dim=1), torch.ones(6).double())
    model.train()
    terms = model.loss(batch, context)
    for key, value in golden["train_terms"].items():
        parity.assert_close(key, terms[key.split("l_")[1]].item(), value)
    parity.assert_close("total", total(terms).item(), golden["total_loss"])
    step(model, total(terms), golden)


def test_avgzslnet_both_is_the_sum_and_divergence_is_symmetric() -> None:
    model = make("avgzslnet", Shapes({"audio": 5, "video": 7}, 300), w_kl=2.0)
    parity.fill(model)
    z = {"audio": torch.randn(4, 64), "video": torch.randn(4, 64)}
    d = model.distances(z, torch.randn(3, 64), False)
    torch.testing.assert_close(d["both"], d["audio"] + d["video"])
    net: Any = make(
        "avgzslnet", Shapes({"audio": 5, "video": 5}, 300), w_kl=2.0, embedding_dropout=0
    )
    context = parity.fill(net)
    batch = golden_batch()
    features = {m: x[..., :5] for m, x in batch.features.items()}
    a = net.triplet_net["embedding_net1"](features["audio"], context)[:, 0].detach().numpy()
    v = net.triplet_net["embedding_net2"](features["video"], context)[:, 0].detach().numpy()
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (a, v))
    by_hand = 2.0 * np.mean(((p * np.log(p / q)).sum(1) + (q * np.log(q / p)).sum(1)) / 2)
    assert net.loss(batch._replace(features=features), context)["kl"].item() == pytest.approx(
        by_hand
    )


@pytest.mark.parametrize("rule", ["per_sample", "outer"])
def test_cjme_branches(rule: str) -> None:
    """Five hand-made rows cover a target of 0, 0.5 and 1."""
    golden = parity.load("cjme_loss_branches")
    a, v, t, a_, v_, gate, table = (
        torch.tensor(golden[key], dtype=torch.float64)
        for key in ("a", "v", "t", "a_neg", "v_neg", "attention", "class_embeddings")
    )
    model = CJME(CJMEConfig(attention_broadcast=rule), MAIN).double()  # type: ignore[arg-type]
    target = model.gate_target(a, v, table)
    assert target.tolist() == golden["supervision_target"]
    near_a, near_v = hinge(t, a, a_, model.margin), hinge(t, v, v_, model.margin)
    for ours, key in ((near_a, "l_ta"), (near_v, "l_tv")):
        torch.testing.assert_close(ours, torch.tensor(golden[key]).double())
    attended = model.attended(gate, near_a, near_v, NO_KEYS).item()
    key = "triplet_legacy_outer" if rule == "outer" else "triplet_per_sample"
    parity.assert_close(key, attended, golden[key])
    whole = attended + (a - v).square().mean().item() + (gate - target).square().mean().item()
    name = "total_legacy" if rule == "outer" else "total_per_sample"
    parity.assert_close(name, whole, golden[name])


def test_cjme_parity() -> None:
    golden = parity.load("cjme_main")
    model: Any = make("cjme", dropout=0, attention_broadcast="outer")
    context = parity.fill(model)
    batch = golden_batch()
    model.eval()
    with torch.no_grad():
        z = model.embed({m: x[:, 0] for m, x in batch.features.items()})
        z_ = model.embed({m: x[:, 1] for m, x in batch.features.items()})
        got = {
            "a": z["audio"],
            "v": z["video"],
            "t": model.embed_classes(batch.text[:, 0]),
            "a_neg": z_["audio"],
            "v_neg": z_["video"],
            "t_neg": model.embed_classes(batch.text[:, 1]),
            "att_hard": z["gate"],
            "class_emb": model.embed_classes(batch.class_text),
        }
    for key, value in got.items():
        parity.assert_summary(key, value, golden["eval"][key])
    model.train()
    terms = model.loss(batch, context)
    parity.assert_close("triplet", terms["triplet"].item(), golden["ct_mean_legacy"])
    parity.assert_close("align", terms["align"].item(), golden["mse_av"])
    parity.assert_close("gate", terms["gate"].item(), golden["loss_supervision"])
    parity.assert_close("total", total(terms).item(), golden["total_loss_legacy"])
    step(model, total(terms), golden)
    per_sample: Any = make("cjme", dropout=0)
    terms = per_sample.loss(batch, parity.fill(per_sample))
    parity.assert_close("per sample", terms["triplet"].item(), golden["ct_mean_per_sample"])


def test_cjme_picks_one_modality_per_sample() -> None:
    model = make("cjme", Shapes({"audio": 5, "video": 7}, 300))
    z = {"audio": torch.randn(2, 64), "video": torch.randn(2, 64)}
    z["gate"] = torch.tensor([[0.0], [1.0]])
    d = model.distances(z, torch.randn(3, 64), False)
    torch.testing.assert_close(d["both"], torch.stack([d["audio"][0], d["video"][1]]))


@pytest.mark.parametrize("name", RANKING)
def test_ranking_losses(name: str) -> None:
    golden = parity.load("ranking_losses")
    scores = torch.tensor(golden["scores"], dtype=torch.float64, requires_grad=True)
    label = torch.tensor(golden["labels"])
    model: Any = make(name)
    loss = model.ranking_loss(
        violations(scores, label, torch.tensor(golden["margin"], dtype=torch.float64))
    ).mean()
    assert loss.item() == pytest.approx(golden[name]["loss"], abs=1e-7)
    loss.backward()
    assert scores.grad is not None
    rows = slice(0, 3) if name == "sje" else slice(None)  # the last row ties exactly
    expected = torch.tensor(golden[name]["grad"], dtype=torch.float64)
    torch.testing.assert_close(scores.grad[rows], expected[rows], rtol=0, atol=1e-7)
    # Adding a constant to a row changes nothing; met margins cost nothing.
    shifted = violations(scores + 3.0, label, torch.tensor(0.1).double())
    torch.testing.assert_close(model.ranking_loss(shifted).mean(), loss)
    met = torch.nn.functional.one_hot(label, 5).double()
    assert model.ranking_loss(violations(met, label, torch.tensor(0.1).double())).sum() == 0


@pytest.mark.parametrize("name", RANKING)
def test_ranking_systems_parity(name: str) -> None:
    golden = parity.load("devise_ale_sje_main")
    model: Any = make(name, dropout=0)
    context = parity.fill(model)
    batch = golden_batch(golden["labels"])
    anchors = {m: x[:, 0] for m, x in batch.features.items()}
    projected = model.embed(anchors)["both"]
    parity.assert_summary("projected", projected, golden["projected"])
    expected = torch.tensor(golden["scores"], dtype=torch.float64)
    torch.testing.assert_close(projected @ batch.class_text.T, expected)
    terms = model.loss(batch, context)
    assert terms["hinge"].item() == pytest.approx(golden[name]["loss"], rel=1e-7)
    terms["hinge"].backward()
    gradient = model.bilinear.weight.grad.norm().item()
    assert gradient == pytest.approx(golden[name]["grad_norms"]["bilinear.weight"], rel=1e-7)
    torch.optim.Adam(model.parameters(), lr=1e-3).step()
    after = golden[name]["after_step"]["bilinear.weight"]
    parity.assert_summary("after step", model.bilinear.weight, after)
    normed: Any = make(name, dropout=0, norm_inputs=True)
    parity.fill(normed)
    parity.assert_summary(
        "normed", normed.embed(anchors)["both"], golden["norm_inputs"]["projected"]
    )


@pytest.mark.parametrize("rule", ["softmax", "logits"])
def test_apn_parity(rule: str) -> None:
    golden = parity.load("apn_main")
    model: Any = make("apn", ce_input=rule)
    context = parity.fill(model)
    batch = golden_batch(golden["labels"])
    anchors = {m: x[:, 0] for m, x in batch.features.items()}
    parity.assert_summary("final", model.embed(anchors)["both"], golden["attr_final"])
    terms = model.loss(batch, context)
    parity.assert_close("mse", terms["mse_final"].item(), golden["mse_final"])
    parity.assert_close("ce", terms["ce_final"].item(), golden[f"ce_on_{rule}_final"])
    if rule == "softmax":
        parity.assert_close("total", total(terms).item(), golden["total_loss_legacy"])
        step(model, total(terms), golden)


COUNTS = {
    "avgzslnet": (1_319_872, 4_596_672, 1_844_160),
    "cjme": (1_299_157, 4_585_557, 1_824_981),
    "devise": (307_200, 1_267_200, 460_800),
    "ale": (307_200, 1_267_200, 460_800),
    "sje": (307_200, 1_267_200, 460_800),
    "apn": (614_400, 2_534_400, 921_600),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name: str) -> None:
    sizes = ((512, 512), (128, 4096), (1024, 512))
    for (audio, video), expected in zip(sizes, COUNTS[name], strict=True):
        model = make(name, Shapes({"audio": audio, "video": video}, 300))
        assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize("name", COUNTS)
def test_reference_checkpoints_load_strictly(name: str) -> None:
    shapes = Shapes({"audio": 5, "video": 7}, 300)
    source, target = make(name, shapes), make(name, shapes)
    state = {f"module.{key}": value.clone() for key, value in source.state_dict().items()}
    if name == "apn":
        state = {key: value[:, :, None, None] for key, value in state.items()}
    elif name not in RANKING:
        norm = next(key for key in state if key.endswith("running_mean"))
        state[norm.replace("running_mean", "num_batches_tracked")] = torch.tensor(3)
    target.load_reference(state)
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value)
    first = next(iter(state))
    lost = {key: value for key, value in state.items() if key != first}
    with pytest.raises(UserError, match=f"missing: {first.removeprefix('module.')}.*extra: odd"):
        target.load_reference(lost | {"odd": torch.zeros(1)})
    with pytest.raises(UserError, match=r"is \[2, 2\], expected"):
        target.load_reference(state | {first: torch.zeros(2, 2)})
