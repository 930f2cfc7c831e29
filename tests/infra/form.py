"""Writes the RayJob form that avzero brings: ``python -m tests.infra.form``, after k8s/ changed."""

from __future__ import annotations

import subprocess

import yaml

from avzero.cluster.kubernetes import FORM
from tests.infra.manifest import K8S, find

HEADER = """\
# The sweep of `kubectl kustomize k8s/base-jobs`, for those who have avzero but not its repository.
# Written by `python -m tests.infra.form`; a test compares the two.
"""


def main() -> None:
    """Render and write."""
    command = ["kubectl", "kustomize", str(K8S / "base-jobs")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sweep = find(list(yaml.safe_load_all(text)), "RayJob", "sweep")
    FORM.write_text(HEADER + yaml.safe_dump(sweep, sort_keys=False, width=100))


if __name__ == "__main__":
    main()
