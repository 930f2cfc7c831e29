"""A system of one's own: two files in a folder, nothing else edited."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from avzero.data.avca import read_avca
from avzero.data.benchmark import Benchmark
from avzero.data.store import FeatureStore
from avzero.errors import UserError
from avzero.models._registry import model_class, model_files
from avzero.train.folder import RunFolder
from avzero.train.loop import Trainer
from avzero.tune.space import load_space
from tests.conftest import make_task

MODEL = '''
"""Nearest class vector after one linear map of the video features."""

import torch
from torch import nn

from avzero.models._contract import Card, Model, ModelConfig


class OwnConfig(ModelConfig):
    """One number."""

    weight: float = 1.0


class Own(Model):
    """A linear map."""

    card = Card("Own", "nobody", 2026, "this test", "https://example.org", ("averaged",))
    Config = OwnConfig

    def __init__(self, config, shapes):
        super().__init__(config, shapes)
        self.map = nn.Linear(shapes.features["video"], shapes.text)
        self.weight = config.weight

    def loss(self, batch, context):
        return {"mse": self.weight * (self.map(batch.features["video"][:, 0]) - batch.text[:, 0])
                .square().mean()}

    def embed(self, features):
        return {"both": self.map(features["video"])}

    def embed_classes(self, text):
        return text

    def distances(self, samples, classes, squared):
        d = torch.cdist(samples["both"], classes)
        return {"both": d.square() if squared else d}
'''
SPACE = """
model: own
space:
  lr: {log: [1.0e-3, 1.0e-1]}
  weight: {uniform: [0.5, 2.0]}
defaults: {lr: 1.0e-2}
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for folder, name, text in (("models", "own.py", MODEL), ("search_spaces", "own.yaml", SPACE)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
    monkeypatch.setenv("AVZERO_PATH", str(tmp_path))
    return tmp_path


def test_it_is_found_and_trains(own: Path, benchmark: Benchmark, store: FeatureStore) -> None:
    assert "own" in model_files() and load_space("own").model == "own"
    task = make_task(benchmark, "own", train={"lr": 0.01, "epochs": 4})
    records = list(Trainer(task, benchmark, RunFolder(store.storage, task)).epochs())
    assert records[-1].loss < records[0].loss


def test_two_files_of_one_name_are_refused(own: Path) -> None:
    (own / "models" / "avca.py").write_text(MODEL)
    with pytest.raises(UserError, match=r"avca\.py: system 'avca' is already .*avca\.py"):
        model_files()


def test_a_file_with_two_systems_is_refused(own: Path) -> None:
    twice = MODEL + MODEL.split("class OwnConfig")[1].join(["class OwnConfig", ""]).replace(
        "class Own(", "class Other("
    )
    (own / "models" / "twice.py").write_text(twice)
    with pytest.raises(UserError, match="defines 2 systems"):
        model_class("twice")


@pytest.mark.parametrize(
    ("line", "other", "message"),
    [
        ("card = Card(", "title = Card(", r"part\.py: Own needs a card: card = Card\(title"),
        ("Config = OwnConfig", "Config = dict", r"part\.py: Own needs a Config: a subclass"),
        ("Config = OwnConfig", "config = OwnConfig", r"part\.py: Own needs a Config"),
    ],
)
def test_a_system_without_its_card_or_config_is_refused(
    own: Path, line: str, other: str, message: str
) -> None:
    assert MODEL.count(line) == 1
    (own / "models" / "part.py").write_text(MODEL.replace(line, other))
    with pytest.raises(UserError, match=message):
        model_class("part")


@pytest.mark.ray
def test_it_is_listed_and_sweeps(own: Path, release: Path) -> None:
    """The commands themselves, on a Ray cluster of their own that has seen AVZERO_PATH."""
    FeatureStore(str(own / "store")).put(read_avca(release, "tiny", "main", name="tiny"))
    job = {
        "name": "own-sweep",
        "store": str(own / "store"),
        "benchmarks": ["tiny"],
        "models": ["own"],
        "train": {"epochs": 3, "batches_per_epoch": 5, "batch_size": 16},
        "search": {"trials": 2, "sampler": "random"},
        "tracking": {"uri": "off"},
    }
    (own / "own.yaml").write_text(yaml.safe_dump(job))

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "avzero.cli", *arguments]
        done = subprocess.run(  # the assertion below says more than check=True would
            command,
            cwd=own,
            env=dict(os.environ),
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "this test" in run("models")
    run("sweep", str(own / "own.yaml"))
    run("test", str(own / "own.yaml"))
    finals = list((own / "store" / "sweeps" / "own-sweep" / "final").rglob("*.json"))
    assert len(finals) == 1 and json.loads(finals[0].read_text())["model"] == "own"
