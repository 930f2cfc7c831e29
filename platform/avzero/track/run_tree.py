"""Draft in, requests out: the tree of runs in MLflow. Used by the outbox's thread alone.

A run costs one request to make, one ``log_batch`` each time there is news (before its end the
budget says how often), one per file, and one to close. Nothing is asked per run: the runs of a
sweep are looked up once, page by page, when the first of them is needed. The dataset, one request
more, is attached to the sweep's own run and to final runs; trials are nested below the former and
carry the digest as a tag.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from avzero.revision import code_revision
from avzero.spec import Job
from avzero.track.budget import Budget, Counted
from avzero.track.logged_model import log_model
from avzero.track.payload import (
    RUNNING,
    Draft,
    Outcome,
    common_tags,
    epoch_metrics,
    parent_draft,
    settings,
)
from avzero.track.views import experiment_tags
from avzero.tune.space import Group

_ENTITIES = 1000
_PARAMETERS = 100
"""Per request, MLflow's limits."""
_LOSS = "train/loss"
"""Every epoch has it, so its history says which epochs a run has."""


@dataclass
class _Run:
    """A run in MLflow and what it is known to hold."""

    id: str
    artifacts: str
    status: str
    params: set[str]
    metrics: dict[str, float]
    tags: dict[str, str]
    has_dataset: bool
    model: str = ""
    """Id of the logged model this call made for it."""
    steps: set[int] = field(default_factory=set)
    """Epochs it had when it was taken up."""

    @classmethod
    def of(cls, run: Any) -> _Run:
        """Read what MLflow answers."""
        inputs = getattr(run, "inputs", None)
        return cls(
            run.info.run_id,
            run.info.artifact_uri,
            run.info.status,
            set(run.data.params),
            dict(run.data.metrics),
            dict(run.data.tags),
            bool(inputs and inputs.dataset_inputs),
        )


class RunTree:
    """Writes drafts to MLflow.

    Args:
        client: an ``MlflowClient``.
        uri: its tracking URI.
        job: the job all runs belong to.
    """

    def __init__(self, client: Any, uri: str, job: Job) -> None:
        self._client = Counted(client)
        self._budget = Budget(self._client, uploads=job.tracking.checkpoints == "all")
        self._uri = uri
        self._job = job
        self._experiments: dict[str, str] = {}
        self._looked_up: set[tuple[str, bool]] = set()
        self._runs: dict[str, _Run] = {}
        self._doubted: set[str] = set()
        """Those that ever were: a request that seemed lost may be carried out late."""
        self._in_doubt: set[str] = set()
        """Identities whose creation was not answered: MLflow may have made the run or not."""

    def deliver(self, draft: Draft) -> None:
        """Send what is new in a draft. After an error half-way, deliver it again."""
        # In this order: a closed draft has all its epochs.
        closed = draft.status != RUNNING
        count = len(draft.epochs)
        if draft.kind == "trial" and not closed and not self._budget.allows(draft.identity):
            return  # the next rung, or the end, sends it all
        run = self._find(draft)
        if run is None:
            run = self._create(draft)
        elif draft.only_missing and run.status != RUNNING:
            return
        elif not closed and run.status != RUNNING:
            self._client.update_run(run.id, status=RUNNING)
            run.status = RUNNING
        if not run.has_dataset and draft.kind != "trial":
            self._log_dataset(run, draft.group)
        outcome = Outcome()
        if closed and not (draft.marks and draft.marks.items() <= run.tags.items()):
            outcome = draft.make_outcome(run.id)
        self._log(run, draft, count, outcome)
        self._upload(run, draft.files())
        draft.files = dict
        if closed:
            self._close(run, draft, outcome)
            if draft.kind == "trial":
                self._budget.closed(draft.identity)

    def _close(self, run: _Run, draft: Draft, outcome: Outcome) -> None:
        """Send the files of the outcome, then the marks, then the status."""
        from mlflow.entities import RunTag

        for identity in (
            self._doubted if draft.kind == "sweep" else self._doubted & {draft.identity}
        ):
            self._remove_others(draft.group, identity)
        files = outcome.files()
        shared = outcome.shared()
        self._upload(run, files | shared)
        if outcome.also in self._runs:
            self._upload(self._runs[outcome.also], shared)
        self._log_model(run, draft, outcome)
        marks = {k: v for k, v in draft.marks.items() if run.tags.get(k) != v}
        if marks:
            self._client.log_batch(run.id, tags=[RunTag(k, v) for k, v in marks.items()])
            run.tags |= marks
        self._client.set_terminated(run.id, status=draft.status, end_time=draft.ended)
        run.status = draft.status

    def _log_model(self, run: _Run, draft: Draft, outcome: Outcome) -> None:
        """Log the system of a final run as an MLflow model."""
        files = outcome.model()
        if not files or draft.task is None:
            return
        if not run.model:
            info = draft.group.benchmark
            name = f"{draft.group.model}-{info.name}-seed-{draft.task.seed}"
            made = self._client.create_logged_model(
                self._experiment(draft.group), re.sub(r"[^\w-]", "-", name), run.id
            )
            run.model = made.model_id
        with tempfile.TemporaryDirectory() as scratch:
            log_model(self._client, run.model, run.id, files, Path(scratch))

    # -- finding and making ---------------------------------------------------------------------

    def _find(self, draft: Draft) -> _Run | None:
        """Return the run of a draft, if there is one."""
        if draft.identity in self._in_doubt:
            self._doubted.add(draft.identity)
            self._look_up(draft.group, f"tags.`avzero.run` = '{draft.identity}'")
            self._in_doubt.remove(draft.identity)
        if draft.identity not in self._runs:
            self._experiment(draft.group)
            # Final runs need not read hundreds of trials.
            trial = draft.kind == "trial"
            scope = (draft.group.benchmark.name, trial)
            if scope not in self._looked_up:
                self._look_up(draft.group, f"tags.`avzero.kind` {'=' if trial else '!='} 'trial'")
                self._looked_up.add(scope)
        return self._runs.get(draft.identity)

    def _look_up(self, group: Group, condition: str) -> None:
        """Read the sweep's runs; what a lost answer made twice is removed."""
        found: dict[str, list[Any]] = {}
        for run in self._search(group, condition):
            found.setdefault(run.data.tags["avzero.run"], []).append(run)
        for identity, runs in found.items():
            keep = max(runs, key=lambda r: (r.info.status != RUNNING, len(r.data.metrics)))
            for extra in runs:
                if extra is not keep:
                    self._client.delete_run(extra.info.run_id)
            self._runs[identity] = _Run.of(keep)

    def _remove_others(self, group: Group, identity: str) -> None:
        """Remove runs of an identity other than the one that is written to."""
        own = self._runs.get(identity)
        for run in self._search(group, f"tags.`avzero.run` = '{identity}'"):
            if own is not None and run.info.run_id != own.id:
                self._client.delete_run(run.info.run_id)

    def _search(self, group: Group, condition: str) -> Iterator[Any]:
        """Yield the sweep's runs that meet a condition, oldest first."""
        experiment, token = self._experiment(group), None
        while True:
            page = self._client.search_runs(
                [experiment],
                filter_string=f"tags.`avzero.sweep` = '{self._job.name}' and {condition}",
                max_results=_ENTITIES,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            yield from page
            token = page.token
            if not token:
                break

    def _create(self, draft: Draft) -> _Run:
        """Make a run with all its tags."""
        tags = common_tags(self._job, draft, code_revision()) | draft.tags
        if draft.kind != "sweep":
            parent = draft.parent or parent_draft(self._job, draft.group)
            # Its own turn may come later, and finds it then.
            tags["mlflow.parentRunId"] = (self._find(parent) or self._create(parent)).id
        experiment = self._experiment(draft.group)
        self._in_doubt.add(draft.identity)
        made = self._client.create_run(experiment, start_time=draft.started, tags=tags)
        self._in_doubt.remove(draft.identity)
        self._runs[draft.identity] = _Run.of(made)
        return self._runs[draft.identity]

    def _experiment(self, group: Group) -> str:
        """Return the experiment of a group's benchmark, made if needed."""
        from mlflow.exceptions import MlflowException

        name = group.benchmark.name
        if name not in self._experiments:
            found = self._client.get_experiment_by_name(name)
            if found is None:
                try:
                    self._experiments[name] = self._client.create_experiment(
                        name, tags=experiment_tags()
                    )
                    self._looked_up |= {(name, True), (name, False)}  # it is empty
                except MlflowException:  # made by somebody else meanwhile, or no answer
                    found = self._client.get_experiment_by_name(name)
                    if found is None:
                        raise
            if found is not None:
                self._experiments[name] = found.experiment_id
        return self._experiments[name]

    # -- filling --------------------------------------------------------------------------------

    def _log_dataset(self, run: _Run, group: Group) -> None:
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
        self._client.log_inputs(run.id, [DatasetInput(dataset=dataset, tags=[context])])
        run.has_dataset = True

    def _log(self, run: _Run, draft: Draft, count: int, outcome: Outcome) -> None:
        """Send parameters, the outcome's tags, and metrics up to the draft's ``count``-th epoch."""
        from mlflow.entities import Metric, Param, RunTag

        wanted = settings(draft.task) if draft.task else {}
        params = [Param(k, v) for k, v in wanted.items() if k not in run.params]
        tags = [RunTag(k, v) for k, v in outcome.tags.items() if run.tags.get(k) != v]
        blocks = [
            (upto, [Metric(k, v, at, step) for k, v in values.items()])
            for upto, at, step, values in self._news(run, draft, count, outcome)
        ]
        while params or tags or blocks:
            now, params = params[:_PARAMETERS], params[_PARAMETERS:]
            room = _ENTITIES - len(now) - len(tags)
            metrics: list[Any] = []
            upto = draft.sent
            while blocks and len(metrics) + len(blocks[0][1]) <= room:
                upto, block = blocks.pop(0)
                metrics += block
            self._client.log_batch(run.id, metrics=metrics, params=now, tags=tags)
            run.params |= {param.key for param in now}
            run.tags |= {tag.key: tag.value for tag in tags}
            run.metrics |= {metric.key: metric.value for metric in metrics}
            draft.sent = upto
            tags = []

    def _news(
        self, run: _Run, draft: Draft, count: int, outcome: Outcome
    ) -> Iterator[tuple[int, int, int, Mapping[str, float]]]:
        """Yield (epochs sent with it, milliseconds, step, metrics) of all that the run lacks."""
        if draft.sent is None:
            # Taken up from an earlier call: ask once what it has. Not so for a run made just now.
            known = self._client.get_metric_history(run.id, _LOSS) if _LOSS in run.metrics else []
            run.steps = {metric.step for metric in known}
            draft.sent = 0
        for number in range(draft.sent, count):
            at, epoch = draft.epochs[number]
            if epoch.epoch not in run.steps:
                yield number + 1, at, epoch.epoch, epoch_metrics(epoch)
        lacking = {k: v for k, v in outcome.metrics.items() if run.metrics.get(k) != v}
        if lacking:
            yield count, draft.ended, 0, lacking

    def _upload(self, run: _Run, files: Mapping[str, bytes]) -> None:
        """Send files; with a tracking server that is a request each."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        if not files:
            return
        with tempfile.TemporaryDirectory() as scratch:
            for name, data in files.items():
                (Path(scratch) / name).write_bytes(data)
            # The client's own method would ask for the run first, to learn this address.
            self._client.requests += len(files)
            place: Any = get_artifact_repository(run.artifacts, tracking_uri=self._uri)
            place.log_artifacts(scratch)
