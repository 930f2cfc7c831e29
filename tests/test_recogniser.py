"""The recogniser and the logged model decide as evaluation does; what pictures need is kept."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from avzero.data.benchmark import Benchmark, Role
from avzero.data.ledger import Opening
from avzero.data.sequences import Sequences
from avzero.data.store import FeatureStore
from avzero.errors import UserError
from avzero.protocol.seal import Frozen
from avzero.spec import Protocol
from avzero.track.logged_model import save_model
from avzero.train.folder import RunFolder
from avzero.train.loop import Trainer
from avzero.train.outcome import conclude_stage_1, score_test
from avzero.train.recogniser import Recogniser, write
from avzero.train.records import Result
from tests.conftest import make_task


def finished(store: FeatureStore, model: str, protocol: Protocol) -> tuple[RunFolder, Result]:
    """Train both stages for a moment and score TEST."""
    benchmark = store.open("tiny")
    folder = RunFolder(store.storage, make_task(benchmark, model, protocol=protocol))
    list(Trainer(folder.task, benchmark, folder).epochs())
    frozen: Frozen = conclude_stage_1(folder, benchmark)[1]
    final = RunFolder(store.storage, frozen.stage_2_task(3))
    list(Trainer(final.task, benchmark, final).epochs())
    return final, score_test(store, final, frozen, "recogniser")


def opened(store: FeatureStore, result: Result) -> Benchmark:
    """Open TEST as a user of the served model would have it."""
    opening = Opening(
        store.open("tiny").info.digest,
        "m",
        "w2v",
        "t",
        result.task,
        result.frozen,
        0.0,
        3,
        "s",
        "r",
    )
    return store.open_test(opening)


def inputs(part: Benchmark) -> tuple[dict[str, NDArray[Any]], NDArray[Any]]:
    rows = part.part.samples.rows(Role.TEST_SEEN, Role.TEST_UNSEEN)
    features = {}
    for name, table in part.part.features.items():
        assert not isinstance(table, Sequences)
        features[name] = np.asarray(table)[rows]
    return features, part.part.samples.class_id[rows]


def recalls(names: list[str], target: NDArray[Any], classes: tuple[str, ...]) -> dict[int, float]:
    right = np.array(names) == np.array(classes)[target]
    return {int(i): float(right[target == i].mean()) for i in np.unique(target)}


CASES = [
    ("avca", Protocol()),
    ("avca", Protocol(modality="audio")),
    ("fvaegan_d2", Protocol()),
    ("devise", Protocol(input_scaling="standard", distance="squared_l2")),
]


@pytest.mark.parametrize(("model", "protocol"), CASES)
def test_recognises_as_evaluation_does(
    store: FeatureStore, tmp_path: Path, model: str, protocol: Protocol
) -> None:
    """Sample by sample, so that the recall of every class is the evaluation's own."""
    final, result = finished(store, model, protocol)
    write(final, result, tmp_path)
    recogniser = Recogniser(tmp_path)
    info = store.open("tiny").info
    features, target = inputs(opened(store, result))
    names, distances = recogniser(features)
    expected = dict(zip(result.per_class["class_id"], result.per_class["recall"], strict=True))
    assert recalls(names, target, info.classes.names) == pytest.approx(expected)
    assert distances.shape == (len(target), len(recogniser.classes))
    near = [recogniser.classes[i] for i in distances.argmin(axis=1)]
    assert np.mean(np.array(near) == np.array(names)) > 0.99, "but for ties"
    with pytest.raises(UserError, match="input 'video' is missing; give audio and video"):
        recogniser({"audio": features["audio"]})
    with pytest.raises(UserError, match=r"has shape \[2, 3\]; give \[n, "):
        recogniser({"audio": np.zeros((2, 3)), "video": features["video"]})


def test_what_pictures_need_is_kept(store: FeatureStore, benchmark: Benchmark) -> None:
    final, result = finished(store, "avca", Protocol())
    info = benchmark.info
    kept = final.load_portrait("test", result.frozen)
    table = result.per_class
    zsl = {i: z for i, z in zip(table["class_id"], table["zsl"], strict=True) if z is not None}
    counts = kept["confusion"].double()
    recall = (counts.diagonal() / counts.sum(1)).tolist()
    assert dict(zip(kept["unseen_ids"].tolist(), recall, strict=True)) == pytest.approx(zsl)
    assert len(kept["samples"]) == len(kept["samples_class"]) > 10
    assert kept["classes"].shape[1] == kept["samples"].shape[1]
    assert {info.classes.names[i] for i in kept["classes_id"].tolist()} >= {
        info.classes.names[i] for i in kept["unseen_ids"].tolist()
    }
    # VAL keeps no embeddings, and nothing of TEST's classes.
    first = RunFolder(store.storage, make_task(benchmark, "avca"))
    assert set(first.load_portrait("val")) == {"confusion", "unseen_ids"}
    assert not set(first.load_portrait("val")["unseen_ids"].tolist()) & set(zsl)


@pytest.mark.infra
def test_model_is_served(store: FeatureStore, tmp_path: Path) -> None:
    """``mlflow models serve`` on loopback gives the recogniser's own answers."""
    final, result = finished(store, "avca", Protocol())
    (tmp_path / "files").mkdir()
    write(final, result, tmp_path / "files")
    files = {path.name: path.read_bytes() for path in (tmp_path / "files").iterdir()}
    save_model(tmp_path / "model", files)
    assert not [p for p in (tmp_path / "model").rglob("*") if p.suffix in (".pkl", ".pickle")]
    features, target = inputs(opened(store, result))
    expected = Recogniser(tmp_path / "files")(features)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(tmp_path / "model")]
    serve += [
        "--env-manager",
        "local",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    place = Path(__file__).resolve().parents[1] / "platform"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PYTHONPATH": str(place), "PATH": path}
    log = tmp_path / "serve.log"
    with log.open("w") as out:
        server = subprocess.Popen(
            serve, env=environment, stdout=out, stderr=out, start_new_session=True
        )
    try:
        answer = ask(port, {name: x.tolist() for name, x in features.items()}, server, log)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)
    assert [row["class"] for row in answer] == expected[0]
    assert np.allclose([row["distances"] for row in answer], expected[1], rtol=1e-6)
    by_class = recalls(
        [row["class"] for row in answer], target, store.open("tiny").info.classes.names
    )
    own = dict(zip(result.per_class["class_id"], result.per_class["recall"], strict=True))
    assert by_class == pytest.approx(own), "the evaluation's own recalls"


def ask(port: int, features: dict[str, Any], server: Any, log: Path) -> list[dict[str, Any]]:
    deadline = time.monotonic() + 120
    while True:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            json.dumps({"inputs": features}).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - loopback
                return list(json.loads(answer.read())["predictions"])
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.5)
