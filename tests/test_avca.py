"""AVCA against the reference's numbers (golden/avca_*.json) and the checks of its spec."""

from __future__ import annotations

import pytest
import torch

from avzero.models._contract import Batch, Shapes, trainable
from avzero.models.avca import AVCA, AVCAConfig
from tests import parity

CASES = [("avca_main", 512, 512), ("avca_cls", 128, 4096)]


def build(audio: int, video: int, momentum: float) -> AVCA:
    config = AVCAConfig(
        r_enc=0,
        r_proj=0,
        r_add=0,
        bn_momentum=momentum,
        train_pos_emb=False,
        bn_legacy_updates=True,
    )
    return AVCA(config, Shapes({"audio": audio, "video": video}, 300))


def golden_batch(audio: int, video: int) -> Batch:
    features = {
        "audio": torch.stack([parity.inputs(audio, 0.1), parity.inputs(audio, 0.4)], 1),
        "video": torch.stack([parity.inputs(video, 0.2), parity.inputs(video, 0.5)], 1),
    }
    text = torch.stack(
        [parity.words(parity.ROWS, 0.3, 1.1), parity.words(parity.ROWS, 0.6, 1.3)], 1
    )
    return Batch(features, text, torch.zeros(parity.ROWS, 2, dtype=torch.int64), text[:, 0])


@pytest.mark.parametrize(("name", "audio", "video"), CASES)
def test_parity(name: str, audio: int, video: int) -> None:
    golden = parity.load(name)
    model = build(audio, video, golden["config"]["bn_momentum"])
    context = parity.fill(model)
    batch = golden_batch(audio, video)

    def check_embeddings(tag: str) -> None:
        model.eval()
        with torch.no_grad():
            z = model.embed({m: x[:, 0] for m, x in batch.features.items()})
            w = model.embed_classes(batch.text[:, 0])
        for key, value in (("theta_a", z["audio"]), ("theta_v", z["video"]), ("theta_w", w)):
            parity.assert_summary(f"{tag} {key}", value, golden[tag][key])
        model.train()

    check_embeddings("eval")
    terms = model.loss(batch, context)
    assert set(terms) == set(golden["train_terms"])
    for key, value in golden["train_terms"].items():
        parity.assert_close(key, terms[key].item(), value)
    total = torch.stack(list(terms.values())).sum()
    parity.assert_close("total", total.item(), golden["total_loss"])
    total.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None
        # Biases before a BatchNorm have no gradient but rounding noise.
        parity.assert_close(key, parameter.grad.norm().item(), golden["grad_norms"][key], 1e-3)
    assert model.pos_emb1D.grad is not None
    assert model.pos_emb1D.grad.norm().item() == pytest.approx(golden["pos_emb_has_grad"])
    before = model.pos_emb1D.detach().clone()
    lr, decay = golden["config"]["lr"], golden["config"]["weight_decay"]
    torch.optim.Adam([p for _, p in trainable(model)], lr=lr, weight_decay=decay).step()
    assert torch.equal(model.pos_emb1D, before) == golden["pos_emb_unchanged"]
    for key, expected in golden["after_step"].items():
        parity.assert_summary(f"after step {key}", model.state_dict()[key], expected)
    with torch.no_grad():
        model.settle(batch, context)
    for key, expected in golden["after_step_and_train_mode_get_embeddings"].items():
        parity.assert_summary(f"settled {key}", model.state_dict()[key], expected)
    check_embeddings("eval_after_step")


@pytest.mark.parametrize(("name", "audio", "video"), CASES)
def test_parameter_count(name: str, audio: int, video: int) -> None:
    total = sum(p.numel() for p in build(audio, video, 0.1).parameters())
    assert total == {"avca_main": 1_693_108, "avca_cls": 3_331_508}[name]


def test_swapping_tokens_and_positions_permutes_attention() -> None:
    model = build(8, 8, 0.1).float()
    model.eval()
    tokens = torch.randn(5, 2, 300)
    out = model.cross_attention(tokens + model.pos_emb1D)
    swapped = model.cross_attention(tokens.flip(1) + model.pos_emb1D.flip(0))
    torch.testing.assert_close(swapped.flip(1), out)


def test_outputs_are_non_negative_and_loss_survives_equal_members() -> None:
    model = build(8, 12, 0.1).train()
    context = parity.fill(model)
    batch = golden_batch(8, 12)
    same = Batch(
        {m: x[:, :1].expand(-1, 2, -1).contiguous() for m, x in batch.features.items()},
        batch.text[:, :1].expand(-1, 2, -1).contiguous(),
        batch.label,
        batch.class_text,
    )
    loss = torch.stack(list(model.loss(same, context).values())).sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    model.eval()
    z = model.embed({m: x[:, 0] for m, x in batch.features.items()})
    assert all((value >= 0).all() for value in z.values())


def test_paper_and_compat_differ_only_in_statistics() -> None:
    """Without legacy updates losses and gradients are the same; running statistics are not."""
    config = {"r_enc": 0, "r_proj": 0, "r_add": 0}
    results = []
    for legacy in (False, True):
        model = AVCA(
            AVCAConfig.model_validate(config | {"bn_legacy_updates": legacy}),
            Shapes({"audio": 8, "video": 12}, 300),
        )
        context = parity.fill(model)
        terms = model.loss(golden_batch(8, 12), context)
        torch.stack(list(terms.values())).sum().backward()
        gradients = {k: p.grad for k, p in model.named_parameters()}
        results.append((terms, gradients, model.state_dict()))
    (terms, grads, state), (terms_2, grads_2, state_2) = results
    for key in terms:
        torch.testing.assert_close(terms[key], terms_2[key])
    for key in grads:
        torch.testing.assert_close(grads[key], grads_2[key])
    differs = {k for k in state if not torch.allclose(state[k], state_2[k])}
    assert differs == {
        f"{m}.{k}"
        for m in ("A_proj.fc.1", "A_proj.fc.5", "V_proj.fc.1", "V_proj.fc.5", "D.fc.1")
        for k in ("running_mean", "running_var")
    }
