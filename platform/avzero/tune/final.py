"""From a finished sweep to TEST: freeze the winner, train stage 2, look at TEST once.

Everything that could be chosen is fixed before stage 2 begins and written to
``sweeps/<name>/frozen/``; TEST is opened through the seal, which leaves a line in the ledger.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from avzero.canon import ID_LENGTH, canonical
from avzero.errors import UserError
from avzero.protocol.calibration import BOTH
from avzero.protocol.seal import Frozen
from avzero.spec import Resources, Task
from avzero.train.drive import drive
from avzero.train.folder import RunFolder
from avzero.train.outcome import conclude_stage_1, score_test
from avzero.train.records import Epoch, Result, TrainingFailed
from avzero.tune.ahead import Ahead
from avzero.tune.listener import FinalView, Listener
from avzero.tune.space import Group
from avzero.tune.sweep import Sweep, check_placement, fits


@dataclass(frozen=True)
class FinalPlan:
    """The winner of every group, frozen, and whether anything is left to train or score."""

    sweep: Sweep
    frozen: dict[str, Frozen]

    def runs(self) -> Iterator[tuple[Group, Frozen, int]]:
        """Yield (group, frozen winner, seed) of every final run."""
        for group in self.sweep.groups:
            for number in range(self.sweep.job.test.seeds):
                yield group, self.frozen[group.key], self.sweep.job.seed + number

    @functools.cached_property
    def pending(self) -> int:
        """Number of runs without a stored TEST result when the plan was made (with
        ``pipeline``: that may have none)."""
        return sum(not self._stored(frozen, seed) for _, frozen, seed in self.runs())

    def _stored(self, frozen: Frozen, seed: int) -> bool:
        if self.sweep.job.test.reseed == "pipeline" and seed != frozen.task.seed:
            again = RunFolder(self.sweep.store.storage, _reseeded(frozen, seed)).load_frozen()
            if again is None:
                return False
            frozen = Frozen.from_dict(again)
        folder = RunFolder(self.sweep.store.storage, frozen.stage_2_task(seed))
        return folder.load_result("test", frozen.digest) is not None


def freeze(sweep: Sweep) -> FinalPlan:
    """Freeze the winner of every group, before the first look at TEST.

    Raises:
        UserError: trials are missing, or a group has no complete trial.
    """
    if sweep.remaining:
        raise UserError(
            f"sweep {sweep.job.name}: {sweep.remaining} of its trials are missing, so there is no "
            "winner yet; run avzero sweep again, or lower search.trials in the job"
        )
    return FinalPlan(sweep, {g.key: _freeze_winner(sweep, g) for g in sweep.groups})


def _freeze_winner(sweep: Sweep, group: Group) -> Frozen:
    """Return the frozen winner of a group and write it beside the sweep."""
    winner = sweep.studies[group.key].winner()
    data = None if winner is None else winner.folder.load_frozen()
    if winner is None or data is None:
        raise UserError(
            f"sweep {sweep.job.name}: {group.key} has no complete trial; see why they failed in "
            f"{sweep.store.storage.url}/sweeps/{sweep.job.name}/trials"
        )
    frozen = Frozen.from_dict(data)
    line = frozen.as_dict() | {"digest": frozen.digest, "number": winner.number}
    text = canonical(line).encode()
    # The current winner, and the trace of an earlier one if more trials changed it.
    for key in (f"{group.key}.json", f"{group.key}/{frozen.digest[:ID_LENGTH]}.json"):
        sweep.store.storage.write(f"sweeps/{sweep.job.name}/frozen/{key}", text)
    return frozen


def run_final(
    plan: FinalPlan, listeners: Sequence[Listener], on_cluster: bool = False
) -> Iterator[tuple[FinalView, Result]]:
    """Yield the TEST result of every group and seed; what is stored already is not run again.

    Raises:
        UserError: the cluster is too small, stage 2 diverged, or the surroundings failed.
    """
    job = plan.sweep.job
    need = job.resources.model_copy(update={"workers": job.test.workers})
    if plan.pending and (on_cluster or need.workers > 1):
        check_placement(job, need)
    room = fits(need) if need.workers == 1 else 1
    slots = min(room, job.resources.concurrent or room)
    # With ``pipeline`` stage 2 follows a stage 1 that has not run yet: one after the other.
    runs = list(plan.runs())
    seeds = [] if job.test.reseed == "pipeline" else runs
    tasks = [frozen.stage_2_task(seed) for _, frozen, seed in seeds]
    ahead = Ahead(plan.sweep.store, tasks, need, slots)
    for group, frozen, seed in runs:
        if job.test.reseed == "pipeline" and seed != frozen.task.seed:
            task = _reseeded(frozen, seed)
            view = _train(plan.sweep, group, frozen, task, listeners, on_cluster)
            benchmark = plan.sweep.store.open(task.benchmark)
            frozen = conclude_stage_1(view.folder, benchmark)[1]  # noqa: PLW2901
        task = frozen.stage_2_task(seed)
        view = _train(plan.sweep, group, frozen, task, listeners, on_cluster, ahead)
        result = score_test(plan.sweep.store, view.folder, frozen, job.name)
        winner = plan.frozen[group.key].task.id
        key = f"sweeps/{job.name}/final/{group.key}/{winner}/{seed}.json"
        record = canonical(final_record(view, winner, result)).encode()
        plan.sweep.store.storage.write(key, record)
        for listener in listeners:
            listener.test_scored(view, result)
        yield view, result


def _reseeded(frozen: Frozen, seed: int) -> Task:
    """Return the winner's stage 1 with another seed."""
    return frozen.task.model_copy(update={"seed": seed})


def _train(
    sweep: Sweep,
    group: Group,
    frozen: Frozen,
    task: Task,
    listeners: Sequence[Listener],
    on_cluster: bool,
    ahead: Ahead | None = None,
) -> FinalView:
    """Train one final run to its end, or replay it where it is finished."""
    folder = RunFolder(sweep.store.storage, task)
    stored = task.stage == 2 and folder.load_result("test", frozen.digest) is not None
    view = FinalView(group, frozen, task, folder, stored)
    for listener in listeners:
        listener.final_started(view)
    resources = sweep.job.resources.model_copy(update={"workers": sweep.job.test.workers})
    try:
        for epoch in _epochs(sweep, folder, resources, on_cluster, ahead):
            for listener in listeners:
                listener.final_epoch_ended(view, epoch)
    except TrainingFailed as error:
        raise UserError(f"stage {task.stage} of {group.key}, seed {task.seed}: {error}") from error
    return view


def _epochs(
    sweep: Sweep, folder: RunFolder, need: Resources, on_cluster: bool, ahead: Ahead | None
) -> Iterator[Epoch]:
    """Yield every epoch of a final run once: followed, read back, or trained here."""
    seen = 0
    for epoch in ahead.follow(folder) if ahead else ():
        seen += 1
        yield epoch
    state = folder.load_state()
    if state is not None and state.finished:
        yield from state.history[seen:]
        return
    for epoch in drive(sweep.store, folder.task, need, on_cluster):
        if epoch.epoch >= seen:
            yield epoch


def final_record(view: FinalView, winner: str, result: Result) -> dict[str, object]:
    """Return the line of a TEST result that reports are made from."""
    info = view.group.benchmark
    return {
        "benchmark": info.name,
        "digest": info.digest,
        "dataset": info.dataset,
        "feature_set": info.feature_set,
        "split": info.split,
        "simulated": info.simulated,
        "model": view.group.model,
        "protocol": view.task.protocol.model_dump(mode="json"),
        "seed": view.task.seed,
        "reseed": view.group.job.test.reseed,
        "winner": winner,
        "trial": view.frozen.task.id,
        "frozen": view.frozen.digest,
        "run": view.task.id,
        "best_epoch": view.frozen.best_epoch,
        "val": view.frozen.val,
        "beta": result.scores[BOTH]["beta"],
        "test": result.scores,
        "area": result.area,
        "extra": result.extra,
        "at_grid_end": result.at_grid_end,
        "parameters": result.parameters,
        "seconds": result.seconds,
        "revision": result.revision,
    }
