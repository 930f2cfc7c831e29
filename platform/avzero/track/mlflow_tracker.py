"""The MLflow run tree: one experiment per benchmark, one parent run per sweep, trials nested.

Runs are found by the tag ``avzero.run`` (the task's identity), so running a command again updates
runs instead of adding copies, and a deleted tracking database is filled again from the store.
Scores are logged in percent, as the field prints them; the store keeps fractions.

MLflow is written by the driver only, between results; no training step waits for it.
"""

from __future__ import annotations

import csv
import functools
import io
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from avzero.canon import ID_LENGTH
from avzero.errors import UserError
from avzero.protocol.calibration import BOTH
from avzero.revision import code_revision
from avzero.spec import Job, Task
from avzero.track.figures import learning_curves, seen_unseen_curve
from avzero.train.folder import RunFolder
from avzero.train.records import Epoch, Result
from avzero.tune.listener import FinalView, Listener, TrialView
from avzero.tune.space import Group

_FLUSH_SECONDS = 10.0
_STATUS = {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}
_PERCENT = ("S", "U", "HM", "ZSL")


@dataclass
class _Run:
    """An MLflow run and the epochs it has not been sent yet."""

    id: str
    waiting: list[Epoch] = field(default_factory=list)
    flushed: float = field(default_factory=time.monotonic)


Hook = TypeVar("Hook", bound=Callable[..., None])


def _guarded(hook: Hook) -> Hook:
    """Let a tracker that stops answering cost its records only, never a trial.

    What is missed is in the store, and ``sweep_ended`` or the next command fills it in.
    """

    @functools.wraps(hook)
    def wrapper(self: MlflowTracker, *arguments: Any) -> None:
        from botocore.exceptions import BotoCoreError
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        if self.down:
            return
        try:
            hook(self, *arguments)
        except (MlflowException, SQLAlchemyError, BotoCoreError, OSError) as error:
            self.down = True
            sys.stderr.write(
                f"avzero: MLflow at {self.uri} has stopped answering "
                f"({str(error).splitlines()[0]}); the sweep goes on, results are in the store, and "
                "the next avzero sweep or test fills the missing runs in\n"
            )

    return wrapper  # type: ignore[return-value]


class MlflowTracker(Listener):
    """Logs a sweep and its final runs.

    Args:
        uri: MLflow tracking URI.
        job: the job; its ``tracking.checkpoints`` says which runs carry weights.

    Raises:
        UserError: nothing answers at the URI.
    """

    def __init__(self, uri: str, job: Job) -> None:
        # Explicit: the default depends on the environment, and usage data stays here.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("DO_NOT_TRACK", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
        # The default retries block for minutes, and Ray Tune's loop with them.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        logging.getLogger("alembic").setLevel(logging.ERROR)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        self._job = job
        self.uri = uri
        self.down = False
        try:
            self._client: Any = MlflowClient(tracking_uri=uri)
            self._client.search_experiments(max_results=1)
        except (MlflowException, SQLAlchemyError, OSError) as error:
            raise UserError(
                f"MLflow at {uri}: does not answer ({str(error).splitlines()[0]}); start it, "
                "correct tracking.uri, or set it to off"
            ) from error
        self._experiments: dict[str, str] = {}
        self._parents: dict[str, str] = {}
        self._runs: dict[str, _Run] = {}

    # -- the run tree ---------------------------------------------------------------------------

    @_guarded
    def sweep_started(self, job: Job, groups: Sequence[Group], done: Sequence[TrialView]) -> None:
        """Make experiments and parent runs; fill in trials an earlier tracker did not see."""
        for group in groups:
            self._client.update_run(self._parent(group), status="RUNNING")
        self._fill_in(done)

    def _fill_in(self, done: Sequence[TrialView]) -> None:
        for view in done:
            if view.twin_of is None and not self._is_finished(view.group, view.task.id):
                self._start_trial(view).waiting.extend(view.epochs)
                self._end_trial(view)

    @_guarded
    def trial_started(self, trial: TrialView) -> None:
        """Create or find the trial's run."""
        self._start_trial(trial)

    @_guarded
    def epoch_ended(self, trial: TrialView, epoch: Epoch) -> None:
        """Keep an epoch; send the kept ones every few seconds."""
        self._keep(self._runs[trial.task.id], epoch)

    @_guarded
    def trial_ended(self, trial: TrialView) -> None:
        """Send what is left, the result and its artifacts; close the run."""
        if trial.twin_of is None:
            self._end_trial(trial)

    def _end_trial(self, trial: TrialView) -> None:
        run = self._runs.pop(trial.task.id)
        self._flush(run)
        if trial.reason:
            self._client.set_tag(run.id, "avzero.reason", trial.reason)
        if trial.result is not None:
            self._log_result(run.id, trial.result)
        elif trial.best is not None:
            self._log_metrics(run.id, headline(trial.best.val))
        if trial.epochs:
            picture = learning_curves(trial.epochs, f"{trial.group.key}, trial {trial.number}")
            self._artifact(run.id, "learning_curves.png", picture)
        if trial.state == "complete" and self._job.tracking.checkpoints == "all":
            self._weights(run.id, trial.folder)
        self._client.set_terminated(run.id, status=_STATUS[trial.state])

    def sweep_ended(self, trials: Sequence[TrialView], interrupted: bool) -> None:
        """Fill in what was missed, write the best trial onto its parent, close the parents."""
        self.down = False  # a tracker that answers again gets everything now
        self._close_sweep(trials, interrupted)

    @_guarded
    def _close_sweep(self, trials: Sequence[TrialView], interrupted: bool) -> None:
        self._fill_in(trials)
        for key, parent in self._parents.items():
            mine = [t for t in trials if t.group.key == key and t.state == "complete"]
            if mine:
                best = max(mine, key=lambda t: (t.hm, -t.number))
                if best.result is not None:
                    self._log_result(parent, best.result)
                self._client.set_tag(parent, "avzero.best_trial", str(best.number))
            self._client.set_terminated(parent, status="KILLED" if interrupted else "FINISHED")

    @_guarded
    def final_started(self, final: FinalView) -> None:
        """Create or find the runs of a final task below the sweep's parent."""
        for identity in [name for name in self._runs if name.endswith("-stage1")]:
            self._finish(self._runs.pop(identity))
        if final.stored and self._is_finished(final.group, _identity(final, "test")):
            return
        for kind in ("stage2", "test") if final.task.stage == 2 else ("stage1",):
            tags = {"avzero.trial": final.frozen.task.id, "avzero.frozen": final.frozen.digest}
            name = f"{final.group.model} {kind} seed {final.task.seed}"
            run = self._start(final.group, _identity(final, kind), kind, name, tags)
            self._log_task(run.id, final.group, final.task, final.frozen.task.config)

    @_guarded
    def final_epoch_ended(self, final: FinalView, epoch: Epoch) -> None:
        """Keep an epoch of a final run."""
        run = self._runs.get(_identity(final, f"stage{final.task.stage}"))
        if run is not None:
            self._keep(run, epoch)

    @_guarded
    def test_scored(self, final: FinalView, result: Result) -> None:
        """Log the TEST scores; close the stage-2 run and the TEST run."""
        if _identity(final, "test") not in self._runs:
            return
        stage_2, test = (self._runs.pop(_identity(final, kind)) for kind in ("stage2", "test"))
        if self._job.tracking.checkpoints != "none":
            self._weights(stage_2.id, final.folder)
        self._log_result(test.id, result)
        self._client.set_tag(test.id, "avzero.test_opened", "true")
        for run in (stage_2, test):
            self._finish(run)

    def _finish(self, run: _Run) -> None:
        """Send what is left and close a run."""
        self._flush(run)
        self._client.set_terminated(run.id, status="FINISHED")

    # -- runs -----------------------------------------------------------------------------------

    def _experiment(self, group: Group) -> str:
        """Return the experiment of a group's benchmark, made if needed."""
        from mlflow.exceptions import MlflowException

        name = group.benchmark.name
        if name not in self._experiments:
            found = self._client.get_experiment_by_name(name)
            if found is None:
                try:
                    # The tag makes the UI open the page of runs instead of its chat tooling.
                    self._experiments[name] = self._client.create_experiment(
                        name, tags={"mlflow.experimentKind": "custom_model_development"}
                    )
                except MlflowException:  # made by somebody else meanwhile
                    found = self._client.get_experiment_by_name(name)
            if found is not None:
                self._experiments[name] = found.experiment_id
        return self._experiments[name]

    def _parent(self, group: Group) -> str:
        """Return the sweep's parent run in a group's experiment."""
        if group.key not in self._parents:
            task = f"sweep-{self._job.name}-{group.key}"
            name = f"{self._job.name}: {group.model}"
            run_id = self._start(group, task, "sweep", name, {}, parent=None).id
            text = yaml.safe_dump(self._job.model_dump(mode="json"), sort_keys=False)
            self._artifact(run_id, "job.yaml", text.encode())
            self._parents[group.key] = run_id
        return self._parents[group.key]

    def _find(self, group: Group, identity: str) -> Any:
        """Return the run with an identity, or None; duplicates of a lost answer are removed."""
        runs = self._client.search_runs(
            [self._experiment(group)],
            filter_string=(
                f"tags.`avzero.run` = '{identity}' and tags.`avzero.sweep` = '{self._job.name}'"
            ),
            order_by=["attributes.start_time ASC"],
        )
        for extra in runs[1:]:
            self._client.delete_run(extra.info.run_id)
        return runs[0] if runs else None

    def _is_finished(self, group: Group, identity: str) -> bool:
        """Return whether a run exists and is closed."""
        run = self._find(group, identity)
        return run is not None and run.info.status != "RUNNING"

    def _start(
        self,
        group: Group,
        identity: str,
        kind: str,
        name: str,
        tags: Mapping[str, str],
        parent: str | None = "sweep",
    ) -> _Run:
        """Create or find a run and make it RUNNING; remember it under its identity."""
        run = self._find(group, identity)
        if run is None:
            info = group.benchmark
            every = {
                "avzero.run": identity,
                "avzero.sweep": self._job.name,
                "avzero.kind": kind,
                "avzero.benchmark": info.name,
                "avzero.digest": info.digest,
                "avzero.dataset": info.dataset,
                "avzero.feature_set": info.feature_set,
                "avzero.simulated": str(info.simulated).lower(),
                "avzero.model": group.model,
                "avzero.preset": self._job.protocol.preset.value,
                "avzero.revision": code_revision(),
                "mlflow.runName": name,
            }
            if parent is not None:
                every["mlflow.parentRunId"] = self._parent(group)
            run = self._client.create_run(self._experiment(group), tags=every | dict(tags))
            self._log_dataset(run.info.run_id, group)
        elif parent is not None:
            self._client.update_run(run.info.run_id, status="RUNNING")
        self._runs[identity] = _Run(run.info.run_id)
        return self._runs[identity]

    def _start_trial(self, trial: TrialView) -> _Run:
        name = f"{trial.group.model} trial {trial.number}"
        tags = {"avzero.number": str(trial.number), "avzero.folder": trial.folder.url}
        run = self._start(trial.group, trial.task.id, "trial", name, tags)
        self._log_task(run.id, trial.group, trial.task, trial.values)
        return run

    def _log_dataset(self, run_id: str, group: Group) -> None:
        """Attach the benchmark with its digest as the run's dataset."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        info = group.benchmark
        dataset = Dataset(
            name=info.name,
            digest=info.digest[:32],
            source_type="avzero",
            source=f"avzero:{info.name}@{info.digest}",
        )
        context = InputTag(key="mlflow.data.context", value="train and select")
        self._client.log_inputs(run_id, [DatasetInput(dataset=dataset, tags=[context])])

    def _log_task(self, run_id: str, group: Group, task: Task, searched: Mapping[str, Any]) -> None:
        """Log every setting of a run as parameters, and the run itself as YAML."""
        from mlflow.entities import Param

        settings: dict[str, Any] = {"model": group.model, "seed": task.seed, "stage": task.stage}
        settings |= task.train.model_dump(mode="json") | dict(task.config)
        for key, value in task.protocol.model_dump(mode="json").items():
            settings[f"protocol.{key}"] = value
        params = [Param(key, str(value)) for key, value in settings.items()]
        self._client.log_batch(run_id, params=params[:100])
        record = {"task": task.id} | task.model_dump(mode="json") | {"searched": dict(searched)}
        self._artifact(run_id, "run.yaml", yaml.safe_dump(record, sort_keys=False).encode())

    # -- metrics and artifacts ------------------------------------------------------------------

    def _keep(self, run: _Run, epoch: Epoch) -> None:
        """Buffer an epoch; send the buffer when it has waited long enough."""
        run.waiting.append(epoch)
        if time.monotonic() - run.flushed > _FLUSH_SECONDS:
            self._flush(run)

    def _flush(self, run: _Run) -> None:
        """Send buffered epochs that the run does not have yet, in one request."""
        from mlflow.entities import Metric

        epochs, run.waiting, run.flushed = run.waiting, [], time.monotonic()
        if any(epoch.replayed for epoch in epochs):
            known = {m.step for m in self._client.get_metric_history(run.id, "train/loss")}
            epochs = [epoch for epoch in epochs if epoch.epoch not in known]
        now = int(time.time() * 1000)
        metrics = [
            Metric(key, value, now, epoch.epoch)
            for epoch in epochs
            for key, value in epoch_metrics(epoch).items()
        ]
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(run.id, metrics=metrics[start : start + 1000])

    def _log_metrics(self, run_id: str, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(
            run_id, metrics=[Metric(key, value, now, 0) for key, value in values.items()]
        )

    def _log_result(self, run_id: str, result: Result) -> None:
        """Log the headline numbers, the curve as picture and data, and the per-class table."""
        values = headline(result.scores[BOTH]) | {
            "AUSUC": 100 * result.area,
            "seconds": result.seconds,
        }
        extra = {name: 100 * value for name, value in result.extra.items()}
        retrieval = {name: value for name, value in extra.items() if name.startswith("mAP_")}
        for name, value in extra.items():
            if name not in retrieval:
                values[name] = value
            elif result.kind == "test" and name.endswith("_hm"):
                # Up to 15 numbers: trials have charts enough, so all of them go into a file.
                values[f"retrieval/{name}"] = value
        if retrieval:
            self._artifact(run_id, "retrieval.csv", _csv(("measure", "%"), retrieval.items()))
        self._log_metrics(run_id, values)
        self._client.set_tag(run_id, "avzero.parameters", str(result.parameters))
        where = "VAL" if result.kind == "val" else "TEST"
        picture = seen_unseen_curve(result, f"{where}: seen-unseen curve, run {result.task}")
        self._artifact(run_id, "seen_unseen_curve.png", picture)
        curve = zip(*(result.curve[k] for k in ("beta", "S", "U")), strict=True)
        self._artifact(run_id, "seen_unseen_curve.csv", _csv(("beta", "S", "U"), curve))
        table = zip(
            *(result.per_class[k] for k in ("class_id", "recall", "zsl", "count")), strict=True
        )
        self._artifact(run_id, "per_class.csv", _csv(("class_id", "recall", "zsl", "count"), table))

    def _weights(self, run_id: str, folder: RunFolder) -> None:
        """Attach the best weights of a finished run."""
        state = folder.load_state()
        if state is not None and "best" in state.files:
            data = folder.storage.read(folder.best_weights_key(state))
            self._artifact(run_id, "model.safetensors", data)

    def _artifact(self, run_id: str, name: str, data: bytes) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / name
            path.write_bytes(data)
            self._client.log_artifact(run_id, str(path))


def _identity(final: FinalView, kind: str) -> str:
    """Return the identity of a final run; the same weights with another beta are another TEST."""
    frozen = f"-{final.frozen.digest[:ID_LENGTH]}" if kind == "test" else ""
    return f"{final.task.id}{frozen}-{kind}"


def headline(scores: Mapping[str, float]) -> dict[str, float]:
    """Return S, U, HM, ZSL in percent, and beta."""
    values = {key: 100 * scores[key] for key in _PERCENT if key in scores}
    return values | ({"beta": scores["beta"]} if "beta" in scores else {})


def epoch_metrics(epoch: Epoch) -> dict[str, float]:
    """Return the per-epoch metric columns of a run."""
    values = {f"val/{key}": value for key, value in headline(epoch.val).items()}
    return values | {
        "train/loss": epoch.loss,
        "train/lr": epoch.lr,
        "train/samples_per_s": epoch.samples_per_second,
    }


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """Return a CSV file; a missing value is an empty cell."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(header)
    writer.writerows(rows)
    return out.getvalue().encode()
