"""AVFS: its terms on small cases against plain formulas, its passes and its classifier."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from avzero.data.benchmark import Benchmark
from avzero.errors import UserError
from avzero.models._contract import Batch, Shapes
from avzero.models._generative import Table, contrastive, fit_softmax
from avzero.models._layers import number_sites
from avzero.models.avfs import AVFS, LATENT, AVFSConfig
from avzero.train.data import StageData
from tests.conftest import make_task
from tests.toys import (
    SMALL,
    assert_passes_reach,
    assert_workers_average,
    drawing,
    seen_rows,
    small_batch,
)

PARTS = ("critic", "generator")


def build(shapes: Shapes = SMALL, **values: object) -> AVFS:
    torch.manual_seed(0)
    config = {"hidden": 16, "embed_dim": 8, "proj_dim": 4} | values
    model = AVFS(AVFSConfig.model_validate(config), shapes).double()
    number_sites(model)
    with torch.no_grad():  # N(0, 0.02) leaves all units of such a small case near zero
        for parameter in model.parameters():
            parameter.normal_(0, 0.4)
    return model


@pytest.mark.parametrize(
    ("dims", "millions", "total"),
    [
        ((512, 512), {"G": 6.66, "D": 5.43, "E": 0.52, "P": 0.13, "C": 0.15}, 12.9),
        ((128, 4096), {"G": 19.8, "D": 18.5, "E": 2.16, "P": 0.13, "C": 0.15}, 40.8),
    ],
)
def test_parameter_counts(dims: tuple[int, int], millions: dict[str, float], total: float) -> None:
    """avfs.md section 5, to the digits given there; names as in section 6."""
    model = AVFS(AVFSConfig(), Shapes({"audio": dims[0], "video": dims[1]}, 300))
    names = {"G.0", "G.2", "D.0", "D.2", "E.0", "P", "C"}
    state = model.state_dict()
    assert set(state) == {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}
    assert all(not value.any() for key, value in state.items() if key.endswith("bias"))
    assert state["D.0.weight"].std().item() == pytest.approx(0.02, rel=0.01)
    for name, count in millions.items():
        ours = sum(v.numel() for k, v in state.items() if k.startswith(f"{name}."))
        assert ours / 1e6 == pytest.approx(count, abs=0.05 if count > 10 else 0.006)
    assert sum(v.numel() for v in state.values()) / 1e6 == pytest.approx(total, abs=0.06)


def supcon(z: Tensor, label: Tensor, tau: float) -> Tensor:
    """The contrastive loss as the specification writes it, row by row."""
    losses = []
    for i in range(len(z)):
        others = [k for k in range(len(z)) if k != i]
        positives = [j for j in others if label[j] == label[i]]
        if not positives:
            continue
        below = sum(torch.exp(z[i] @ z[k] / tau) for k in others)
        shares = [torch.log(torch.exp(z[i] @ z[j] / tau) / below) for j in positives]
        losses.append(-sum(shares) / len(positives))
    return torch.stack(losses).mean()  # type: ignore[arg-type]


@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 1, 2], [0, 1, 2, 3, 4, 0]])
def test_contrastive(labels: list[int]) -> None:
    torch.manual_seed(2)
    z = F.normalize(torch.randn(6, 4, dtype=torch.float64), dim=1).requires_grad_()
    label, tau = torch.tensor(labels), torch.tensor(0.3, dtype=torch.float64)
    ours, plain = contrastive(z, label, tau), supcon(z, label, 0.3)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(torch.autograd.grad(ours, z), torch.autograd.grad(plain, z))


def test_contrastive_without_positives_is_zero() -> None:
    z = F.normalize(torch.randn(3, 4), dim=1).requires_grad_()
    loss = contrastive(z, torch.arange(3), torch.tensor(0.1))
    loss.backward()
    assert loss.item() == 0
    assert z.grad is not None and not z.grad.any()


def plain_terms(model: AVFS, data: Batch, tau: float) -> dict[str, Tensor]:
    """Section 2 of the specification written out with the weights alone."""
    s = model.state_dict()
    text, label = data.text[:, 0], data.label[:, 0]
    x = torch.cat([data.features["video"][:, 0], data.features["audio"][:, 0]], 1)
    ctx = drawing()
    eps, alpha = model.noise(x, LATENT, ctx), model.alpha(x, 1, ctx)

    def linear(name: str, rows: Tensor) -> Tensor:
        return rows @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    def leaky(rows: Tensor) -> Tensor:
        return torch.where(rows > 0, rows, 0.2 * rows)

    def d(rows: Tensor) -> Tensor:
        return linear("D.2", leaky(linear("D.0", torch.cat([rows, text], 1))))[:, 0]

    def unit(rows: Tensor) -> Tensor:
        return rows / rows.norm(dim=1, keepdim=True)

    def dis(rows: Tensor) -> Tensor:
        e = linear("E.0", rows).clamp(min=0)
        logits = unit(e) @ unit(linear("C", data.class_text)).T / tau
        return -torch.log_softmax(logits, 1)[torch.arange(len(x)), label].mean()

    def z(rows: Tensor) -> Tensor:
        return unit(linear("P", linear("E.0", rows).clamp(min=0)))

    fake = linear("G.2", leaky(linear("G.0", torch.cat([eps, text], 1)))).clamp(min=0)
    between = (alpha * x + (1 - alpha) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(d(between).sum(), between)
    both = torch.cat([fake, x])
    return {
        "D": d(fake).mean() - d(x).mean(),
        "gp": 5 * (slope.norm(dim=1) - 1).square().mean(),
        "con": supcon(z(x), label, tau),
        "dis": dis(x),
        "gan": -d(fake).mean(),
        "con_gen": 0.3 * supcon(z(both), torch.cat([label, label]), tau),
        "dis_gen": 0.6 * dis(fake),
    }


def test_terms_are_those_of_the_specification() -> None:
    model = build(gp_weight=5, l1_contrastive=0.3, l2_discriminative=0.6, tau=0.2)
    data = small_batch()
    ours = {k: v for part in PARTS for k, v in model.loss(data, drawing(part)).items()}
    expected = plain_terms(model, data, 0.2)
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_vae_branch() -> None:
    model, data = build(use_vae=True), small_batch()
    assert model.Q is not None and model.eps is not None
    terms = model.loss(data, drawing("generator"))
    text = data.text[:, 0]
    x = torch.cat([data.features["video"][:, 0], data.features["audio"][:, 0]], 1)
    mean, log_var = model.Q(x, text)
    code = mean + model.eps(x, LATENT, drawing()) * torch.exp(log_var / 2)
    hidden = F.leaky_relu(model.G["0"](torch.cat([code, text], 1)), 0.2)
    rebuilt = model.G["2"](hidden).clamp(min=0)
    kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum(1).mean()
    torch.testing.assert_close(terms["rec"], ((rebuilt - x) ** 2).sum(1).mean())
    torch.testing.assert_close(terms["kl"], kl)
    assert "rec" not in build().loss(data, drawing("generator"))


@pytest.mark.parametrize("use_vae", [False, True])
def test_a_pass_reaches_its_own_networks_only(use_vae: bool) -> None:
    reached = {"critic": ("D.", "E.", "P.", "C."), "generator": ("G.", "Q.")}
    assert_passes_reach(build(use_vae=use_vae), small_batch(), reached)


def test_passes() -> None:
    model = build(n_critic=4)
    assert [s for s in range(9) if "generator" in model.passes(s)] == [0, 4, 8]
    assert all(model.passes(s)[0] == "critic" for s in range(9))


@pytest.mark.parametrize("part", PARTS)
def test_two_workers_average_to_the_terms_of_one(part: str) -> None:
    assert_workers_average(build(), small_batch(), part)


def test_candidates() -> None:
    """One classifier over all classes; the same seed gives the same, another seed another."""
    model, data = build(n_syn=6, classifier_epochs=3), small_batch(12)
    rows = seen_rows(data, 2)
    table = model.candidates(data.class_text, 2, rows)
    assert table.shape == (3, 8 + 1) and not table.requires_grad
    torch.manual_seed(77)
    assert torch.equal(model.candidates(data.class_text, 2, rows), table)
    assert not torch.equal(model.candidates(data.class_text, 2, seen_rows(data, 2, 6)), table)
    x = torch.cat([rows.features["video"], rows.features["audio"]], 1)
    embedded = (x @ model.E["0"].weight.T + model.E["0"].bias).clamp(min=0)
    logits = embedded @ table[:, :-1].T + table[:, -1]
    for squared in (False, True):
        found = model.distances(model.embed(rows.features), table, squared)
        torch.testing.assert_close(found["both"], -logits)


def test_balanced_draws_weigh_classes_alike() -> None:
    """Without information in the rows the classifier learns the class frequencies it is shown."""
    x = torch.zeros(1000, 1, dtype=torch.float64)
    table = Table(1000, 1, x)
    table.add(x[:900], 0)
    table.add(x[900:], 2)  # class 1 has no rows and is never drawn
    for balanced, expected in ((True, 0.5), (False, 0.9)):
        fitted = fit_softmax(table, 3, 60, 100, 0.02, torch.Generator().manual_seed(0), balanced)
        shares = torch.softmax(fitted[:, -1], 0)
        assert (shares[0] / (shares[0] + shares[2])).item() == pytest.approx(expected, abs=0.03)
        assert shares[1] < 0.05


def test_scaling_is_the_systems_own(benchmark: Benchmark) -> None:
    """Minmax unless asked otherwise, whatever the protocol says; negative inputs are refused."""
    cpu = torch.device("cpu")
    data = StageData(benchmark, make_task(benchmark, "avfs"), cpu)
    assert data.scaling.rule == "minmax" and data.low() >= 0
    task = make_task(benchmark, "avfs", config={"input_scaling": "standard"})
    with pytest.raises(UserError, match=r"ends in a ReLU.*minmax"):
        StageData(benchmark, task, cpu)
