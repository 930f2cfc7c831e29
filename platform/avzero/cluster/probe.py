"""``avzero doctor``'s other half: the same checks, made on the cluster."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from avzero.cluster.checks import (
    Check,
    check_environment,
    check_gpus,
    check_store,
    check_tracker,
    guarded,
)

MARK = "AVZERO-PROBE "
_GPU_SECONDS = 90.0


def findings(wanted: dict[str, Any]) -> list[Check]:
    """Return what is found here.

    Args:
        wanted: ``store`` and ``tracking`` (None: not asked), ``gpus`` of the cluster.
    """
    from avzero.cluster.package import unmet

    found = guarded("packages", lambda: check_environment(unmet()))
    if wanted.get("store"):
        found += guarded("store", lambda: check_store(wanted["store"]))
    if wanted.get("tracking"):
        found += guarded("tracker", lambda: check_tracker(wanted["tracking"]))
    if wanted.get("gpus"):
        found += guarded("gpus", _on_a_gpu_node)
    return found


def _on_a_gpu_node() -> Iterator[Check]:
    """Look for the GPU on a node that has one."""
    import ray

    from avzero.cluster.connect import ray_cluster

    def look() -> list[dict[str, Any]]:
        return [check.as_dict() for check in check_gpus(1)]

    with ray_cluster("auto"):
        there = ray.remote(num_gpus=1, num_cpus=0)(look).remote()
        try:
            yield from (Check(**row) for row in ray.get(there, timeout=_GPU_SECONDS))
        except ray.exceptions.GetTimeoutError:
            yield Check("warn", "gpus", f"no GPU was free for {_GPU_SECONDS:.0f} s; not looked at")


def main() -> None:
    """Print the findings as one line."""
    found = [check.as_dict() for check in findings(json.loads(os.environ["AVZERO_PROBE"]))]
    sys.stdout.write(f"\n{MARK}{json.dumps(found)}\n")


if __name__ == "__main__":
    main()
