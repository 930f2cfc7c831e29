"""Finding the systems: every file of ``models/`` without a leading underscore is one.

Folders named in ``AVZERO_PATH`` (separated like ``PATH``) are searched as well: a system of your
own is ``<folder>/models/<name>.py`` plus ``<folder>/search_spaces/<name>.yaml``, nothing else.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from pydantic import ValidationError

from avzero.canon import sha256_hex
from avzero.errors import UserError
from avzero.models._contract import Card, Model, ModelConfig, Shapes
from avzero.models._layers import number_sites
from avzero.protocol.counter import fold
from avzero.spec import Preset, Task, describe

_INITIALISATION = 0x494E4954


def extra_folders() -> list[Path]:
    """Return the folders of ``AVZERO_PATH``, and those that travelled with a submitted job."""
    named = [Path(p) for p in os.environ.get("AVZERO_PATH", "").split(os.pathsep) if p]
    return [*named, *sorted((Path(__file__).parents[1] / "_own").glob("*"))]


def model_files() -> dict[str, Path]:
    """Return {system name: file}, sorted by name.

    Raises:
        UserError: two files define the same name.
    """
    folders = [Path(__file__).parent, *(folder / "models" for folder in extra_folders())]
    return dict(_found(tuple((folder, _changed(folder)) for folder in folders)))


def _changed(folder: Path) -> int:
    """Return when files were last added to a folder or removed, 0 where there is none."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return 0


@functools.lru_cache(maxsize=8)
def _found(folders: tuple[tuple[Path, int], ...]) -> dict[str, Path]:
    """Return the systems' files; read again when a folder has changed."""
    found: dict[str, Path] = {}
    for folder, _ in folders:
        for path in sorted(folder.glob("*.py")):
            if path.stem.startswith("_"):
                continue
            if path.stem in found:
                raise UserError(f"{path}: system {path.stem!r} is already {found[path.stem]}")
            found[path.stem] = path
    return dict(sorted(found.items()))


def model_class(name: str) -> type[Model]:
    """Return the class of a system.

    Raises:
        UserError: there is no such system, its file does not define exactly one, or what it
            defines lacks ``card`` or ``Config``.
    """
    files = model_files()
    if name not in files:
        raise UserError(f"no system {name!r}; there is {', '.join(files)}")
    return _load(name, files[name])


@functools.cache
def _load(name: str, path: Path) -> type[Model]:
    module = _import(name, path)
    classes = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, Model)
        and not inspect.isabstract(value)
        and value.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise UserError(f"{path}: defines {len(classes)} systems; a file defines exactly one")
    (cls,) = classes
    if not isinstance(getattr(cls, "card", None), Card):
        raise UserError(f"{path}: {cls.__name__} needs a card: card = Card(title, authors, …)")
    config = getattr(cls, "Config", None)
    if not (inspect.isclass(config) and issubclass(config, ModelConfig)):
        raise UserError(f"{path}: {cls.__name__} needs a Config: a subclass of ModelConfig")
    return cls


def _import(name: str, path: Path) -> ModuleType:
    """Import a model file; files outside the package get a private module name.

    Raises:
        UserError: a file outside the package cannot be run.
    """
    if path.parent == Path(__file__).parent:
        return importlib.import_module(f"avzero.models.{name}")
    qualified = f"_avzero_model_{name}_{sha256_hex(str(path).encode())[:8]}"
    spec = importlib.util.spec_from_file_location(qualified, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[qualified] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[qualified]
        # A syntax error names its line itself; of others, the innermost line in this file counts.
        lines = [
            f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)
        ]
        if isinstance(error, SyntaxError) and error.filename == str(path):
            lines = [error.lineno]
        where = f"{path}:{lines[-1]}" if lines and lines[-1] else str(path)
        raise UserError(f"{where}: {type(error).__name__}: {error}") from error
    return module


def make_config(name: str, values: dict[str, object], preset: Preset, where: str) -> ModelConfig:
    """Return a system's configuration: its defaults, the preset's, then ``values``.

    Raises:
        UserError: an unknown hyperparameter or an impossible value; the message starts ``where``.
    """
    cls = model_class(name)
    base = dict(cls.compat) if preset is Preset.COMPAT else {}
    try:
        return cls.Config.model_validate(base | values)
    except ValidationError as error:
        raise UserError(f"{where}: {name}: {describe(error, cls.Config)}") from error


def outline(name: str, config: ModelConfig, shapes: Shapes) -> Model:
    """Build a system without memory or random numbers: refusals and sizes at once.

    What has been built is kept, for a search space asks for the same ones again and again: look at
    it, do not change it.

    Raises:
        UserError: the system cannot be built this way for these shapes.
    """
    features = tuple(shapes.features.items())
    return _outline(model_class(name), config.model_dump_json(), features, shapes[1:])


@functools.lru_cache(maxsize=256)
def _outline(
    cls: type[Model], config: str, features: tuple[tuple[str, int], ...], rest: tuple[Any, ...]
) -> Model:
    with torch.device("meta"):
        return cls(cls.Config.model_validate_json(config), Shapes(dict(features), *rest))


def build(task: Task, shapes: Shapes, device: torch.device | str = "cpu") -> Model:
    """Build a task's system with the framework's default initialisation, in its precision.

    The weights depend on (seed, stage) only, not on what was built before or how many workers
    build it, nor on the device they are moved to.
    """
    cls = model_class(task.model)
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which seeds every kind of device there could be: 0.5 ms.
        torch.default_generator.manual_seed(fold(_INITIALISATION, task.seed, task.stage) >> 1)
        model = cls(cls.Config.model_validate(task.config), shapes)
    number_sites(model)
    return model.to(device, getattr(torch, task.train.precision))
