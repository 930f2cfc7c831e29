"""Which code made a result: the git revision where there is one, else the package version."""

from __future__ import annotations

import functools
import json
import subprocess
from pathlib import Path

import avzero


@functools.cache
def code_revision() -> str:
    """Return ``<commit>`` or ``<commit>+changes`` of the source tree, or ``avzero <version>``."""
    here = Path(__file__).parent
    shipped = here / "_shipped.json"  # code that travelled with a job (cluster.package)
    if shipped.is_file():
        return str(json.loads(shipped.read_text())["revision"])

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True, timeout=20
        )
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return f"avzero {avzero.__version__}"
