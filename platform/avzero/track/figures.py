"""Figures of a run as PNG bytes. Drawn on their own canvas: no global plotting state, no screen."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from avzero.protocol.calibration import BOTH
from avzero.train.records import Epoch, Result

_BLUE, _RED, _GREY = "#2457a6", "#c2402a", "#8a8a8a"


def seen_unseen_curve(result: Result, title: str) -> bytes:
    """Draw S against U for every beta, the chosen point, and (on VAL) the exact optimum."""
    figure = Figure(figsize=(6.4, 4.8), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    unseen = 100 * np.array(result.curve["U"])
    seen = 100 * np.array(result.curve["S"])
    axes.fill_between(unseen, seen, color=_BLUE, alpha=0.08, linewidth=0)
    axes.plot(unseen, seen, color=_BLUE, linewidth=1.8, label=f"AUSUC {100 * result.area:.2f}")
    _hm_contours(axes, 1.04 * max(unseen.max(), 1.0), 1.04 * max(seen.max(), 1.0))
    chosen = result.scores[BOTH]
    axes.plot(
        100 * chosen["U"],
        100 * chosen["S"],
        "o",
        color=_RED,
        markersize=8,
        label=f"HM {100 * chosen['HM']:.2f} at beta {chosen['beta']:.3g}",
    )
    if result.exact:
        axes.plot(
            100 * result.exact["U"],
            100 * result.exact["S"],
            "x",
            color="black",
            markersize=8,
            label=f"best HM {100 * result.exact['HM']:.2f} at beta {result.exact['beta']:.3g}",
        )
    axes.set_xlabel("U: mean recall of unseen classes (%)")
    axes.set_ylabel("S: mean recall of seen classes (%)")
    axes.set_xlim(0, 1.04 * max(unseen.max(), 1.0))
    axes.set_ylim(0, 1.04 * max(seen.max(), 1.0))
    axes.set_title(title, fontsize=10)
    axes.legend(loc="lower left", fontsize=9)
    axes.grid(alpha=0.25)
    return _png(figure)


def _hm_contours(axes: object, most_unseen: float, most_seen: float) -> None:
    """Draw lines of equal harmonic mean behind the curve."""
    u, s = np.meshgrid(np.linspace(0.05, most_unseen, 120), np.linspace(0.05, most_seen, 120))
    hm = 2 * u * s / (u + s)
    lines = axes.contour(  # type: ignore[attr-defined]
        u, s, hm, levels=6, colors=_GREY, linewidths=0.6, linestyles="dotted"
    )
    axes.clabel(lines, fmt="HM %.0f", fontsize=7)  # type: ignore[attr-defined]


def learning_curves(epochs: Sequence[Epoch], title: str) -> bytes:
    """Draw the loss and, where there are any, VAL scores over epochs."""
    figure = Figure(figsize=(6.4, 4.2), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [epoch.epoch for epoch in epochs]
    axes.plot(steps, [epoch.loss for epoch in epochs], color=_GREY, label="loss (left)")
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    looked = [epoch for epoch in epochs if epoch.val]
    if looked:
        right, at = axes.twinx(), [epoch.epoch for epoch in looked]
        for name, colour in (("HM", _RED), ("S", _BLUE), ("U", "#3c8d40"), ("ZSL", "#b0882c")):
            right.plot(at, [100 * e.val[name] for e in looked], color=colour, label=name)
        right.set_ylabel("VAL score (%)")
        right.set_ylim(0, None)
        right.legend(loc="center right", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper right", fontsize=8)
    axes.set_title(title, fontsize=10)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    """Render without a timestamp: same data, same bytes."""
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
