"""The ledger of TEST: every opening is a line that is written before the rows are read."""

from __future__ import annotations

import getpass
import json
import os
import socket
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from avzero.canon import ID_LENGTH, canonical
from avzero.data.storage import Storage

IMPORTS = "import-checkpoint"
"""What stands for the sweep where a published checkpoint was scored."""


@dataclass(frozen=True)
class Opening:
    """Why TEST is opened: which frozen run asks, and with what fixed choices.

    ``run`` is the identity of the stage-2 run, ``trial`` that of the frozen stage-1 trial,
    ``frozen`` the digest of everything fixed beforehand (hyperparameters, epoch, learning-rate
    sequence, beta), so that nothing can have been chosen after the look.
    """

    benchmark: str
    model: str
    text: str
    trial: str
    run: str
    frozen: str
    beta: float
    seed: int
    sweep: str
    revision: str

    def line(self) -> dict[str, Any]:
        """Return the ledger line: the request plus who, where and when."""
        return asdict(self) | {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "user": _user(),
            "host": socket.gethostname(),
        }


def record_opening(storage: Storage, opening: Opening) -> Mapping[str, Any]:
    """Write the ledger line of an opening; return it."""
    line = opening.line()
    key = f"{_prefix(opening.benchmark)}{opening.run}-{uuid.uuid4().hex[:8]}.json"
    storage.write(key, canonical(line).encode())
    return line


def read_openings(storage: Storage, benchmark: str) -> list[dict[str, Any]]:
    """Return all ledger lines of a benchmark, oldest first."""
    lines = [json.loads(storage.read(key)) for key in storage.keys(_prefix(benchmark))]
    return sorted(lines, key=lambda line: (line["time"], line["run"]))


def _user() -> str:
    """Return the user's name; containers often run under a number without one."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def _prefix(benchmark: str) -> str:
    return f"ledger/{benchmark[:ID_LENGTH]}/"
