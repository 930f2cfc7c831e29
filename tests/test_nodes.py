"""What fits on which nodes, in numbers."""

from __future__ import annotations

from typing import Any

import pytest

from avzero.spec import Resources
from avzero.tune.nodes import misfit, room

SMALL = {"CPU": 2.0}
LARGE = {"CPU": 8.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("nodes", "need", "runs"),
    [
        ([SMALL] * 3, {}, 6),
        ([SMALL] * 3, {"cpus": 4}, 0),  # twelve halves are no whole
        ([SMALL, LARGE], {"cpus": 4}, 2),
        ([SMALL] * 4, {"cpus": 2, "workers": 3}, 1),
        ([SMALL] * 3, {"cpus": 0.1}, 60),
        ([LARGE] * 2, {"gpus": 1, "cpus": 0}, 4),
        ([LARGE], {"gpus": 0.3, "cpus": 1}, 6),  # 3 on each of 2 devices, not 6.67
        ([{"GPU": 1.0}] * 2, {"gpus": 2, "cpus": 0}, 0),
        ([LARGE] * 2, {"gpus": 1, "workers": 4, "cpus": 2}, 1),
        ([SMALL], {"gpus": 0, "cpus": 0}, 1),
        ([SMALL] * 2, {"cpus": 2, "workers": 3, "min_workers": 2}, 1),
        ([SMALL], {"cpus": 2, "workers": 3, "min_workers": 2}, 0),
        ([SMALL] * 6, {"cpus": 2, "workers": 3, "min_workers": 2}, 2),
        ([], {}, 0),
    ],
)
def test_room(nodes: list[dict[str, float]], need: dict[str, Any], runs: int) -> None:
    assert room(nodes, Resources.model_validate(need)) == runs
    assert bool(misfit(nodes, Resources.model_validate(need))) == (runs == 0)


def test_misfit_says_the_numbers() -> None:
    together = misfit([SMALL] * 3, Resources(cpus=7))
    assert together == "a run needs 7 CPU (on 1 worker), the cluster has 6"
    shaped = misfit([SMALL, SMALL, LARGE], Resources(cpus=9))
    assert shaped == (
        "a worker needs 9 CPU on one node and a run 1 worker; the cluster's nodes "
        "(2 of 2 CPU, 1 of 8 CPU + 2 GPU) hold 0"
    )
    assert "a run 3 workers; the cluster's nodes (2 of 4 CPU) hold 2" in misfit(
        [{"CPU": 4.0}] * 2, Resources(cpus=2.5, workers=3)
    )
