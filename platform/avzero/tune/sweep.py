"""Running a sweep: Ray Tune executes the trials the studies hand out.

Ray Tune places trials, retries those whose worker died, and keeps one long-lived actor per slot
(``reuse_actors``: a new trial costs 0.2 s instead of 2 to 3 s and a process). It keeps no state
that matters: what to run next, what to stop early and what is finished is in the Optuna studies,
so a sweep continues by running the same command, without ``Tuner.restore``, which would forget
the evidence for early stopping.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from avzero.canon import canonical
from avzero.data.store import FeatureStore
from avzero.errors import UserError
from avzero.spec import Job
from avzero.train.records import Epoch
from avzero.tune.listener import Listener, TrialView
from avzero.tune.runner import TrialRunner
from avzero.tune.space import Group
from avzero.tune.study import GroupStudy, Journal

METRIC = "hm"


class Sweep:
    """A job's groups, studies and index; ``run`` executes what is missing.

    Raises:
        UserError: the job contradicts its own earlier trials, or names what does not exist.
    """

    def __init__(self, job: Job, store: FeatureStore, listeners: Sequence[Listener] = ()) -> None:
        self.job = job
        self.store = store
        self.listeners = tuple(listeners)
        infos = [store.info(name) for name in job.benchmarks]
        self.groups = [Group(job, info, model) for info in infos for model in job.models]
        self._claim_name()
        journal = Journal(store.storage, job.name)
        self.studies = {g.key: GroupStudy(g, journal, store.storage) for g in self.groups}

    def _claim_name(self) -> None:
        """Write the job beside its trials; refuse a job that changed what trials depend on."""
        key = f"sweeps/{self.job.name}/job.json"
        digests = {group.key: group.benchmark.digest for group in self.groups}
        claim = {"frozen": self.job.frozen_part() | {"digests": digests}}
        try:
            earlier = json.loads(self.store.storage.read(key))["frozen"]
        except KeyError:
            earlier = claim["frozen"]
        changes = difference(earlier, claim["frozen"])
        if changes:
            raise UserError(
                f"job {self.job.name}: differs from its earlier trials in {'; '.join(changes)}. "
                "More trials, points or seeds may be added; for anything else choose another name"
            )
        full = claim | {"job": self.job.model_dump(mode="json")}
        self.store.storage.write(key, canonical(full).encode())

    @property
    def remaining(self) -> int:
        """Number of trials still to run."""
        return sum(study.remaining for study in self.studies.values())

    def done(self) -> list[TrialView]:
        """Return the trials that have ended."""
        return [view for study in self.studies.values() for view in study.done()]

    def run(self) -> bool:
        """Run the missing trials on the connected Ray cluster; return whether all ended.

        False means interrupted (Ctrl-C): running the same command again goes on.
        """
        for listener in self.listeners:
            listener.sweep_started(self.job, self.groups, self.done())
        interrupted = False
        if self.remaining:
            desk = TrialDesk(self)
            with tempfile.TemporaryDirectory(prefix="avzero-tune-") as scratch:
                self._tuner(desk, Path(scratch)).fit()
            interrupted = bool(desk.open_trials) or self.remaining > 0
        for listener in self.listeners:
            listener.sweep_ended(self.done(), interrupted)
        return not interrupted

    def _tuner(self, desk: TrialDesk, scratch: Path) -> tune.Tuner:
        resources = self.job.resources
        share = {"cpu": resources.cpus, "gpu": resources.gpus}
        if resources.workers > 1:
            # The Ray Train workers bring their own resources; a share of nothing is not allowed,
            # and any share of a CPU could make a trial that fills the machine impossible to place.
            share = {"cpu": 0, "gpu": 0, "memory": 1 << 20}
        return tune.Tuner(
            tune.with_resources(TrialRunner, share),
            param_space={
                "store": self.store.storage.url,
                "resources": resources.model_dump(mode="json"),
            },
            tune_config=tune.TuneConfig(
                metric=METRIC,
                mode="max",
                search_alg=StudySearcher(desk),
                scheduler=StudyScheduler(desk),
                num_samples=self.remaining,
                max_concurrent_trials=concurrency(self.job),
                reuse_actors=True,
                trial_name_creator=lambda trial: trial.config["id"],
                trial_dirname_creator=lambda trial: trial.config["id"],
            ),
            run_config=tune.RunConfig(
                name=self.job.name,
                storage_path=str(scratch),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=resources.max_failures),
                # Runs keep their own checkpoints (train.folder), readable without Ray.
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )


class TrialDesk:
    """Where Ray Tune's trials and the studies' trials meet; lives in the driver."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.open_trials: dict[str, TrialView] = {}

    def hand_out(self, tune_id: str) -> dict[str, Any] | None:
        """Return the configuration of the next trial, from the groups in turn."""
        waiting = [study for study in self.sweep.studies.values() if study.remaining]
        if not waiting:
            return None
        study = max(waiting, key=lambda s: s.remaining / s.group.job.search.trials)
        view = study.next()
        if view is None:
            return None
        self.open_trials[tune_id] = view
        for listener in self.sweep.listeners:
            listener.trial_started(view)
        return {"task": view.task.model_dump_json(), "id": view.task.id}

    def take(self, tune_id: str, result: dict[str, Any]) -> bool:
        """Take a result; return whether the trial should be stopped early."""
        view = self.open_trials[tune_id]
        epoch = Epoch.from_dict(json.loads(result["record"]), replayed=result["replayed"])
        if any(known.epoch == epoch.epoch for known in view.epochs):
            return False  # a restarted worker replays what was taken already
        stop = self.sweep.studies[view.group.key].report(view, epoch)
        for listener in self.sweep.listeners:
            listener.epoch_ended(view, epoch)
        if stop:
            view.state = "pruned"
        return stop

    def close(self, tune_id: str, result: dict[str, Any], error: bool) -> None:
        """Record how a trial ended, from its last result."""
        view = self.open_trials.pop(tune_id)
        if error:
            view.state = "failed"
            view.reason = "its worker died more often than resources.max_failures"
        elif view.state == "running":
            view.reason = result.get("failed", "")
            view.state = "failed" if view.reason else "complete"
        if view.state == "complete":
            view.result = view.folder.load_result("val")
        self.sweep.studies[view.group.key].close(view)
        key = f"sweeps/{self.sweep.job.name}/trials/{view.group.key}/{view.number:05d}.json"
        self.sweep.store.storage.write(key, canonical(trial_record(view)).encode())
        for listener in self.sweep.listeners:
            listener.trial_ended(view)


class _AtDesk:
    """Ray Tune pickles searcher and scheduler for a restore we never do: leave the desk out."""

    _desk: TrialDesk

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_desk"}


class StudySearcher(_AtDesk, Searcher):
    """Ray Tune's view of the studies: what to run next, and what has ended."""

    def __init__(self, desk: TrialDesk) -> None:
        super().__init__(metric=METRIC, mode="max")
        self._desk = desk

    def suggest(self, trial_id: str) -> Any:
        """Return the next configuration, or that there is none."""
        return self._desk.hand_out(trial_id) or Searcher.FINISHED

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Record the end of a trial."""
        self._desk.close(trial_id, result or {}, error)

    def save(self, checkpoint_path: str) -> None:
        """Keep nothing: the studies are the truth."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing: a sweep continues from its studies."""


class StudyScheduler(_AtDesk, FIFOScheduler):
    """Passes epochs to the studies and stops what they prune."""

    def __init__(self, desk: TrialDesk) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._desk = desk

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Take one result of one trial."""
        del tune_controller
        stop = self._desk.take(trial.trial_id, result)
        return str(TrialScheduler.STOP if stop else TrialScheduler.CONTINUE)


def concurrency(job: Job) -> int:
    """Return how many trials the connected cluster can hold at once.

    Raises:
        UserError: not even one: the job asks for more than there is.
    """
    import ray

    need, have = job.resources, ray.cluster_resources()  # type: ignore[no-untyped-call]
    fits = []
    for name, per_worker in (("CPU", need.cpus), ("GPU", need.gpus)):
        if per_worker:
            fits.append(int(have.get(name, 0) / (per_worker * need.workers)))
            if not fits[-1]:
                raise UserError(
                    f"job {job.name}: a trial needs {per_worker * need.workers:g} {name} "
                    f"({need.workers} workers), the cluster has {have.get(name, 0):g}; "
                    "lower resources, or add nodes"
                )
    most = min(fits, default=1)
    return min(most, need.concurrent) if need.concurrent else most


def trial_record(view: TrialView) -> dict[str, Any]:
    """Return a trial's line in the sweep's index, readable without Optuna or MLflow."""
    best = view.best
    return {
        "benchmark": view.group.benchmark.name,
        "digest": view.group.benchmark.digest,
        "model": view.group.model,
        "number": view.number,
        "task": view.task.id,
        "state": view.state,
        "reason": view.reason,
        "values": view.values,
        "epochs": len(view.epochs),
        "best_epoch": best.epoch if best else None,
        "val": best.val if best else {},
        "seconds": round(sum(epoch.seconds for epoch in view.epochs), 3),
    }


def difference(old: Any, new: Any, path: str = "") -> list[str]:
    """Return where two JSON values differ, as ``key: old -> new``."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            inner = f"{path}.{key}" if path else str(key)
            found += difference(old.get(key), new.get(key), inner)
        return found
    return [] if old == new else [f"{path}: {json.dumps(old)} -> {json.dumps(new)}"]
