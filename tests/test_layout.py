"""Rules of the source tree that a reviewer would otherwise have to remember (design.md)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "platform" / "avzero"
ORDER = ("data", "protocol", "models", "train", "tune", "track", "report", "cluster")
"""Layers from left to right; a layer imports itself and what stands left of it."""
SOURCES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Yield the avzero modules a file imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("avzero"):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("avzero"))


def layer(parts: tuple[str, ...]) -> str:
    """Return the layer of a module path below ``avzero``."""
    return parts[0] if parts and parts[0] in ORDER else ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_left(path: Path) -> None:
    mine = layer(path.relative_to(PACKAGE).parts)
    for module in imports(path):
        theirs = layer(tuple(module.split(".")[1:]))
        if mine and theirs:
            assert ORDER.index(theirs) <= ORDER.index(mine), f"{path} imports {module}"
        elif not mine and path.name != "cli.py":
            assert not theirs, f"{path} is importable by all, so it may not import {module}"


def test_platform_is_no_package() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
    code = "import platform, ray, torch; assert platform.system(); print(platform.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert str(ROOT) not in done.stdout


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_sizes(path: Path) -> None:
    text = path.read_text()
    limit = 250 if path.parent.name == "models" and not path.name.startswith("_") else 500
    assert len(text.splitlines()) <= limit
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{node.name} is too long"


def test_no_branch_on_a_systems_name() -> None:
    names = {p.stem for p in (PACKAGE / "models").glob("*.py") if not p.stem.startswith("_")}
    for path in SOURCES:
        if path.parent.name == "models" and not path.stem.startswith("_"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                constants = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant)}
                # "clipclap" names a release's layout as well as a system.
                allowed = {"clipclap"} if "layout" in ast.unparse(node) else set()
                found = (constants & names) - allowed
                assert not found, f"{path}:{node.lineno} compares with a system's name"


def test_only_the_seal_opens_test() -> None:
    callers = [
        path.relative_to(PACKAGE).as_posix()
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "open_test"
    ]
    assert callers == ["protocol/seal.py"]
    users = [
        path.relative_to(PACKAGE).as_posix()
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Name) and node.id == "open_test"
    ]
    assert users == ["train/outcome.py"]


def test_command_line_starts_without_heavy_libraries() -> None:
    code = (
        "import sys, avzero, avzero.cli; heavy = {'ray', 'torch', 'mlflow', 'optuna', 'pyarrow', "
        "'h5py', 'numpy', 'boto3'} & set(sys.modules); sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"imported at start: {done.stderr}"


def test_jobs_start_with_their_command() -> None:
    for path in sorted((ROOT / "jobs").glob("*.yaml")):
        first = path.read_text().splitlines()[0]
        assert first.startswith("# ") and ("avzero" in first or "make" in first), path
