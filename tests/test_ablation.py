"""One modality only: in training and at test, and withheld from a system trained on both."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from avzero.data.benchmark import Benchmark
from avzero.data.store import FeatureStore
from avzero.errors import UserError
from avzero.models._registry import model_files
from avzero.spec import Protocol
from avzero.train.data import StageData
from avzero.train.folder import RunFolder
from avzero.train.loop import Trainer
from avzero.train.outcome import conclude_stage_1
from tests.conftest import make_task
from tests.toys import taken

CPU = torch.device("cpu")


@pytest.mark.parametrize("modality", ["audio", "video"])
def test_the_other_modality_is_zeros_everywhere(benchmark: Benchmark, modality: str) -> None:
    protocol = Protocol(modality=modality, input_scaling="standard")  # type: ignore[arg-type]
    data = StageData(benchmark, make_task(benchmark, protocol=protocol), CPU)
    other = {"audio": "video", "video": "audio"}[modality]
    batch = taken(data, data.sampler.epoch(0, 1, 0, 1, 16), 0, 0, 1)
    assert not batch.features[other].any() and batch.features[modality].any()
    block, _ = next(data.blocks(data.training_rows()[1]))
    assert not block[other].any() and block[modality].any()


@pytest.mark.parametrize("system", list(model_files()))
def test_every_system_reports_what_it_does_without_a_modality(
    system: str, benchmark: Benchmark, store: FeatureStore
) -> None:
    task = make_task(benchmark, system, seed=2101, train={"epochs": 1})
    folder = RunFolder(store.storage, task)
    list(Trainer(task, benchmark, folder).epochs())
    result, frozen = conclude_stage_1(folder, benchmark)
    withheld = {"missing_audio", "missing_video"}
    assert {"both"} | withheld <= result.scores.keys()
    assert all(0 <= result.scores[name]["ZSL"] <= 1 for name in withheld)
    # They have a beta of their own and do not touch that of the headline (P-04).
    betas = frozen.calibration.betas
    whole = [beta for name, beta in betas.items() if name not in withheld]
    assert frozen.calibration.beta("both", Protocol(), 1.0) == pytest.approx(np.mean(whole))
    for name in withheld:
        assert frozen.calibration.beta(name, Protocol(), 1.0) == betas[name]


def test_trained_on_one_modality(benchmark: Benchmark, store: FeatureStore) -> None:
    task = make_task(benchmark, seed=2102, protocol=Protocol(modality="audio"))
    folder = RunFolder(store.storage, task)
    list(Trainer(task, benchmark, folder).epochs())
    result, _ = conclude_stage_1(folder, benchmark)
    assert set(result.scores) == {"both"}  # nothing is left to withhold


@pytest.mark.parametrize("rule", ["minmax", "standard", "l2"])
def test_a_system_may_bring_its_own_scaling(benchmark: Benchmark, rule: str) -> None:
    plain = StageData(benchmark, make_task(benchmark), CPU)
    own = StageData(benchmark, make_task(benchmark, config={"input_scaling": rule}), CPU)
    as_protocol = make_task(benchmark, protocol=Protocol(input_scaling=rule))  # type: ignore[arg-type]
    same = StageData(benchmark, as_protocol, CPU)
    rows = own.training_rows()[1]
    (a, _), (b, _), (c, _) = (next(data.blocks(rows)) for data in (plain, own, same))
    assert not torch.equal(a["video"], b["video"])
    torch.testing.assert_close(b["video"], c["video"])
    if rule == "minmax":
        assert b["video"].min() == 0 and b["video"].max() == 1


def test_negative_features_are_refused_where_they_cannot_be_used(benchmark: Benchmark) -> None:
    if "fvaegan_d2" not in model_files():
        pytest.skip("no system with that rule")
    shifted = make_task(benchmark, "fvaegan_d2", config={"input_scaling": "standard"})
    with pytest.raises(UserError, match=r"fvaegan_d2 cannot use .*smallest value -.*minmax"):
        StageData(benchmark, shifted, CPU)
    StageData(benchmark, make_task(benchmark, "fvaegan_d2"), CPU)
