"""Published checkpoints: what is taken, what is refused with one line, and TEST opened once."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from avzero.data.avca import read_avca
from avzero.data.store import FeatureStore
from avzero.errors import UserError
from avzero.models._contract import Model
from avzero.models._registry import build, make_config
from avzero.spec import Preset, Protocol, Task, TextAlignment
from avzero.train.data import StageData
from avzero.train.folder import RunFolder
from avzero.train.loop import Trainer
from avzero.train.outcome import conclude_stage_1, score_test
from avzero.tune.imported import SWEEP, Import, parse_settings, read_checkpoint
from tests.conftest import SMALL, Run, make_task

SMALL_AVCA = SMALL["avca"]
COMPAT = Protocol.model_validate({"preset": "compat"})
SETTINGS = ["--set", "encoder_hidden=32", "--set", "proj_hidden=32"]


def task_of(store: FeatureStore, model: str = "avca", **values: object) -> Task:
    """The compat task that the trained weights in these tests belong to."""
    config = make_config(model, SMALL.get(model, {}) | values, Preset.COMPAT, "test")
    changes = {"config": config.model_dump(mode="json"), "protocol": COMPAT}
    return make_task(store.open("tiny"), model).model_copy(update=changes)


def released(state: dict[str, Tensor], epoch: int = 3) -> dict[str, Any]:
    """A checkpoint as the reference saves it: wrapped names, step counters, optimiser beside."""
    named = {f"module.{key}": value.clone() for key, value in state.items()}
    for key in state:
        if key.endswith("running_mean"):
            counter = key.replace("running_mean", "num_batches_tracked")
            named[f"module.{counter}"] = torch.tensor(1500)
    adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))]).state_dict()
    return {"epoch": epoch, "model": named, "optimizer": adam, "metric": "score"}


def fresh(store: FeatureStore, model: str = "avca", **values: object) -> Model:
    """A system with weights of its own."""
    task = task_of(store, model, **values)
    return build(task, StageData(store.open("tiny"), task, torch.device("cpu")).shapes)


@pytest.fixture(scope="module")
def trained(place: Path) -> dict[str, Any]:
    """Both stages of a small AVCA, trained here, their results, and their weights as released."""
    store = FeatureStore(str(place / "store"))
    folder = RunFolder(store.storage, task_of(store))
    list(Trainer(folder.task, store.open("tiny"), folder).epochs())
    val, frozen = conclude_stage_1(folder, store.open("tiny"))
    stage_2 = RunFolder(store.storage, frozen.stage_2_task(7))
    list(Trainer(stage_2.task, store.open("tiny"), stage_2).epochs())
    test = score_test(store, stage_2, frozen, "trained-here")
    out: dict[str, Any] = {"val": val, "test": test, "folder": stage_2}
    for name, run in (("stage1", folder), ("stage2", stage_2)):
        state = run.load_state()
        assert state is not None
        out[name] = place / f"AVCA_score_{name}.pt"
        torch.save(released(run.best_weights(state), state.best_epoch + 1), out[name])
    return out


def openings(place: Path) -> list[dict[str, Any]]:
    lines = FeatureStore(str(place / "store")).openings("tiny")
    return [line for line in lines if line["sweep"] == SWEEP]


def importing(place: Path, path: Path) -> tuple[object, ...]:
    """The command that imports a file of an AVCA, without its settings."""
    at = ("--store", place / "store")
    return ("import-checkpoint", path, "--model", "avca", "--benchmark", "tiny", *at)


def test_scores_are_those_of_the_run_it_came_from(
    avzero: Run, place: Path, trained: dict[str, Any]
) -> None:
    store = FeatureStore(str(place / "store"))
    run = Import(
        store, trained["stage2"], "avca", "tiny", trained["stage1"], values=dict(SMALL_AVCA)
    )
    val, frozen = run.val()
    test, stored = run.test(frozen)
    assert not stored
    for ours, theirs in ((val, trained["val"]), (test, trained["test"])):
        assert ours.scores == theirs.scores and ours.extra == theirs.extra
        assert ours.per_class == theirs.per_class and ours.epoch == theirs.epoch
    # Same settings, yet an identity of its own: the run trained here is untouched.
    assert test.task != trained["test"].task and test.frozen != trained["test"].frozen
    (line,) = openings(place)
    assert line["run"] == test.task and line["frozen"] == frozen.digest
    assert line["beta"] == test.scores["both"]["beta"]
    folder = place / "store" / "runs" / test.task
    record = json.loads((folder / "checkpoint.json").read_text())
    assert record["file"] == "AVCA_score_stage2.pt" and record["metric"] == "score"
    assert json.loads((folder / "task.json").read_text())["weights"] == record["sha256"]
    # Again, from the command line: nothing is opened.
    again = avzero(*importing(place, trained["stage2"]), "--stage1", trained["stage1"], *SETTINGS)
    assert again[0] == 0 and "TEST was not opened again" in again[1]
    assert len(openings(place)) == 1


def test_command_line(avzero: Run, place: Path, trained: dict[str, Any]) -> None:
    command = (*importing(place, trained["stage2"]), *SETTINGS)
    before = len(openings(place))
    code, out, err = avzero(*command, "--no-test")
    assert code == 0 and err == "" and len(openings(place)) == before
    assert "AVCA on tiny. AVCA_score_stage2.pt: " in out and "chosen by score" in out
    assert "defaults of avca; no point is published for TINY" in out
    assert "set: encoder_hidden=32, proj_hidden=32" in out
    assert "published checkpoints were trained against those vectors" in out
    assert "--alignment by_class" in out
    assert "Warning: beta comes from VAL scored with this file's own weights." in out
    assert "VAL   both" in out and "VAL   mAP text -> both" in out and "TEST  both" not in out
    code, out, _ = avzero(*command)
    assert code == 0 and "TEST  both" in out and len(openings(place)) == before + 1
    # Another setting is another result, and another line in the ledger.
    code, out, _ = avzero(*command, "--alignment", "by_class")
    assert code == 0 and "every class has its own vector" in out
    assert len(openings(place)) == before + 2
    code, out, _ = avzero(*command, "--stage1", trained["stage1"], "--no-test")
    assert "Beta comes from VAL with stage 1. AVCA_score_stage1.pt" in out and "Warning" not in out


@pytest.mark.parametrize("kind", ["plain", "safetensors", "legacy", "half"])
def test_kinds_of_files(place: Path, trained: dict[str, Any], kind: str) -> None:
    state = read_checkpoint(trained["stage2"]).state
    path = place / f"AVCA_{kind}.{'safetensors' if kind == 'safetensors' else 'pt'}"
    if kind == "safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    elif kind == "legacy":
        torch.save({"model": dict(state)}, path, _use_new_zipfile_serialization=False)
    else:
        half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
        torch.save(half if kind == "half" else dict(state), path)
    store = FeatureStore(str(place / "store"))
    run = Import(store, path, "avca", "tiny", trained["stage1"], values=dict(SMALL_AVCA))
    assert run.checkpoint.epoch == -1 and "epoch not stated" in run.checkpoint.line()
    test, _ = run.test(run.val()[1])
    if kind != "half":
        assert test.scores == trained["test"].scores


def test_published_point_and_settings(release: Path, tmp_path: Path) -> None:
    """A benchmark of a published dataset takes that point's hyperparameters, in compat."""
    store = FeatureStore(str(tmp_path / "store"))
    raw = read_avca(release, "tiny", "main", name="ucf")
    store.put(dataclasses.replace(raw, dataset="UCF", feature_set="cls"))
    values = dict(SMALL_AVCA)
    config = make_config("avca", values, Preset.COMPAT, "test")
    task = make_task(store.open("ucf")).model_copy(
        update={"config": config.model_dump(mode="json"), "protocol": COMPAT}
    )
    data = StageData(store.open("ucf"), task, torch.device("cpu"))
    torch.save(released(build(task, data.shapes).state_dict()), tmp_path / "x.pt")
    run = Import(store, tmp_path / "x.pt", "avca", "ucf", values=values | {"k1": 0.5})
    chosen = run.group.task({})
    assert chosen.config["bn_momentum"] == 0.99 and chosen.config["k1"] == 0.5
    assert chosen.config["bn_legacy_updates"] and not chosen.config["train_pos_emb"]
    assert chosen.protocol.text_alignment is TextAlignment.LEGACY_SORTED
    assert "published point of UCF cls: AVCA-GZSL run scripts" in "\n".join(run.notes())


def test_identity_is_the_file_and_the_settings(place: Path, trained: dict[str, Any]) -> None:
    store = FeatureStore(str(place / "store"))

    def identity(path: Path, **changes: Any) -> str:
        values = dict(SMALL_AVCA) | changes.pop("values", {})
        return (
            Import(store, path, "avca", "tiny", values=values, **changes)
            ._task(read_checkpoint(path), 2)
            .id
        )

    base = identity(trained["stage2"])
    copy = place / "renamed.pt"
    copy.write_bytes(trained["stage2"].read_bytes())
    assert identity(copy) == base
    others = [
        identity(trained["stage1"]),
        identity(trained["stage2"], values={"heads": "6x50"}),
        identity(trained["stage2"], protocol={"text_alignment": "by_class"}),
        identity(trained["stage2"], seed=1),
        task_of(store).model_copy(update={"stage": 2}).id,
    ]
    assert len({base, *others}) == len(others) + 1


class Hostile:
    """What a pickle may ask for."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def bad_files(folder: Path, store: FeatureStore) -> dict[str, Path]:
    """Files that are no AVCA checkpoint for the tiny benchmark."""
    state = fresh(store).state_dict()
    nan = {k: torch.full_like(v, torch.nan) if k == "D.fc.0.bias" else v for k, v in state.items()}
    wild = {k: -v - 1 if k.endswith("running_var") else v for k, v in state.items()}
    wide = dict(state) | {"A_enc.fc.0.weight": torch.zeros(32, 512)}
    hidden = fresh(store, encoder_hidden=64).state_dict()
    contents: dict[str, Any] = {
        "nan.pt": {"model": nan, "epoch": 1},
        "wild.pt": wild,
        "wide.pt": released(wide),
        "AVCA_hidden.pt": released(hidden),
        "empty.pt": {"model": {}, "epoch": 1},
        "list.pt": [1, 2],
        "args.pt": {"lr": 0.1, "seed": 42},
        "DeviseModel_score.pt": {"model": {"bilinear.weight": torch.zeros(3, 4)}},
    }
    for name, content in contents.items():
        torch.save(content, folder / name)
    (folder / "text.pt").write_text("not a checkpoint\n")
    (folder / "none.pt").write_bytes(b"")
    (folder / "cut.pt").write_bytes((folder / "wide.pt").read_bytes()[:2000])
    (folder / "evil.pt").write_bytes(pickle.dumps({"model": Hostile(folder / "was-here")}))
    torch.save({"model": Hostile(folder / "was-here")}, folder / "evil-zip.pt")
    (folder / "text.safetensors").write_text("not safetensors")
    (folder / "folder.pt").mkdir()
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.pt", "absent.pt: no such file"),
        ("folder.pt", "folder.pt: no such file"),
        ("text.pt", "not a checkpoint that can be read without running code from it"),
        ("none.pt", "not a checkpoint that can be read"),
        ("cut.pt", "not a checkpoint that can be read"),
        ("evil.pt", "not a checkpoint that can be read"),
        ("evil-zip.pt", "without running code from it (it asks for "),
        ("text.safetensors", "not a checkpoint that can be read"),
        ("empty.pt", "no state dict"),
        ("list.pt", "no state dict: expected named tensors, or an entry 'model' with them"),
        ("args.pt", "it has lr, seed"),
        ("nan.pt", "D.fc.0.bias is not finite"),
        ("wild.pt", "embeddings of tiny are not finite with these weights"),
        ("wide.pt", "A_enc.fc.0.weight is [32, 512], expected [32, 32]"),
        ("wide.pt", "Benchmark tiny has audio 32, video "),
        ("AVCA_hidden.pt", "A_enc.fc.0.bias is [64], expected [32]"),
        ("DeviseModel_score.pt", "not a checkpoint of AVCA with these settings: missing: A_enc"),
        ("DeviseModel_score.pt", "extra: bilinear.weight"),
        ("DeviseModel_score.pt", "The file's name says devise: give --model devise"),
    ],
)
def test_refusals_are_one_line(
    avzero: Run, place: Path, tmp_path: Path, name: str, message: str
) -> None:
    bad_files(tmp_path, FeatureStore(str(place / "store")))
    before, lines = sorted((place / "store").rglob("*")), len(openings(place))
    code, out, err = avzero(*importing(place, tmp_path / name), *SETTINGS)
    assert code == 2 and message in err and err.startswith("avzero: ")
    assert err.count("\n") == 1 and out == ""
    assert sorted((place / "store").rglob("*")) == before and len(openings(place)) == lines
    assert not (tmp_path / "was-here").exists()


def test_another_systems_weights_are_recognised(avzero: Run, place: Path, tmp_path: Path) -> None:
    """By the weights first: one class of the reference serves three systems."""
    store = FeatureStore(str(place / "store"))
    torch.save(released(fresh(store, "devise").state_dict()), tmp_path / "model.pt")
    at = ("--benchmark", "tiny", "--store", place / "store", "--no-test")
    code, _, err = avzero("import-checkpoint", tmp_path / "model.pt", "--model", "avca", *at)
    assert code == 2 and "not a checkpoint of AVCA" in err
    assert "The weights are those of ale or devise or sje: give --model ale" in err
    (tmp_path / "model.pt").rename(tmp_path / "DeviseModel_score.pt")
    path = tmp_path / "DeviseModel_score.pt"
    code, out, _ = avzero("import-checkpoint", path, "--model", "ale", *at)
    assert code == 0 and "The file's name says devise; the weights fit ale as well." in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "avca", "--benchmark", "nothing"], "no benchmark 'nothing'"),
        (["--model", "nothing", "--benchmark", "tiny"], "no system 'nothing'"),
        (["--model", "avca", "--benchmark", "tiny", "--set", "k1"], "--set k1: write key=value"),
        (["--model", "avca", "--benchmark", "tiny", "--set", "k1=["], "not valid YAML"),
        (["--model", "avca", "--benchmark", "tiny", "--set", "k9=1"], "no hyperparameter 'k9'"),
        (["--model", "avca", "--benchmark", "tiny", "--text", "x"], "no text set 'x'"),
        (["--model", "avca", "--benchmark", "tiny", "--alignment", "x"], "text_alignment: input"),
        (["--model", "avca", "--benchmark", "tiny", "--stage1", "/none.pt"], "/none.pt: no such"),
    ],
)
def test_wrong_options_are_one_line(
    avzero: Run, place: Path, trained: dict[str, Any], arguments: list[str], message: str
) -> None:
    code, out, err = avzero(
        "import-checkpoint", trained["stage2"], *arguments, "--store", place / "store"
    )
    assert code == 2 and message in err and out == ""
    assert err.startswith("avzero: ") and err.count("\n") == 1


def test_settings_are_read_as_yaml() -> None:
    got = parse_settings(["a=1", "b=0.5", "c=true", "d=3x100", "e="])
    assert got == {"a": 1, "b": 0.5, "c": True, "d": "3x100", "e": None}


ODD_TENSORS: dict[str, tuple[Callable[[], Tensor], str]] = {
    "sparse": (lambda: torch.eye(32).to_sparse(), "a sparse_coo tensor"),
    "csr": (lambda: torch.eye(32).to_sparse_csr(), "a sparse_csr tensor"),
    "nested": (lambda: torch.nested.nested_tensor([torch.zeros(2)]), "a nested tensor"),
    "float8": (lambda: torch.zeros(32).to(torch.float8_e4m3fn), "of type float8_e4m3fn"),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.zeros(32), 0.1, 0, torch.quint8),
        "of type quint8",
    ),
    "complex": (lambda: torch.zeros(32, dtype=torch.complex64), "of type complex64"),
    "meta": (lambda: torch.zeros(32, device="meta"), "a tensor on meta, without values"),
    "huge": (
        lambda: torch.zeros(1).expand(2**42),
        "[4398046511104], more than the 4 bytes stored for it",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("odd", list(ODD_TENSORS))
def test_odd_tensors_are_refused_by_name(
    avzero: Run, place: Path, tmp_path: Path, odd: str
) -> None:
    make, message = ODD_TENSORS[odd]
    state = fresh(FeatureStore(str(place / "store"))).state_dict()
    torch.save(dict(state) | {"D.fc.0.bias": make()}, tmp_path / "x.pt")
    code, out, err = avzero(*importing(place, tmp_path / "x.pt"), *SETTINGS)
    assert code == 2 and err.startswith("avzero: ") and err.count("\n") == 1 and out == ""
    assert f"x.pt: D.fc.0.bias is {message}" in err


@pytest.mark.parametrize("kind", ["int8", "int64", "bool"])
def test_weights_must_be_floating_point(
    avzero: Run, place: Path, tmp_path: Path, kind: str
) -> None:
    state = dict(fresh(FeatureStore(str(place / "store"))).state_dict())
    state["D.fc.0.bias"] = state["D.fc.0.bias"].to(getattr(torch, kind))
    torch.save(released(state), tmp_path / "x.pt")
    code, out, err = avzero(*importing(place, tmp_path / "x.pt"), *SETTINGS)
    assert code == 2 and err.count("\n") == 1 and out == ""
    assert f"D.fc.0.bias is {kind}, expected float32" in err


def test_complex_weights_do_not_load_even_past_the_reader(place: Path) -> None:
    model = fresh(FeatureStore(str(place / "store")))
    state = {k: v.to(torch.complex64) for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match=r"is complex64, expected float32.* more of another shape"):
        model.load_reference(state)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lr=2001-13-45", "not valid YAML ('2001-13-45' is no timestamp)"),
        ("lr=2001-12-13", "lr: input should be a valid number"),
        ("lr=" + "[" * 3000, "not valid YAML (nested too deeply)"),
        ("lr=!!bool x", "not valid YAML ('x' is no bool)"),
        ("lr=" + "1" * 5000, "1' is no int)"),
        ('lr="\\U00110000"', "not valid YAML (cannot be parsed)"),
        ("heads={a: 1, a: 2}", "not valid YAML (key 'a' is written twice)"),
    ],
)
def test_settings_that_yaml_stumbles_over(
    avzero: Run, place: Path, trained: dict[str, Any], setting: str, message: str
) -> None:
    code, out, err = avzero(*importing(place, trained["stage2"]), "--set", setting)
    assert code == 2 and message in err and out == ""
    assert err.startswith("avzero: ") and err.count("\n") == 1 and len(err) < 400


def test_settings_read_numbers_as_jobs_do_and_come_once() -> None:
    assert parse_settings(["lr=1e-3", "k1=2E-5"]) == {"lr": 1e-3, "k1": 2e-5}
    with pytest.raises(UserError, match="--set lr=2: lr is given twice"):
        parse_settings(["lr=1", "lr=2"])


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("score", "chosen by score,"),
        ("\x1b[2Jx", r"chosen by '\x1b[2Jx',"),
        ("score\nTEST  both HM 99.9", r"chosen by 'score\nTEST  both HM 99.9',"),
        ("\u202e", r"chosen by '\u202e',"),
        ("\ud800", r"chosen by '\ud800',"),
        ("x" * 5000, f"chosen by '{'x' * 60}',"),
    ],
)
def test_text_of_the_file_is_shown_harmlessly(
    place: Path, trained: dict[str, Any], tmp_path: Path, metric: str, expected: str
) -> None:
    state = read_checkpoint(trained["stage2"]).state
    torch.save({"model": dict(state), "epoch": 10**600, "metric": metric}, tmp_path / "x.pt")
    store = FeatureStore(str(place / "store"))
    run = Import(store, tmp_path / "x.pt", "avca", "tiny", values=dict(SMALL_AVCA))
    line = run.checkpoint.line()
    assert expected in line and line.isprintable() and "epoch not stated" in line
    run.val()  # the record beside the weights takes it as well


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"\x1b[2Jname": 1}, r"it has '\x1b[2Jname'"),
        ({10**600: 1}, "it has int"),
        ({"\x1b[2Jname": torch.zeros(2)}, r"'\x1b[2Jname' is no name of a weight"),
        ({"model": {"a\nb": torch.zeros(2)}}, r"'a\nb' is no name of a weight"),
        ({"x" * 5000: torch.zeros(2)}, "is no name of a weight"),
    ],
)
def test_names_in_the_file_are_shown_harmlessly(
    tmp_path: Path, content: dict[Any, Any], message: str
) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError) as caught:
        read_checkpoint(tmp_path / "x.pt")
    assert message in str(caught.value) and str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_what_a_pickle_asks_for_is_shown_harmlessly(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"\x80\x02cos\n\x1b[2Jsystem\n.")
    with pytest.raises(UserError, match="without running code from it") as caught:
        read_checkpoint(tmp_path / "x.pt")
    assert str(caught.value).isprintable()
