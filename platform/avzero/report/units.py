"""Lengths of time and sizes as people read them."""

from __future__ import annotations

import math


def duration(seconds: float) -> str:
    """Return a length of time as ``12 s``, ``3 min 04 s`` or ``2 h 05 min``."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: float) -> str:
    """Return bytes as ``4.4 MB``."""
    units = ("B", "kB", "MB", "GB", "TB")
    power = min(len(units) - 1, max(0, int(math.log10(max(count, 1)) // 3)))
    return f"{count / 1000**power:.3g} {units[power]}"
