"""``avzero models``: what it lists, and that it reads well at the widths people have."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable

import pytest
from rich.cells import cell_len
from rich.console import Console

from avzero import cli
from avzero.models._registry import model_class, model_files
from avzero.report.systems import all_systems, describe, in_full, overview
from avzero.tune.space import load_space

Run = Callable[..., tuple[int, str, str]]
SYSTEMS = list(model_files())


@pytest.fixture
def avzero(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process; return (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["avzero", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


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
