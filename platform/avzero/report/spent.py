"""What a sweep took, beside what was planned (``avzero plan``), from the records in the store."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from avzero.data.storage import Storage
from avzero.report.units import duration, size

PLAN, SPENT = "plan.json", "spent.json"
"""Below ``sweeps/<name>/``: the estimate (``tune.plan``), what was spent (``bookkeeper``)."""


def kept(storage: Storage, sweep: str, name: str) -> dict[str, Any]:
    """Return one of a sweep's records; empty where there is none."""
    try:
        return dict(json.loads(storage.read(f"sweeps/{sweep}/{name}")))
    except KeyError:
        return {}


def comparison(storage: Storage, sweeps: Sequence[str]) -> Iterator[str]:
    """Yield a line for every sweep that has a plan and has been run: planned / actual.

    Core- and GPU-hours are those the arrays were held for; ``training`` counts optimiser steps
    alone, which the records of the epochs add up to.
    """
    for sweep in sweeps:
        plan, spent = kept(storage, sweep, PLAN), kept(storage, sweep, SPENT)
        if not plan or "epochs" not in spent:
            continue
        parts = [
            f"trials {plan['trials']} / {spent['trials']}",
            f"config-epochs {plan['epochs']:,.0f} / {spent['epochs']:,} "
            f"(at most {plan['most_epochs']:,})",
        ]
        for name, key in (("core-hours", "core_hours"), ("GPU-hours", "gpu_hours")):
            if plan[key] or spent[key]:
                parts.append(f"{name} {plan[key]:.3g} / {spent[key]:.3g}")
        parts.append(
            f"training {duration(3600 * plan['training_hours'])} / "
            f"{duration(3600 * spent['training_hours'])}"
        )
        if plan["arrays"] != spent["arrays"]:
            parts.append(f"arrays {plan['arrays']} / {spent['arrays']}")
        parts.append(f"wall {duration(plan['wall'])} / {duration(spent['wall'])}")
        if "bytes" in spent:
            parts.append(f"storage {size(plan['bytes'])} / {size(spent['bytes'])}")
        yield f"Sweep {sweep}, planned / actual: {', '.join(parts)}"
