"""What MLflow is told about a run: tags, parameters, metrics and files. No requests are made here.

A run has at most 15 metric keys: 8 per epoch and 7 of its result. A trial carries no files but its
weights, where the job wants them: recalls by class of all trials are one table of the sweep's own
run, everything else about a trial is in its folder in the store, which the tag ``avzero.folder``
names. Pictures cost 100 ms of CPU and more each, so they are drawn for the best trial of a sweep
and for final runs only.
"""

from __future__ import annotations

import csv
import io
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from avzero.canon import ID_LENGTH, canonical
from avzero.protocol.calibration import BOTH
from avzero.spec import Job, Task
from avzero.track.figures import learning_curves, seen_unseen_curve
from avzero.train.folder import RunFolder
from avzero.train.records import Epoch, Result
from avzero.tune.listener import FinalView, TrialView
from avzero.tune.space import Group

METRIC_KEYS = 15
"""At most so many columns per run: MLflow's charts and tables become slow with more."""
EPOCH_KEYS = 8
RUNNING = "RUNNING"
STATUS = {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}
BEST_TRIAL, COMPLETE_TRIALS = "avzero.best_trial", "avzero.complete_trials"
_PERCENT = ("S", "U", "HM", "ZSL")


Files = Callable[[], dict[str, bytes]]
"""Name -> content, made when it is sent: pictures and weights should not wait in memory."""


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
    make_outcome: Callable[[], Outcome] = Outcome
    sent: int | None = None
    """Number of epochs MLflow has for certain; the sender's own note."""

    def __str__(self) -> str:
        return f"run {self.name!r}"

    def add(self, epoch: Epoch) -> None:
        """Keep an epoch."""
        self.epochs.append((milliseconds(), epoch))

    def close(self, status: str, make_outcome: Callable[[], Outcome] = Outcome) -> None:
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
        f"{job.name}: {group.model}",
        files=lambda: {"job.yaml": _yaml(job.model_dump(mode="json"))},
    )


def trial_draft(trial: TrialView) -> Draft:
    """Return a trial's run, without its epochs."""
    tags = {
        "avzero.number": str(trial.number),
        "avzero.folder": trial.folder.url,
        "avzero.searched": canonical(trial.values),
    }
    name = f"{trial.group.model} trial {trial.number}"
    return Draft(trial.group, trial.task.id, "trial", name, tags, trial.task)


def final_draft(final: FinalView, kind: str) -> Draft:
    """Return a final run; stage 2 and TEST of one task are two runs."""
    task, frozen = final.task, final.frozen
    record = task.model_dump(mode="json") | {"searched": dict(frozen.task.config)}
    return Draft(
        final.group,
        final_identity(final, kind),
        kind,
        f"{final.group.model} {kind} seed {task.seed}",
        {"avzero.trial": frozen.task.id, "avzero.frozen": frozen.digest},
        task,
        files=lambda: {"run.yaml": _yaml({"task": task.id} | record)},
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
        "avzero.benchmark": info.name,
        "avzero.digest": info.digest,
        "avzero.dataset": info.dataset,
        "avzero.feature_set": info.feature_set,
        "avzero.simulated": str(info.simulated).lower(),
        "avzero.model": draft.group.model,
        "avzero.preset": job.protocol.preset.value,
        "avzero.revision": revision,
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
    result, outcome = trial.result, Outcome()
    if trial.reason:
        outcome.tags["avzero.reason"] = trial.reason
    if result is not None:
        outcome.metrics = result_metrics(result, METRIC_KEYS - EPOCH_KEYS)
        outcome.tags["avzero.parameters"] = str(result.parameters)
    elif trial.best is not None:
        outcome.metrics = headline(trial.best.val)
    if trial.state == "complete" and job.tracking.checkpoints == "all":
        outcome.files = lambda: weights(trial.folder)
    return outcome


def sweep_outcome(best: TrialView, complete: Sequence[TrialView]) -> Outcome:
    """Return what a sweep's own run gets at its end; the best trial gets its own pictures, too."""
    result, outcome = best.result, Outcome(also=best.task.id)
    if result is not None:
        outcome.metrics = result_metrics(result)
        outcome.tags["avzero.parameters"] = str(result.parameters)
    outcome.files = lambda: {"per_class_of_trials.parquet": per_class_of_trials(complete)}

    def shared() -> dict[str, bytes]:
        curves = _learning(best.epochs, f"{best.group.key}, trial {best.number}")
        return curves | ({} if result is None else result_files(result))

    outcome.shared = shared
    return outcome


def stage_2_outcome(job: Job, final: FinalView, epochs: Sequence[Epoch]) -> Outcome:
    """Return what a stage-2 run gets at its end."""

    def files() -> dict[str, bytes]:
        curves = _learning(epochs, f"{final.group.key}, stage 2, seed {final.task.seed}")
        return curves | (weights(final.folder) if job.tracking.checkpoints != "none" else {})

    return Outcome(files=files)


def test_outcome(result: Result) -> Outcome:
    """Return what a TEST run gets."""
    tags = {"avzero.parameters": str(result.parameters), "avzero.test_opened": "true"}
    return Outcome(result_metrics(result), tags, lambda: result_files(result))


# -- metrics ------------------------------------------------------------------------------------


def headline(scores: Mapping[str, float]) -> dict[str, float]:
    """Return S, U, HM, ZSL in percent, and beta."""
    values = {key: 100 * scores[key] for key in _PERCENT if key in scores}
    return values | ({"beta": scores["beta"]} if "beta" in scores else {})


def epoch_metrics(epoch: Epoch) -> dict[str, float]:
    """Return the per-epoch metric columns of a run, ``EPOCH_KEYS`` at most."""
    values = {f"val/{key}": value for key, value in headline(epoch.val).items()}
    return values | {
        "train/loss": epoch.loss,
        "train/lr": epoch.lr,
        "train/samples_per_s": epoch.samples_per_second,
    }


def result_metrics(result: Result, room: int = METRIC_KEYS) -> dict[str, float]:
    """Return the headline numbers of a result, ``room`` keys at most.

    Of retrieval only TEST has metrics, and only harmonic means: trials have charts enough.
    """
    values = headline(result.scores[BOTH]) | {
        "AUSUC": 100 * result.area,
        "seconds": result.seconds,
    }
    for name, value in result.extra.items():
        if not name.startswith("mAP_"):
            values[name] = 100 * value
        elif result.kind == "test" and name.endswith("_hm"):
            values[f"retrieval/{name}"] = 100 * value
    return dict(itertools.islice(values.items(), room))


# -- files --------------------------------------------------------------------------------------


def result_files(result: Result) -> dict[str, bytes]:
    """Return the curve as picture and data, the per-class table and the retrieval table."""
    where = "VAL" if result.kind == "val" else "TEST"
    curve = zip(*(result.curve[k] for k in ("beta", "S", "U")), strict=True)
    files = {
        "seen_unseen_curve.png": seen_unseen_curve(
            result, f"{where}: seen-unseen curve, run {result.task}"
        ),
        "seen_unseen_curve.csv": _csv(("beta", "S", "U"), curve),
        "per_class.csv": per_class(result),
    }
    retrieval = [(k, 100 * v) for k, v in result.extra.items() if k.startswith("mAP_")]
    if retrieval:
        files["retrieval.csv"] = _csv(("measure", "%"), retrieval)
    return files


def _learning(epochs: Sequence[Epoch], title: str) -> dict[str, bytes]:
    return {"learning_curves.png": learning_curves(epochs, title)} if epochs else {}


def per_class(result: Result) -> bytes:
    """Return the table of recalls by class."""
    header = ("class_id", "recall", "zsl", "count")
    return _csv(header, zip(*(result.per_class[k] for k in header), strict=True))


def per_class_of_trials(trials: Sequence[TrialView]) -> bytes:
    """Return the recalls by class of all complete trials as one Parquet table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"class_id": pa.int32(), "recall": pa.float32(), "zsl": pa.float32()}
    columns: dict[str, list[Any]] = {name: [] for name in ("trial", *kinds)}
    for trial in trials:
        table = trial.result.per_class if trial.result else {name: [] for name in kinds}
        columns["trial"] += [trial.number] * len(table["class_id"])
        for name in kinds:
            columns[name] += table[name]
    out = io.BytesIO()
    pq.write_table(pa.table(columns, pa.schema({"trial": pa.int32()} | kinds)), out)
    return out.getvalue()


def weights(folder: RunFolder) -> dict[str, bytes]:
    """Return the best weights of a finished run; nothing where they are gone."""
    state = folder.load_state()
    if state is None or "best" not in state.files:
        return {}
    try:
        return {"model.safetensors": folder.storage.read(folder.best_weights_key(state))}
    except KeyError:
        return {}


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """Return a CSV file; a missing value is an empty cell."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(header)
    writer.writerows(rows)
    return out.getvalue().encode()


def _yaml(data: Mapping[str, Any]) -> bytes:
    return yaml.safe_dump(dict(data), sort_keys=False).encode()
