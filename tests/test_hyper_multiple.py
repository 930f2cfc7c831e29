"""Hyper-alignment, -single and -multiple: formulas in numpy, maps, counts, released keys."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from avzero.data.benchmark import Benchmark
from avzero.data.store import FeatureStore
from avzero.errors import UserError
from avzero.models._contract import Batch, Shapes, trainable
from avzero.models.avca import AVCA, AVCAConfig
from avzero.models.hyper_multiple import HyperConfig, HyperMultiple, log0, project, similarities
from tests import toys
from tests.conftest import make_task
from tests.test_world import many

MAIN = Shapes({"audio": 512, "video": 512}, 300)
CLS = Shapes({"audio": 128, "video": 4096}, 300)
TINY = Shapes({"audio": 5, "video": 4}, 6)
FRAMEWORKS = ("alignment", "single", "multiple", "baseline")
KINDS = ("norm_product", "cosine", "geodesic")
LAST_OF_ENCODERS = [f"{m}_enc.fc.5.{k}" for m in "AV" for k in ("weight", "bias")]


def build(shapes: Shapes = TINY, **values: object) -> HyperMultiple:
    return HyperMultiple(HyperConfig.model_validate(values), shapes).train()


@pytest.mark.parametrize(
    ("shapes", "counts"),
    [
        (MAIN, (1_693_108, 1_693_709, 1_694_310, 1_693_108)),
        (CLS, (3_331_508, 3_332_109, 3_332_710, 3_331_508)),
    ],
)
def test_parameter_counts(shapes: Shapes, counts: tuple[int, ...]) -> None:
    ours = [toys.parameters(build(shapes, framework=f, num_curvature=2)) for f in FRAMEWORKS]
    assert tuple(ours) == counts


def h(x: toys.Array, c: float) -> toys.Array:
    """One point to the ball and back, in numpy."""
    norm = max(float(np.linalg.norm(x)), 1e-5)
    if norm > 0.999 / np.sqrt(c):
        x = x / norm * 0.999 / np.sqrt(c)
    norm = max(float(np.linalg.norm(x)), 1e-5)
    out: toys.Array = np.arctanh(np.sqrt(c) * norm) / (np.sqrt(c) * norm) * x
    return out


def geodesic(x: toys.Array, y: toys.Array, c: float, d: float) -> float:
    """Minus the distance on the unit ball of two rescaled points, by the arcosh formula."""
    p, q = x * np.sqrt(c), y * np.sqrt(d)
    p = p * min(1, 0.999 / np.linalg.norm(p))
    q = q * min(1, 0.999 / np.linalg.norm(q))
    ratio = ((p - q) ** 2).sum() / (1 - p @ p) / (1 - q @ q)
    return float(-np.arccosh(1 + 2 * ratio) / (c * d) ** 0.25)


def sim(rows: toys.Array, curvature: toys.Array, kind: str) -> toys.Array:
    """Sim [B, B] entry by entry."""
    n = len(rows)
    out = np.zeros((n, n))
    mapped = [h(x, c) for x, c in zip(rows, curvature, strict=True)]
    for i in range(n):
        for j in range(n):
            lengths = np.linalg.norm(mapped[i]) * np.linalg.norm(mapped[j])
            if kind == "norm_product":
                out[i, j] = lengths
            elif kind == "cosine":
                out[i, j] = mapped[i] @ mapped[j] / lengths
            else:
                out[i, j] = geodesic(rows[i], rows[j], curvature[i], curvature[j])
    return out


def align(s: toys.State, phi_a: toys.Array, phi_v: toys.Array, framework: str, kind: str) -> float:
    """A(.., ..) of one member, averaged over curvatures; scale 0.4."""
    if framework == "alignment":
        curvatures = np.full((len(phi_a), 1), 0.4)
    else:
        logits = np.concatenate([phi_v, phi_a], 1) @ s["fusenet1.weight"].T + s["fusenet1.bias"]
        curvatures = 0.4 / (1 + np.exp(-logits))
    return float(
        np.mean([toys.mse(sim(phi_v, c, kind), sim(phi_a, c, kind)) for c in curvatures.T])
    )


def forward(s: toys.State, data: Batch, member: int) -> dict[str, toys.Array]:
    """phi, theta and rho of one member."""
    a, v = (data.features[m][:, member].numpy() for m in ("audio", "video"))
    phi_a, phi_v = toys.mlp(s, "A_enc", a), toys.mlp(s, "V_enc", v)
    phi = np.stack([phi_a, phi_v], 1)
    fused = phi + toys.transformer(s, "cross_attention", phi + s["pos_emb1D"], 1, 3)
    out = {"phi_a": phi_a, "phi_v": phi_v}
    out["a"] = toys.mlp(s, "A_proj", fused[:, 0])
    out["v"] = toys.mlp(s, "V_proj", fused[:, 1])
    out["w"] = toys.mlp(s, "W_proj", data.text[:, member].numpy())
    return out | {f"rho_{k}": toys.mlp(s, "D", out[k]) for k in "avw"}


@pytest.mark.parametrize(
    ("framework", "kind"),
    [
        ("alignment", "norm_product"),
        ("single", "norm_product"),
        *(("multiple", kind) for kind in KINDS),
        ("baseline", "norm_product"),
    ],
)
def test_loss_terms(framework: str, kind: str) -> None:
    model = build(
        framework=framework,
        similarity=kind,
        num_curvature=3,
        curvature=0.4,
        align_weight=0.01,
        f1=0.5,
        f2=2.0,
    )
    context, s = toys.ready(model)
    # Encoder outputs small enough that some points lie inside the ball and some beyond it.
    for name in LAST_OF_ENCODERS:
        s[name] *= 0.12
        model.get_parameter(name).data.mul_(0.12)
    data = toys.batch(5, 4, 6)
    x, n = forward(s, data, 0), forward(s, data, 1)
    text = data.text[:, 0].numpy()
    t = toys.triplet
    expected = {
        "rec": sum(toys.mse(text, x[f"rho_{k}"]) for k in "vaw"),
        "ct": sum(t(x["rho_w"], x[f"rho_{k}"], n[f"rho_{k}"]) for k in "va"),
        "w": sum(t(x["w"], x[k], n[k]) + t(x[k], x["w"], n["w"]) for k in "av"),
        "t": sum(0.5 * t(x[k], x["w"], n[k]) + 2 * t(x["w"], x[k], n["w"]) for k in "av"),
        "r": toys.mse(toys.mlp(s, "V_rec", x["v"]), x["phi_v"])
        + toys.mse(toys.mlp(s, "A_rec", x["a"]), x["phi_a"])
        + toys.mse(x["v"], x["w"])
        + toys.mse(x["a"], x["w"]),
    }
    if framework != "baseline":
        both_members = [align(s, m["phi_a"], m["phi_v"], framework, kind) for m in (x, n)]
        assert min(both_members) > 1e-4, "the toy must have something to align"
        expected["align"] = 0.01 * sum(both_members)
        norms = np.linalg.norm(np.concatenate([x["phi_a"], x["phi_v"]]), axis=1)
        assert norms.min() < 0.999 / 0.4**0.5 < norms.max() or framework != "alignment"
    terms = model.loss(data, context)
    assert {k: v.item() for k, v in terms.items()} == pytest.approx(expected, rel=1e-8)


def test_maps_by_hand() -> None:
    """c = 0.25: the ball has radius 2, points beyond 1.998 are pulled back."""
    c = torch.tensor([[0.25]], dtype=torch.float64)
    x = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    y = project(x, c)
    torch.testing.assert_close(y[0], x[0])
    torch.testing.assert_close(y[1], torch.tensor([0.6, 0.8], dtype=torch.float64) * 1.998)
    out = log0(y, c)
    assert out[0].tolist() == pytest.approx([np.arctanh(0.5) / 0.5, 0])
    assert out[1].norm().item() == pytest.approx(np.arctanh(0.999) / 0.5)
    assert out[2].tolist() == [0, 0]


def test_maps_equal_geoopt() -> None:
    """The dependency is left out: its project with our edge, and its logmap0, are the same."""
    math = pytest.importorskip("geoopt").manifolds.stereographic.math
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(40, 300, generator=generator, dtype=torch.float64)
    x = x / x.norm(dim=1, keepdim=True) * torch.linspace(0.01, 4, 40, dtype=torch.float64)[:, None]
    for c in (0.04, 0.3, 0.6):
        curvature = torch.tensor(c, dtype=torch.float64)
        theirs = math.project(x, k=-curvature, eps=1e-3)
        torch.testing.assert_close(project(x, curvature), theirs, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(
            log0(theirs, curvature), math.logmap0(theirs, k=-curvature), rtol=1e-6, atol=1e-9
        )
        inside = x[: int(10 / 4 / c**0.5 * 0.9)]
        plain = math.logmap0(math.project(inside, k=-curvature), k=-curvature)
        torch.testing.assert_close(
            log0(project(inside, curvature), curvature), plain, rtol=1e-6, atol=1e-9
        )
        sims = similarities(theirs, curvature.expand(40, 1), "geodesic")
        distance = math.dist(theirs[:, None], theirs[None], k=-curvature)
        torch.testing.assert_close(-sims, distance, rtol=1e-6, atol=1e-6)


def small_state() -> dict[str, torch.Tensor]:
    """Weights shared by all frameworks; encoder outputs lie inside and beyond the ball."""
    model = build(framework="alignment")
    toys.ready(model)
    state = model.state_dict()
    for name in LAST_OF_ENCODERS:
        state[name] = state[name] * 0.12
    return state


def test_cosine_ignores_the_curvature_and_the_others_do_not() -> None:
    """hyper_multiple.md section 3: today's release is a Euclidean alignment, however it is set."""
    data = toys.batch(5, 4, 6)
    for kind in KINDS:
        values = []
        for framework, c in (("alignment", 0.05), ("alignment", 0.5), ("multiple", 0.5)):
            model = build(framework=framework, similarity=kind, curvature=c)
            context, _ = toys.ready(model)
            model.load_state_dict(small_state(), strict=False)
            loss = model.loss(data, context)["align"]
            values.append(loss.item())
            if framework == "multiple":
                loss.backward()  # type: ignore[no-untyped-call]
                gradient = model.get_parameter("fusenet1.weight").grad
                assert gradient is not None
                assert bool(gradient.norm() < 1e-12) is (kind == "cosine"), kind
        if kind == "cosine":
            assert values == pytest.approx([values[0]] * 3, rel=1e-9)
        else:
            assert abs(values[0] - values[1]) > 1e-3 * values[0], kind


def test_geodesic_gradients_are_finite_with_repeated_and_zero_rows() -> None:
    rows = torch.tensor(
        [[0.0, 0.0], [0.3, 0.4], [0.3, 0.4], [30.0, 4.0], [0.0, 0.0]], requires_grad=True
    )
    for kind in KINDS:
        out = similarities(rows, torch.full((5, 1), 0.3), kind)
        out.square().sum().backward()  # type: ignore[no-untyped-call]
        assert rows.grad is not None and torch.isfinite(rows.grad).all(), kind
        rows.grad = None


def test_without_alignment_it_is_avca() -> None:
    """The baseline's terms are AVCA's, grouped."""
    ours = build(framework="baseline", r_enc=0, r_proj=0, r_dec=0)
    context, _ = toys.ready(ours)
    theirs = AVCA(AVCAConfig(r_enc=0, r_proj=0, r_add=0), TINY).double().train()
    theirs.load_state_dict(ours.state_dict())
    data = toys.batch(5, 4, 6)
    value = toys.total(theirs.loss(data, context)).item()
    assert toys.total(ours.loss(data, context)).item() == pytest.approx(value, rel=1e-12)


def test_dead_passes_move_statistics_only() -> None:
    data = toys.batch(5, 4, 6)
    terms, states = [], []
    for dead in (False, True):
        model = build(dead_passes=dead)
        context, _ = toys.ready(model)
        terms.append({k: v.item() for k, v in model.loss(data, context).items()})
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        with torch.no_grad():
            model.settle(data, context)
        moved = {
            k.split(".")[0] for k, v in model.state_dict().items() if not v.equal(states[-1][k])
        }
        after = {"A_enc", "V_enc", "A_proj", "V_proj", "W_proj"} if dead else set()
        assert moved == after
    assert terms[0] == pytest.approx(terms[1], rel=1e-12)
    differs = {k for k in states[0] if not torch.allclose(states[0][k], states[1][k])}
    assert differs == {
        f"{m}.{k}"
        for m in ("A_proj.fc.1", "A_proj.fc.5", "V_proj.fc.1", "V_proj.fc.5", "D.fc.1")
        for k in ("running_mean", "running_var")
    }


def test_positions_are_trained_on_request_only() -> None:
    for on in (False, True):
        names = {name for name, _ in trainable(build(train_pos_emb=on))}
        assert ("pos_emb1D" in names) is on
    assert not HyperConfig().train_pos_emb and HyperMultiple.compat["dead_passes"] is True


def test_outputs_are_non_negative_and_only_video_is_compared() -> None:
    model = build().eval()
    z = model.embed({"audio": torch.rand(3, 5), "video": torch.rand(3, 4)})
    classes = model.embed_classes(torch.rand(4, 6))
    assert all((value >= 0).all() for value in (*z.values(), classes))
    distances = model.distances(z, classes, False)
    assert set(distances) == {"both"}
    torch.testing.assert_close(distances["both"], torch.cdist(z["video"], classes))


@pytest.mark.parametrize(
    "values",
    [
        *({"framework": framework} for framework in FRAMEWORKS),
        {"similarity": "geodesic"},
        {"similarity": "cosine", "dead_passes": True},
    ],
)
def test_stacks(values: dict[str, object]) -> None:
    toys.assert_stacks(lambda: build(TINY, **values), toys.batch(5, 4, 6))


def released(audio: int, video: int, count: int) -> dict[str, torch.Tensor]:
    """A checkpoint under the released names."""
    keys: dict[str, toys.Shape] = {
        **dict(toys.block_keys("A_enc", audio, 512, 300)),
        **dict(toys.block_keys("V_enc", video, 512, 300)),
        **dict(toys.layer_keys("cross_attention", 0, 300, 300, 64)),
        **dict(toys.block_keys("W_proj", 300, 64)),
        **dict(toys.block_keys("D", 64, 300)),
        **dict(toys.block_keys("A_proj", 300, 512, 64)),
        **dict(toys.block_keys("V_proj", 300, 512, 64)),
        **dict(toys.block_keys("A_rec", 64, 300)),
        **dict(toys.block_keys("V_rec", 64, 300)),
        "pos_emb1D": (2, 300),
    }
    if count:
        keys |= {"fusenet1.weight": (count, 600), "fusenet1.bias": (count,)}
    return toys.checkpoint(keys)


def test_released_keys() -> None:
    toys.assert_taken(build(MAIN, num_curvature=2), released(512, 512, 2), ())
    toys.assert_taken(build(MAIN, framework="single"), released(512, 512, 1), ())
    toys.assert_taken(build(CLS, framework="alignment"), released(128, 4096, 0), ())
    with pytest.raises(UserError, match=r"Hyper-multiple.*extra: fusenet1\.bias, fusenet1\.weight"):
        build(MAIN, framework="alignment").load_reference(released(512, 512, 2))
    state = released(512, 512, 3)
    del state["module.pos_emb1D"]
    message = r"missing: pos_emb1D; fusenet1\.bias is \[3\], expected \[2\]"
    with pytest.raises(UserError, match=message):
        build(MAIN, num_curvature=2).load_reference(state)


def test_alignment_on_two_workers(
    benchmark: Benchmark, store: FeatureStore, tmp_path: Path
) -> None:
    """B x B matrices span the global batch, so two workers see those one sees."""
    tasks = [
        make_task(
            benchmark,
            "hyper_multiple",
            seed=6301,
            config={"similarity": kind, "align_weight": 1.0},
            train={"epochs": 2, "batches_per_epoch": 2, "batch_size": 24, "precision": "float64"},
        )
        for kind in ("norm_product", "geodesic")
    ]
    for (one, _), (two, _), _ in many(tasks, store, tmp_path):
        for (losses, _, _), (losses_2, _, _) in zip(one, two, strict=True):
            assert losses_2 == pytest.approx(losses, rel=1e-5, abs=1e-9)
