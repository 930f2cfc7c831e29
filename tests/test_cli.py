"""The command line: what a person types, and what one clear line they get when it is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Run

JOB = "name: x\nbenchmarks: [tiny]\nmodels: [avca]\nstore: {store}\ntracking: {{uri: 'off'}}\n"


def test_simulate_ingest_and_look(avzero: Run, tmp_path: Path) -> None:
    store = tmp_path / "store"
    code, out, _ = avzero("simulate", tmp_path / "TINY", "--size", "tiny")
    assert code == 0 and "size tiny, seed 0" in out
    for verb in ("stored", "already in the store"):
        code, out, _ = avzero(
            "ingest",
            "avca",
            tmp_path / "TINY",
            "--features",
            "tiny",
            "--split",
            "main",
            "--to",
            store,
        )
        assert code == 0 and verb in out and "train 192" in out
    code, out, _ = avzero("data", "list", "--store", store)
    assert code == 0 and "tiny-main-sim" in out.replace("\n", "") and "audio 32" in out
    name = "tiny-tiny-main-sim"
    assert "all digests match" in avzero("data", "verify", "--store", store)[1]
    assert "SIMULATED" in avzero("data", "audit", name, "--store", store)[1]
    audit = json.loads(avzero("data", "audit", name, "--json", "--store", store)[1])
    assert audit["roles"]["train"]["classes"] == 24
    assert "was opened 0 times" in avzero("data", "ledger", name, "--store", store)[1]
    blob = max((store / "blobs").iterdir(), key=lambda p: p.stat().st_size)
    blob.write_bytes(blob.read_bytes()[:-1] + b"!")
    code, _, err = avzero("data", "verify", "--store", store)
    assert code == 2 and blob.name[:12] in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simulate", "{tmp}/X", "--size", "huge"], "no size 'huge'; choose one of tiny"),
        (["ingest", "avca", "{tmp}/nowhere", "--to", "{tmp}/s"], "no folder class-split"),
        (["ingest", "avca", "{tmp}", "--to", "gs://b"], "unknown kind of storage"),
        (["ingest", "avca", "{tmp}", "--text", "w2v"], "--text w2v: write NAME=FILE"),
        (["data", "audit", "ucf", "--store", "{tmp}/s"], "no benchmark 'ucf'; there is none"),
        (["sweep", "{tmp}/none.yaml"], "no such file"),
        (["sweep", "nameless", "--store", "{tmp}/s"], "no sweep 'nameless'"),
        (["sweep", "{tmp}/bad.yaml"], "bad.yaml: unknown key 'model'; known keys: benchmarks"),
        (["sweep", "{tmp}/job.yaml"], "no benchmark 'tiny'"),
        (["test", "{tmp}/job.yaml"], "no benchmark 'tiny'"),
        (["report", "--store", "{tmp}/s"], "no TEST results yet; run avzero sweep"),
    ],
)
def test_wrong_input_is_one_clear_line(
    avzero: Run, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "bad.yaml").write_text(JOB.format(store=tmp_path / "s") + "model: avca\n")
    (tmp_path / "job.yaml").write_text(JOB.format(store=tmp_path / "s"))
    before = sorted(tmp_path.rglob("*"))
    code, out, err = avzero(*(a.format(tmp=tmp_path) for a in arguments))
    assert code == 2
    assert message in err and err.startswith("avzero: ")
    assert err.count("\n") == 1 and "Traceback" not in err + out
    assert sorted(tmp_path.rglob("*")) == before, "something was half written"


def test_usage_errors_exit_with_2(avzero: Run) -> None:
    assert avzero("sweep")[0] == 2
    assert avzero("swep")[0] == 2
    assert avzero("--help")[0] == 0


def test_debug_shows_the_traceback(avzero: Run, tmp_path: Path) -> None:
    from avzero.errors import UserError

    with pytest.raises(UserError):
        avzero("sweep", tmp_path / "none.yaml", "--debug")
