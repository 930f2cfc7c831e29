"""What MLflow is told about a run: tags, parameters, metrics and files. No requests are made here.

A run has at most 15 metric keys, and the same ones stand for the same thing everywhere: a trial's
S, U, HM, … are on VAL, a TEST run's on TEST, and the tag ``selection`` says what was chosen how.
Nothing of TEST is on any other run. A trial carries no files but its
weights, where the job wants them: recalls by class of all trials are one table of the sweep's own
run, everything else about a trial is in its folder in the store, which the tag ``avzero.folder``
names. Pictures cost 100 ms of CPU and more each, so they are drawn for the best trial of a sweep
and for final runs only.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from avzero.canon import ID_LENGTH, canonical
from avzero.data.benchmark import MODALITIES
from avzero.models._registry import model_class
from avzero.protocol.calibration import BOTH, MISSING
from avzero.spec import Job, Task
from avzero.track.files import (
    Files,
    learning_files,
    model_files,
    per_class_of_trials,
    result_files,
    study_files,
    weights,
    yaml_file,
)
from avzero.track.note import sweep_note
from avzero.train.records import Epoch, Result
from avzero.tune.listener import FinalView, TrialView
from avzero.tune.space import Group

METRIC_KEYS = 15
"""At most so many columns per run: MLflow's charts and tables become slow with more."""
EPOCH_KEYS = 5
RUNNING = "RUNNING"
STATUS = {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}
BEST_TRIAL, COMPLETE_TRIALS = "avzero.best_trial", "avzero.complete_trials"
_PERCENT = ("S", "U", "HM", "ZSL")
_STATE = {"complete": "complete", "pruned": "stopped early", "failed": "failed"}
_PHASE = {"stage1": "stage 1 repeated", "stage2": "stage 2", "test": "TEST"}
_SELECTION = {
    "stage1": "best epoch by HM on VAL",
    "stage2": "frozen on VAL",
    "test": "frozen on VAL; TEST opened once",
}


def milliseconds() -> int:
    """Return the time as MLflow wants it."""
    return int(time.time() * 1000)


@dataclass
class Outcome:
    """What is known when a run ends."""

    metrics: dict[str, float] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    files: Files = dict
    shared: Files = dict
    """These go to another run as well."""
    also: str = ""
    """Identity of that run."""
    model: Files = dict
    """Files of a recogniser (``train.recogniser``) to log as an MLflow model, or none."""


@dataclass(eq=False)
class Draft:
    """One run as far as it is known. Hooks add to it, the outbox's thread sends what is new."""

    group: Group
    identity: str
    kind: str
    """``sweep``, ``trial``, ``stage1``, ``stage2`` or ``test``."""
    name: str
    tags: dict[str, str] = field(default_factory=dict)
    task: Task | None = None
    parent: Draft | None = None
    """Of the sweep's own run."""
    files: Files = dict
    """Sent once, with the first news."""
    only_missing: bool = False
    """Leave a run alone that is closed already."""
    marks: dict[str, str] = field(default_factory=dict)
    """Tags written after everything else: a run that has them needs no outcome."""
    started: int = field(default_factory=milliseconds)
    epochs: list[tuple[int, Epoch]] = field(default_factory=list)
    """Milliseconds since 1970 and record. A repeated request says the same time, so it changes
    nothing."""
    status: str = RUNNING
    ended: int = 0
    make_outcome: Callable[[str], Outcome] = lambda run: Outcome()
    """Given MLflow's id of the run."""
    sent: int | None = None
    """Number of epochs MLflow has for certain; the sender's own note."""

    def __str__(self) -> str:
        return f"run {self.name!r}"

    def add(self, epoch: Epoch) -> None:
        """Keep an epoch."""
        self.epochs.append((milliseconds(), epoch))

    def close(
        self, status: str, make_outcome: Callable[[str], Outcome] = lambda run: Outcome()
    ) -> None:
        """Say how the run ended; the outcome is made in the outbox's thread."""
        self.make_outcome = make_outcome
        self.ended = milliseconds()
        self.status = status  # last: whoever sees it sees the rest


# -- the kinds of runs --------------------------------------------------------------------------


def parent_draft(job: Job, group: Group) -> Draft:
    """Return the run of a whole sweep in one group; the others are nested below it."""
    return Draft(
        group,
        f"sweep-{job.name}-{group.key}",
        "sweep",
        f"{_title(group)}: search {job.name}",
        {"stage": "1", "seed": str(job.seed), "selection": "best trial by HM on VAL"},
        files=lambda: {"job.yaml": yaml_file(job.model_dump(mode="json"))},
    )


def trial_draft(trial: TrialView) -> Draft:
    """Return a trial's run, without its epochs."""
    tags = {
        "avzero.number": str(trial.number),
        "avzero.folder": trial.folder.url,
        "avzero.searched": canonical(trial.values),
        "stage": "1",
        "seed": str(trial.task.seed),
        "selection": "best epoch by HM on VAL",
    }
    first = " (published point)" if trial.group.published else " (defaults)"
    name = f"{_title(trial.group)}: trial {trial.number}{'' if trial.number else first}"
    return Draft(trial.group, trial.task.id, "trial", name, tags, trial.task)


def final_draft(final: FinalView, kind: str) -> Draft:
    """Return a final run; stage 2 and TEST of one task are two runs."""
    task, frozen = final.task, final.frozen
    record = task.model_dump(mode="json") | {"searched": dict(frozen.task.config)}
    return Draft(
        final.group,
        final_identity(final, kind),
        kind,
        f"{_title(final.group)}: {_PHASE[kind]}, seed {task.seed}",
        {
            "avzero.trial": frozen.task.id,
            "avzero.frozen": frozen.digest,
            "stage": str(task.stage),
            "seed": str(task.seed),
            "selection": _SELECTION[kind],
        },
        task,
        files=lambda: {"run.yaml": yaml_file({"task": task.id} | record)},
        only_missing=final.stored,
    )


def final_identity(final: FinalView, kind: str) -> str:
    """Return the identity of a final run; the same weights with another beta are another TEST."""
    frozen = f"-{final.frozen.digest[:ID_LENGTH]}" if kind == "test" else ""
    return f"{final.task.id}{frozen}-{kind}"


def common_tags(job: Job, draft: Draft, revision: str) -> dict[str, str]:
    """Return the tags every run has."""
    info = draft.group.benchmark
    return {
        "avzero.run": draft.identity,
        "avzero.sweep": job.name,
        "avzero.kind": draft.kind,
        "avzero.digest": info.digest,
        "avzero.simulated": str(info.simulated).lower(),
        "avzero.revision": revision,
        "benchmark": info.name,
        "dataset": info.dataset,
        "feature_set": info.feature_set,
        "text": draft.group.protocol.text,
        "model": draft.group.model,
        "preset": job.protocol.preset.value,
        "mlflow.runName": draft.name,
    }


def settings(task: Task) -> dict[str, str]:
    """Return every setting of a run as MLflow parameters."""
    values: dict[str, Any] = {"model": task.model, "seed": task.seed, "stage": task.stage}
    values |= task.train.model_dump(mode="json") | dict(task.config)
    for key, value in task.protocol.model_dump(mode="json").items():
        values[f"protocol.{key}"] = value
    return {key: str(value) for key, value in values.items()}


# -- how runs end -------------------------------------------------------------------------------


def trial_outcome(job: Job, trial: TrialView) -> Outcome:
    """Return what a trial's run gets at its end."""
    result, outcome = trial.result, Outcome(tags={"state": _STATE[trial.state]})
    if trial.reason:
        outcome.tags["avzero.reason"] = trial.reason
    if result is not None:
        outcome.metrics = result_metrics(result)
    elif trial.best is not None:
        outcome.metrics = headline(trial.best.val)
        outcome.metrics["seconds"] = round(sum(epoch.seconds for epoch in trial.epochs), 2)
    if trial.state == "complete" and job.tracking.checkpoints == "all":
        outcome.files = lambda: weights(trial.folder)
    return outcome


def sweep_outcome(best: TrialView, trials: Sequence[TrialView], run: str) -> Outcome:
    """Return what a sweep's own run gets at its end; the best trial gets its own pictures, too.

    Args:
        best: the winner on VAL.
        trials: all of its group.
        run: MLflow's name of the sweep's run, for links to its pictures.
    """
    result, outcome = best.result, Outcome(also=best.task.id)
    own = [trial for trial in trials if trial.twin_of is None]
    complete = [trial for trial in own if trial.state == "complete"]
    title = f"{_title(best.group)} on {best.group.title}"
    if result is not None:
        outcome.metrics = result_metrics(result) | rate(best.epochs)
    outcome.tags["mlflow.note.content"] = sweep_note(best, trials, run)

    def files() -> dict[str, bytes]:
        table = {"per_class_of_trials.parquet": per_class_of_trials(complete)}
        return table | study_files(own, f"{title}, search {best.group.job.name}")

    def shared() -> dict[str, bytes]:
        name = f"{title}, trial {best.number}"
        curves = learning_files(best.epochs, f"{name}: learning curves")
        info = best.group.benchmark
        return curves | ({} if result is None else result_files(result, best.folder, info, name))

    outcome.files, outcome.shared = files, shared
    return outcome


def stage_2_outcome(job: Job, final: FinalView, epochs: Sequence[Epoch], result: Result) -> Outcome:
    """Return what a stage-2 run gets at its end: what it took, and no score of TEST."""
    title = f"{_title(final.group)} on {final.group.title}, stage 2, seed {final.task.seed}"

    def files() -> dict[str, bytes]:
        curves = learning_files(epochs, f"{title}: learning curve")
        return curves | (weights(final.folder) if job.tracking.checkpoints != "none" else {})

    cost = {"seconds": round(result.seconds, 2), "parameters": float(result.parameters)}
    return Outcome(cost, files=files)


def test_outcome(final: FinalView, epochs: Sequence[Epoch], result: Result) -> Outcome:
    """Return what a TEST run gets: scores, figures, and the final model."""
    title = f"{_title(final.group)} on {final.group.title}, seed {final.task.seed}"
    info = final.group.benchmark
    return Outcome(
        result_metrics(result) | rate(epochs),
        {"avzero.test_opened": "true"},
        lambda: result_files(result, final.folder, info, title),
        model=lambda: model_files(final.folder, result),
    )


def _title(group: Group) -> str:
    """Return a system's name as its authors write it."""
    return model_class(group.model).card.title


# -- metrics ------------------------------------------------------------------------------------


def headline(scores: Mapping[str, float]) -> dict[str, float]:
    """Return S, U, HM, ZSL in percent, and beta."""
    values = {key: percent(scores[key]) for key in _PERCENT if key in scores}
    return values | ({"beta": round(scores["beta"], 6)} if "beta" in scores else {})


def percent(fraction: float) -> float:
    """Return a score in percent, short enough for a column; the store has every digit."""
    return round(100 * fraction, 4)


def epoch_metrics(epoch: Epoch) -> dict[str, float]:
    """Return the per-epoch metric columns of a run, ``EPOCH_KEYS`` at most.

    S and U of every epoch are in the learning curves and in the store.
    """
    values = {f"val/{key}": percent(epoch.val[key]) for key in ("HM", "ZSL") if key in epoch.val}
    return values | {
        "train/loss": epoch.loss,
        "train/lr": epoch.lr,
        "samples_per_s": round(epoch.samples_per_second, 1),
    }


def rate(epochs: Sequence[Epoch]) -> dict[str, float]:
    """Return the mean samples per second over a run's epochs, for runs without a series of it."""
    if not epochs:
        return {}
    return {"samples_per_s": round(sum(e.samples_per_second for e in epochs) / len(epochs), 1)}


def result_metrics(result: Result) -> dict[str, float]:
    """Return the columns of a result: 10, and on TEST what else fits.

    ``audio_HM`` is by audio alone: by the distances of audio where a system has them, else by the
    whole with video withheld; ``video_HM`` likewise.

    Of retrieval only TEST has metrics, and only harmonic means: trials have charts enough.
    """
    values = headline(result.scores[BOTH]) | {"AUSUC": percent(result.area)}
    audio, video = MODALITIES
    for modality, other in ((audio, video), (video, audio)):
        scores = result.scores.get(modality) or result.scores.get(MISSING + other)
        if scores:
            values[f"{modality}_HM"] = percent(scores["HM"])
    values |= {"seconds": round(result.seconds, 2), "parameters": float(result.parameters)}
    if result.kind == "test":
        more = {k: percent(v) for k, v in result.extra.items()}
        values |= {k: v for k, v in more.items() if not k.startswith("mAP_")}
        values |= {f"retrieval/{k}": v for k, v in more.items() if k.endswith("_hm")}
    # One is kept for samples_per_s.
    return dict(itertools.islice(values.items(), METRIC_KEYS - 1))
