"""Jobs and search spaces: what is accepted, what is refused and how it is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest

from avzero.data.benchmark import BenchmarkInfo
from avzero.data.store import FeatureStore
from avzero.errors import UserError
from avzero.models._registry import model_class, model_files
from avzero.spec import Job, load_job
from avzero.tune.space import Group, load_space
from avzero.tune.sweep import Sweep, difference
from tests.conftest import ROOT

BASE = "name: x\nbenchmarks: [tiny]\nmodels: [avca]\n"


def job(**changes: object) -> Job:
    return Job.model_validate({"name": "x", "benchmarks": ["tiny"], "models": ["avca"]} | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nbenchmark: [tiny]\nmodels: [avca]\n", "unknown key 'benchmark'; known keys: be"),
        (
            BASE + "search: {trial: 3}\n",
            "unknown key 'search.trial'; known keys: cohort",
        ),
        (BASE + "train: {lr: -1}\n", r"train\.lr: input should be greater than 0 \(got -1\)"),
        (BASE + "train: {batch: 5}\n", "train: .*unknown|unknown key .*batch"),
        (BASE + "search: {trials: 0}\n", r"search\.trials: .*greater than or equal to 1"),
        (BASE + "search: {pruner: hyperband}\n", r"search\.pruner: .*'halving', 'median' or"),
        (BASE + "search: {sampler: bayes}\n", r"search\.sampler: .*'tpe', 'random', 'grid' or"),
        (BASE + "search: {objectives: [hm, hm]}\n", r"search\.objectives: an entry is listed tw"),
        (BASE + "search: {objectives: [auc]}\n", r"search\.objectives\.0: .*'hm' or 'zsl'"),
        (BASE + "search: {objectives: []}\n", r"search\.objectives: .*at least 1 item"),
        (
            BASE + "search: {sampler: cmaes, objectives: [hm, zsl]}\n",
            "search: sampler cmaes takes one objective; use tpe, or remove one",
        ),
        (BASE + "name: y\n", "4: not valid YAML .*'name' is written twice"),
        ("name: [\n", "not valid YAML"),
        ("- 1\n", "expected keys like name"),
        ("benchmarks: [tiny]\nmodels: [avca]\n", "key 'name' is missing"),
        (BASE.replace("x", "A B", 1), "name: use 1 to 63 of"),
        (BASE.replace("[avca]", "[avca, avca]"), "models: an entry is listed twice"),
        (BASE + "fixed: {kda: {}}\n", "fixed: model 'kda' is not in models"),
        (BASE + "protocol: {beta_grid: {start: 2, stop: 1}}\n", "stop must be larger"),
        (BASE + "seed: .nan\n", "seed"),
        (BASE + "resources: {workers: 2, gpus: 0.5}\n", "gpus must be whole with several workers"),
    ],
)
def test_bad_jobs_end_in_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_job(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_missing_job() -> None:
    with pytest.raises(UserError, match="no such file"):
        load_job(Path("nowhere.yaml"))


def test_numbers_in_scientific_notation(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(BASE + "train: {lr: 1e-4, weight_decay: 2E-5}\n")
    assert load_job(path).train == {"lr": 1e-4, "weight_decay": 2e-5}


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_job_of_the_repository_is_valid(path: Path) -> None:
    load_job(path)


def test_published_points_are_those_of_the_specification() -> None:
    """avca.md section 6: r_enc, r_proj, r_add, momentum, batch."""
    published = {
        (p.dataset, p.features): [
            p.values[k] for k in ("r_enc", "r_proj", "r_add", "bn_momentum", "batch_size")
        ]
        for p in load_space("avca").published
    }
    assert published == {
        ("UCF", "main"): [0.2, 0.3, 0.5, 0.1, 256],
        ("UCF", "cls"): [0.2, 0.3, 0.5, 0.99, 256],
        ("VGGSound", "main"): [0.0, 0.0, 0.1, 0.1, 64],
        ("VGGSound", "cls"): [0.0, 0.0, 0.0, 0.99, 256],
        ("ActivityNet", "main"): [0.2, 0.2, 0.1, 0.99, 256],
        ("ActivityNet", "cls"): [0.2, 0.2, 0.1, 0.99, 256],
    }


def test_group_merges_defaults_published_fixed_and_searched(store: FeatureStore) -> None:
    from dataclasses import replace

    info = replace(store.info("tiny"), dataset="VGGSound", feature_set="main")
    group = Group(job(train={"epochs": 7}, fixed={"avca": {"margin": 0.5}}), info, "avca")
    assert "margin" not in group.distributions and "epochs" not in group.distributions
    (first,) = group.start_points
    assert first["batch_size"] == 64 and first["r_add"] == 0.1 and first["lr"] == 1e-3
    task = group.task(first | {"r_enc": 0.25})
    assert (task.train.epochs, task.train.batch_size, task.train.weight_decay) == (7, 64, 1e-5)
    assert (task.config["margin"], task.config["r_enc"], task.config["r_add"]) == (0.5, 0.25, 0.1)


def group(store: FeatureStore, **search: object) -> Group:
    return Group(job(search=search), store.info("tiny"), "avca")


def test_points_and_ranges_of_a_job(store: FeatureStore) -> None:
    made = group(
        store,
        space={"lr": {"log": [1e-4, 1e-2]}, "epochs": {"int": [2, 50]}},
        points=[{"r_enc": 0.5, "epochs": 7}],
    )
    assert made.distributions["epochs"] == optuna.distributions.IntDistribution(2, 50)
    first, second = made.start_points
    assert second == first | {"r_enc": 0.5, "epochs": 7}


def test_one_objective_is_no_change_to_what_earlier_versions_claimed() -> None:
    """Their claims have no such key; a second objective does differ."""
    for plain in ({}, {"objectives": ["hm"]}):
        frozen = job(search=plain).frozen_part()
        assert "objectives" not in frozen["search"]
    two = job(search={"objectives": ["zsl", "hm"]}).frozen_part()
    assert difference(frozen, two) == ['search.objectives: null -> ["zsl", "hm"]']
    assert job().search.objectives == ["hm"]


SETTLED = {
    "r_enc": 0.2,
    "r_proj": 0.2,
    "r_add": 0.2,
    "margin": 1.0,
    "w_reg": 1.0,
    "w_rec": 1.0,
    "bn_momentum": 0.5,
    "encoder_hidden": 256,
    "proj_hidden": 256,
    "heads": "3x100",
    "weight_decay": 1e-5,
    "k2": 1.0,
}


def grid(store: FeatureStore, dataset: str = "toy", **search: object) -> Group:
    """Return a group that searches lr, batch_size, depth and k1, by default 3 x 2 x 3 x 2."""
    space = {
        "lr": {"choice": [1e-4, 1e-3, 1e-2]},
        "batch_size": {"choice": [64, 256]},
        "k1": {"choice": [0.0, 1.0]},
    }
    settings = search | {"sampler": "grid", "space": space | dict(search.get("space", {}))}  # type: ignore[call-overload]
    info = replace(store.info("tiny"), dataset=dataset, feature_set="main")
    return Group(job(search=settings, fixed={"avca": SETTLED}), info, "avca")


def test_a_grid_starts_at_the_published_or_default_point_where_it_has_it(
    store: FeatureStore,
) -> None:
    whole = grid(store, trials=1000)
    assert whole.trials == len(whole.start_points) == 36
    assert len({tuple(sorted(p.items())) for p in whole.start_points}) == 36
    first = whole.start_points[0]
    assert (first["lr"], first["batch_size"]) == (1e-3, 256)
    part = grid(store, trials=7)
    assert part.trials == 7 and part.start_points == whole.start_points[:7]
    # Point 0 of this dataset has batch_size 64; a grid without it is left as the job lists it.
    assert grid(store, "VGGSound").start_points[0]["batch_size"] == 64
    without = {"batch_size": {"choice": [32, 128]}}
    assert grid(store, "VGGSound", trials=7, space=without).trials == 7
    off = grid(store, "VGGSound", trials=99, space=without)
    assert off.trials == 36
    assert {p["batch_size"] for p in off.start_points} == {32, 128}


def test_a_jobs_own_points_come_early_in_its_grid(store: FeatureStore) -> None:
    mine = {"lr": 1e-2, "depth": 3}
    plain, made = grid(store, trials=40), grid(store, trials=40, points=[mine])
    assert made.start_points[1] == made.start_points[0] | mine
    assert made.trials == 36 and made.start_points[0] == plain.start_points[0]
    rest = [p for p in plain.start_points[1:] if p != made.start_points[1]]
    assert made.start_points[2:] == rest
    with pytest.raises(UserError, match=r"start point 1 of .*: lr = 0\.5 is outside its range"):
        grid(store, points=[{"lr": 0.5}])


def test_ranges_a_sampler_cannot_use(store: FeatureStore) -> None:
    with pytest.raises(UserError, match=r"job x: tiny--avca: sampler grid .* unlike lr, weight_de"):
        group(store, sampler="grid")
    with pytest.raises(UserError, match=r"avca: sampler grid .* unlike lr; write search.space.lr"):
        grid(store, space={"lr": {"log": [1e-4, 1e-2]}})
    one = {"lr": {"log": [1e-4, 1e-2]}, "depth": {"choice": [1]}}
    info, search = store.info("tiny"), {"sampler": "cmaes", "space": one}
    with pytest.raises(UserError, match=r"job x: tiny--avca: sampler cmaes needs .* there is lr;"):
        Group(job(search=search, fixed={"avca": SETTLED}), info, "avca")
    assert group(store, sampler="cmaes").trials == 16


def test_class_vectors_are_aligned_once_for_a_group(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = BenchmarkInfo.class_vectors, []

    def counted(self: BenchmarkInfo, *args: Any) -> Any:
        calls.append(args)
        return real(self, *args)

    monkeypatch.setattr(BenchmarkInfo, "class_vectors", counted)
    group(store)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"space": {"epochs": {"int": [2, 5]}}}, "start point 0 .*: epochs = 50 is outside its"),
        ({"points": [{"lr": 0.5}]}, r"start point 1 .*: lr = 0\.5 is outside its range; widen"),
        ({"points": [{"epochs": 3}]}, "start point 1 .*: epochs is not searched; it is fixed"),
        ({"space": {"r_encoder": {"uniform": [0, 1]}}}, "avca has no hyperparameter 'r_encoder'"),
        ({"space": {"lr": {"uniform": [0, 1], "log": [1, 2]}}}, "lr: give exactly one of unif"),
        ({"space": {"lr": {"loguniform": [0, 1]}}}, "known keys: choice, int, log, uniform"),
        ({"space": {"lr": {"log": [1e-2, 1e-4]}}}, "search space of avca: lr: "),
        # Bounds a system would refuse in the middle of a sweep are refused before it.
        ({"space": {"r_enc": {"uniform": [0, 3]}}}, "r_enc: input should be less than 1"),
        ({"space": {"heads": {"choice": ["3x100", "2x2"]}}}, "heads: input should be '3x100'"),
    ],
)
def test_bad_search_spaces(store: FeatureStore, search: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        group(store, **search)


def test_bad_fixed_values(store: FeatureStore) -> None:
    info = store.info("tiny")
    with pytest.raises(UserError, match=r"job x: avca: r_enc: input should be less than 1"):
        Group(job(fixed={"avca": {"r_enc": 1.5}}), info, "avca")
    with pytest.raises(UserError, match=r"no system 'avcaa'; there is .*avca"):
        Group(job(models=["avcaa"]), info, "avcaa")
    with pytest.raises(UserError, match="batch_size 64 cannot be split evenly over 3 workers"):
        Group(job(train={"batch_size": 64}, test={"workers": 3}), info, "avca")


def test_compat_preset_reaches_the_model(store: FeatureStore) -> None:
    group = Group(job(protocol={"preset": "compat"}), store.info("tiny"), "avca")
    config = group.task({}).config
    assert config["train_pos_emb"] is False and config["bn_legacy_updates"] is True


@pytest.mark.parametrize("system", list(model_files()))
@pytest.mark.parametrize("features", ["main", "cls", "clipclap"])
def test_trial_0_of_every_system_is_its_published_point(
    system: str, features: str, store: FeatureStore
) -> None:
    """Under both presets; the preset's values survive where the job searches them."""
    for dataset in ("UCF", "VGGSound", "ActivityNet"):
        info = replace(store.info("tiny"), dataset=dataset, feature_set=features)
        for preset in ("paper", "compat"):
            settings = job(models=[system], protocol={"preset": preset})
            group = Group(settings, info, system)
            task = group.task(group.start_points[0])
            stated = {} if group.published is None else group.published.values
            whole = task.config | task.train.model_dump()
            assert stated.items() <= whole.items()
            if preset == "compat":
                ours = dict(model_class(system).compat) | stated
                assert {k: whole[k] for k in ours} == ours


def test_one_benchmark_with_two_text_sets(store: FeatureStore) -> None:
    settings = job(benchmarks=["tiny", "tiny:other"])
    assert [settings.text_of(b) for b in settings.benchmarks] == [
        ("tiny", "w2v"),
        ("tiny", "other"),
    ]
    info = store.info("tiny")
    info = replace(info, text={**info.text, "other": info.text["w2v"]})
    plain, own = (Group(settings, info, "avca", text) for text in ("w2v", "other"))
    assert (plain.key, own.key) == ("tiny--avca", "tiny+other--avca")
    ids = {g.task(g.start_points[0]).id for g in (plain, own)}
    assert len(ids) == 2 and own.task(own.start_points[0]).protocol.text == "other"
    with pytest.raises(UserError, match="benchmarks lists tiny twice"):
        Sweep(job(benchmarks=["tiny", "tiny:w2v"]), store)
    with pytest.raises(UserError, match="no text set 'nope'; it has w2v"):
        Sweep(job(name="never", benchmarks=["tiny:nope"]), store)
    assert not store.storage.keys("sweeps/never/")


@pytest.mark.parametrize("entry", ["tiny:", ":w2v", "tiny@x:y", "a:b:c", ""])
def test_malformed_benchmark_entries(entry: str) -> None:
    with pytest.raises(ValueError, match="write name, name@digest, name:text"):
        job(benchmarks=[entry])


def test_what_a_system_cannot_do_is_refused_before_anything_starts(store: FeatureStore) -> None:
    info = store.info("tiny")
    for settings, message in (
        ({"protocol": {"max_steps": 60}}, "max_steps: benchmark tiny has one vector per video"),
        (
            {"models": ["devise"], "fixed": {"devise": {"test_rule": "dot"}}}
            | {"protocol": {"calibration": "scaled"}},
            "devise compares logits or products",
        ),
        ({"models": ["clipclap"], "fixed": {"clipclap": {"word_embeddings": "clip"}}}, "clip"),
    ):
        whole = job(**settings)
        with pytest.raises(UserError, match=message):
            Group(whole, info, whole.models[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 2001-13-45\n", r":4: not valid YAML \('2001-13-45' is no timestamp\)"),
        ("seed: 2001-12-13\n", "seed: input should be a valid integer"),
        ("train: " + "[" * 3000 + "\n", r": not valid YAML \(nested too deeply\)"),
        ("train: " + "{a: " * 3000 + "\n", r": not valid YAML \(nested too deeply\)"),
        ("seed: " + "1" * 5000 + "\n", r":4: not valid YAML \('1+' is no int\)"),
        ("train: !!map [a]\n", ":4: not valid YAML .expected a mapping node"),
        ("seed: !!bool x\n", r":4: not valid YAML \('x' is no bool\)"),
        ("seed: !!timestamp x\n", r":4: not valid YAML \('x' is no timestamp\)"),
        ("seed: 2001-01-01 00:00:00 +99:99\n", ":4: not valid YAML"),
        ('seed: "\\UFFFFFFFF"\n', "not valid YAML"),
        ("? [a]\n: 1\n", "not valid YAML"),
    ],
)
def test_values_that_yaml_stumbles_over(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(BASE + text)
    with pytest.raises(UserError, match=message) as caught:
        load_job(path)
    assert str(caught.value).startswith(str(path)) and len(str(caught.value)) < 400
