"""f-VAEGAN-D2 against the reference's numbers, its penalty by double backward, its classifiers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avzero.data.benchmark import Benchmark
from avzero.errors import UserError
from avzero.models._contract import Batch, Context, Shapes
from avzero.models._generative import Table, criticise, fit_softmax, gradient_penalty
from avzero.models._layers import number_sites
from avzero.models.fvaegan_d2 import FVAEGAN, FVAEGANConfig
from avzero.train.data import StageData
from tests import parity
from tests.conftest import make_task
from tests.toys import (
    SMALL,
    Rows,
    assert_passes_reach,
    assert_workers_average,
    drawing,
    seen_rows,
    small_batch,
    total,
)


def build(shapes: Shapes = SMALL, **values: object) -> FVAEGAN:
    torch.manual_seed(0)
    model = FVAEGAN(FVAEGANConfig.model_validate(values), shapes).double()
    number_sites(model)
    return model


class Given(nn.Module):
    """Stands in for a noise layer: always the same values."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = values

    def forward(self, like: Tensor, width: int, context: Context) -> Tensor:
        return self.values


def golden_model() -> tuple[FVAEGAN, Batch, Context]:
    model = build(Shapes({"audio": 512, "video": 512}, 300))
    for net in (model.Encoder, model.netG, model.netD, model.netD2):
        parity.fill(net)  # type: ignore[arg-type]  # the reference keeps four networks, each filled on its own
    model.noise = Given(parity.wave((parity.ROWS, 300), 2.1, 1.0, 1.7))  # type: ignore[assignment]
    model.eps = Given(parity.wave((parity.ROWS, 300), 2.9, 1.0, 2.3))  # type: ignore[assignment]
    alpha = torch.full((parity.ROWS, 1), 0.3, dtype=torch.float64)
    model.alpha = model.alpha2 = Given(alpha)  # type: ignore[assignment]
    features = {"audio": parity.inputs(512, 0.1), "video": parity.inputs(512, 0.2)}
    text = parity.words(parity.ROWS, 0.3, 1.1)
    label = torch.zeros(parity.ROWS, 2, dtype=torch.int64)
    pair = {m: torch.stack([x, x], 1) for m, x in features.items()}
    context = Context(torch.zeros(4, 2, dtype=torch.int32))
    return model, Batch(pair, torch.stack([text, text], 1), label, text), context


def test_parity() -> None:
    golden = parity.load("fvaegan_d2_main")
    model, data, context = golden_model()
    text = data.text[:, 0]
    x = model.embed({m: f[:, 0] for m, f in data.features.items()})["x"][:, :-1]
    noise, eps = model.noise.values, model.eps.values  # type: ignore[union-attr]
    fake = torch.sigmoid(model.netG(noise, text))
    mean, log_var = model.Encoder(x, text)
    rec = torch.sigmoid(model.netG(mean + eps * torch.exp(0.5 * log_var), text))
    for name, value in (("fake", fake), ("rec", rec), ("mean", mean), ("log_var", log_var)):
        parity.assert_summary(name, value, golden[name])
    scores = {
        "D_real": model.netD(torch.cat([x, text], 1)),
        "D_fake": model.netD(torch.cat([fake, text], 1)),
        "D2_real": model.netD2(x),
        "D2_fake": model.netD2(fake),
        "D_rec": model.netD(torch.cat([rec, text], 1)),
    }
    for name, score in scores.items():
        parity.assert_close(name, score.mean().item(), golden[name])

    critic = model.loss(data, context._replace(part="critic"))
    parity.assert_close("D", critic["D"].item(), golden["D_fake"] - golden["D_real"], 1.0)
    parity.assert_close("D2", critic["D2"].item(), golden["D2_fake"] - golden["D2_real"], 1.0)
    parity.assert_close("gp_D", critic["gp_D"].item(), golden["gp_D"])
    parity.assert_close("gp_D2", critic["gp_D2"].item(), golden["gp_D2"])

    terms = model.loss(data, context._replace(part="generator"))
    parity.assert_close("bce", terms["bce"].item(), golden["bce_sum"])
    parity.assert_close("kl", terms["kl"].item(), golden["kld_sum"])
    parity.assert_close("generator_encoder", total(terms).item(), golden["generator_encoder_loss"])


@pytest.mark.parametrize(
    ("width", "counts"),
    [
        (1024, {"Encoder": 578_100, "netG": 833_024, "netD": 678_913, "netD2": 525_313}),
        (4224, {}),
    ],
)
def test_parameter_counts(width: int, counts: dict[str, int]) -> None:
    model = build(Shapes({"audio": 128, "video": width - 128}, 300))
    for name, count in counts.items():
        assert sum(p.numel() for p in model.get_submodule(name).parameters()) == count
    total = {1024: 2_615_350, 4224: 8_493_750}[width]
    assert sum(p.numel() for p in model.parameters()) == total


@pytest.mark.parametrize("conditional", [True, False])
def test_penalty_equals_double_backward(conditional: bool) -> None:
    """Value, and gradient with respect to every weight, against the framework's second order."""
    torch.manual_seed(2)
    first, second = nn.Linear(9 if conditional else 6, 12).double(), nn.Linear(12, 1).double()
    rows = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
    condition = torch.randn(10, 3, dtype=torch.float64) if conditional else None
    weights = [first.weight, first.bias, second.weight, second.bias]
    ours = gradient_penalty(first, second, rows, condition)
    ours_grad = torch.autograd.grad(ours, weights, materialize_grads=True)

    x = rows if condition is None else torch.cat([rows, condition], 1)
    score = criticise(first, second, x).sum()
    (slope,) = torch.autograd.grad(score, rows, create_graph=True)
    theirs = (slope.norm(dim=1) - 1).square().mean()
    theirs_grad = torch.autograd.grad(theirs, weights, materialize_grads=True)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ours_grad, theirs_grad)


def test_passes() -> None:
    model = build(critic_steps=3)
    generator = [step for step in range(9) if "generator" in model.passes(step)]
    assert generator == [0, 3, 6]
    assert all(model.passes(step)[0] == "critic" for step in range(9))
    assert build(critic_steps=1).passes(7) == ("critic", "generator")
    cut = build(**FVAEGAN.compat)
    assert [cut.passes(step) for step in range(3)] == [("critic", "generator"), (), ()]


def test_a_pass_reaches_its_own_networks_only() -> None:
    reached = {"critic": ("netD.", "netD2."), "generator": ("netG.", "Encoder.")}
    assert_passes_reach(build(), small_batch(), reached)


def test_terms_are_those_of_the_specification() -> None:
    """Section 2 written out once more, with plain loops over rows, on a small case."""
    model, data = build(gan_weight=3, lambda_gp=7, ud_weight=0.5, vae_weight=2), small_batch(4)
    text = data.text[:, 0]
    x = torch.cat([data.features["audio"][:, 0], data.features["video"][:, 0]], 1)
    x = x / x.norm(dim=1, keepdim=True)
    context = drawing()
    noise, eps = model.noise(x, 300, context), model.eps(x, 300, context)
    alpha, alpha2 = model.alpha(x, 1, context), model.alpha2(x, 1, context)
    state = model.state_dict()

    def net(name: str, *parts: Tensor, leak: float = 0.0) -> Tensor:
        keys = ("MLP.L0", "MLP.L1") if name == "netG" else ("fc1", "fc2")
        h = torch.cat(parts) @ state[f"{name}.{keys[0]}.weight"].T + state[f"{name}.{keys[0]}.bias"]
        h = torch.maximum(h, leak * h)
        return h @ state[f"{name}.{keys[1]}.weight"].T + state[f"{name}.{keys[1]}.bias"]

    expected = dict.fromkeys(
        ("D", "gp_D", "D2", "gp_D2", "gan_rec", "gan", "bce", "kl"), torch.zeros(()).double()
    )
    for i in range(4):
        fake = 1 / (1 + torch.exp(-net("netG", noise[i], text[i])))
        hidden = torch.cat([x[i], text[i]]) @ state["Encoder.MLP.L0.weight"].T
        hidden = torch.clamp(hidden + state["Encoder.MLP.L0.bias"], min=0)
        mean, log_var = (
            hidden @ state[f"Encoder.{k}.weight"].T + state[f"Encoder.{k}.bias"]
            for k in ("linear_means", "linear_log_var")
        )
        rec = 1 / (1 + torch.exp(-net("netG", mean + eps[i] * torch.exp(log_var / 2), text[i])))

        def d(row: Tensor, text: Tensor = text[i]) -> Tensor:
            return net("netD", row, text, leak=0.2)[0]

        def d2(row: Tensor) -> Tensor:
            return net("netD2", row, leak=0.2)[0]

        def slope(critic: object, a: Tensor, row: Tensor = x[i], made: Tensor = fake) -> Tensor:
            u = (a * row + (1 - a) * made).detach().requires_grad_()
            return torch.autograd.grad(critic(u), u)[0].norm()  # type: ignore[operator]

        step = {
            "D": (d(fake) - d(x[i])) / 4,
            "gp_D": 7 * (slope(d, alpha[i]) - 1) ** 2 / 4,
            "D2": 0.5 * (d2(fake) - d2(x[i])) / 4,
            "gp_D2": 0.5 * 7 * (slope(d2, alpha2[i]) - 1) ** 2 / 4,
            "gan_rec": -3 * d(rec) / 4,
            "gan": -3 * d(fake) / 4,
            "bce": -2 * (x[i] * rec.log() + (1 - x[i]) * (1 - rec).log()).sum(),
            "kl": -2 * 0.5 * (1 + log_var - mean**2 - log_var.exp()).sum(),
        }
        expected = {name: expected[name] + value for name, value in step.items()}
    ours = model.loss(data, context._replace(part="critic"))
    ours |= model.loss(data, context._replace(part="generator"))
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("part", ["critic", "generator"])
def test_two_workers_average_to_the_terms_of_one(part: str) -> None:
    sent = assert_workers_average(build(), small_batch(), part)
    assert sent == {0: [], 1: []}, "this system exchanges nothing but gradients"


def test_candidates() -> None:
    """Two classifiers; the same seed gives the same ones, another seed others."""
    model, data = build(syn_num=6, classifier_epochs=3, hidden_G=16, hidden_D=16), small_batch(12)
    rows = seen_rows(data, 2)
    table = model.candidates(data.class_text, 2, rows)
    assert table.shape == (3 + 1, 5 + 6 + 1) and not table.requires_grad
    torch.manual_seed(77)
    again = model.candidates(data.class_text, 2, rows)
    assert torch.equal(table, again)
    other = model.candidates(data.class_text, 2, seen_rows(data, 2, seed=6))
    assert not torch.allclose(table, other)
    samples = model.embed(rows.features)
    logits = samples["x"][:, :-1] @ table[:, :-1].T + table[:, -1]
    for squared in (False, True):
        found = model.distances(samples, table, squared)
        torch.testing.assert_close(found["both"], -logits)
    assert model.beta_grid.values() == [0.0]


def test_candidates_recognise_what_the_generator_makes() -> None:
    """A generator that copies the text: real seen and unseen rows end in their classes."""
    torch.manual_seed(3)
    shapes = Shapes({"audio": 4, "video": 3}, 7)
    model = build(shapes, latent=2, hidden_G=7, syn_num=50, classifier_lr=0.05)
    text = torch.eye(7, dtype=torch.float64)[:5]
    with torch.no_grad():
        for parameter in model.netG.parameters():
            parameter.zero_()
        model.netG.MLP["L0"].weight[:, 2:] = torch.eye(7)
        model.netG.MLP["L1"].weight.copy_(8 * torch.eye(7))
        model.netG.MLP["L1"].bias.fill_(-4)
    label = torch.arange(5).repeat(20)
    x = (text[label] + 0.05 * torch.rand(100, 7, dtype=torch.float64)).split([4, 3], dim=1)
    features = dict(zip(("audio", "video"), x, strict=True))
    seen = label < 3
    rows = Rows({m: f[seen] for m, f in features.items()}, label[seen])
    table = model.candidates(text, 3, rows)
    distances = model.distances(model.embed(features), table, False)["both"]
    assert torch.equal(distances[:, :5].argmin(1), label)
    assert torch.equal(distances[~seen][:, 5:].argmin(1), label[~seen] - 3)


def test_classifier_is_plain_softmax_regression() -> None:
    """Against the framework's own layers: shuffled once, batches in order, Adam, NLL."""
    torch.manual_seed(4)
    x, label = torch.randn(23, 5, dtype=torch.float64), torch.arange(23) % 3
    table = Table(23, 5, x)
    table.add(x[:20], label[:20])
    table.add(x[20:], label[20:])
    ours = fit_softmax(table, 3, 4, 7, 0.01, torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(9)
    layer = nn.Linear(5, 3).double()
    with torch.no_grad():
        layer.weight.copy_(
            0.02 * torch.randn(3, 5, generator=generator, dtype=torch.float64),
        )
        layer.bias.zero_()
    order = torch.randperm(23, generator=generator)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01, betas=(0.5, 0.999))
    for _ in range(4):
        for take in (order[:7], order[7:14], order[14:21], order[21:]):
            optimizer.zero_grad()
            F.nll_loss(torch.log_softmax(layer(x[take]), 1), label[take]).backward()
            optimizer.step()
    torch.testing.assert_close(ours, torch.cat([layer.weight, layer.bias[:, None]], 1).detach())


def test_negative_features_are_refused_with_the_remedy(benchmark: Benchmark) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match=r"binary cross-entropy.*input_scaling: minmax"):
        StageData(benchmark, make_task(benchmark, "fvaegan_d2", config=SCALED), cpu)
    config = SCALED | {"input_scaling": "minmax"}
    data = StageData(benchmark, make_task(benchmark, "fvaegan_d2", config=config), cpu)
    assert data.low() >= 0


SCALED = {"input_scaling": "standard"}


def test_reference_names() -> None:
    model, other = build(), build(hidden_G=512)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    names = {"netG.MLP.L0", "netG.MLP.L1", "netD.fc1", "netD.fc2", "netD2.fc1", "netD2.fc2"}
    names |= {"Encoder.MLP.L0", "Encoder.linear_means", "Encoder.linear_log_var"}
    state = other.state_dict()
    assert set(state) == {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}
    model.load_reference(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    state["netD.fc3.weight"] = torch.zeros(1)
    with pytest.raises(UserError, match=r"extra: netD\.fc3\.weight"):
        model.load_reference(state)
