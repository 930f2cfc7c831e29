"""Canonical JSON and the identities made from it.

Two specifications that mean the same have the same canonical text, hence the same identity; an
identity names the Optuna trial, the Ray trial, the MLflow run and the folder in storage, so that
running again is resuming.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

ID_LENGTH = 16
"""Hexadecimal digits of a short identity (64 bits)."""


def canonical(value: Any) -> str:
    """Return the canonical JSON text of ``value``: sorted keys, no spaces, no NaN or infinity.

    Raises:
        ValueError: a float is NaN or infinite, which JSON cannot carry.
    """
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def sha256_hex(data: bytes) -> str:
    """Return the SHA-256 of ``data`` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal, reading it in pieces."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def identity(value: Any) -> str:
    """Return the short identity of ``value``: the head of the SHA-256 of its canonical JSON."""
    return sha256_hex(canonical(value).encode())[:ID_LENGTH]
