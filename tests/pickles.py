"""What tests of pickled releases share: their files, and ways to damage them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from avzero.data.avca import read_avca
from avzero.data.benchmark import Role
from avzero.data.class_lists import FOLDER_OF_ROLE
from avzero.data.release import ReadOptions
from avzero.data.sequences import Features, Sequences
from avzero.errors import UserError

FOLDER = "cls_features_non_averaged"


def class_file(root: Path, modality: str, stem: str | Role, index: int = 0) -> Path:
    stem = FOLDER_OF_ROLE[stem] if isinstance(stem, Role) else stem
    return sorted((root / "features" / FOLDER / modality / stem).glob("*.pkl"))[index]


def load(path: Path) -> dict[str, Any]:
    return dict(pickle.loads(path.read_bytes()))  # noqa: S301 - written by a test


def change(path: Path, edit: Callable[[dict[str, Any]], object], protocol: int = 4) -> None:
    """Edit the dict of a class file; what ``edit`` returns, if not None, replaces it."""
    value: object = load(path)
    value = edit(value) or value  # type: ignore[arg-type]
    path.write_bytes(pickle.dumps(value, protocol=protocol))


def row(features: Features, i: int) -> Any:
    if isinstance(features, Sequences):
        return features.values[features.starts[i] : features.starts[i + 1]]
    return features[i]


def expect(root: Path, *parts: str, options: ReadOptions | None = None) -> None:
    with pytest.raises(UserError) as caught:
        read_avca(root, FOLDER, "cls", options=options)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
