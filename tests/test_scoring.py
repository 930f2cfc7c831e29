"""Scoring: the one-pass rule against its definition, the invariants, the reference's numbers."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avzero.protocol.calibration import calibrate
from avzero.protocol.scoring import Nearest, harmonic_mean
from avzero.spec import BetaGrid, Preset, Protocol
from tests.conftest import ROOT

GRID = BetaGrid().values()


def facts(
    distances: torch.Tensor, target: torch.Tensor, seen: list[int], unseen: list[int]
) -> Nearest:
    """Reduce [N, classes by id] distances."""
    return Nearest.of(
        distances[:, seen], distances[:, unseen], target, torch.tensor(seen), torch.tensor(unseen)
    )


def brute_force(
    distances: torch.Tensor, target: torch.Tensor, seen: list[int], unseen: list[int], beta: float
) -> tuple[float, float, float]:
    """S, U and ZSL by the definition of protocol.md section 4."""

    def mean_recall(scores: torch.Tensor, candidates: list[int], group: list[int]) -> float:
        recalls = []
        for c in group:
            rows = (target == c).nonzero().flatten().tolist()
            if not rows:
                continue
            hits = 0
            for row in rows:
                values = [(scores[row, k].item(), k) for k in candidates]
                hits += min(values)[1] == c  # ties go to the smallest class id
            recalls.append(hits / len(rows))
        return sum(recalls) / len(recalls) if recalls else 0.0

    shifted = distances.clone()
    shifted[:, seen] += beta
    both = sorted(seen + unseen)
    return (
        mean_recall(shifted, both, seen),
        mean_recall(shifted, both, unseen),
        mean_recall(distances, unseen, unseen),
    )


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, list[int], list[int]]:
    """Small problems with integer distances, so that ties happen and arithmetic is exact."""
    n_classes = draw(st.integers(2, 7))
    n_seen = draw(st.integers(1, n_classes - 1))
    order = draw(st.permutations(range(n_classes)))
    seen, unseen = sorted(order[:n_seen]), sorted(order[n_seen:])
    rows = draw(st.integers(1, 12))
    cells = st.integers(0, 6)
    distances = draw(
        st.lists(
            st.lists(cells, min_size=n_classes, max_size=n_classes), min_size=rows, max_size=rows
        )
    )
    target = draw(st.lists(st.integers(0, n_classes - 1), min_size=rows, max_size=rows))
    return torch.tensor(distances, dtype=torch.float64), torch.tensor(target), seen, unseen


@settings(max_examples=300, deadline=None)
@given(problems(), st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0, 6.0, 7.0]))
def test_agrees_with_the_definition(
    problem: tuple[torch.Tensor, torch.Tensor, list[int], list[int]], beta: float
) -> None:
    got = facts(*problem).at(beta)
    seen, unseen, zsl = brute_force(*problem, beta)
    assert got.seen == pytest.approx(seen, abs=1e-12)
    assert got.unseen == pytest.approx(unseen, abs=1e-12)
    assert got.zsl == pytest.approx(zsl, abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(problems())
def test_invariants(problem: tuple[torch.Tensor, torch.Tensor, list[int], list[int]]) -> None:
    nearest = facts(*problem)
    betas = np.linspace(-8, 8, 65)
    seen, unseen = nearest.at_many(betas)
    hm = harmonic_mean(seen, unseen)
    assert (np.diff(seen) <= 1e-12).all() and (np.diff(unseen) >= -1e-12).all()
    assert (unseen <= nearest.zsl + 1e-12).all()
    assert nearest.at(1e9).unseen == pytest.approx(nearest.zsl)
    assert (hm <= 2 * np.minimum(seen, unseen) + 1e-12).all()
    assert (hm <= np.maximum(seen, unseen) + 1e-12).all()


@settings(max_examples=200, deadline=None)
@given(problems())
def test_curve_is_the_whole_story(
    problem: tuple[torch.Tensor, torch.Tensor, list[int], list[int]],
) -> None:
    nearest = facts(*problem)
    curve = nearest.curve()
    betas = np.linspace(-8, 8, 321)
    seen, unseen = nearest.at_many(betas)
    index = np.searchsorted(curve.beta, betas, side="right") - 1
    np.testing.assert_allclose(curve.seen[index], seen, atol=1e-12)
    np.testing.assert_allclose(curve.unseen[index], unseen, atol=1e-12)
    # The exact optimum is reached where it says, and nothing on a fine grid beats it.
    again = nearest.at(curve.best.beta)
    assert again.hm == pytest.approx(curve.best.hm, abs=1e-12)
    assert harmonic_mean(seen, unseen).max() <= curve.best.hm + 1e-12
    assert 0 <= curve.area <= 1 + 1e-12


@settings(max_examples=100, deadline=None)
@given(problems(), st.sampled_from([0.0, 1.0, 2.5]))
def test_per_class_recalls_average_to_the_scores(
    problem: tuple[torch.Tensor, torch.Tensor, list[int], list[int]], beta: float
) -> None:
    _, _, seen, unseen = problem
    nearest = facts(*problem)
    table = nearest.per_class(beta)
    scores = nearest.at(beta)
    for group, expected in ((seen, scores.seen), (unseen, scores.unseen)):
        mine = np.isin(table.class_id, group)
        assert expected == pytest.approx(table.recall[mine].mean() if mine.any() else 0.0)
    mine = np.isin(table.class_id, unseen)
    assert np.isnan(table.zsl[~mine]).all()
    if mine.any():
        assert table.zsl[mine].mean() == pytest.approx(scores.zsl)


def test_sweep_takes_the_first_of_equals() -> None:
    distances = torch.tensor([[0.0, 9.0], [9.0, 0.0]], dtype=torch.float64)
    assert facts(distances, torch.tensor([0, 1]), [0], [1]).sweep(GRID).beta == 0.0


def test_nan_distances_are_refused() -> None:
    distances = torch.tensor([[float("nan"), 1.0], [0.0, 1.0]])
    with pytest.raises(FloatingPointError, match="distance to a class is NaN"):
        facts(distances, torch.tensor([0, 1]), [0], [1])


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return dict(json.loads((ROOT / "tests/golden/evaluation.json").read_text()))


@pytest.fixture(scope="module")
def golden_facts(golden: dict[str, Any]) -> dict[str, Nearest]:
    """The fixture's distances as the reference forms them, reduced."""
    ids = golden["candidate_ids"]
    seen, unseen = torch.tensor(golden["seen_ids"]), torch.tensor(golden["unseen_ids"])
    classes = torch.tensor(golden["classes"])
    columns = {c: i for i, c in enumerate(ids)}
    d = {m: torch.cdist(torch.tensor(golden[m]), classes) for m in ("audio", "video")}
    gate = torch.tensor(golden["attention_hard"])[:, None]
    d["both"] = d["audio"] + d["video"]
    d["both_cjme_gated"] = (1 - gate) * d["audio"] + gate * d["video"]
    target = torch.tensor(golden["targets"])
    return {
        name: Nearest.of(
            x[:, [columns[c] for c in seen.tolist()]],
            x[:, [columns[c] for c in unseen.tolist()]],
            target,
            seen,
            unseen,
        )
        for name, x in d.items()
    }


def same(ours: dict[str, float], theirs: dict[str, float]) -> None:
    for mine, reference in (
        ("S", "seen"),
        ("U", "unseen"),
        ("HM", "hm"),
        ("ZSL", "zsl"),
        ("beta", "beta"),
    ):
        assert ours[mine] == pytest.approx(theirs[reference], abs=1e-6), mine


@pytest.mark.parametrize("name", ["audio", "video", "both", "both_cjme_gated"])
def test_golden_sweep(golden: dict[str, Any], golden_facts: dict[str, Nearest], name: str) -> None:
    same(golden_facts[name].sweep(GRID).as_dict(), golden["sweep"][name])


@pytest.mark.parametrize("name", ["audio", "video", "both"])
def test_golden_curves_and_fixed_values(
    golden: dict[str, Any], golden_facts: dict[str, Nearest], name: str
) -> None:
    for point in golden["full_curve_beta_0_to_3_step_0.2"][name]:
        same(golden_facts[name].at(point["beta"]).as_dict(), point)
    for beta, expected in golden["fixed"][name].items():
        same(golden_facts[name].at(float(beta)).as_dict(), expected)


def test_golden_calibration_carried_to_test(
    golden: dict[str, Any], golden_facts: dict[str, Nearest]
) -> None:
    """beta* is the mean of the three chosen values (P-04), and is used for all three."""
    three = {name: golden_facts[name] for name in ("audio", "video", "both")}
    calibration, _ = calibrate(three, BetaGrid(), 1.0)
    for name, nearest in three.items():
        beta = calibration.beta(name, Protocol(), 1.0)
        assert beta == pytest.approx(golden["averaged_beta"], abs=1e-6)
        same(nearest.at(beta).as_dict(), golden["test_with_averaged_beta"][name])


def test_calibration_options(golden_facts: dict[str, Nearest]) -> None:
    three = {name: golden_facts[name] for name in ("audio", "video", "both")}
    own = Protocol(beta_reduction="per_modality")
    calibration, scores = calibrate(three, BetaGrid(), 2.0)
    assert {m: calibration.beta(m, own, 2.0) for m in three} == pytest.approx(
        {m: s.beta for m, s in scores.items()}
    )
    scaled = Protocol(calibration="scaled", beta_reduction="per_modality")
    assert calibration.beta("video", scaled, 3.0) == pytest.approx(scores["video"].beta * 1.5)
    assert calibration.at_grid_end  # the optimum of "both" is 0, an end of the grid (P-06)
    wide = BetaGrid(start=-1, stop=1, count=21)
    assert not calibrate(three, wide, 1.0)[0].at_grid_end


def test_presets_are_bundles() -> None:
    paper, compat = Protocol(), Protocol(preset=Preset.COMPAT)
    assert (paper.text_alignment, paper.stage2_lr) == ("by_class", "replay")
    assert (compat.text_alignment, compat.stage2_lr) == ("legacy_sorted", "plateau_on_val")
    mixed = Protocol.model_validate({"preset": "compat", "text_alignment": "by_class"})
    assert (mixed.text_alignment, mixed.stage2_lr) == ("by_class", "plateau_on_val")
    assert len(GRID) == 16 and GRID[-1] == pytest.approx(3.0) and GRID[1] == pytest.approx(0.2)
