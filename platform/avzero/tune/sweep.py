"""Running a sweep: Ray Tune executes the trials the studies hand out.

Ray Tune places arrays, one per GPU or per core, and restarts those whose process died; an array
trains several trials at once (``train.array``) and is refilled with others as they end, so a trial
costs no process of its own. Tune keeps no state that matters: what to run next, what to stop early
and what is finished is in the Optuna studies, so a sweep continues by running the same command,
without ``Tuner.restore``, which would forget the evidence for early stopping.
"""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from optuna.distributions import distribution_to_json
from ray import tune

from avzero.canon import canonical
from avzero.data.benchmark import BenchmarkInfo
from avzero.data.store import FeatureStore
from avzero.errors import UserError
from avzero.models._registry import model_class
from avzero.spec import Job, Resources
from avzero.train.data import StageData
from avzero.tune.desk import Desk, Mailbox
from avzero.tune.journal import Journal
from avzero.tune.listener import Listener, TrialView
from avzero.tune.nodes import cluster_nodes, misfit, room
from avzero.tune.place import METRIC, ArrayScheduler, ArraySearcher
from avzero.tune.pulse import Pulse
from avzero.tune.runner import ArrayRunner
from avzero.tune.space import Group
from avzero.tune.study import GroupStudy


class Sweep:
    """A job's groups, studies and index; ``run`` executes what is missing.

    Raises:
        UserError: the job contradicts its own earlier trials, or names what does not exist.
    """

    def __init__(self, job: Job, store: FeatureStore, listeners: Sequence[Listener] = ()) -> None:
        self.job = job
        self.store = store
        self.listeners = tuple(listeners)
        self.use = 0.0
        """Share of the slots that was used, after ``run``."""
        self._claim_key = f"sweeps/{job.name}/job.json"
        earlier = self._earlier_claim()
        infos = {name: self._info(name, earlier) for name in job.benchmarks}
        self.groups = [
            Group(job, info, model, job.text_of(name)[1])
            for name, info in infos.items()
            for model in job.models
        ]
        self._check_groups()
        self._claim = {
            "settings": job.frozen_part(),
            "benchmarks": {name: info.digest for name, info in infos.items()},
            "groups": {
                group.key: {
                    "digest": group.benchmark.digest,
                    "fixed": dict(job.fixed.get(group.model, {})),
                    "space": {
                        name: json.loads(distribution_to_json(range_))
                        for name, range_ in group.distributions.items()
                    },
                }
                for group in self.groups
            },
            "job": job.model_dump(mode="json"),
        }
        self._check_claim(earlier)
        self.journal = Journal(store.storage, job.name)
        self._pulse = Pulse()
        self.journal.numbers = self._pulse.numbers
        self.studies = self._open_studies()

    def _earlier_claim(self) -> dict[str, Any]:
        """Return what an earlier call of the same sweep wrote, or nothing."""
        try:
            return dict(json.loads(self.store.storage.read(self._claim_key)))
        except KeyError:
            return {}

    def _info(self, reference: str, earlier: dict[str, Any]) -> BenchmarkInfo:
        """Return a benchmark; a sweep stays with the version its earlier trials used."""
        # The same benchmark with another text set is pinned to the same version.
        name = self.job.text_of(reference)[0]
        pinned = {self.job.text_of(k)[0]: v for k, v in earlier.get("benchmarks", {}).items()}
        digest = pinned.get(name)
        return self.store.info(name if digest is None else f"{name.partition('@')[0]}@{digest}")

    def _check_groups(self) -> None:
        """Refuse two names for one benchmark: their trials could not be told apart."""
        seen: dict[str, str] = {}
        for group in self.groups:
            for mark in (
                group.key,
                f"{group.benchmark.digest} {group.protocol.text} {group.model}",
            ):
                if mark in seen:
                    raise UserError(
                        f"job {self.job.name}: benchmarks lists {group.benchmark.name} twice, "
                        "under two names or in two versions; remove one, or use two jobs"
                    )
                seen[mark] = group.key

    def _check_claim(self, earlier: dict[str, Any]) -> None:
        """Refuse a job that changed what its earlier trials depend on."""
        if not earlier:
            return
        changes = difference(earlier["settings"], self._claim["settings"])
        for key, group in self._claim["groups"].items():
            if key in earlier["groups"]:
                changes += difference(earlier["groups"][key], group, key)
        if changes:
            raise UserError(
                f"job {self.job.name}: differs from its earlier trials in {'; '.join(changes)}. "
                "More trials, points, seeds, benchmarks or models may be added; for anything else "
                "choose another name"
            )

    def _open_studies(self) -> dict[str, GroupStudy]:
        return {g.key: GroupStudy(g, self.journal, self.store.storage) for g in self.groups}

    @property
    def remaining(self) -> int:
        """Number of trials still to run."""
        return sum(study.remaining for study in self.studies.values())

    def done(self) -> list[TrialView]:
        """Return the trials that have ended."""
        return [view for study in self.studies.values() for view in study.done()]

    def failures(self) -> dict[str, str]:
        """Return, for every group none of whose trials is complete, why the first one failed."""
        return {
            key: next((v.reason for v in study.done() if v.reason), "every trial was stopped early")
            for key, study in self.studies.items()
            if study.winner() is None
        }

    def run(self) -> bool:
        """Run the missing trials on the connected Ray cluster; return whether all ended.

        False means interrupted (Ctrl-C): running the same command again goes on.

        Raises:
            UserError: another driver runs the sweep, the cluster is too small, or something in
                the surroundings (disk, network) failed; trials that ran are taken up next time.
        """
        if not self.remaining:
            return self._run_missing()
        check_placement(self.job, self.job.resources)
        self._check_features()
        with self.journal.exclusive():
            self.studies = self._open_studies()
            self.store.storage.write(self._claim_key, canonical(self._claim).encode())
            finished = self._run_missing()
            self.journal.outcome = "finished" if finished else "interrupted"
            return finished

    def _check_features(self) -> None:
        """Refuse features a system cannot use before anything starts (``StageData`` says why)."""
        for group in self.groups:
            if model_class(group.model).needs_nonnegative:
                benchmark = self.store.open(group.benchmark.digest)
                rules = {
                    task.config["input_scaling"]: task
                    for task in map(group.task, group.start_points)
                }
                for task in rules.values():
                    StageData(benchmark, task, torch.device("cpu"))

    def _run_missing(self) -> bool:
        done = self.done()
        for view in done:
            self.record(view, only_missing=True)
        single = self.job.resources.execution == "trial" or self.job.resources.workers > 1
        finished = False
        try:
            for listener in (self._pulse, *self.listeners):
                listener.sweep_started(self.job, self.groups, done)
            if self.remaining:
                arrays, slots = concurrency(self.job), self.job.resources.width
                told = (self._pulse, *self.listeners)
                deaths = self.job.resources.max_failures
                desk = Desk(self.studies, self.record, told, slots, arrays, single, deaths)
                self._run_tune(desk, arrays, single)
                self.use = desk.use
                desk.raise_trouble()
            finished = not self.remaining
        finally:
            for listener in self.listeners:
                listener.sweep_ended(self.done(), not finished)
        return finished

    def _run_tune(self, desk: Desk, arrays: int, single: bool) -> None:
        """Let Ray Tune run arrays until the desk has nothing left."""
        import ray

        name = f"avzero-{uuid.uuid4().hex}"
        actor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Mailbox)
        handle: Any = actor.options(name=name).remote()
        try:
            with tempfile.TemporaryDirectory(prefix="avzero-tune-") as scratch:
                self._tuner(desk, Path(scratch), (name, handle), arrays, single).fit()
        finally:
            ray.kill(handle)  # a named actor would outlive the sweep

    def record(self, view: TrialView, only_missing: bool = False) -> None:
        """Write a trial's line of the sweep's index."""
        key = f"sweeps/{self.job.name}/trials/{view.group.key}/{view.number:05d}.json"
        if not only_missing or self.store.storage.size(key) is None:
            self.store.storage.write(key, canonical(trial_record(view)).encode())

    def _tuner(
        self, desk: Desk, scratch: Path, mailbox: tuple[str, Any], arrays: int, single: bool
    ) -> tune.Tuner:
        resources = self.job.resources
        share = {"cpu": resources.cpus, "gpu": resources.gpus}
        if resources.workers > 1:
            # The Ray Train workers bring their own resources; a share of nothing is not allowed,
            # and any share of a CPU could make a trial that fills the machine impossible to place.
            share = {"cpu": 0, "gpu": 0, "memory": 1 << 20}
        names: dict[str, str] = {}
        searcher = ArraySearcher(desk, names, single)
        return tune.Tuner(
            tune.with_resources(ArrayRunner, share),
            param_space={
                "mailbox": mailbox[0],
                "store": self.store.storage.url,
                "resources": resources.model_dump(mode="json"),
            },
            tune_config=tune.TuneConfig(
                metric=METRIC,
                mode="max",
                search_alg=searcher,
                scheduler=ArrayScheduler(desk, searcher, mailbox[1], names, single),
                num_samples=-1,
                max_concurrent_trials=arrays,
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


def fits(need: Resources) -> int:
    """Return how many runs of ``need`` the connected cluster holds at once; 0 without one."""
    return room(cluster_nodes(), need)


def check_placement(job: Job, need: Resources) -> int:
    """Return how many runs of ``need`` the connected cluster holds at once.

    Raises:
        UserError: not even one.
    """
    nodes = cluster_nodes()
    problem = misfit(nodes, need)
    if problem:
        raise UserError(f"job {job.name}: {problem}; lower resources or workers, or add nodes")
    return room(nodes, need)


def concurrency(job: Job) -> int:
    """Return how many arrays run at once on the connected cluster."""
    most = check_placement(job, job.resources)
    return min(most, job.resources.concurrent) if job.resources.concurrent else most


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
        "twin_of": view.twin_of,
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
