"""The code that travels with a submitted job: this package, as one small zip for ``py_modules``.

A wheel would be installed by pip on every node, with all its dependencies and from a network the
nodes may not have; a zip of the package is unpacked and put on ``PYTHONPATH``. It carries the
search spaces and the systems of ``AVZERO_PATH``, and says which code it is and what it needs.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import platform
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import avzero
from avzero.canon import canonical, sha256_hex
from avzero.errors import UserError
from avzero.models._registry import extra_folders
from avzero.revision import code_revision

SHIPPED = "_shipped.json"
_PACKAGE = Path(avzero.__file__).resolve().parent
_MOST_BYTES = 50_000_000
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same files make the same zip


class Package(NamedTuple):
    """A zip and the name Ray keeps it under."""

    name: str
    data: bytes

    @property
    def uri(self) -> str:
        """What ``py_modules`` lists."""
        return f"gcs://{self.name}"


def build_package() -> Package:
    """Return the package of the running code.

    Raises:
        UserError: a folder of ``AVZERO_PATH`` holds too much to be shipped.
    """
    buffer, total = io.BytesIO(), 0
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in sorted(_files()):
            total += path.stat().st_size
            if total > _MOST_BYTES:
                raise UserError(
                    f"{path}: with it the code to ship exceeds {_MOST_BYTES // 1_000_000} MB; keep "
                    "only code in models/ and search_spaces/ of AVZERO_PATH"
                )
            archive.writestr(zipfile.ZipInfo(f"avzero/{name}", _EPOCH), path.read_bytes())
        about = canonical(describe_code()).encode()
        archive.writestr(zipfile.ZipInfo(f"avzero/{SHIPPED}", _EPOCH), about)
    data = buffer.getvalue()
    return Package(f"_ray_pkg_avzero_{sha256_hex(data)[:24]}.zip", data)


def _files() -> Iterator[tuple[str, Path]]:
    """Yield (name below ``avzero/``, file)."""
    yield from _below(_PACKAGE, "")
    checkout = _PACKAGE.parents[1] / "search_spaces"
    if checkout.is_dir() and not (_PACKAGE / "_search_spaces").is_dir():
        yield from _below(checkout, "_search_spaces/")
    for number, folder in enumerate(extra_folders()):
        for part in ("models", "search_spaces"):
            yield from _below(folder / part, f"_own/{number}/{part}/")


def _below(folder: Path, prefix: str) -> Iterator[tuple[str, Path]]:
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        again = name.parts[0] in (SHIPPED, "_own") and not prefix  # this code was shipped itself
        if path.is_file() and path.suffix != ".pyc" and not again:
            yield f"{prefix}{name.as_posix()}", path


def describe_code() -> dict[str, Any]:
    """Return which code this is, and which versions of others it needs."""
    return {
        "revision": code_revision(),
        "version": avzero.__version__,
        "requirements": _requirements(),
        "python": platform.python_version(),
    }


def shipped() -> dict[str, Any]:
    """Return what the package that was shipped here says of itself; nothing where none was."""
    try:
        return dict(json.loads((_PACKAGE / SHIPPED).read_text()))
    except FileNotFoundError:
        return {}


def _requirements() -> list[str]:
    """Return the requirements of the running code, extras left out."""
    project = _PACKAGE.parents[1] / "pyproject.toml"
    if shipped():
        return list(shipped()["requirements"])
    if project.is_file():
        return list(tomllib.loads(project.read_text())["project"]["dependencies"])
    try:
        found = importlib.metadata.requires("avzero") or []
    except importlib.metadata.PackageNotFoundError:
        found = []
    return [line for line in found if "extra ==" not in line]


def unmet() -> list[str]:
    """Return what the running environment lacks of the code's requirements."""
    from packaging.requirements import Requirement

    found = []
    for line in _requirements():
        need = Requirement(line)
        try:
            have = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{need.name} is missing ({need} is needed)")
            continue
        if not need.specifier.contains(have, prereleases=True):
            found.append(f"{need.name} is {have} ({need.name}{need.specifier} is needed)")
    return found
