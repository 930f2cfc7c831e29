"""Scoring: the one-pass rule against its definition, the invariants, the reference's numbers."""

from __future__ import annotations

import json
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avzero.data.benchmark import Benchmark
from avzero.data.store import FeatureStore
from avzero.models._contract import Model
from avzero.models._registry import build
from avzero.models.avgzslnet import AVGZSLNet
from avzero.protocol import scoring
from avzero.protocol.calibration import calibrate
from avzero.protocol.scoring import Blocks, Nearest, harmonic_mean
from avzero.protocol.stages import STAGE_1, STAGE_2
from avzero.spec import BetaGrid, Preset, Protocol
from avzero.train import data
from avzero.train.data import StageData, nearest
from avzero.train.folder import RunFolder
from avzero.train.loop import Trainer
from avzero.train.outcome import class_scale, conclude_stage_1, finished_state, load_model
from avzero.train.records import TrainingFailed
from tests.conftest import ROOT, make_task

GRID = BetaGrid().values()


def facts(
    distances: torch.Tensor, target: torch.Tensor, seen: list[int], unseen: list[int]
) -> Nearest:
    """Reduce [N, classes by id] distances."""
    ids = (torch.tensor(seen), torch.tensor(unseen))
    return Nearest.of(distances[:, seen + unseen], target, *ids)


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
@given(problems(), st.sampled_from([torch.float32, torch.float64]))
def test_ties_between_the_groups_go_to_the_smaller_id(
    problem: tuple[torch.Tensor, torch.Tensor, list[int], list[int]], dtype: torch.dtype
) -> None:
    """At every beta that equals some gap, where a nearest seen and unseen class are equally far."""
    distances, target, seen, unseen = problem
    gaps = distances[:, unseen].amin(1) - distances[:, seen].amin(1)
    found = facts(distances.to(dtype), target, seen, unseen)
    for beta in sorted({0.0, *gaps.tolist()}):
        got = found.at(beta)
        want = brute_force(*problem, beta)
        assert (got.seen, got.unseen, got.zsl) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("ids", [([0, 2], [1, 3]), ([1, 3], [0, 2])])
def test_all_classes_equally_far(ids: tuple[list[int], list[int]]) -> None:
    """What a collapsed system gives: the smallest id of all wins at 0, of the group elsewhere."""
    seen, unseen = ids
    found = facts(torch.full((4, 4), 2.5), torch.arange(4), seen, unseen)
    first = 0.5  # the recall of the first of a group's two classes
    at_zero = (first, 0.0) if 0 in seen else (0.0, first)
    for beta, want in ((-0.1, (first, 0.0)), (0.0, at_zero), (0.1, (0.0, first))):
        assert (found.at(beta).seen, found.at(beta).unseen) == want
    assert found.zsl == first


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(1, 9), st.randoms(use_true_random=False))
def test_neither_blocks_nor_order_matter(
    problem: tuple[torch.Tensor, torch.Tensor, list[int], list[int]], cells: int, random: Any
) -> None:
    """Scores are equal to the last bit, one by one or together."""
    distances, target, seen, unseen = problem
    whole = facts(*problem)
    order = list(range(len(target)))
    random.shuffle(order)
    cut = random.randrange(len(order) + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "_CELLS", cells)
        blocks = Blocks(len(order))
        for i in (order[:cut], order[cut:]):
            if i:
                blocks.add(facts(distances[i], target[i], seen, unseen))
    parts = blocks.whole()
    assert parts.sweep(GRID) == whole.sweep(GRID)
    assert parts.curve().best == whole.curve().best
    together = np.stack(whole.at_many(GRID), axis=1)
    for beta, scores in zip(GRID, together.tolist(), strict=True):
        assert [parts.at(beta).seen, parts.at(beta).unseen] == scores
    backwards = np.stack(whole.at_many(GRID[::-1]), axis=1)
    np.testing.assert_array_equal(backwards[::-1], together)


def test_a_missing_block_is_missed() -> None:
    some = facts(torch.rand(3, 4), torch.arange(3), [0, 1], [2, 3])
    blocks = Blocks(6)
    with pytest.raises(ValueError, match="0 of 6 samples"):
        blocks.whole()
    blocks.add(some)
    with pytest.raises(ValueError, match="3 of 6 samples"):
        blocks.whole()
    blocks.add(some)
    np.testing.assert_array_equal(blocks.whole().target, [0, 1, 2, 0, 1, 2])


def test_a_value_scores_alike_alone_and_in_a_grid() -> None:
    """Sums over many classes run in one order, however many values are asked for."""
    generator = torch.Generator().manual_seed(0)
    distances = torch.rand(4000, 300, generator=generator)
    target = torch.randint(300, (4000,), generator=generator)
    distances[torch.arange(4000), target] *= 0.01
    found = facts(distances, target, list(range(0, 300, 2)), list(range(1, 300, 2)))
    betas = np.linspace(-0.01, 0.01, 16)
    alone = [found.at_many([beta]) for beta in betas]
    np.testing.assert_array_equal(found.at_many(betas), np.concatenate(alone, axis=1))
    assert 0 < found.at(0.0).seen < 1


@settings(max_examples=100, deadline=None)
@given(problems(), st.sampled_from([0.0, 1.0, 2.5]))
def test_a_second_classifier_is_for_zsl_alone(
    problem: tuple[torch.Tensor, torch.Tensor, list[int], list[int]], beta: float
) -> None:
    distances, target, seen, unseen = problem
    other = (5 * distances + 3 * torch.arange(distances.shape[1])) % 7
    ordered = torch.cat([distances[:, seen + unseen], other[:, unseen]], dim=1)
    found = Nearest.of(ordered, target, torch.tensor(seen), torch.tensor(unseen))
    got = found.at(beta)
    want = (*brute_force(*problem, beta)[:2], brute_force(other, *problem[1:], beta)[2])
    assert (got.seen, got.unseen, got.zsl) == pytest.approx(want, abs=1e-12)
    table = found.per_class(beta)
    mine = np.isin(table.class_id, unseen)
    if mine.any():
        assert table.zsl[mine].mean() == pytest.approx(want[2])


@settings(max_examples=100, deadline=None)
@given(problems(), st.booleans())
def test_many_systems_at_once(
    problem: tuple[torch.Tensor, torch.Tensor, list[int], list[int]], second: bool
) -> None:
    """Each gets what it gets alone; one that diverged says nothing of the others."""
    distances, target, seen, unseen = problem
    ids = (torch.tensor(seen), torch.tensor(unseen))
    ordered = distances[:, seen + unseen + (unseen[::-1] if second else [])]
    stacked = torch.stack([ordered, 6 - ordered, ordered.clone(), ordered.roll(1, dims=0)])
    stacked[2, -1, -1] = torch.nan
    found = Nearest.of_many(stacked, target, *ids)
    assert [x is None for x in found] == [False, False, True, False]
    for m, together in enumerate(found):
        if together is not None:
            alone = Nearest.of(stacked[m], target, *ids)
            for name, column in vars(alone).items():
                np.testing.assert_array_equal(getattr(together, name), column)


@settings(max_examples=100, deadline=None)
@given(problems(), st.booleans())
def test_smallest_is_the_same_on_any_device(
    problem: tuple[torch.Tensor, torch.Tensor, list[int], list[int]], nan: bool
) -> None:
    """Devices search with torch, a CPU with numpy: first of equals, and NaN before all."""
    distances, _, seen, _ = problem
    distances = distances.float()
    if nan:
        distances[0, 0] = torch.nan
    stacked = torch.stack([distances, 6 - distances])
    groups = [slice(0, len(seen)), slice(len(seen), distances.shape[1])]
    for a, b in zip(
        scoring._smallest_by_numpy(stacked, groups),
        scoring._smallest_by_torch(stacked, groups),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    value, column = scoring._smallest_by_numpy(stacked, groups)
    assert np.isnan(value[0, :, 0]).all() == nan
    first = column[0, 0, 0]
    assert first == (0 if nan else distances[0, : len(seen)].tolist().index(value[0, 0, 0]))


@settings(max_examples=200, deadline=None)
@given(problems())
def test_invariants(problem: tuple[torch.Tensor, torch.Tensor, list[int], list[int]]) -> None:
    nearest = facts(*problem)
    betas = np.linspace(-8, 8, 65)
    seen, unseen = nearest.at_many(betas)
    hm = harmonic_mean(seen, unseen)
    assert (np.diff(seen) <= 1e-12).all() and (np.diff(unseen) >= -1e-12).all()
    assert (unseen <= nearest.zsl + 1e-12).all()
    assert nearest.at(1e9).unseen == nearest.zsl
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
    with pytest.raises(FloatingPointError):  # the difference of the two groups is NaN
        facts(torch.full((1, 2), torch.inf), torch.tensor([0]), [0], [1])


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
            x[:, [columns[c] for c in [*seen.tolist(), *unseen.tolist()]]], target, seen, unseen
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
    for name, found in three.items():
        beta = calibration.beta(name, Protocol(), 1.0)
        assert beta == pytest.approx(golden["averaged_beta"], abs=1e-6)
        same(found.at(beta).as_dict(), golden["test_with_averaged_beta"][name])


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


def test_training_scores_the_headline_alone(
    benchmark: Benchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of distances, even to the smallest, change nothing; modalities are extra."""
    torch.manual_seed(0)
    task = make_task(benchmark, "avgzslnet")
    stage = StageData(benchmark, task, torch.device("cpu"))
    model = build(task, stage.shapes)
    rows = stage.evaluation(benchmark, STAGE_1)
    quick = nearest(model, stage, rows, task.protocol)
    assert model.training and list(quick) == ["both"]
    monkeypatch.setattr(data, "_CELLS", 1)
    monkeypatch.setattr(data, "_ROWS", 45)
    parts = list(rows.blocks(len(rows.rows)))
    assert {p.stop - p.start for p in parts} == {37, 38}
    assert [i for p in parts for i in range(len(rows.rows))[p]] == list(range(len(rows.rows)))
    every = nearest(model, stage, rows, task.protocol, every=True)
    assert set(every) == {"audio", "video", "both", "missing_audio", "missing_video"}
    np.testing.assert_array_equal(every["both"].hit, quick["both"].hit)
    np.testing.assert_allclose(every["both"].limit, quick["both"].limit, atol=1e-5)
    assert every["both"].sweep(GRID) == quick["both"].sweep(GRID)


def test_a_modality_that_diverged_fails_the_trial(
    benchmark: Benchmark, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training looks at the headline; what it did not see is found when the trial is concluded."""
    usual = AVGZSLNet.distances

    def broken(*arguments: Any) -> dict[str, torch.Tensor]:
        found = usual(*arguments)
        return found | {"audio": found["audio"] * torch.nan}

    folder = RunFolder(store.storage, make_task(benchmark, "avgzslnet", seed=4406))
    monkeypatch.setattr(AVGZSLNet, "distances", broken)
    list(Trainer(folder.task, benchmark, folder).epochs())
    with pytest.raises(TrainingFailed, match=r"NaN on VAL with the weights of epoch \d; lower"):
        conclude_stage_1(folder, benchmark)


def test_one_scale_for_both_stages(benchmark: Benchmark, store: FeatureStore) -> None:
    """The unit of beta, by hand: it is stored on VAL, and taken anew from stage 2's classes."""
    folder = RunFolder(store.storage, make_task(benchmark, seed=4407))
    list(Trainer(folder.task, benchmark, folder).epochs())
    _, frozen = conclude_stage_1(folder, benchmark)
    stage = StageData(benchmark, folder.task, torch.device("cpu"))
    model = load_model(folder, finished_state(folder), stage)
    for roles in (STAGE_1, STAGE_2):
        groups = [benchmark.info.classes.ids(*names) for names in (roles.seen, roles.unseen)]
        with torch.no_grad():
            seen, unseen = (model.embed_classes(stage.class_text[ids]).numpy() for ids in groups)
        near = sorted(np.linalg.norm(seen - one, axis=1).min() for one in unseen)
        by_hand = near[(len(near) - 1) // 2]  # the lower of two middle ones, as torch has it
        got = class_scale(model, stage, *(torch.from_numpy(ids).long() for ids in groups))
        assert got == pytest.approx(by_hand, rel=1e-4)
        if roles is STAGE_1:
            assert frozen.calibration.scale == pytest.approx(got)


@pytest.mark.parametrize("classes", [5, 200])
@pytest.mark.parametrize("squared", [False, True])
def test_usual_distances_are_euclidean(classes: int, squared: bool) -> None:
    """By either formula: few classes, and more than the embedding is wide."""
    generator = torch.Generator().manual_seed(0)
    z, table = (torch.randn(n, 64, generator=generator) for n in (90, classes))
    table[0] = z[7]
    before = z.clone(), table.clone()
    found = Model.distances(cast(Model, None), {"both": z}, table, squared)["both"]
    assert torch.equal(z, before[0]) and torch.equal(table, before[1])
    want = (z.double()[:, None] - table.double()).square().sum(2)
    near = torch.zeros_like(want, dtype=torch.bool)
    near[7, 0] = True  # a difference of equal numbers: rounding is all that is left
    assert 0 <= found[7, 0] < (1e-3 if squared else 2e-2)
    want = want if squared else want.sqrt()
    torch.testing.assert_close(found[~near].double(), want[~near], rtol=1e-5, atol=1e-4)
