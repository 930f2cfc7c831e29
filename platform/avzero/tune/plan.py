"""What a job will cost, before it is run: trials, epochs, hours, memory and storage.

The counts follow from the job. Times, memory and file sizes come from a calibration
(``train.calibrate``): the array a sweep would begin with, its start points and first proposals,
trained for a few steps on the real benchmark. ``avzero plan`` keeps the estimate beside the sweep,
so that the report can set what was spent against it (``report.plan``).

How many epochs early stopping saves is an expectation: the rule is played through with trials that
come in no particular order and keep their ranks while they train. A sampler that improves sends
more trials up than that, and rankings that change let some pass that would have been stopped; no
trial trains beyond its budget, which is the upper bound.
"""

from __future__ import annotations

import bisect
import math
import os
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from avzero.canon import canonical
from avzero.data.benchmark import Progress
from avzero.data.storage import Storage
from avzero.errors import UserError
from avzero.spec import Job, Resources, Search, Task
from avzero.train.calibrate import Cost, measure, measure_on_worker
from avzero.tune.cohorts import begun_with, cohort_size, proposals, structural, structural_names
from avzero.tune.nodes import Node, misfit, room, total
from avzero.tune.rungs import decides
from avzero.tune.space import Group
from avzero.tune.sweep import Sweep

_SAMPLE = 32
"""Configurations looked at for budgets, where these are searched."""
_DRAWS = 32
_FREE = 4
"""Trials the median rule lets pass before it has enough to compare with (``tune.rungs``)."""


@dataclass(frozen=True)
class GroupPlan:
    """One group's part. Times in seconds of one array, sizes in bytes."""

    group: Group
    done: int
    """Trials that have ended already; the estimate is of all."""
    seats: int
    structural: tuple[str, ...]
    """Searched names whose values shape what can be stacked."""
    carried: tuple[str, ...]
    """Searched names whose values a slot carries."""
    structures: int
    """How many structures the structural names can make, at most."""
    epochs: float
    """Config-epochs expected."""
    most_epochs: int
    """Config-epochs without early stopping."""
    complete: float
    """Trials expected to train their whole budget."""
    budget: int
    """Epochs of the longest trial."""
    steps: float
    """Optimiser steps of an epoch, mean over configurations."""
    looks: float
    """Evaluations of an epoch, likewise."""
    cost: Cost | None
    """None: not calibrated."""

    @property
    def trials(self) -> int:
        """Number of trials."""
        return self.group.trials

    @property
    def epoch_seconds(self) -> float:
        """One config-epoch: steps, evaluation, checkpoint."""
        return self.steps * self.cost.step + self.looks * self.cost.look if self.cost else math.nan

    def seconds(self, epochs: float, complete: float) -> float:
        """Return what trials that train so many epochs together take."""
        if self.cost is None:
            return math.nan
        trials = self.trials * self.cost.start + complete * self.cost.close
        return epochs * self.epoch_seconds + trials

    @property
    def final_epochs(self) -> int:
        """Config-epochs of stage 2 (and further seeds' stage 1), at most."""
        seeds, again = self.group.job.test.seeds, self.group.job.test.reseed == "pipeline"
        return self.budget * (seeds + (seeds - 1) * again)

    @property
    def final_seconds(self) -> float:
        """What they and TEST take, at most."""
        if self.cost is None:
            return math.nan
        epoch = self.steps * self.cost.alone + self.cost.look
        return self.final_epochs * epoch + self.group.job.test.seeds * self.cost.close

    @property
    def kept(self) -> float:
        """Storage when the sweep is over: of runs stopped early, what they would go on from."""
        if self.cost is None:
            return math.nan
        beside = self.cost.kept - self.cost.weights
        stopped = beside + self.cost.weights + self.cost.optimizer
        return self.complete * self.cost.kept + (self.trials - self.complete) * stopped


@dataclass(frozen=True)
class Plan:
    """A job's estimate."""

    job: Job
    groups: tuple[GroupPlan, ...]
    have: Mapping[str, float]
    """What the cluster, or this machine, has: CPU, GPU, memory."""
    arrays: int
    """How many run at once; 0: not one fits."""
    misfit: str = ""
    """Why not one fits."""

    @property
    def calibrated(self) -> bool:
        """Whether times and sizes are known."""
        return all(group.cost is not None for group in self.groups)

    def hours(self, seconds: float, unit: str = "CPU") -> float:
        """Return core- or GPU-hours of seconds of one worker."""
        need = self.job.resources
        return seconds / 3600 * (need.cpus if unit == "CPU" else need.gpus)

    @property
    def seconds(self) -> float:
        """Expected seconds of one worker."""
        return sum(g.seconds(g.epochs, g.complete) for g in self.groups)

    @property
    def most_seconds(self) -> float:
        """The same without early stopping."""
        return sum(g.seconds(g.most_epochs, g.trials) for g in self.groups)

    @property
    def training_seconds(self) -> float:
        """Expected seconds of optimiser steps alone: what the records of epochs add up to."""
        return sum(g.epochs * g.steps * g.cost.step for g in self.groups if g.cost)

    @property
    def final_seconds(self) -> float:
        """Seconds of one worker for stage 2 and TEST, at most."""
        return sum(group.final_seconds for group in self.groups)

    @property
    def wall(self) -> float:
        """Expected seconds of the search, Ray's start not counted.

        Not less than the longest trial takes alone, and arrays without trials do not count.
        """
        need = self.job.resources
        busy = min(self.arrays, math.ceil(sum(g.trials for g in self.groups) / need.width))
        longest = max(
            g.budget * (g.steps * g.cost.alone + g.looks * g.cost.look) if g.cost else math.nan
            for g in self.groups
        )
        return max(self.seconds / max(1, busy), longest) / need.workers

    @property
    def kept(self) -> float:
        """Bytes of storage when everything is over, final runs included."""
        seeds = self.job.test.seeds
        return sum(g.kept + seeds * (g.cost.kept if g.cost else math.nan) for g in self.groups)

    @property
    def peak(self) -> float:
        """Bytes of storage at most: every trial with its best and its last weights and its
        optimiser, and a checkpoint being written by every array."""
        costs = [(g.trials, g.cost) for g in self.groups if g.cost]
        most = sum(trials * (c.kept + c.weights + c.optimizer) for trials, c in costs)
        writing = max((c.weights + c.optimizer for _, c in costs), default=0)
        return most + self.arrays * writing + self.kept - sum(g.kept for g in self.groups)

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate as JSON values, totals first."""
        groups = {}
        for g in self.groups:
            row = {k: v for k, v in vars(g).items() if k not in ("group", "cost")}
            row["cost"] = None if g.cost is None else asdict(g.cost)
            groups[g.group.key] = row | {"trials": g.trials}
        return {
            "trials": sum(g.trials for g in self.groups),
            "done": sum(g.done for g in self.groups),
            "epochs": sum(g.epochs for g in self.groups),
            "most_epochs": sum(g.most_epochs for g in self.groups),
            "core_hours": self.hours(self.seconds),
            "most_core_hours": self.hours(self.most_seconds),
            "gpu_hours": self.hours(self.seconds, "GPU"),
            "training_hours": self.training_seconds / 3600,
            "wall": self.wall,
            "bytes": sum(g.kept for g in self.groups),
            "arrays": self.arrays,
            "groups": groups,
        }

    def save(self, storage: Storage) -> None:
        """Keep the estimate beside the sweep."""
        key = f"sweeps/{self.job.name}/plan.json"
        storage.write(key, canonical(self.as_dict()).encode())


def make_plan(
    sweep: Sweep,
    calibrate: bool = True,
    nodes: Sequence[Node] | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Plan:
    """Return a job's estimate; nothing is written to its store.

    Args:
        sweep: the job's groups and what is done of them.
        calibrate: measure costs; without, only counts are known. Left out where no run fits.
        nodes: those of the connected Ray cluster, on which the calibration then runs; None: this
            machine.
        progress: is told which group is being calibrated.

    Raises:
        UserError: a run cannot be trained as the job asks.
    """
    job, on_cluster = sweep.job, nodes is not None
    nodes = [this_machine()] if nodes is None else nodes
    fits = room(nodes, job.resources)
    arrays = min(fits, job.resources.concurrent or fits)
    plans = []
    for number, group in enumerate(sweep.groups):
        progress("planning", number - 1, len(sweep.groups))  # so many groups are done
        seats, cohort = _side_by_side(sweep, group, arrays)
        names = structural_names(group) if cohort > 1 else ()
        tries = proposals(group, min(_SAMPLE, group.trials), cohort, names)
        cost = None
        if calibrate and arrays:
            tasks = [group.task(values) for values in tries[: min(job.resources.width, seats)]]
            cost = _measured(sweep, tasks, job.resources, on_cluster)
        done = group.trials - sweep.studies[group.key].remaining
        plans.append(group_plan(group, tries, seats, done, cost))
    return Plan(job, tuple(plans), total(nodes), arrays, misfit(nodes, job.resources))


def _side_by_side(sweep: Sweep, group: Group, arrays: int) -> tuple[int, int]:
    """Return how many trials sit side by side, and how many in a row share a structure: what the
    study began with, or would begin with."""
    begun = begun_with(sweep.journal.load(group))
    if begun is not None:
        return begun
    waiting = sum(one.remaining > 0 for one in sweep.studies.values())
    slots = sweep.job.resources.width
    seats = sweep.job.search.seats or slots * max(1, arrays // max(1, waiting))
    return seats, cohort_size(group.job.search, group.trials, seats)


def _measured(sweep: Sweep, tasks: Sequence[Task], need: Resources, on_cluster: bool) -> Cost:
    """Calibrate here, or on one of the cluster's workers."""
    if not on_cluster:
        return measure(sweep.store, tasks, need)
    import ray

    there = ray.remote(num_cpus=need.cpus, num_gpus=need.gpus)(measure_on_worker)
    said = ray.get(
        there.remote(
            sweep.store.storage.url,
            [task.model_dump_json() for task in tasks],
            need.model_dump_json(),
        )
    )
    if "trouble" in said:
        raise UserError(said["trouble"])
    return Cost(**said)


def group_plan(
    group: Group, tries: Sequence[Mapping[str, Any]], seats: int, done: int, cost: Cost | None
) -> GroupPlan:
    """Return one group's part.

    Args:
        group: the group.
        tries: some configurations, for what depends on searched budgets.
        seats: trials side by side.
        done: trials that have ended.
        cost: of its runs, if measured.
    """
    trains = [group.task(values).train for values in tries]
    budgets = [(train.epochs, train.evaluate_every) for train in trains]
    played = {b: course(group.job.search, group.trials, *b) for b in sorted(set(budgets))}
    courses = [played[budget] for budget in budgets]
    structures = structural(group, tries)
    return GroupPlan(
        group=group,
        done=done,
        seats=seats,
        structural=tuple(name for name, count in structures.items() if count > 1),
        carried=tuple(name for name, count in structures.items() if count == 1),
        structures=math.prod(structures.values()),
        epochs=statistics.fmean(math.fsum(training) for training in courses),
        most_epochs=round(group.trials * statistics.fmean(train.epochs for train in trains)),
        complete=statistics.fmean(training[-1] for training in courses),
        budget=max(train.epochs for train in trains),
        steps=statistics.fmean(train.batches_per_epoch for train in trains),
        looks=statistics.fmean(1 / train.evaluate_every for train in trains),
        cost=cost,
    )


def course(search: Search, trials: int, epochs: int, every: int = 1) -> list[float]:
    """Return how many trials are expected to train in each epoch (see the module's docstring).

    Args:
        search: the rule of early stopping.
        trials: how many begin, one after the other.
        epochs: their budget.
        every: epochs from one look at VAL to the next.
    """
    draw, training = random.Random(0), [0] * epochs  # noqa: S311 - the same at every call
    for _ in range(_DRAWS):
        alive, before = [draw.random() for _ in range(trials)], 0
        for epoch in range(1, epochs + 1):
            training[epoch - 1] += len(alive)
            if epoch % every == 0:
                if decides(before, epoch, search, epochs):
                    alive = survivors(search, alive)
                before = epoch
    return [count / _DRAWS for count in training]


def survivors(search: Search, arriving: Sequence[float]) -> list[float]:
    """Return which values go on from a decision they come to in this order (``tune.rungs``)."""
    seen: list[float] = []
    found = []
    for value in arriving:
        if search.pruner == "median":
            passes = len(seen) < _FREE or value >= statistics.median(seen)
        else:
            better = len(seen) - bisect.bisect_left(seen, value)
            passes = better < max(1, (len(seen) + 1) // search.reduction)
        if passes:
            found.append(value)
        bisect.insort(seen, value)
    return found


def this_machine() -> dict[str, float]:
    """Return cores, GPUs and bytes of memory of this machine."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "CPU": float(os.cpu_count() or 1),
        "GPU": float(torch.cuda.device_count()),
        "memory": float(memory),
    }
