"""From a finished sweep to TEST: freeze the winner, train stage 2, look at TEST once.

Everything that could be chosen is fixed before stage 2 begins and written to
``sweeps/<name>/frozen/``; TEST is opened through the seal, which leaves a line in the ledger.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from avzero.canon import canonical
from avzero.errors import UserError
from avzero.protocol.seal import Frozen
from avzero.revision import code_revision
from avzero.spec import Resources, Task
from avzero.train.drive import drive
from avzero.train.folder import RunFolder
from avzero.train.outcome import conclude_stage_1, score_test
from avzero.train.records import Result
from avzero.tune.listener import FinalView, Listener
from avzero.tune.space import Group
from avzero.tune.sweep import Sweep


def run_final(sweep: Sweep, listeners: Sequence[Listener]) -> Iterator[tuple[FinalView, Result]]:
    """Yield the TEST result of every group and seed; what is stored already is not run again.

    Raises:
        UserError: trials are missing, or a group has no complete trial.
    """
    if sweep.remaining:
        raise UserError(
            f"sweep {sweep.job.name}: {sweep.remaining} of its trials are missing, so there is no "
            "winner yet; run avzero sweep again, or lower search.trials in the job"
        )
    # All winners are frozen before the first look at TEST.
    frozen = {group.key: freeze_winner(sweep, group) for group in sweep.groups}
    for group in sweep.groups:
        for number in range(sweep.job.test.seeds):
            seed = sweep.job.seed + number
            yield _final_run(sweep, group, frozen[group.key], seed, listeners)


def freeze_winner(sweep: Sweep, group: Group) -> Frozen:
    """Return the frozen winner of a group and write it beside the sweep."""
    winner = sweep.studies[group.key].winner()
    if winner is None:
        raise UserError(
            f"sweep {sweep.job.name}: {group.key} has no complete trial; see why they failed in "
            f"{sweep.store.storage.url}/sweeps/{sweep.job.name}/trials"
        )
    data = winner.folder.load_frozen()
    if data is None:  # killed between the last epoch and its conclusion
        frozen = conclude_stage_1(winner.folder, sweep.store.open(winner.task.benchmark))[1]
    else:
        frozen = Frozen.from_dict(data)
    key = f"sweeps/{sweep.job.name}/frozen/{group.key}.json"
    line = frozen.as_dict() | {"digest": frozen.digest, "number": winner.number}
    sweep.store.storage.write(key, canonical(line).encode())
    return frozen


def _final_run(
    sweep: Sweep, group: Group, frozen: Frozen, seed: int, listeners: Sequence[Listener]
) -> tuple[FinalView, Result]:
    """Train stage 2 for one seed and score TEST."""
    resources = sweep.job.resources.model_copy(update={"workers": sweep.job.test.workers})
    if sweep.job.test.reseed == "pipeline" and seed != frozen.task.seed:
        frozen = _repeat_stage_1(sweep, frozen, seed, resources)
    task = frozen.stage_2_task(seed)
    folder = RunFolder(sweep.store.storage, task)
    view = FinalView(group, frozen, task, folder, folder.load_result("test") is not None)
    for listener in listeners:
        listener.final_started(view)
    state = view.folder.load_state()
    if state is None or not state.finished:
        for epoch in drive(sweep.store, task, resources):
            for listener in listeners:
                listener.final_epoch_ended(view, epoch)
    result = score_test(sweep.store, view.folder, frozen, sweep.job.name, code_revision())
    key = f"sweeps/{sweep.job.name}/final/{group.key}/{seed}.json"
    sweep.store.storage.write(key, canonical(final_record(view, result)).encode())
    for listener in listeners:
        listener.test_scored(view, result)
    return view, result


def _repeat_stage_1(sweep: Sweep, frozen: Frozen, seed: int, resources: Resources) -> Frozen:
    """Run the winner's stage 1 with another seed: its own best epoch, rates and beta."""
    task: Task = frozen.task.model_copy(update={"seed": seed})
    folder = RunFolder(sweep.store.storage, task)
    for _ in drive(sweep.store, task, resources):
        pass
    return conclude_stage_1(folder, sweep.store.open(task.benchmark))[1]


def final_record(view: FinalView, result: Result) -> dict[str, object]:
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
        "trial": view.frozen.task.id,
        "frozen": view.frozen.digest,
        "run": view.task.id,
        "best_epoch": view.frozen.best_epoch,
        "val": view.frozen.val,
        "test": result.scores,
        "area": result.area,
        "extra": result.extra,
        "at_grid_end": result.at_grid_end,
        "parameters": result.parameters,
        "seconds": result.seconds,
        "revision": code_revision(),
    }
