"""A job's estimate as a page of text: what will run, what it takes, and what will not work."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table

from avzero.data.storage import Storage
from avzero.report.units import duration, size
from avzero.track.payload import EPOCH_KEYS, METRIC_KEYS, settings
from avzero.tune.plan import GroupPlan, Plan
from avzero.tune.rungs import rung_epochs

_CROWDED = 1.5
"""Wall time over CPU time from which others' work on the machine is worth a remark."""
_BARE_KEYS = 3
"""Metric keys of an epoch without a look at VAL."""


def page(plan: Plan, storage: Storage) -> Iterator[RenderableType]:
    """Yield everything there is to say of an estimate."""
    yield _head(plan)
    yield _table(plan)
    yield from _keys(plan)
    if plan.calibrated:
        yield from _totals(plan)
    yield _mlflow(plan)
    yield from (f"WARNING: {line}" for line in warnings(plan, storage))


def _head(plan: Plan) -> str:
    """Return the line that says what will run where."""
    job, need = plan.job, plan.job.resources
    done, trials = sum(g.done for g in plan.groups), sum(g.trials for g in plan.groups)
    what = "arrays" if need.execution == "array" and need.workers == 1 else "single trials"
    slots = f" of {need.width} slots" if what == "arrays" else ""
    have = ", ".join(f"{plan.have.get(k, 0):g} {k}" for k in ("CPU", "GPU") if plan.have.get(k))
    return (
        f"Plan of {job.name}: {trials} trials in {len(plan.groups)} "
        f"group{'s' * (len(plan.groups) > 1)}{f' ({done} done)' if done else ''}; "
        f"{plan.arrays} {what}{slots} at once ({have}); {_stopping(plan)}"
    )


def _stopping(plan: Plan) -> str:
    """Return the rule of early stopping in words."""
    search = plan.job.search
    if search.pruner == "none":
        return "no early stopping"
    if search.pruner == "median":
        return f"the median rule from epoch {search.min_epochs} on"
    budget = max(g.budget for g in plan.groups)
    rungs = rung_epochs(search.min_epochs, search.reduction, budget)
    at = f"at epochs {', '.join(map(str, rungs))}" if rungs else "nowhere: the budget is too short"
    return f"halving (1 in {search.reduction} goes on) {at} of {budget}"


def _table(plan: Plan) -> Table:
    """Return a row per group."""
    table = Table()
    table.add_column("group", overflow="fold")
    names = ["trials", "seats", "config-epochs", "at most"]
    unit = "GPU" if plan.job.resources.gpus else "CPU"
    if plan.calibrated:
        hours = "GPU-hours" if unit == "GPU" else "core-hours"
        names += ["s / config-epoch", hours, "at most", "memory / array", "storage / run"]
    for name in names:
        table.add_column(name, justify="right")
    for g in plan.groups:
        cells = [str(g.trials), str(g.seats), f"{g.epochs:,.0f}", f"{g.most_epochs:,}"]
        if plan.calibrated and g.cost is not None:
            memory = g.cost.device_memory or g.cost.memory
            cells += [
                f"{g.epoch_seconds:.3g}",
                f"{plan.hours(g.seconds(g.epochs, g.complete), unit):.3g}",
                f"{plan.hours(g.seconds(g.most_epochs, g.trials), unit):.3g}",
                size(memory),
                size(g.cost.kept),
            ]
        table.add_row(g.group.key, *cells)
    return table


def _keys(plan: Plan) -> Iterator[str]:
    """Yield, per system, which hyperparameters shape a stack and which a slot carries."""
    said = set()
    for g in plan.groups:
        shaping = f"{', '.join(g.structural)} (up to {g.structures} structures)"
        line = (
            f"{g.group.model}: structural: {shaping if g.structural else 'none'}; "
            f"a slot carries: {', '.join(g.carried) or 'nothing'}"
        )
        if line not in said:
            said.add(line)
            yield line


def _totals(plan: Plan) -> Iterator[str]:
    """Yield what search, TEST and storage take."""
    units = [("core", "CPU")] if plan.job.resources.cpus else []
    units += [("GPU", "GPU")] if plan.job.resources.gpus else []

    def hours(seconds: float) -> str:
        return " and ".join(f"{plan.hours(seconds, u):.3g} {name}-hours" for name, u in units)

    epochs, most = sum(g.epochs for g in plan.groups), sum(g.most_epochs for g in plan.groups)
    left = sum(g.trials - g.done for g in plan.groups) / sum(g.trials for g in plan.groups)
    yield (
        f"Search: {epochs:,.0f} config-epochs expected, {most:,} at most: {hours(plan.seconds)} "
        f"expected, {hours(plan.most_seconds)} at most; about {duration(plan.wall)} with Ray up"
        f"{f', {duration(plan.wall * left)} for the trials left' if left < 1 else ''}"
    )
    finals = sum(g.final_epochs for g in plan.groups)
    runs = len(plan.groups) * plan.job.test.seeds
    yield (
        f"TEST: {runs} stage-2 run{'s' * (runs > 1)}, {finals:,} epochs at most: "
        f"{hours(plan.final_seconds)}"
    )
    yield f"Storage: {size(plan.kept)} when all is over, {size(plan.peak)} at most meanwhile"


def _mlflow(plan: Plan) -> str:
    """Return how much the tracking server gets (see ``track.payload`` and its run tree)."""
    job, seeds = plan.job, plan.job.test.seeds
    if job.tracking.uri == "off":
        return "MLflow: off"
    again = (seeds - 1) * (job.test.reseed == "pipeline")
    runs = metrics = params = requests = 0.0
    for g in plan.groups:
        final = 2 * seeds + again
        runs += 1 + g.trials + final
        metrics += g.epochs * (g.looks * EPOCH_KEYS + (1 - g.looks) * _BARE_KEYS)
        metrics += g.trials * (METRIC_KEYS - EPOCH_KEYS) + (seeds + 1) * METRIC_KEYS
        metrics += g.final_epochs * _BARE_KEYS
        params += (g.trials + final) * len(settings(g.group.task({})))
        files = job.tracking.checkpoints == "all"
        requests += 3 * g.trials + g.complete * files
    return (
        f"MLflow: {runs:,.0f} runs, about {metrics:,.0f} rows of metrics and {params:,.0f} "
        f"parameters; {requests:,.0f} requests or more for the search"
    )


def warnings(plan: Plan, storage: Storage) -> Iterator[str]:
    """Yield what will not work, or not as well as the job assumes; each with its remedy."""
    need = plan.job.resources
    if not plan.arrays:
        yield (
            f"nothing fits, and nothing was calibrated: {plan.misfit}; lower resources, or give a "
            "larger cluster with --address"
        )
    for g in plan.groups:
        yield from _group_warnings(g, plan)
    costs = [g.cost for g in plan.groups if g.cost]
    if not costs:
        return
    memory = max(plan.arrays * cost.memory + cost.mapped for cost in costs)
    if not need.gpus and memory > plan.have.get("memory", math.inf):
        yield (
            f"{plan.arrays} arrays need {size(memory)} of memory, there are "
            f"{size(plan.have['memory'])}; lower resources.slots or resources.concurrent"
        )
    root = storage.local_path("")
    if root is not None and plan.peak > (free := _free(root)):
        yield (
            f"the runs need up to {size(plan.peak)} in {storage.url}, which has {size(free)} free; "
            "make room, or choose another --store"
        )
    crowded = max(cost.crowded for cost in costs)
    if crowded > _CROWDED:
        yield (
            f"others were computing during the calibration (wall time up to {crowded:.1f} times "
            "CPU time); alone on the machine it takes accordingly less"
        )


def _group_warnings(g: GroupPlan, plan: Plan) -> Iterator[str]:
    """Yield what concerns one group."""
    cost = g.cost
    if cost is None:
        return
    if cost.device_memory > cost.device_share:
        yield (
            f"{g.group.key}: an array needs {size(cost.device_memory)} of GPU memory, its share is "
            f"{size(cost.device_share)}; lower resources.slots, or raise resources.gpus"
        )
    if plan.job.resources.gpus and cost.runs > 1 and cost.stacks > cost.runs / 2:
        yield (
            f"{g.group.key}: the first {cost.runs} trials make {cost.stacks} stacks, so that "
            f"little is gained by stacking; raise search.cohort, or fix {' or '.join(g.structural)}"
        )


def _free(root: Path) -> int:
    """Return the bytes free where a folder is, or will be."""
    while not root.exists():
        root = root.parent
    return shutil.disk_usage(root).free
