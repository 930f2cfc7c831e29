"""Options and weights of the systems that no reference covers: what each changes, and nothing else.

A weight is doubled alone, with the same parameters, batch and random keys: the terms it belongs to
double, all others stay to the last bit. Options with values of their own are worked out by hand.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from avzero.models._contract import Batch, Model, Shapes
from avzero.models._layers import number_sites
from avzero.models._registry import make_config, model_class
from avzero.models._two_branch import TERMS
from avzero.spec import Preset
from tests import toys
from tests.test_contract import SETS, anchors, batch, context, make, terms

WEIGHTS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("apn", "w_regression", "/mse_final /mse_prototype", {}),
    ("avca", "k1", "/add1_a /add1_v", {}),
    ("avca", "k2", "/add2_a /add2_v", {}),
    ("avca", "w_rec", "/rec_v /rec_a /rec_w", {}),
    ("avca", "w_reg", "/reg_phi_v /reg_phi_a /reg_theta_v /reg_theta_a", {}),
    ("avfs", "gp_weight", "critic/gp", {"use_vae": True}),
    ("avfs", "l1_contrastive", "generator/con_gen", {"use_vae": True}),
    ("avfs", "l2_discriminative", "generator/dis_gen", {"use_vae": True}),
    ("avgzslnet", "w_kl", "/kl", {}),
    ("cjme", "w_align", "/align", {}),
    ("cjme", "w_gate", "/gate", {}),
    ("clipclap", "w_ce", "/ce", {}),
    ("clipclap", "w_rec", "/rec_o /rec_w", {}),
    ("clipclap", "w_reg", "/reg", {}),
    ("fvaegan_d2", "gan_weight", "generator/gan_rec generator/gan", {}),
    ("fvaegan_d2", "vae_weight", "generator/bce generator/kl", {}),
    ("fvaegan_d2", "lambda_gp", "critic/gp_D critic/gp_D2", {}),
    ("fvaegan_d2", "ud_weight", "critic/D2 critic/gp_D2", {}),
    ("hyper_multiple", "align_weight", "/align", {}),
    ("hyper_multiple", "align_weight", "/align", {"similarity": "geodesic"}),
    ("hyper_multiple", "align_weight", "/align", {"framework": "alignment"}),
    ("kda", "align_weight", "/align", {}),
    ("mft", "lambda_kl", "/kl", {}),
    ("mft", "lambda_kl", "/kl", {"kl_on": "class"}),
    ("mft", "lambda_cos", "/cos", {}),
    ("mft", "lambda_cos", "/cos", {"cosine_on": "pairs"}),
]
"""(system, weight, the terms proportional to it, other settings)."""


def measured(system: str, **values: Any) -> dict[str, Tensor]:
    """Return the terms of all passes of a fresh model, always with the same randomness."""
    model = make(system, **values)
    return {name: term.detach() for name, term in terms(model, batch(), context(model)).items()}


def tiny(system: str, shapes: Shapes, **values: Any) -> Any:
    """Return a system in float64 and train mode, its random layers numbered."""
    cls = model_class(system)
    model = cls(make_config(system, values, Preset.PAPER, "test"), shapes)
    number_sites(model)
    return model.double().train()


def close(ours: Tensor, theirs: Any) -> None:
    """Compare with numbers worked out by hand, in float64."""
    torch.testing.assert_close(ours.detach(), torch.tensor(theirs, dtype=torch.float64))


@pytest.mark.parametrize(("system", "weight", "named", "values"), WEIGHTS)
def test_a_weight_doubles_its_own_terms(
    system: str, weight: str, named: str, values: dict[str, Any]
) -> None:
    once = measured(system, **values | {weight: 0.3})
    twice = measured(system, **values | {weight: 0.6})
    assert once.keys() == twice.keys()
    own = set(named.split())
    assert own <= once.keys()
    for name, term in once.items():
        assert term != 0, f"{name} is zero, which doubling cannot show"
        assert torch.equal(twice[name], term * (2 if name in own else 1)), name


def test_every_weight_is_in_the_table() -> None:
    """A system here that gets another weight fails; those not in the table have tests below."""
    elsewhere = {("hyper_multiple", "f1"), ("hyper_multiple", "f2"), ("stft", "w_triplet")}
    kinds = ("w_", "lambda_", "l1_", "l2_", "k1", "k2", "f1", "f2")
    found = {
        (system, field)
        for system in {"stft", "tcaf", "devise", "ale", "sje"} | {row[0] for row in WEIGHTS}
        for field in model_class(system).Config.model_fields
        if field.startswith(kinds) or field.endswith("_weight")
    }
    assert found == elsewhere | {(system, weight) for system, weight, _, _ in WEIGHTS}


@pytest.mark.parametrize(("f1", "f2"), [(1.0, 1.0), (2.0, 1.0), (1.0, 2.0), (0.3, 0.7), (0.0, 0.0)])
def test_hyper_weighs_both_kinds_of_triplets_within_one_term(f1: float, f2: float) -> None:
    plain: Any = make("hyper_multiple")
    values, _ = plain.terms(batch(), context(plain))
    raw = dict(zip(TERMS, values.unbind(), strict=True))
    add1, add2 = (raw[f"{name}_a"] + raw[f"{name}_v"] for name in ("add1", "add2"))
    assert add1 > 0 and add2 > 0 and abs(add1 - add2) > 1e-3
    base, found = measured("hyper_multiple"), measured("hyper_multiple", f1=f1, f2=f2)
    torch.testing.assert_close(found.pop("/t"), (f1 * add1 + f2 * add2).detach())
    base.pop("/t")
    assert found.keys() == base.keys()
    assert all(torch.equal(found[name], base[name]) for name in base)


def test_stft_shares_one_weight_between_triplets_and_the_rest() -> None:
    """w times what triplets are at 1, 1 - w times what the other terms are at 0."""
    full, none = measured("stft", w_triplet=1.0), measured("stft", w_triplet=0.0)
    triplets = {"/t_ow", "/t_wo"}
    assert triplets < full.keys() and full.keys() == none.keys()
    for name in full:
        at, absent = (full, none) if name in triplets else (none, full)
        assert at[name] > 0 and absent[name] == 0
    for w in (0.25, 0.5, 0.8):
        for name, term in measured("stft", w_triplet=w).items():
            expected = w * full[name] if name in triplets else (1 - w) * none[name]
            torch.testing.assert_close(term, expected)


PAIR = Shapes({"audio": 1, "video": 1}, 2)
"""Features (video, audio) are points of the plane, and so are class vectors."""


def plane(points: list[list[float]], label: list[int], classes: list[list[float]]) -> Batch:
    """Return anchors at ``points`` (video, audio); the negatives lie far off and must not count."""
    x = torch.tensor(points, dtype=torch.float64)
    away = torch.full_like(x, 1e6)
    table = torch.tensor(classes, dtype=torch.float64)
    both = torch.stack([x, away], 1)
    labels = torch.tensor([label, [(y + 1) % len(classes) for y in label]]).T
    features = {"video": both[..., :1], "audio": both[..., 1:]}
    return Batch(features, table[labels], labels, table)


def apn_by_hand(**values: Any) -> Any:
    """The final prediction is (video, audio), the prototype's (audio, video)."""
    model = tiny("apn", PAIR, **values)
    with torch.no_grad():
        model.ALE_vector.copy_(torch.eye(2))
        model.prototype_vectors["layer4"].copy_(torch.eye(2).flip(0))
    return model


APN_ROWS = plane([[2, 1], [0, 4]], [0, 1], [[1, 0], [0, 1]])


@pytest.mark.parametrize(("temperature", "w"), [(1.0, 1.0), (2.0, 3.0), (0.5, 0.0)])
def test_apn_terms_by_hand(temperature: float, w: float) -> None:
    """Predictions (2, 1) and (0, 4), swapped by the prototypes; class vectors (1, 0) and (0, 1)."""
    model = apn_by_hand(temperature=temperature, w_regression=w)
    found = model.loss(APN_ROWS, toys.ready(tiny("apn", PAIR))[0])

    def ce(*leads: float) -> float:
        """Cross-entropy where the true class leads by so much."""
        return sum(math.log1p(math.exp(-lead / temperature)) for lead in leads) / len(leads)

    close(found["ce_final"], ce(1, 4))
    close(found["ce_prototype"], ce(-1, -4))
    # ((1, 1) and (0, 3)), ((0, 2) and (4, -1)) away from the class vectors.
    close(found["mse_final"], w * (1 + 1 + 0 + 9) / 4)
    close(found["mse_prototype"], w * (0 + 4 + 16 + 1) / 4)


def test_apn_cross_entropy_of_probabilities_by_hand() -> None:
    """``ce_input: softmax`` takes a softmax of what is one already; regression is the same."""
    keys = toys.ready(tiny("apn", PAIR))[0]
    found = apn_by_hand(ce_input="softmax", temperature=2.0).loss(APN_ROWS, keys)
    for name, sign in (("final", 1), ("prototype", -1)):
        expected = [math.log1p(math.exp(-sign * math.tanh(lead / 4))) for lead in (1, 4)]
        close(found[f"ce_{name}"], sum(expected) / 2)
    logits = apn_by_hand(temperature=2.0).loss(APN_ROWS, keys)
    assert all(torch.equal(found[k], logits[k]) for k in ("mse_final", "mse_prototype"))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, [[2, 1], [0, 4]]),
        ({"use_prototype_at_test": "average"}, [[1.5, 1.5], [2, 2]]),
        (
            {"use_prototype_at_test": "average", "norm_inputs": True},
            [[1.5 / 5**0.5, 1.5 / 5**0.5], [0.5, 0.5]],
        ),
    ],
)
def test_apn_embedding_at_test(values: dict[str, Any], expected: list[list[float]]) -> None:
    model = apn_by_hand(**values).eval()
    z = model.embed(anchors(APN_ROWS))
    assert z.keys() == {"both"}
    close(z["both"], expected)
    assert torch.equal(model.embed_classes(APN_ROWS.class_text), APN_ROWS.class_text)


CLASSES: list[list[float]] = [[1, 0], [0, 1], [0.6, 0.8], [-1, 0]]


def bilinear(system: str, **values: Any) -> Any:
    """A one-matrix system whose matrix is the identity."""
    model = tiny(system, PAIR, **values)
    with torch.no_grad():
        model.bilinear.weight.copy_(torch.eye(2))
    return model


@pytest.mark.parametrize(("topk", "rows"), [(1, (1.1, 1.1)), (2, (1.8, 2.0)), (3, (1.8, 2.1))])
def test_sje_sums_the_largest_violations(topk: int, rows: tuple[float, float]) -> None:
    """Violations 1.1, 0.7 and 0 of sample (1, 0); 1.1, 0.9 and 0.1 of sample (0, 1)."""
    data = plane([[1, 0], [0, 1]], [1, 0], CLASSES)
    model = bilinear("sje", topk=topk, dropout=0, margin=0.1)
    close(model.loss(data, toys.ready(tiny("sje", PAIR))[0])["hinge"], sum(rows) / 2)
    wide = bilinear("sje", topk=50, dropout=0, margin=0.1)  # more than there are classes: all
    close(wide.loss(data, toys.ready(tiny("sje", PAIR))[0])["hinge"], (1.8 + 2.1) / 2)


@pytest.mark.parametrize("system", ["devise", "ale", "sje", "apn"])
def test_the_test_rule(system: str) -> None:
    """Samples (1, 0) and (0, 2) against four classes, by product and by Euclidean distance."""
    data = plane([[1, 0], [0, 2]], [0, 1], CLASSES)
    make_one = apn_by_hand if system == "apn" else lambda **v: bilinear(system, **v)
    dot, euclidean = make_one(test_rule="dot").eval(), make_one(test_rule="euclidean").eval()
    z, table = dot.embed(anchors(data)), dot.embed_classes(data.class_text)
    close(dot.distances(z, table, False)["both"], [[-1, 0, -0.6, 1], [0, -2, -1.6, 0]])
    assert torch.equal(
        dot.distances(z, table, True)["both"], dot.distances(z, table, False)["both"]
    ), "a product has no square"
    squares = [[0, 2, 0.8, 4], [5, 1, 1.8, 5]]
    close(euclidean.distances(z, table, True)["both"], squares)
    close(euclidean.distances(z, table, False)["both"], np.sqrt(squares).tolist())
    assert make_one().test_rule == "euclidean"


@pytest.mark.parametrize("system", ["devise", "ale", "sje"])
def test_text_dropout(system: str) -> None:
    """``none`` leaves the class vectors alone; ``same`` drops them at the samples' rate."""
    shapes = Shapes({"audio": 3, "video": 4}, 40)
    data = toys.batch(3, 4, 40)
    tables, samples = {}, {}
    for kind in ("none", "same"):
        model = tiny(system, shapes, dropout=0.75, text_dropout=kind)
        taken: dict[str, Tensor] = {}
        model.text_dropout.register_forward_hook(lambda _, __, y, to=taken: to.update(text=y))
        model.dropout.register_forward_hook(lambda _, __, y, to=taken: to.update(x=y))
        model.loss(data, context(model))
        tables[kind], samples[kind] = taken["text"], taken["x"]
    assert torch.equal(tables["none"], data.class_text)
    kept = tables["same"] != 0
    torch.testing.assert_close(tables["same"][kept], 4 * data.class_text[kept])
    assert 0.1 < kept.double().mean() < 0.4
    assert torch.equal(samples["none"], samples["same"]) and (samples["none"] == 0).any()


@pytest.mark.parametrize(
    ("eps", "target"),
    [(0.0, [1.0, 0.0, 0.5]), (0.32, [1.0, 0.0, 0.5]), (0.33, [0.5, 0.5, 0.5])],
)
def test_cjme_calls_for_a_lead_in_entropy(eps: float, target: list[float]) -> None:
    """Embeddings (0, 0) and (2, 0) have entropies 0.6931 and 0.3653 over two classes."""
    model = tiny("cjme", Shapes({"audio": 3, "video": 4}, 6), entropy_eps=eps)
    flat, sharp = [0.0, 0.0], [2.0, 0.0]
    a = torch.tensor([flat, sharp, sharp], dtype=torch.float64)
    v = torch.tensor([sharp, flat, sharp], dtype=torch.float64)
    close(model.gate_target(a, v, torch.eye(2, dtype=torch.float64)), target)


def test_cjme_gate_learns_the_target_in_the_loss() -> None:
    """A gate that says 0.5 is right where nothing leads by enough, and 0.5 off where all do."""
    for eps, expected in ((100.0, 0.0), (0.0, 0.25)):
        model: Any = make("cjme", entropy_eps=eps, w_gate=3.0)
        with torch.no_grad():
            model.attention_model["1"].weight.zero_()
            model.attention_model["1"].bias.zero_()
        assert terms(model, batch(), context(model))["/gate"].item() == pytest.approx(3 * expected)


def projection(s: toys.State, name: str, x: toys.Array) -> toys.Array:
    """Linear, BatchNorm where there is one, ReLU, Linear, in numpy."""
    at = f"{name}.fc"
    x = x @ s[f"{at}.0.weight"].T + s[f"{at}.0.bias"]
    last = "3"
    if f"{at}.1.weight" in s:
        x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
        x, last = x * s[f"{at}.1.weight"] + s[f"{at}.1.bias"], "4"
    out: toys.Array = np.maximum(x, 0) @ s[f"{at}.{last}.weight"].T + s[f"{at}.{last}.bias"]
    return out


def avgzslnet_terms(s: toys.State, data: Batch, unit: bool, squared: bool) -> dict[str, float]:
    """Section 3 of the specification, each network called on each block of rows by itself."""
    inputs = {"1": data.features["audio"], "2": data.features["video"], "3": data.text}
    a, v, t = (
        [projection(s, f"triplet_net.embedding_net{n}", x[:, g].numpy()) for g in (0, 1)]
        for n, x in inputs.items()
    )

    def decode(x: toys.Array) -> toys.Array:
        out = projection(s, "decoder_net.embedding_net", x)
        return toys.norm_rows(out) if unit else out

    words, power = data.text[:, 0].numpy(), 2 if squared else 1
    x_a, x_v, x_t, x_a_, x_v_ = (decode(x) for x in (a[0], v[0], t[0], a[1], v[1]))
    gaps = [np.linalg.norm(x - words, axis=1) ** power for x in (x_a, x_v, x_t)]
    p, q = toys.softmax(a[0]), toys.softmax(v[0])
    return {
        "rec": float(sum(gap.mean() for gap in gaps)),
        "cta": toys.triplet(x_t, x_a, x_a_),
        "ctv": toys.triplet(x_t, x_v, x_v_),
        "ta": toys.triplet(t[0], a[0], a[1]),
        "at": toys.triplet(a[0], t[0], t[1]),
        "tv": toys.triplet(t[0], v[0], v[1]),
        "vt": toys.triplet(v[0], t[0], t[1]),
        "kl": float(((p - q) * np.log(p / q)).sum(1).mean() / 2),
    }


@pytest.mark.parametrize("use_bn", [True, False])
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("distance_fn", ["l2", "squared_l2"])
def test_avgzslnet_options_by_hand(use_bn: bool, unit: bool, distance_fn: str) -> None:
    model = tiny(
        "avgzslnet",
        Shapes({"audio": 5, "video": 4}, 6),
        use_bn=use_bn,
        normalize_decoder_outputs=unit,
        distance_fn=distance_fn,
        w_kl=0.7,
        hidden=8,
        decoder_hidden=7,
        out_dim=3,
    )
    keys, state = toys.ready(model)
    assert any(key.endswith("running_mean") for key in state) == use_bn
    data = toys.batch(5, 4, 6)
    expected = avgzslnet_terms(state, data, unit, distance_fn == "squared_l2")
    expected["kl"] *= 0.7
    found = {name: term.item() for name, term in model.loss(data, keys).items()}
    assert found == pytest.approx(expected, rel=1e-9)
    assert all(value > 0 for value in found.values())


def test_avgzslnet_has_no_divergence_by_default() -> None:
    base, weighed = measured("avgzslnet"), measured("avgzslnet", w_kl=0.5)
    assert weighed.keys() - base.keys() == {"/kl"}
    assert all(torch.equal(weighed[name], term) for name, term in base.items())


@pytest.mark.parametrize("kind", ["averaged", "temporal"])
@pytest.mark.parametrize("divisor", [1.0, 10.0, 255.0])
def test_tcaf_divides_audio_only(kind: str, divisor: float) -> None:
    """What reaches the encoders: audio over the divisor, and video as it always is."""
    data = batch(shapes=SETS[kind])
    seen = {}
    for value in (divisor, 255.0):
        model: Any = make("tcaf", shapes=SETS[kind], audio_divisor=value)
        taken: dict[str, Tensor] = {}
        for name in ("A_enc", "V_enc"):
            getattr(model, name).register_forward_pre_hook(
                lambda _, args, name=name, to=taken: to.update({name: args[0]})
            )
        model.loss(data, context(model))
        seen[value] = taken
    audio = data.features["audio"][:, 0].flatten(0, -2)
    torch.testing.assert_close(seen[divisor]["A_enc"], audio / divisor)
    assert torch.equal(seen[divisor]["V_enc"], seen[255.0]["V_enc"])


def test_tcaf_divisor_by_hand_at_test() -> None:
    """Audio (20, 5) over 10 is audio (510, 127.5) over 255; over 5 it is something else."""
    shapes = Shapes({"audio": 2, "video": 2}, 6)
    models: list[Model] = []
    for divisor in (10.0, 255.0, 5.0):
        torch.manual_seed(0)
        values = {"layers": 1, "heads": 1, "H": 8, "K": 8, "audio_divisor": divisor}
        models.append(tiny("tcaf", shapes, **values).eval())
    video = torch.tensor([[3.0, 4.0]], dtype=torch.float64)

    def theta(model: Model, *audio: float) -> Tensor:
        row = torch.tensor([audio], dtype=torch.float64)
        return model.embed({"audio": row, "video": video})["both"]

    ten, full, five = models
    torch.testing.assert_close(theta(ten, 20, 5), theta(full, 510, 127.5))
    assert not torch.allclose(theta(five, 20, 5), theta(ten, 20, 5))
    torch.testing.assert_close(theta(five, 10, 2.5), theta(ten, 20, 5))
