"""Trials as listeners see them, made up: for tests and benchmarks of what listens to a sweep."""

from __future__ import annotations

from typing import Any

from avzero.data.storage import Storage
from avzero.train.folder import RunFolder
from avzero.train.records import Epoch, Result
from avzero.tune.listener import TrialView
from avzero.tune.space import Group

PICTURES = ("learning_curves", "seen_unseen_curve", "recall_bars", "parallel_coordinates")
"""What is drawn of made-up trials (``track.files``); tests that are not about pictures patch it."""

EPOCHS = 12
SETTINGS: dict[str, Any] = {
    "name": "tracked",
    "benchmarks": ["tiny"],
    "models": ["avca"],
    "train": {"epochs": EPOCHS},
    "search": {"trials": 4, "min_epochs": 2, "reduction": 3},
    "tracking": {"checkpoints": "none"},
}
"""A job whose runs are logged."""


def epoch_of(number: int, hm: float = 0.2, best: bool = True, replayed: bool = False) -> Epoch:
    """Return an epoch's record."""
    val = {"S": 0.3 + number / 1000, "U": 0.15, "HM": hm, "ZSL": 0.25, "beta": 0.5}
    losses = {"cross": 1.0 / (number + 1), "rec": 0.5}
    return Epoch(number, losses, 1e-3, val, best, 0.5, 900.0, replayed)


def result_of(task: str, kind: str = "val", hm: float = 0.2) -> Result:
    """Return a result of the size real ones have."""
    classes, points = 40, 500
    scores = {"both": {"S": 0.31, "U": 0.15, "HM": hm, "ZSL": 0.25, "beta": 0.5}}
    table: dict[str, Any] = {
        "class_id": list(range(classes)),
        "recall": [0.2] * classes,
        "zsl": [None] * (classes // 2) + [0.3] * (classes - classes // 2),
        "count": [50] * classes,
    }
    falling = [1 - i / points for i in range(points)]
    curve = {"beta": [i / 100 for i in range(points)], "S": falling, "U": falling[::-1]}
    extra = {
        f"mAP_{query}_{items}_{group}": 0.25
        for query, items in [
            ("text", "both"),
            ("text", "audio"),
            ("text", "video"),
            ("audio", "video"),
            ("video", "audio"),
        ]
        for group in ("seen", "unseen", "hm")
    }
    if kind == "test":
        extra["S_source_disjoint"] = 0.3
    exact = {} if kind == "test" else {"S": 0.3, "U": 0.16, "HM": 0.21, "ZSL": 0.25, "beta": 0.6}
    return Result(
        task=task,
        stage=2 if kind == "test" else 1,
        kind=kind,
        epoch=3,
        scores=scores,
        area=0.08,
        exact=exact,
        at_grid_end=False,
        per_class=table,
        curve=curve,
        parameters=1_700_000,
        seconds=12.5,
        revision="r",
        frozen="f" * 64 if kind == "test" else "",
        extra=extra,
    )


def trial_view(
    group: Group, storage: Storage, number: int, epochs: int, complete: bool, hm: float = 0.2
) -> TrialView:
    """Return an ended trial; its learning rate is its own, so its identity is, too."""
    values = {"lr": 1e-4 * (1 + number)}
    task = group.task(values)
    view = TrialView(group, number, task, values, RunFolder(storage, task))
    view.epochs = [epoch_of(e, hm) for e in range(epochs)]
    view.state = "complete" if complete else "pruned"
    view.result = result_of(task.id, hm=hm) if complete else None
    return view
