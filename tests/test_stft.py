"""STFT: neuron, fusion and losses against the formulas of its specification, written out again."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from avzero.models._contract import Batch, Context, Shapes, trainable
from avzero.models._layers import number_sites
from avzero.models.stft import STFT, Spiking, STFTConfig, Tucker, fire

SMALL = Shapes({"audio": 7, "video": 9}, 12)
STILL = {"r_enc": 0, "r_proj": 0, "r_dec": 0}
TINY = STILL | {"T": 4, "d": 16, "tucker_rank": 5, "slots": 2}


def build(shapes: Shapes = SMALL, **values: object) -> tuple[STFT, Context]:
    torch.manual_seed(0)
    model = STFT(STFTConfig.model_validate(TINY | values), shapes).double()
    return model, Context(torch.zeros(number_sites(model), 2, dtype=torch.int32))


def batch(rows: int = 8, classes: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    table = F.normalize(draw(classes, SMALL.text) - 0.3, dim=1)
    label = torch.stack([torch.arange(rows) % classes, (torch.arange(rows) + 1) % classes], 1)
    features = {m: draw(rows, 2, d) for m, d in SMALL.features.items()}
    return Batch(features, table[label], label, table)


@pytest.mark.parametrize(
    ("audio", "video", "count"), [(512, 512, 9_732_447), (128, 4096, 13_009_247)]
)
def test_parameter_counts_and_names(audio: int, video: int, count: int) -> None:
    """stft.md sections 6 and 7."""
    model = STFT(STFTConfig(), Shapes({"audio": audio, "video": video}, 300))
    assert sum(p.numel() for p in model.parameters()) == count
    expected = {
        "snn_a.lin.0.weight": (512, audio),
        "snn_v.lin.0.weight": (512, video),
        "snn_a.norm.2.weight": (512,),
        "snn_v.glp_logit": (3,),
        "snn_v.tsf": (10,),
        "lkc.slots": (4, 512, 512),
        "lkc.gate_a.weight": (512, 512),
        "lkc.alpha": (),
        "lkc.prior": (512,),
        "tucker.sem.a.weight": (60, 512),
        "tucker.tem.v.weight": (60, 512),
        "tucker.core": (2, 60, 60, 60),
        "tucker.out.v.weight": (512, 60),
    }
    state = model.state_dict()
    assert {key: tuple(state[key].shape) for key in expected} == expected
    for part in ("lkc.layer.", "cross.layer."):
        assert any(key.startswith(part) for key in state)
    assert state["tucker.core"].std().item() == pytest.approx(1 / 60, rel=0.01)


def test_spikes_and_their_derivative() -> None:
    """1 at and above the threshold; backwards 4 s (1 - s) with s = sigmoid(4 x)."""
    x = torch.tensor([-2.0, -1e-9, 0.0, 1e-9, 0.3], dtype=torch.float64, requires_grad=True)
    spikes = fire(x)
    assert spikes.tolist() == [0, 0, 1, 1, 1]
    spikes.sum().backward()
    s = 1 / (1 + torch.exp(-4 * x.detach()))
    torch.testing.assert_close(x.grad, 4 * s * (1 - s))
    stacked = torch.vmap(torch.func.grad(lambda v: fire(v).square().sum()))(x.detach()[:, None])
    torch.testing.assert_close(stacked[:, 0], 2 * spikes.detach() * 4 * s * (1 - s))


def plain_spikes(
    state: Mapping[str, Tensor], config: STFTConfig, x: Tensor
) -> tuple[list[Tensor], list[float]]:
    """Return block 3's spikes and the thresholds of every step, for one input [d_m]."""
    membrane = [torch.zeros(1).double()] * 3
    theta, spikes, thetas = 1.0, [], []
    for _ in range(config.T):
        signal, pooled = x, 0.0
        for k in range(3):
            h = state[f"lin.{k}.weight"] @ signal + state[f"lin.{k}.bias"]
            h = (h - h.mean()) / torch.sqrt(h.var(correction=0) + 1e-5)
            h = h * state[f"norm.{k}.weight"] + state[f"norm.{k}.bias"]
            b = 1 / (1 + math.exp(-float(state["glp_logit"][k])))
            top, mean = float(h.max()), float(h.mean())
            pooled = 0.5 * (top + mean) + b * top + (1 - b) * mean
            if config.glp:
                h = (1 + 1 / (1 + math.exp(-pooled))) * h
            u = membrane[k] + (h - membrane[k]) / config.tau
            signal = (u >= theta).double()
            membrane[k] = u * (1 - signal)
        spikes.append(signal)
        thetas.append(theta)
        if config.dynamic_threshold:
            r = float(signal.mean())
            entropy = 0.0 if r in (0, 1) else -(r * math.log2(r) + (1 - r) * math.log2(1 - r))
            goal = 0.5 / (1 + math.exp(-pooled)) + entropy
            theta = 0.5 * theta + 0.5 * min(max(goal, 0.25), 2.0)
    return spikes, thetas


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("glp", [True, False])
@pytest.mark.parametrize("tsf", [True, False])
def test_spiking_branch(dynamic: bool, glp: bool, tsf: bool) -> None:
    """Spikes, thresholds and the weighted mean, sample by sample; samples do not interact."""
    torch.manual_seed(2)
    values = {"dynamic_threshold": dynamic, "glp": glp, "tsf": tsf, "tau": 1.7, "T": 6}
    config = STFTConfig.model_validate(TINY | values)
    branch = Spiking(7, config).double()
    with torch.no_grad():
        branch.glp_logit.normal_()
        branch.tsf.normal_()
        for layer in branch.norm:
            layer.weight.uniform_(0.8, 1.5)  # type: ignore[operator,union-attr]
            layer.bias.normal_(0.2, 0.3)  # type: ignore[operator,union-attr]
    x = torch.rand(3, 2, 7, dtype=torch.float64)
    spikes, thetas = branch.spikes(x)
    assert spikes.shape == (3, 2, 6, 16) and thetas.shape == (3, 2, 6, 1)
    out = branch(x)
    rates, offsets = [], branch.tsf.tolist()
    for i in range(3):
        for j in range(2):
            plain, theta = plain_spikes(branch.state_dict(), config, x[i, j])
            assert torch.equal(spikes[i, j].detach(), torch.stack(plain))
            assert thetas[i, j, :, 0].tolist() == pytest.approx(theta)
            counts = [float(s.sum()) / 16**0.5 + q for s, q in zip(plain, offsets, strict=True)]
            weights = [math.exp(c) / sum(math.exp(o) for o in counts) for c in counts]
            weights = weights if tsf else [1 / 6] * 6
            expected = sum(w * s for w, s in zip(weights, plain, strict=True))
            torch.testing.assert_close(out[i, j].detach(), expected)
            rates += [float(s.mean()) for s in plain]
    assert 0.05 < sum(rates) / len(rates) < 0.95, "the branch neither sleeps nor shouts"
    assert not thetas.requires_grad
    assert (len(set(thetas.flatten().tolist())) > 1) == dynamic


def test_gradients_pass_through_time() -> None:
    """The first block's weights get gradients from the last step's spikes."""
    torch.manual_seed(2)
    branch = Spiking(7, STFTConfig.model_validate(TINY)).double()
    spikes, _ = branch.spikes(torch.rand(5, 7, dtype=torch.float64))
    spikes[:, -1].sum().backward()
    for layer in branch.lin:
        assert layer.weight.grad is not None and layer.weight.grad.any()  # type: ignore[union-attr]


def test_same_spikes_as_snntorch_where_both_are_defined() -> None:
    """Fixed threshold, reset to zero at once. What differs is said in the system's file."""
    snntorch = pytest.importorskip("snntorch", reason="an independent neuron; not a dependency")
    torch.manual_seed(3)
    currents, tau = 3 * torch.rand(40, 6, 50), 2.5
    leaky = snntorch.Leaky(
        beta=1 - 1 / tau, threshold=1.0, reset_mechanism="zero", reset_delay=False
    )
    theirs, v = leaky.init_leaky(), torch.zeros(6, 50)
    fired = 0.0
    for current in currents:
        spikes, theirs = leaky(current / tau, theirs)
        u = v + (current - v) / tau
        ours = fire(u - 1.0)
        v = u * (1 - ours)
        assert torch.equal(ours, spikes)
        fired += float(ours.mean())
        torch.testing.assert_close(v, theirs)
    assert 0.1 < fired / 40 < 0.9
    # And where they are not the same: exactly at the threshold.
    spikes, _ = leaky(torch.ones(1, 1), torch.zeros(1, 1))
    assert fire(torch.zeros(1, 1)).item() == 1 and spikes.item() == 0
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.vmap(torch.func.grad(lambda x: leaky.spike_grad(x).sum()))(torch.ones(2, 3))


def test_tucker_is_the_sum_over_both_indices() -> None:
    torch.manual_seed(4)
    fusion = Tucker(6, 3).double()
    semantic, spikes = torch.rand(2, 6).double(), torch.rand(2, 6).double()
    for number, m in enumerate("av"):
        ours = fusion(m, semantic, spikes)
        for row in range(2):
            r = fusion.sem[m].weight @ semantic[row]
            s = fusion.tem[m].weight @ spikes[row]
            y = torch.zeros(3).double()
            for i in range(3):
                for j in range(3):
                    y = y + r[i] * s[j] * fusion.core[number, i, j]
            expected = fusion.out[m].weight @ y + fusion.out[m].bias
            torch.testing.assert_close(ours[row], expected)


def test_combiner() -> None:
    """Slots, gates and prior by hand; the transformer layer is shared and tested elsewhere."""
    model, _ = build(slots=3)
    c = model.lkc
    with torch.no_grad():
        c.alpha.fill_(0.4)
        c.prior.normal_()
    phi = torch.rand(5, 2, 16, dtype=torch.float64)
    u = []
    for m in range(2):
        gate = sum(torch.sigmoid(phi[:, m] @ c.slots[i]) for i in range(3))
        u.append(gate * phi[:, m])
    g = [F.relu(layer(x)) for layer, x in zip((c.gate_a, c.gate_v), u, strict=True)]
    share = 1 / (1 + math.exp(-0.4))
    k = share * (g[0] * u[0] + g[1] * u[1]) + (1 - share) * c.prior
    tokens = torch.stack([u[0] + g[0] + k, u[1] + g[1] + k, k], 1)
    torch.testing.assert_close(c(phi, None), c.layer(tokens)[:, :2])


def test_loss_terms_are_those_of_the_specification() -> None:
    model, context = build(w_triplet=0.3)
    twin, _ = build(w_triplet=0.3)
    data = batch()
    terms = model.loss(data, context)
    phi_a, phi_v, theta_a, theta_v = twin._branches(data.features, context)
    theta_w = twin.W_proj(data.text, context)
    theta = (theta_a + theta_v) / 2

    def t(anchor: Tensor, near: Tensor, far: Tensor) -> Tensor:
        d = [F.pairwise_distance(anchor, other) for other in (near, far)]
        return (1 + d[0] - d[1]).clamp(min=0).mean()

    a, v, w = theta_a[:, 0], theta_v[:, 0], theta_w[:, 0]
    text = data.text[:, 0]
    rho = {name: twin.D(x, context) for name, x in (("a", a), ("v", v), ("w", w))}
    expected = {
        "t_ow": 0.3 * 0.5 * t(theta[:, 0], w, theta_w[:, 1]),
        "t_wo": 0.3 * 0.5 * t(w, theta[:, 0], theta[:, 1]),
        "p_a": 0.7 * 0.5 * F.mse_loss(a, w),
        "p_v": 0.7 * 0.5 * F.mse_loss(v, w),
        "rec_phi_a": 0.7 / 5 * F.mse_loss(twin.A_rec(a, context), phi_a[:, 0]),
        "rec_phi_v": 0.7 / 5 * F.mse_loss(twin.V_rec(v, context), phi_v[:, 0]),
        "rec_a": 0.7 / 5 * F.mse_loss(rho["a"], text),
        "rec_v": 0.7 / 5 * F.mse_loss(rho["v"], text),
        "rec_w": 0.7 / 5 * F.mse_loss(rho["w"], text),
    }
    assert terms.keys() == expected.keys()
    for name, value in terms.items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_sequences_enter_as_the_mean_of_their_real_steps() -> None:
    """Averaged by hand or by the system: the same; padding, whatever is in it, counts nowhere."""
    flat, _ = build()
    model, _ = build(SMALL._replace(temporal=True))
    model.load_state_dict(flat.state_dict())
    x: dict[str, Tensor] = {}
    averaged: dict[str, Tensor] = {}
    for modality, d in SMALL.features.items():
        steps = torch.rand(4, 5, d, dtype=torch.float64)
        length = torch.tensor([5, 3, 1, 0])
        x |= {modality: steps, f"{modality}_length": length}
        means = [steps[i, : length[i]].mean(0) for i in range(3)]
        averaged[modality] = torch.stack([*means, torch.zeros(d, dtype=torch.float64)])
    with torch.no_grad():
        ours, expected = model.eval().embed(x), flat.eval().embed(averaged)
    torch.testing.assert_close(ours["both"], expected["both"])


def test_test_head() -> None:
    data = batch()
    anchors = {m: x[:, 0] for m, x in data.features.items()}
    with torch.no_grad():
        video, mean = (build(test_head=h)[0].eval() for h in ("video", "mean"))
        _, _, a, v = video._branches(anchors, None)
        torch.testing.assert_close(video.embed(anchors)["both"], v)
        torch.testing.assert_close(mean.embed(anchors)["both"], (a + v) / 2)


@pytest.mark.parametrize("off", ["glp", "tsf", "dynamic_threshold"])
def test_what_is_switched_off_does_not_learn(off: str) -> None:
    model, context = build(**{off: False})
    torch.stack(list(model.loss(batch(), context).values())).sum().backward()
    learning = {name for name, _ in trainable(model)}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in learning), name
    names = {"glp": "glp_logit", "tsf": "tsf"}
    frozen = {f"snn_{m}.{names[off]}" for m in "av"} if off in names else set()
    assert model.frozen() == frozen


def test_trains_in_a_stack() -> None:
    """Gradients of two stacked configurations equal those each gets alone."""
    models = [build()[0] for _ in range(2)]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(1.01)
    data, context = batch(), build()[1]

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = build()[0]

        def forward(self) -> Tensor:
            return torch.stack(list(self.model.loss(data, context).values())).sum()

    skeleton = Loss()

    def loss(p: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        named = {f"model.{key}": value for key, value in (p | b).items()}
        return torch.func.functional_call(skeleton, named, ())

    params, buffers = torch.func.stack_module_state(models)  # type: ignore[arg-type]
    values = torch.vmap(loss)(params, buffers)
    found = torch.autograd.grad(values.sum(), list(params.values()))
    stacked = dict(zip(params, found, strict=True))
    for i, model in enumerate(models):
        torch.stack(list(model.loss(data, context).values())).sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(stacked[name][i], parameter.grad, msg=name)
