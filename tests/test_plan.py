"""The estimate of a sweep: counts, calibration, what is said of it, and the actual beside it."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState, create_trial
from rich.console import Console

from avzero.data.benchmark import Benchmark
from avzero.data.store import FeatureStore
from avzero.errors import UserError
from avzero.models._registry import build
from avzero.report.bookkeeper import Bookkeeper
from avzero.report.plan import page, warnings
from avzero.report.spent import SPENT, comparison, kept
from avzero.report.units import size
from avzero.spec import Resources, Search
from avzero.train.calibrate import Cost, few_steps, measure, measure_on_worker, size_of
from avzero.train.folder import RunFolder
from avzero.train.loop import Trainer
from avzero.train.outcome import conclude_stage_1
from avzero.tune.cohorts import proposals, structural
from avzero.tune.nodes import cluster_nodes, misfit
from avzero.tune.plan import (
    Plan,
    course,
    group_plan,
    make_plan,
    survivors,
)
from avzero.tune.rungs import SEAT, START, should_stop
from avzero.tune.sweep import Sweep
from tests.conftest import Run, make_task
from tests.sweeps import SETTINGS, sweep
from tests.trials import trial_view

NEED = Resources()
COST = Cost(
    runs=4,
    stacks=1,
    step=0.1,
    look=0.5,
    alone=0.2,
    start=0.25,
    close=2.0,
    memory=600_000_000,
    mapped=100_000_000,
    device_memory=0,
    device_share=0,
    weights=1_000_000,
    optimizer=2_000_000,
    kept=1_100_000,
    crowded=1.0,
)


def planned(place: Path, cost: Cost | None = COST, arrays: int = 2, **changes: Any) -> Plan:
    """Return a plan whose costs are given."""
    run = sweep(place, **changes)
    groups = tuple(group_plan(group, group.start_points, 8, 0, cost) for group in run.groups)
    nodes = [{"CPU": 2.0, "memory": 8e9}]
    return Plan(run.job, groups, nodes[0], arrays, misfit(nodes, run.job.resources))


def text_of(plan: Plan, run: Sweep) -> str:
    console = Console(width=160)
    with console.capture() as captured:
        for part in page(plan, run.store.storage):
            console.print(part)
    return captured.get()


# -- how many epochs ------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 6).map(float), max_size=20),
    st.sampled_from(["halving", "median"]),
    st.integers(2, 4),
)
def test_survivors_are_those_the_rule_lets_pass(
    values: list[float], pruner: Any, reduction: int
) -> None:
    search = Search(pruner=pruner, min_epochs=1, reduction=reduction)
    trials = []
    for number, value in enumerate(values):
        attrs = {START: number, SEAT: 0}
        trial = create_trial(
            state=TrialState.RUNNING, user_attrs=attrs, intermediate_values={1: value}
        )
        trial.number = number
        trials.append(trial)
    passed = [
        value
        for trial, value in zip(trials, values, strict=True)
        if not should_stop(trial, 1, value, trials, search, 9)
    ]
    assert survivors(search, values) == passed


def test_course() -> None:
    assert course(Search(pruner="none"), 7, 3) == [7.0, 7.0, 7.0]
    thirds = course(Search(min_epochs=2), 90, 9)
    assert thirds[:2] == [90.0, 90.0]
    assert set(thirds[2:6]) == {thirds[2]} and set(thirds[6:]) == {thirds[6]}, "rungs 2 and 6"
    assert 28 <= thirds[2] <= 33 and 9 <= thirds[6] <= 13
    # Rungs 1 and 3, VAL looked at every 4 epochs: both are decided at the first look, once.
    late = course(Search(min_epochs=1), 90, 9, every=4)
    assert late == [90.0] * 4 + [thirds[2]] * 5
    halves = course(Search(pruner="median", min_epochs=2), 100, 6)
    assert halves[1] == 100 and 48 <= halves[2] <= 56
    assert halves == sorted(halves, reverse=True)
    assert course(Search(pruner="median", min_epochs=1), 4, 5) == [4.0] * 5, "too few to compare"


# -- what shapes a stack --------------------------------------------------------------------------


def test_structural_and_carried_names(place: Path) -> None:
    (group,) = sweep(place, train={}, fixed={}).groups
    counts = structural(group, group.start_points)
    assert {name: count for name, count in counts.items() if count > 1} == {
        "batch_size": 4,
        "encoder_hidden": 3,
        "proj_hidden": 3,
        "depth": 3,
        "heads": 3,
    }
    assert {"lr", "r_enc", "bn_momentum", "margin", "k1"} <= counts.keys()
    part = group_plan(group, group.start_points, 4, 0, None)
    assert part.structures == 4 * 3**4
    assert set(part.structural) | set(part.carried) == counts.keys()
    (fixed,) = planned(place).groups
    assert fixed.structural == () and fixed.structures == 1 and "lr" in fixed.carried


def test_proposals_are_what_the_sweep_will_try(place: Path) -> None:
    """The calibrated array is the one a sweep begins with: start points, then the sampler's."""
    search = {"trials": 6, "seats": 6, "points": [{"lr": 2e-3}], "sampler": "tpe"}
    run = sweep(place, name="proposals", search=search)
    (group,) = run.groups
    study = run.studies[group.key]
    with run.journal.exclusive():
        study.begin(6)
        started = [event.trial.values for event in study.advance()]
    assert len(started) == 6
    assert proposals(group, 6) == started
    grid = {"sampler": "grid", "trials": 9, "space": {"lr": {"choice": [1e-3, 2e-3, 3e-3]}}}
    only = {"lr": 1e-3}
    (points,) = sweep(place, search=grid, fixed={"avca": _all_fixed(group, only)}).groups
    assert proposals(points, points.trials) == points.start_points and points.trials == 3


def _all_fixed(group: Any, but: dict[str, Any]) -> dict[str, Any]:
    fixed = {k: v for k, v in group.start_points[0].items() if k not in but}
    return dict(SETTINGS["fixed"]["avca"]) | fixed


# -- arithmetic -----------------------------------------------------------------------------------


def test_totals_by_hand(place: Path) -> None:
    plan = planned(place, search={"trials": 5, "pruner": "none"}, train=SETTINGS["train"])
    (g,) = plan.groups
    assert (g.epochs, g.most_epochs, g.complete) == (20.0, 20, 5.0)
    assert g.epoch_seconds == pytest.approx(6 * 0.1 + 0.5)
    search = 20 * 1.1 + 5 * 0.25 + 5 * 2.0
    assert plan.seconds == plan.most_seconds == pytest.approx(search)
    assert plan.hours(plan.seconds) == pytest.approx(search / 3600)
    assert plan.training_seconds == pytest.approx(20 * 6 * 0.1)
    assert plan.wall == pytest.approx(search / 2), "two arrays; five trials fill them"
    assert g.final_epochs == 2 * 4
    assert plan.final_seconds == pytest.approx(8 * (6 * 0.2 + 0.5) + 2 * 2.0)
    assert g.kept == 5 * COST.kept and plan.kept == 7 * COST.kept
    assert plan.peak == 5 * (1.1e6 + 1e6 + 2e6) + 2 * 3e6 + 2 * 1.1e6
    one = planned(place, search={"trials": 2, "pruner": "none"}, test={"seeds": 1})
    assert one.wall == pytest.approx(one.seconds), "two trials lie in one array"
    wide = {"cpus": 3.0, "gpus": 1.0, "workers": 2}
    split = planned(place, search={"trials": 5, "pruner": "none"}, resources=wide)
    assert split.hours(3600.0) == 3 and split.hours(3600.0, "GPU") == 1
    assert split.wall == pytest.approx(split.seconds / 2 / 2)
    again = planned(place, test={"seeds": 3, "reseed": "pipeline"})
    assert again.groups[0].final_epochs == 4 * (3 + 2)


def test_expected_lies_between_the_bounds_and_stopped_runs_keep_more(place: Path) -> None:
    plan = planned(place, search={"trials": 40, "min_epochs": 1})
    (g,) = plan.groups
    assert g.most_epochs == 160 and 40 + 2 * 40 / 3 + 40 / 9 <= g.epochs < 85, "rungs 1 and 3 of 4"
    assert 40 / 9 <= g.complete < 8
    assert plan.seconds < plan.most_seconds
    stopped = COST.kept + COST.optimizer
    assert g.kept == pytest.approx(g.complete * COST.kept + (40 - g.complete) * stopped)


def test_searched_budgets_count_by_their_mean(place: Path) -> None:
    space = {"epochs": {"choice": [2, 50]}, "batches_per_epoch": {"choice": [10, 500]}}
    sure = {"batch_size": 32, "evaluate_every": 2}
    search = {"trials": 40, "pruner": "none", "sampler": "random", "space": space}
    run = sweep(place, search=search, train=sure)
    tries = proposals(run.groups[0], 32)
    part = group_plan(run.groups[0], tries, 4, 0, COST)
    mean = sum(values["epochs"] for values in tries) / 32
    assert part.most_epochs == round(40 * mean) and part.budget == 50
    assert part.epochs == pytest.approx(40 * mean)
    assert part.steps == sum(values["batches_per_epoch"] for values in tries) / 32
    assert part.looks == 0.5


# -- calibration ----------------------------------------------------------------------------------


def test_calibration_measures_the_array_and_leaves_the_store_alone(
    store: FeatureStore, benchmark: Benchmark
) -> None:
    tasks = [make_task(benchmark, train={"lr": lr}) for lr in (1e-3, 2e-3)]
    tasks.append(make_task(benchmark, train={"batch_size": 8}))
    before = store.storage.keys("")
    torch.set_num_threads(2)
    try:
        cost = measure(store, tasks, NEED)
        assert store.storage.keys("") == before and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert (cost.runs, cost.stacks) == (3, 2)
    for seconds in (cost.step, cost.look, cost.alone, cost.start, cost.close):
        assert 0 < seconds < 60
    assert cost.memory > 50e6 and cost.mapped > 0 and cost.device_memory == 0
    folder = RunFolder(store.storage, tasks[0])
    for _ in Trainer(tasks[0], benchmark, folder).epochs():
        pass
    conclude_stage_1(folder, benchmark)
    state = folder.load_state()
    assert state is not None
    assert cost.weights == store.storage.size(folder.best_weights_key(state))
    assert 1.5 * cost.weights < cost.optimizer < 2.5 * cost.weights
    assert cost.kept == pytest.approx(size_of(folder), rel=0.05)


def test_calibration_goes_on_without_runs_that_diverge(
    store: FeatureStore, benchmark: Benchmark
) -> None:
    wild = make_task(benchmark, train={"lr": 1e30})
    cost = measure(store, [wild, make_task(benchmark)], NEED)
    assert math.isfinite(cost.step) and cost.step > 0
    with pytest.raises(UserError, match="every run diverges within a few steps"):
        measure(store, [wild], NEED)
    said = measure_on_worker(store.storage.url, [wild.model_dump_json()], NEED.model_dump_json())
    assert "every run diverges" in said["trouble"]
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="torch sees no GPU here"):
            measure(store, [wild], Resources(gpus=1.0))


@pytest.mark.parametrize(
    ("model", "config", "steps", "count"),
    [
        ("avca", {}, 500, 4),
        ("avca", {}, 3, 3),
        ("avfs", {"n_critic": 5}, 500, 5),  # one generator step in five
        ("avfs", {"n_critic": 2}, 500, 4),
        ("fvaegan_d2", {"one_step_per_epoch": True}, 500, 12),  # as rare as can be
    ],
)
def test_few_steps_keep_the_rhythm_of_passes(
    benchmark: Benchmark, model: str, config: dict[str, Any], steps: int, count: int
) -> None:
    from avzero.train.data import StageData

    task = make_task(benchmark, model, config=config)
    shapes = StageData(benchmark, task, torch.device("cpu")).shapes
    assert few_steps(build(task, shapes), steps) == count


def test_rare_passes_are_not_charged_to_every_step(
    store: FeatureStore, benchmark: Benchmark
) -> None:
    """One update in an epoch of 500 steps costs a hundredth of one update in each of five."""

    def cost(steps: int) -> float:
        config = {"one_step_per_epoch": True, "critic_steps": 1}
        task = make_task(benchmark, "fvaegan_d2", config=config, train={"batches_per_epoch": steps})
        return measure(store, [task], NEED).step

    assert cost(5000) < cost(5) / 20


# -- the page -------------------------------------------------------------------------------------


def test_page(place: Path) -> None:
    plan, run = planned(place), sweep(place)
    text = text_of(plan, run)
    for part in (
        "Plan of tiny-sweep: 5 trials in 1 group; 2 arrays of 4 slots at once (2 CPU)",
        "halving (1 in 3 goes on) at epochs 2 of 4",
        "avca: structural: none; a slot carries: lr, weight_decay",
        "config-epochs expected, 20 at most",
        "core-hours expected",
        "TEST: 2 stage-2 runs, 8 epochs at most",
        "Storage: ",
        "600 MB",
        "MLflow: 10 runs, about ",
    ):
        assert part in text, part
    assert "WARNING" not in text
    counts = text_of(planned(place, cost=None, tracking={"uri": "off"}, train={}), run)
    assert "core-hours" not in counts and "Storage" not in counts and "MLflow: off" in counts
    assert "avca: structural: batch_size (up to 4 structures); a slot carries" in counts


def test_warnings(place: Path) -> None:
    storage = sweep(place).store.storage
    assert list(warnings(planned(place), storage)) == []
    (placed,) = warnings(
        planned(place, None, 0, resources={"cpus": 4.0, "workers": 2, "slots": 1}), storage
    )
    assert "a run needs 8 CPU (on 2 workers), the cluster has 2" in placed and "--address" in placed
    (memory,) = warnings(planned(place, replace(COST, memory=4_500_000_000)), storage)
    assert "2 arrays need 9.1 GB of memory, there are 8 GB; lower resources.slots" in memory
    (full,) = warnings(planned(place, replace(COST, kept=10**17)), storage)
    assert "free; make room, or choose another --store" in full
    (busy,) = warnings(planned(place, replace(COST, crowded=2.5)), storage)
    assert "wall time up to 2.5 times CPU time" in busy
    gpu = {"resources": {"gpus": 0.5}, "train": {}}
    used = replace(COST, device_memory=30_000_000_000, device_share=20_000_000_000, stacks=4)
    full_gpu, loose = warnings(planned(place, used, **gpu), storage)
    assert "needs 30 GB of GPU memory, its share is 20 GB" in full_gpu
    assert "the first 4 trials make 4 stacks" in loose and "fix batch_size" in loose


def test_sizes_in_words() -> None:
    assert [size(n) for n in (0, 999, 4_380_752, 2.1e9, 3e15)] == [
        "0 B",
        "999 B",
        "4.38 MB",
        "2.1 GB",
        "3e+03 TB",
    ]


# -- the command ----------------------------------------------------------------------------------


def job_file(place: Path, **changes: Any) -> Path:
    path = place / "plan.yaml"
    settings = SETTINGS | {"name": "planned", "store": str(place / "store")} | changes
    path.write_text(yaml.safe_dump(settings))
    return path


def test_command(avzero: Run, place: Path) -> None:
    store = place / "store"
    before = sorted(store.rglob("*"))
    code, out, err = avzero("plan", job_file(place), "--no-calibration")
    assert (code, err) == (0, "") and "Plan of planned: 5 trials" in out
    assert "core-hours" not in out and sorted(store.rglob("*")) == before
    code, out, err = avzero("plan", job_file(place, resources={"cpus": 1000.0}))
    assert (
        code == 0 and "WARNING: nothing fits, and nothing was calibrated: a run needs 1000" in out
    )
    assert sorted(store.rglob("*")) == before
    code, out, err = avzero("plan", job_file(place))
    assert (code, err) == (0, "") and re.search(r"Search: \d+ config-epochs expected, 20 at", out)
    new = {path for path in store.rglob("*") if path.is_file()} - set(before)
    assert new == {store / "sweeps/planned/plan.json"}
    kept_plan = json.loads(next(iter(new)).read_text())
    assert kept_plan["trials"] == 5 and kept_plan["most_epochs"] == 20
    assert 0 < kept_plan["core_hours"] <= kept_plan["most_core_hours"]
    (group,) = kept_plan["groups"].values()
    assert group["cost"]["runs"] == 4 and "lr" in group["carried"]
    code, _, err = avzero("report", "--store", store)
    assert code == 2, "a plan alone is no sweep"


def test_command_refuses_in_one_line(avzero: Run, place: Path, tmp_path: Path) -> None:
    for path, message in (
        (job_file(place, benchmarks=["nowhere"]), "no benchmark 'nowhere'"),
        (tmp_path / "none.yaml", "no such file"),
    ):
        code, out, err = avzero("plan", path)
        assert code == 2 and message in err and err.count("\n") == 1 and not out


# -- the actual -----------------------------------------------------------------------------------


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def test_bookkeeper_adds_up_calls(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two calls with a pause between them, the first one killed; a third that trains nothing."""
    monkeypatch.setattr("avzero.report.bookkeeper.fits", lambda need: 3)
    clock = Clock(monkeypatch)
    run = sweep(place, resources={"concurrent": 2, "cpus": 2.0})
    storage = FeatureStore(str(tmp_path)).storage
    views = [trial_view(run.groups[0], storage, n, 3, complete=n == 0) for n in range(3)]
    views[2].twin_of = 1

    first = Bookkeeper(storage)
    first.sweep_started(run.job, run.groups, [])
    clock.now += 8
    first.epoch_ended(views[0], views[0].epochs[0])
    assert kept(storage, "tiny-sweep", SPENT) == {}, "not at every epoch"
    clock.now += 4
    first.epoch_ended(views[0], views[0].epochs[1])
    assert kept(storage, "tiny-sweep", SPENT)["wall"] == 12
    clock.now += 1000
    second = Bookkeeper(storage)
    second.sweep_started(run.job, run.groups, [])
    clock.now += 11
    second.epoch_ended(views[0], replace(views[0].epochs[0], replayed=True))
    second.epoch_ended(views[0], views[0].epochs[1])
    clock.now += 7
    second.sweep_ended(views, False)
    spent = kept(storage, "tiny-sweep", SPENT)
    assert spent["wall"] == 30 and spent["arrays"] == 2
    assert spent["core_hours"] == pytest.approx(30 * 2 * 2 / 3600) and spent["gpu_hours"] == 0
    assert spent["trials"] == 3 and spent["epochs"] == 6, "a twin trains nothing"
    assert spent["training_hours"] == pytest.approx(6 * 0.5 / 3600)
    assert "bytes" not in spent, "nobody planned, so the store is not asked"
    third = Bookkeeper(storage)
    third.sweep_started(run.job, run.groups, views)
    clock.now += 50
    third.sweep_ended(views, False)
    assert kept(storage, "tiny-sweep", SPENT) == spent


def test_comparison_line(place: Path, tmp_path: Path) -> None:
    storage = FeatureStore(str(tmp_path)).storage
    planned(place, search={"trials": 5, "pruner": "none"}).save(storage)
    assert list(comparison(storage, ["tiny-sweep"])) == [], "not run yet"
    spent = {"trials": 5, "epochs": 19, "core_hours": 0.0123, "gpu_hours": 0.0, "arrays": 1}
    spent |= {"training_hours": 14 / 3600, "wall": 70.0, "bytes": 5_600_000}
    storage.write(f"sweeps/tiny-sweep/{SPENT}", json.dumps(spent).encode())
    (line,) = comparison(storage, ["tiny-sweep", "other"])
    assert line == (
        "Sweep tiny-sweep, planned / actual: trials 5 / 5, config-epochs 20 / 19 (at most 20), "
        "core-hours 0.00924 / 0.0123, training 12 s / 14 s, arrays 2 / 1, wall 16 s / 1 min 10 s, "
        "storage 5.5 MB / 5.6 MB"
    )


@pytest.mark.ray
def test_plan_then_sweep(ray_local: None, avzero: Run, place: Path) -> None:
    """Planned on a cluster's worker, run, and compared with what the records say."""
    changes: dict[str, Any] = {"name": "compared", "resources": {"concurrent": 1}}
    path = job_file(place, tracking={"uri": "off"}, **changes)
    run = sweep(place, **changes)
    plan = make_plan(run, nodes=cluster_nodes())
    assert plan.calibrated and plan.arrays >= 1
    plan.save(run.store.storage)
    run.listeners = (Bookkeeper(run.store.storage),)
    assert run.run()
    spent = kept(run.store.storage, "compared", SPENT)
    views = run.done()
    assert spent["epochs"] == sum(len(view.epochs) for view in views) <= plan.groups[0].most_epochs
    assert spent["bytes"] == sum(size_of(view.folder) for view in views)
    assert spent["wall"] * spent["arrays"] / 3600 == pytest.approx(spent["core_hours"])
    stopped = sum(view.state == "pruned" for view in views)
    cost = plan.groups[0].cost
    assert cost is not None
    least = 5 * cost.kept + stopped * cost.optimizer
    assert least * 0.98 <= spent["bytes"] <= plan.peak
    code, out, _ = avzero("sweep", path)
    assert code == 0 and "Sweep compared, planned / actual: trials 5 / 5, config-epochs" in out
    again = text_of(make_plan(sweep(place, **changes), calibrate=False), run)
    assert "5 trials in 1 group (5 done)" in again
