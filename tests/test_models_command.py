"""``avzero models``: what it lists, and that it reads well at the widths people have."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from avzero.models._registry import model_class, model_files
from avzero.report.systems import all_systems, describe, in_full, overview
from avzero.tune.space import load_space
from tests.conftest import Run

SYSTEMS = list(model_files())


def shown(width: int, *parts: object) -> list[str]:
    """Return the lines a terminal of a width shows."""
    console = Console(width=width, highlight=False, markup=False, color_system=None)
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    return [line.rstrip() for line in capture.get().splitlines()]


def test_avca_in_numbers() -> None:
    """The counts of its spec; the released code leaves the positional embedding untrained."""
    avca = describe("avca")
    assert avca.parameters == {"main": 1_693_108, "cls": 3_331_508}
    assert len(avca.ranges) == 16 and avca.ranges["lr"] == "1e-05 … 0.005 (log)"
    assert avca.ranges["depth"] == "1 … 3 (int)" and avca.ranges["heads"] == "3x100, 6x50, 5x60"
    assert avca.defaults["r_enc"] == 0.2 and avca.defaults["weight_decay"] == 1e-5
    assert avca.compat == {"train_pos_emb": False, "bn_legacy_updates": True}
    assert len(avca.published) == 6


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_can_be_described(name: str) -> None:
    system = describe(name)
    assert system.docstring and json.loads(json.dumps(system.as_dict()))["name"] == name
    assert set(system.ranges) == set(load_space(name).space) <= set(system.defaults)
    averaged = "averaged" in model_class(name).card.features
    assert set(system.parameters) == ({"main", "cls"} if averaged else set())
    assert all(count > 0 for count in system.parameters.values())
    for width in (80, 120, 160):
        lines = shown(width, *in_full(system))
        assert max(map(cell_len, lines)) <= width
        text = " ".join(" ".join(lines).split())
        assert "…" not in re.sub(r"\S+ … \S+ \(", "", text), "a cell was cut off"
        for point in system.published:
            assert " ".join(point["source"].split()) in text


@pytest.mark.parametrize(
    ("width", "columns"),
    [
        (80, "system year features main cls searched evidence"),
        (120, "system year venue features main cls searched evidence fixture"),
        (160, "system title year venue features main cls searched evidence fixture options"),
    ],
)
def test_overview_fits(width: int, columns: str) -> None:
    systems = all_systems()
    lines = shown(width, overview(systems, width))
    assert max(map(cell_len, lines)) <= width
    header = next(line for line in lines if line.strip().startswith("system"))
    assert header.split() == columns.split()
    rows = [line for line in lines if line.split(" ")[0] in SYSTEMS]
    assert [row.split()[0] for row in rows] == SYSTEMS
    assert not any("…" in line for line in lines), "a cell was cut off"
    body = lines[lines.index(header) + 2 :]
    if "options" not in columns:
        assert body[: len(SYSTEMS)] == rows, "a row takes two lines"
    for row, system in zip(rows, systems, strict=True):
        assert str(system.card.year) in row and system.card.evidence in row


def test_command(avzero: Run) -> None:
    code, out, _ = avzero("models")
    assert code == 0 and all(f"{name} " in out for name in SYSTEMS)
    assert "AVCA" in out and "2022" in out
    code, out, _ = avzero("models", "avca")
    assert code == 0 and "cross-modal attention" in out and "Option: train_pos_emb (P-10)" in out
    assert "main 1,693,108, cls 3,331,508" in out and "Fixture: avca_main" in out
    assert re.search(r"bn_legacy_updates +False +True", out)
    assert "ActivityNet cls: r_enc 0.2" in out and "HM 9.92, ZSL 7.58" in out
    code, _, err = avzero("models", "nothing")
    assert code == 2 and err.startswith("avzero: no system 'nothing'")


def test_json(avzero: Run) -> None:
    code, out, _ = avzero("models", "--json")
    everything = json.loads(out)
    assert code == 0 and [system["name"] for system in everything] == SYSTEMS
    (avca,) = json.loads(avzero("models", "avca", "--json")[1])
    assert avca == everything[SYSTEMS.index("avca")]
    assert avca["year"] == 2022 and avca["evidence"] == "code"
    assert avca["parameters"]["main"] == 1_693_108 and avca["published"][0]["dataset"] == "UCF"


OWN = """
from avzero.models.devise import {cls} as _Base, {config} as _Config
from avzero.models._contract import Card


class OwnConfig(_Config):
    pass


class Own(_Base):
    card = Card("Own", "nobody", 2026, "this test", "https://example.org", ("averaged",))
    Config = OwnConfig
"""
SPACE = "model: own\nspace: {lr: {log: [1.0e-3, 1.0e-1]}}\n"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of AVZERO_PATH with a system that is listed without complaint."""
    (tmp_path / "models").mkdir()
    (tmp_path / "search_spaces").mkdir()
    base = model_class("devise")
    text = OWN.format(cls=base.__name__, config=base.Config.__name__)
    if base.Config.__module__ != base.__module__:
        text = text.replace(f", {base.Config.__name__} as _Config", "").replace(
            "class OwnConfig",
            f"from {base.Config.__module__} import "
            f"{base.Config.__name__} as _Config\n\n\nclass OwnConfig",
        )
    (tmp_path / "models" / "own.py").write_text(text)
    (tmp_path / "search_spaces" / "own.yaml").write_text(SPACE)
    monkeypatch.setenv("AVZERO_PATH", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (SPACE.replace("{log: [1.0e-3, 1.0e-1]}", "{}"), "own: lr: give exactly one of uniform"),
        (SPACE.replace("{log:", "{int: [1, 2], log:"), "own: lr: give exactly one of uniform"),
        (SPACE.replace("1.0e-3", "1.0"), "search space of own: lr: "),
        (SPACE.replace("lr:", "learning_rate:"), "own has no hyperparameter 'learning_rate'; it"),
        (SPACE + "defaults: {rate: 1}\n", "own: unknown key 'rate'"),
        (SPACE + "defaults: {lr: -1}\n", "search space of own: lr: input should be greater"),
        (
            SPACE + "published: [{dataset: UCF, features: cls, source: x, values: {rate: 1}}]\n",
            "own has no hyperparameter 'rate'",
        ),
        (SPACE + "defaults: {lr: 2001-13-45}\n", "own.yaml:3: not valid YAML"),
    ],
)
def test_a_bad_search_space_of_ones_own(avzero: Run, own: Path, space: str, message: str) -> None:
    assert avzero("models")[0] == 0
    (own / "search_spaces" / "own.yaml").write_text(space)
    for arguments in (["models"], ["models", "own"], ["models", "--json"]):
        code, out, err = avzero(*arguments)
        assert code == 2 and message in err and err.startswith("avzero: ")
        assert err.count("\n") == 1 and out == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import torch\ndef f(:\n", "own.py:2: SyntaxError: invalid syntax"),
        ("import torch\n\nimport absent_package\n", "own.py:3: ModuleNotFoundError: No module "),
        ("def f():\n    return {}['x']\n\nf()\n", "own.py:2: KeyError: 'x'"),
        ("import json\njson.loads('')\n", "own.py:2: JSONDecodeError: "),
        ("import sys\nsys.exit(0)\n", "own.py:2: SystemExit: 0"),
        ("x = 1\0\n", "own.py"),
        (None, "own.py: "),
    ],
)
def test_a_bad_file_of_ones_own(avzero: Run, own: Path, text: str | None, message: str) -> None:
    path = own / "models" / "own.py"
    path.unlink()
    private = {name for name in sys.modules if name.startswith("_avzero_model_own_")}
    if text is None:
        path.mkdir()
    else:
        path.write_text(text)
    for arguments in (["models"], ["models", "own"]):
        code, out, err = avzero(*arguments)
        assert code == 2 and str(path) in err and message in err
        assert err.startswith("avzero: ") and err.count("\n") == 1 and out == ""
    assert {name for name in sys.modules if name.startswith("_avzero_model_own_")} == private


def test_a_file_in_another_encoding_is_listed(avzero: Run, own: Path) -> None:
    path = own / "models" / "own.py"
    text = '# coding: latin-1\n"""Système à moi."""\n' + path.read_text()
    path.write_bytes(text.encode("latin-1"))
    code, out, _ = avzero("models", "own")
    assert code == 0 and "Système à moi." in out
