"""From finished weights to results: VAL of a stage-1 run, TEST of a stage-2 run."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from avzero.data.benchmark import Benchmark, Role
from avzero.data.store import FeatureStore
from avzero.errors import UserError
from avzero.models._contract import Model
from avzero.models._registry import build
from avzero.protocol.calibration import BOTH, Calibration, calibrate
from avzero.protocol.retrieval import Gallery
from avzero.protocol.scoring import Nearest, Scores
from avzero.protocol.seal import Frozen, open_test
from avzero.protocol.stages import STAGE_1, STAGE_2
from avzero.revision import code_revision
from avzero.train.data import EvaluationSet, StageData, evaluation_set, nearest
from avzero.train.folder import RunFolder, State
from avzero.train.loop import lr_sequence
from avzero.train.records import Result, TrainingFailed

_CPU = torch.device("cpu")
_CURVE_POINTS = 2048
_PICTURED = 1500
"""Samples of TEST whose embeddings are kept."""


def finished_state(folder: RunFolder) -> State:
    """Return the state of a finished run.

    Raises:
        UserError: the run is not finished.
    """
    state = folder.load_state()
    if state is None or not state.finished:
        raise UserError(f"{folder.url}: not finished; run the same command again to go on")
    return state


def load_model(folder: RunFolder, state: State, data: StageData) -> Model:
    """Return the system with the weights of the best epoch."""
    task = folder.task
    model = build(task, data.shapes)
    try:
        model.load_state_dict(folder.best_weights(state))
    except KeyError as error:
        raise UserError(
            f"{folder.url}: weights {error} are missing or damaged; delete the folder and run the "
            "same command again"
        ) from error
    return model.eval()


def conclude_stage_1(folder: RunFolder, benchmark: Benchmark) -> tuple[Result, Frozen]:
    """Calibrate the best weights of a finished stage-1 run on VAL (protocol.md section 5, 3).

    Returns:
        The VAL result, which is also stored, and the frozen trial.

    Raises:
        TrainingFailed: a distance by one modality is NaN.
    """
    task = folder.task
    state = finished_state(folder)
    data = StageData(benchmark, task, _CPU)
    model = load_model(folder, state, data)
    rows = data.evaluation(benchmark, STAGE_1)
    gallery = Gallery()
    try:
        facts = nearest(model, data, rows, task.protocol, every=True, keep=gallery)
    except FloatingPointError as error:
        # Training looks at the headline only; this is a modality beside it.
        raise TrainingFailed(
            f"{error} on VAL with the weights of epoch {state.best_epoch}; lower lr, or "
            "standardise the inputs (protocol.input_scaling)"
        ) from error
    scale = class_scale(model, data, rows.seen_ids, rows.unseen_ids)
    grid = task.protocol.beta_grid or model.beta_grid
    calibration, scores = calibrate(facts, grid, scale)
    frozen = Frozen(
        task, state.best_epoch, lr_sequence(state.history), calibration, scores[BOTH].as_dict()
    )
    extra = gallery.scores(rows.seen_ids, rows.unseen_ids, data.scaling.absent)
    result = _result(folder, state, model, facts, scores, calibration, extra=extra)
    folder.save_frozen(frozen.as_dict())
    folder.save_portrait(result, _confusion(gallery, rows))
    folder.save_result(result)
    return result, frozen


def score_test(store: FeatureStore, folder: RunFolder, frozen: Frozen, sweep: str) -> Result:
    """Open TEST once for a finished stage-2 run and score it with the carried beta.

    A run whose TEST result is stored already is not opened again.
    """
    stored = folder.load_result("test", frozen.digest)
    if stored is not None:
        return stored
    task = folder.task
    state = finished_state(folder)
    benchmark = store.open(task.benchmark)
    data = StageData(benchmark, task, _CPU)
    model = load_model(folder, state, data)
    # Its class texts are in the open part: this looks at no TEST row.
    groups = (data.info.classes.ids(*roles) for roles in (STAGE_2.seen, STAGE_2.unseen))
    test_scale = class_scale(model, data, *(torch.from_numpy(ids).long() for ids in groups))
    if not math.isfinite(test_scale):
        raise UserError(f"{folder.url}: the weights are not finite; TEST stays shut. Lower lr")
    betas = {
        modality: frozen.calibration.beta(modality, task.protocol, test_scale)
        for modality in frozen.calibration.betas
    }
    test = open_test(store, frozen, task, betas[BOTH], sweep, code_revision())
    rows = evaluation_set(test, STAGE_2, data.class_text, _CPU, data.evaluation_window)
    gallery = Gallery()
    facts = nearest(model, data, rows, task.protocol, every=True, keep=gallery)
    scores = {m: facts[m].at(beta) for m, beta in betas.items() if m in facts}
    extra = _source_disjoint(benchmark, test, facts[BOTH], betas[BOTH])
    extra |= gallery.scores(rows.seen_ids, rows.unseen_ids, data.scaling.absent)
    result = _result(folder, state, model, facts, scores, frozen.calibration, frozen.digest, extra)
    portrait = _confusion(gallery, rows) | _embeddings(gallery, model, data, rows)
    folder.save_portrait(result, portrait)
    folder.save_result(result)
    return result


def _confusion(gallery: Gallery, rows: EvaluationSet) -> dict[str, Tensor]:
    """Return the unseen classes and the confusion among them (``Gallery.confusion``)."""
    confusion = gallery.confusion(rows.seen_ids, rows.unseen_ids)
    return {"confusion": confusion, "unseen_ids": rows.unseen_ids}


@torch.no_grad()
def _embeddings(
    gallery: Gallery, model: Model, data: StageData, rows: EvaluationSet
) -> dict[str, Tensor]:
    """Return embeddings of some samples and, where they are points of the same space, of all
    candidate classes; nothing for a system without an embedding of the whole sample."""
    z, target = gallery.sample(_PICTURED)
    if not len(z):
        return {}
    kept = {"samples": z.float(), "samples_class": target}
    ids = torch.cat([rows.seen_ids, rows.unseen_ids])
    classes = model.embed_classes(data.class_text[ids])
    if model.lengths and classes.shape[1:] == z.shape[1:]:
        kept |= {"classes": classes.float(), "classes_id": ids}
    return kept


@torch.no_grad()
def class_scale(model: Model, data: StageData, seen_ids: Tensor, unseen_ids: Tensor) -> float:
    """Return the unit of ``calibration: scaled`` (P-03), from class texts alone.

    It is the median over unseen classes of the distance between their embedding and that of the
    nearest seen class.

    Args:
        model: the system, in eval mode.
        data: gives the class texts.
        seen_ids: int64 ids of the seen candidate classes.
        unseen_ids: int64 ids of the unseen ones.
    """
    embedded = model.embed_classes(data.class_text[torch.cat([seen_ids, unseen_ids])])
    seen, unseen = embedded[: len(seen_ids)], embedded[len(seen_ids) :]
    return float(torch.cdist(unseen, seen).amin(dim=1).median())


def _source_disjoint(
    benchmark: Benchmark, test: Benchmark, facts: Nearest, beta: float
) -> dict[str, float]:
    """Return S over seen test samples whose source video is not in training (P-16)."""
    train = benchmark.part.samples
    sources = {train.source_id[i] for i in train.rows(*STAGE_2.train).tolist()}
    samples = test.part.samples
    rows = samples.rows(*STAGE_2.evaluate)
    clean = np.array([samples.source_id[i] not in sources for i in rows.tolist()])
    seen = samples.role[rows] == Role.TEST_SEEN.code
    if clean[seen].all() or not clean[seen].any():
        return {}
    return {"S_source_disjoint": facts.subset(clean & seen).at(beta).seen}


def _result(
    folder: RunFolder,
    state: State,
    model: Model,
    facts: Mapping[str, Nearest],
    scores: Mapping[str, Scores],
    calibration: Calibration,
    frozen: str = "",
    extra: dict[str, float] | None = None,
) -> Result:
    """Assemble a result record: of TEST where a frozen trial is named, else of VAL."""
    curve = facts[BOTH].curve()
    # A curve for a plot and a table: at most this many points, ends included.
    points = len(curve.beta)
    pick = np.unique(np.linspace(0, points - 1, min(points, _CURVE_POINTS)).astype(int))
    beta = curve.beta.copy()
    beta[0] = beta[1] - 1.0 if points > 1 else 0.0
    return Result(
        task=folder.task.id,
        stage=folder.task.stage,
        kind="test" if frozen else "val",
        epoch=state.best_epoch,
        scores={modality: s.as_dict() for modality, s in scores.items()},
        area=curve.area,
        # On TEST the optimum over beta would be a choice made on TEST.
        exact={} if frozen else curve.best.as_dict(),
        at_grid_end=calibration.at_grid_end,
        per_class=facts[BOTH].per_class(scores[BOTH].beta).as_dict(),
        curve={
            "beta": beta[pick].tolist(),
            "S": curve.seen[pick].tolist(),
            "U": curve.unseen[pick].tolist(),
        },
        parameters=sum(p.numel() for p in model.parameters()),
        seconds=sum(epoch.seconds for epoch in state.history),
        revision=code_revision(),
        frozen=frozen,
        extra=extra or {},
    )
