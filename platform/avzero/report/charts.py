"""Charts of the report page as inline SVG: no script draws them, so they print and need nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 460, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 12, 40
_TOLERANCE = 0.4
"""Pixels a simplified line may be off."""
Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line of a chart, in data units."""

    key: str
    """Identity of the row it belongs to; the page shows and hides by it."""
    name: str
    style: int
    """Which of the page's line styles; the same for a system everywhere."""
    points: Sequence[Point]
    mark: Point | None = None
    note: str = ""
    """Shown by the mark."""


@dataclass(frozen=True)
class Drawn:
    """A line in pixels."""

    key: str
    name: str
    style: int
    path: str
    mark: tuple[str, str] | None
    note: str


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    at: str
    label: str


@dataclass(frozen=True)
class Chart:
    """Everything a template needs to draw a chart."""

    title: str
    x_title: str
    y_title: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Drawn, ...]
    contours: tuple[tuple[str, str, str, str], ...] = ()
    """Path, label and its place, of lines of equal HM."""
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM


class _Axes:
    """Turns data units into pixels.

    Args:
        x: lowest and highest value of x.
        y: of y.
    """

    def __init__(self, x: Point, y: Point) -> None:
        self.x, self.y = x, y

    def __call__(self, point: Point) -> Point:
        (x0, x1), (y0, y1) = self.x, self.y
        across = (point[0] - x0) / (x1 - x0 or 1)
        up = (point[1] - y0) / (y1 - y0 or 1)
        return (
            _LEFT + across * (WIDTH - _LEFT - _RIGHT),
            HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM),
        )

    def draw(self, line: Line, stepped: bool = False) -> Drawn:
        """Return a line in pixels."""
        points = [self(point) for point in line.points]
        mark = self(line.mark) if line.mark else None
        return Drawn(
            line.key,
            line.name,
            line.style,
            stairs(points) if stepped else path(simplified(points)),
            (_number(mark[0]), _number(mark[1])) if mark else None,
            line.note,
        )


def seen_unseen(lines: Sequence[Line]) -> Chart:
    """Return the chart of S against U over all beta, both percent, from 0."""
    points = [p for line in lines for p in (*line.points, *([line.mark] if line.mark else []))]
    x1 = _ceiling(max(p[0] for p in points))
    y1 = _ceiling(max(p[1] for p in points))
    axes = _Axes((0, x1), (0, y1))
    return Chart(
        "Seen against unseen",
        "S: accuracy on seen classes, %",
        "U: accuracy on unseen classes, %",
        _ticks(0, x1, lambda v: axes((v, 0))[0]),
        _ticks(0, y1, lambda v: axes((0, v))[1]),
        tuple(axes.draw(line) for line in lines),
        tuple(_contours(axes)),
    )


def _contours(axes: _Axes) -> list[tuple[str, str, str, str]]:
    """Return lines of equal HM: U = HM S / (2 S - HM)."""
    (_, x1), (_, y1) = axes.x, axes.y
    most = 2 * x1 * y1 / (x1 + y1)
    found = []
    for hm in _nice(0, most, 4)[1:]:
        if hm >= most * 0.98:
            continue
        low = hm * y1 / (2 * y1 - hm) if 2 * y1 > hm else hm  # S where U reaches the top
        steps = [low + (x1 - low) * (i / 24) ** 2 for i in range(25)]
        curve = [axes((s, hm * s / (2 * s - hm))) for s in steps if 2 * s > hm]
        end = curve[-1]
        found.append((path(curve), f"HM {hm:g}", _number(end[0] - 3), _number(end[1] - 4)))
    return found


def best_of_k(lines: Sequence[Line]) -> Chart:
    """Return the chart of the best VAL HM after k trials."""
    highest = max(p[1] for line in lines for p in line.points)
    lowest = min(p[1] for line in lines for p in line.points)
    most = max([2.0, *(p[0] for line in lines for p in line.points)])
    ticks = _nice(max(0.0, lowest - 0.1 * (highest - lowest)), highest or 1.0, 5)
    axes = _Axes((1, most), (ticks[0], max(ticks[-1], highest)))
    return Chart(
        "Search progress",
        "trials that have ended",
        "best HM on VAL so far, %",
        tuple(
            Tick(_number(axes((v, 0))[0]), f"{v:g}")
            for v in (1.0, *_nice(0, most, 5)[1:])
            if v == int(v) and 1 <= v <= most
        ),
        tuple(Tick(_number(axes((1, v))[1]), f"{v:g}") for v in ticks),
        tuple(axes.draw(line, stepped=True) for line in lines),
    )


def _ticks(low: float, high: float, place: Callable[[float], float]) -> tuple[Tick, ...]:
    """Return marks of an axis."""
    return tuple(Tick(_number(place(v)), f"{v:g}") for v in _nice(low, high, 5))


def _nice(low: float, high: float, count: int) -> list[float]:
    """Return about ``count`` round values that hold low … high."""
    raw = (high - low) / count or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def _ceiling(value: float) -> float:
    """Return the end of an axis from 0 that holds a value."""
    return _nice(0, max(value, 1e-9), 5)[-1]


def simplified(points: Sequence[Point]) -> list[Point]:
    """Return a line without the points nobody would see (Ramer, Douglas and Peucker)."""
    points = _apart(points)
    keep = {0, len(points) - 1}
    waiting = [(0, len(points) - 1)]
    while waiting:
        start, end = waiting.pop()
        (x0, y0), (x1, y1) = points[start], points[end]
        length = math.hypot(x1 - x0, y1 - y0)
        worst, place = _TOLERANCE, -1
        for i in range(start + 1, end):
            x, y = points[i]
            if length:
                off = abs((x1 - x0) * (y - y0) - (y1 - y0) * (x - x0)) / length
            else:
                off = math.hypot(x - x0, y - y0)
            if off > worst:
                worst, place = off, i
        if place > 0:
            keep.add(place)
            waiting += [(start, place), (place, end)]
    return [points[i] for i in sorted(keep)]


def _apart(points: Sequence[Point]) -> list[Point]:
    """Return points at least a tolerance apart, and both ends."""
    kept = [points[0]]
    for point in points[1:-1]:
        if max(abs(point[0] - kept[-1][0]), abs(point[1] - kept[-1][1])) >= _TOLERANCE:
            kept.append(point)
    return [*kept, points[-1]]


def stairs(points: Sequence[Point]) -> str:
    """Return a path that stays level until the next point."""
    first, *rest = points
    steps = [f"M{_number(first[0])} {_number(first[1])}"]
    level = first[1]
    for x, y in rest:
        if y != level:
            steps.append(f"H{_number(x)}V{_number(y)}")
            level = y
    steps.append(f"H{_number(points[-1][0])}")
    return "".join(steps)


def path(points: Sequence[Point]) -> str:
    """Return a path of straight lines."""
    return "M" + "L".join(f"{_number(x)} {_number(y)}" for x, y in points)


def _number(value: float) -> str:
    """Return a pixel, to a tenth."""
    return f"{value:.1f}".removesuffix(".0")
