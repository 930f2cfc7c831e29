"""Figures: made of records alone, the same bytes each time, and nothing where there is nothing."""

from __future__ import annotations

import csv
import io

import numpy as np
import optuna
import pytest
import torch

from avzero.data.store import FeatureStore
from avzero.spec import Job
from avzero.track import study_figures
from avzero.track.figures import confusion, embedding, learning_curves, recall_bars
from avzero.track.files import per_class, result_files, study_files
from avzero.track.study_figures import importances, parallel_coordinates
from avzero.train.folder import RunFolder, Tensors
from avzero.tune.listener import TrialView
from avzero.tune.space import Group
from tests.trials import epoch_of, result_of

NAMES = [f"class {n}" for n in range(320)]


@pytest.fixture
def searched(store: FeatureStore) -> list[TrialView]:
    """Trials whose score depends on the learning rate alone."""
    job = Job.model_validate({"name": "figures", "benchmarks": ["tiny"], "models": ["avca"]})
    group = Group(job, store.info("tiny"), "avca", "w2v")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    trials = []
    for number in range(40):
        values = study.ask(dict(group.distributions)).params
        view = TrialView(
            group, number, group.task(values), values, RunFolder(store.storage, group.task(values))
        )
        view.epochs = [epoch_of(0, 0.3 + 0.05 * float(np.log10(values["lr"])))]
        view.state = "pruned" if number % 3 else "complete"
        trials.append(view)
    return trials


def test_importances_find_what_matters(searched: list[TrialView]) -> None:
    found = importances(searched)
    assert sum(found.values()) == pytest.approx(1) and next(iter(found)) == "lr"
    assert found["lr"] > 0.5
    assert importances(searched[: study_figures._FEWEST - 1]) == {} == importances([])
    for trial in searched:
        trial.epochs = [epoch_of(0, 0.3)]
    assert importances(searched) == {}, "nothing differs"


def test_study_files(searched: list[TrialView]) -> None:
    searched[3].epochs = []  # failed before its first epoch
    files = study_files(searched, "a search")
    pictures = {"parallel_coordinates.png", "hyperparameter_importances.png"}
    assert set(files) == pictures | {"trials.csv"}
    assert files == study_files(searched, "a search"), "same records, same bytes"
    rows = list(csv.DictReader(io.StringIO(files["trials.csv"].decode())))
    assert len(rows) == 40 and rows[3]["best_val_hm"] == "" and rows[0]["state"] == "complete"
    assert float(rows[5]["lr"]) == searched[5].values["lr"]
    for trial in searched:
        trial.values = dict(searched[0].values)
    assert parallel_coordinates(searched, {}, "t") is None, "nothing was varied"


def portrait(unseen: int, classes: bool = True) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(2, 2 + unseen)
    kept = {
        "confusion": torch.randint(0, 9, (unseen, unseen), generator=generator, dtype=torch.int32),
        "unseen_ids": ids,
        "samples": torch.randn(60, 5, generator=generator),
        "samples_class": torch.randint(0, 2 + unseen, (60,), generator=generator),
    }
    kept["confusion"][0] = 0  # a class without samples
    if classes:
        kept |= {"classes": torch.randn(2 + unseen, 5), "classes_id": torch.arange(2 + unseen)}
    return kept


@pytest.mark.parametrize("unseen", [3, 70])
def test_few_and_many_classes(unseen: int) -> None:
    assert confusion(portrait(unseen), NAMES, "t").startswith(b"\x89PNG")
    result = result_of("t")
    many = list(range(unseen + 20))
    result.per_class.update(
        class_id=many,
        recall=[0.5] * len(many),
        zsl=[None] * 20 + [0.5] * unseen,
        count=[1] * len(many),
    )
    assert recall_bars(result, NAMES, "t") == recall_bars(result, NAMES, "t")
    assert per_class(result, NAMES).splitlines()[1] == b"0,class 0,0.5,,1"


def test_embeddings_with_and_without_class_vectors() -> None:
    whole = embedding(portrait(3), NAMES, "t")
    without = embedding(portrait(3, classes=False), NAMES, "t")
    assert whole and without and whole != without
    assert embedding({"unseen_ids": torch.zeros(0)}, NAMES, "t") is None


def test_figures_of_a_result_without_a_portrait(
    store: FeatureStore, searched: list[TrialView]
) -> None:
    """Results of earlier versions have none: fewer figures, no error."""
    folder = RunFolder(store.storage, searched[0].task)
    files = result_files(result_of("t"), folder, store.info("tiny"), "t")
    assert {"seen_unseen_curve.png", "per_class_recall.png"} < set(files)
    assert not {"confusion_unseen.png", "embeddings_tsne.png"} & set(files)
    assert learning_curves([epoch_of(0)], "one epoch") != learning_curves(
        [epoch_of(0), epoch_of(1)], "two"
    )
