"""Figures of a run as PNG bytes. Drawn on their own canvas: no global plotting state, no screen.

Colours are Okabe and Ito's, which people with any colour vision tell apart; what matters differs in
shape or place as well.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from avzero.protocol.calibration import BOTH
from avzero.train.folder import Tensors
from avzero.train.records import Epoch, Result

BLUE, ORANGE, GREEN, RED = "#0072b2", "#e69f00", "#009e73", "#d55e00"
PINK, SKY, YELLOW, GREY = "#cc79a7", "#56b4e9", "#f0e442", "#8a8a8a"
_CLASSES_NAMED = 60
"""More class names than this do not fit beside bars or cells."""
_COLOURED = (BLUE, ORANGE, GREEN, RED, PINK, SKY, "#000000", YELLOW)
_SEEN, _OTHER = "#c8c8c8", "#6e6e6e"


def seen_unseen_curve(result: Result, title: str) -> bytes:
    """Draw S against U for every beta, the chosen point, and (on VAL) the exact optimum."""
    figure, (axes,) = canvas(6.4, 4.8)
    unseen = 100 * np.array(result.curve["U"])
    seen = 100 * np.array(result.curve["S"])
    axes.fill_between(unseen, seen, color=BLUE, alpha=0.08, linewidth=0)
    axes.plot(unseen, seen, color=BLUE, linewidth=1.8, label=f"AUSUC {100 * result.area:.2f} %")
    _hm_contours(axes, 1.04 * max(unseen.max(), 1.0), 1.04 * max(seen.max(), 1.0))
    chosen = result.scores[BOTH]
    at_beta = f"HM {100 * chosen['HM']:.2f} % at the chosen beta {chosen['beta']:.3g}"
    u, s = 100 * chosen["U"], 100 * chosen["S"]
    axes.plot(u, s, "o", color=RED, markersize=8, label=at_beta)
    axes.plot([u, u, 0], [0, s, s], color=RED, linewidth=0.8, linestyle="dashed")
    if result.exact:
        best = result.exact
        label = f"best HM {100 * best['HM']:.2f} % at beta {best['beta']:.3g}"
        axes.plot(100 * best["U"], 100 * best["S"], "x", color="black", markersize=8, label=label)
    axes.set_xlabel("U: mean recall of unseen classes (%)")
    axes.set_ylabel("S: mean recall of seen classes (%)")
    axes.set_xlim(0, 1.04 * max(unseen.max(), 1.0))
    axes.set_ylim(0, 1.04 * max(seen.max(), 1.0))
    axes.set_title(title, fontsize=10)
    axes.legend(loc="lower left", fontsize=9)
    axes.grid(alpha=0.25)
    return png(figure)


def _hm_contours(axes: Any, most_unseen: float, most_seen: float) -> None:
    """Draw lines of equal harmonic mean behind the curve."""
    u, s = np.meshgrid(np.linspace(0.05, most_unseen, 120), np.linspace(0.05, most_seen, 120))
    hm = 2 * u * s / (u + s)
    lines = axes.contour(u, s, hm, levels=6, colors=GREY, linewidths=0.6, linestyles="dotted")
    axes.clabel(lines, fmt="HM %.0f", fontsize=7)


def learning_curves(epochs: Sequence[Epoch], title: str) -> bytes:
    """Draw the loss and, where there are any, VAL scores over epochs; the best epoch is marked."""
    looked = [epoch for epoch in epochs if epoch.val]
    figure, (axes, *rest) = canvas(6.4, 5.2 if looked else 3.2, 2 if looked else 1)
    marker = "o" if len(epochs) < 2 else None
    axes.plot([e.epoch + 1 for e in epochs], [e.loss for e in epochs], color="black", marker=marker)
    axes.set_ylabel("training loss")
    axes.set_title(title, fontsize=10)
    for right in rest:
        at = [epoch.epoch + 1 for epoch in looked]
        styles = {"S": (BLUE, "-"), "U": (GREEN, "-"), "HM": (RED, "-"), "ZSL": (ORANGE, "--")}
        for name, (colour, style) in styles.items():
            values = [100 * e.val[name] for e in looked]
            right.plot(
                at, values, style, color=colour, label=name, linewidth=2.2 if name == "HM" else 1.3
            )
        best = max(looked, key=lambda e: (e.val["HM"], -e.epoch))
        label = f"best epoch: {best.epoch + 1}"
        right.axvline(best.epoch + 1, color=GREY, linewidth=0.9, linestyle="dotted", label=label)
        right.set_ylabel("score on VAL (%)")
        right.set_ylim(0, None)
        right.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8)
    for each in (axes, *rest):
        each.xaxis.set_major_locator(MaxNLocator(integer=True))
        each.grid(alpha=0.25)
    (rest or [axes])[-1].set_xlabel("epoch")
    return png(figure)


def recall_bars(result: Result, names: Sequence[str], title: str) -> bytes:
    """Draw the recall of every class, unseen and seen classes apart, each sorted.

    Args:
        result: with the recalls.
        names: of all classes of the benchmark, by id.
        title: of the figure.
    """
    table = result.per_class
    rows = list(zip(table["recall"], table["class_id"], table["zsl"], strict=True))
    groups = {
        f"unseen classes (mean U {100 * result.scores[BOTH]['U']:.1f} %)": (
            [row for row in rows if row[2] is not None],
            GREEN,
        ),
        f"seen classes (mean S {100 * result.scores[BOTH]['S']:.1f} %)": (
            [row for row in rows if row[2] is None],
            BLUE,
        ),
    }
    most = max(len(group) for group, _ in groups.values())
    named = most <= _CLASSES_NAMED
    figure, both = canvas(9.0, max(3.2, 0.19 * most + 1.4) if named else 6.0, 1, 2)
    for axes, (label, (group, colour)) in zip(both, groups.items(), strict=True):
        group.sort(key=lambda row: (row[0], -row[1]))
        at = np.arange(len(group))
        axes.barh(at, [100 * r for r, _, _ in group], color=colour, height=0.8)
        zsl = [(i, 100 * z) for i, (_, _, z) in enumerate(group) if z is not None]
        if zsl:
            x, y = [z for _, z in zsl], [i for i, _ in zsl]
            note = "among unseen classes alone"
            axes.plot(x, y, "|", color="black", markersize=7, label=note)
            axes.legend(loc="lower right", fontsize=8)
        axes.set_yticks(at if named else [], [names[i] for _, i, _ in group] if named else [])
        axes.tick_params(axis="y", labelsize=7)
        axes.set_xlim(0, 100)
        axes.set_ylim(-0.7, max(len(group), 1) - 0.3)
        axes.set_xlabel("recall (%)")
        axes.set_title(label, fontsize=9)
        axes.grid(axis="x", alpha=0.25)
        if not named:
            axes.set_ylabel(f"{len(group)} classes, sorted")
    figure.suptitle(title, fontsize=10)
    return png(figure)


def confusion(portrait: Tensors, names: Sequence[str], title: str) -> bytes:
    """Draw which unseen class samples of each unseen class are taken for, in percent of rows.

    Args:
        portrait: with ``confusion`` and ``unseen_ids`` (``train.outcome``).
        names: of all classes of the benchmark, by id.
        title: of the figure.
    """
    counts = portrait["confusion"].numpy()
    labels = [names[i] for i in portrait["unseen_ids"].tolist()]
    share = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    n = len(labels)
    size = min(11.0, 3.4 + 0.24 * n)
    figure, (axes,) = canvas(size + 1.0, size)
    image = axes.imshow(share, cmap="cividis", vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, shrink=0.8).set_label("share of the true class's samples (%)")
    if n <= _CLASSES_NAMED:
        axes.set_xticks(range(n), labels, rotation=90, fontsize=7)
        axes.set_yticks(range(n), labels, fontsize=7)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
    for i, j in np.argwhere(share >= 10) if n <= 25 else ():
        colour = "black" if share[i, j] > 55 else "white"
        axes.text(j, i, f"{share[i, j]:.0f}", ha="center", va="center", color=colour, fontsize=6.5)
    axes.set_xlabel(f"nearest of the {n} unseen classes")
    axes.set_ylabel("true class")
    axes.set_title(title, fontsize=10)
    return png(figure)


def embedding(portrait: Tensors, names: Sequence[str], title: str) -> bytes | None:
    """Draw embeddings of samples and class vectors in a plane (t-SNE), or None without any.

    The unseen classes with the most samples have colours and names, the others are grey.

    Args:
        portrait: with ``samples``, ``samples_class``, ``unseen_ids``, maybe ``classes`` and
            ``classes_id`` (``train.outcome``).
        names: of all classes of the benchmark, by id.
        title: of the figure.
    """
    from sklearn.manifold import TSNE  # type: ignore[import-untyped]

    if "samples" not in portrait or len(portrait["samples"]) < 10:
        return None
    of = portrait["samples_class"].numpy()
    n, points = len(of), portrait["samples"].numpy()
    ids = np.zeros(0, dtype=int)
    if "classes" in portrait:
        points, ids = (
            np.vstack([points, portrait["classes"].numpy()]),
            portrait["classes_id"].numpy(),
        )
    perplexity = min(30.0, (len(points) - 1) / 4)
    flat = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(points)
    figure, (axes,) = canvas(8.6, 5.6)
    unseen = portrait["unseen_ids"].numpy()
    most = sorted(unseen, key=lambda i: (-(of == i).sum(), i))[: len(_COLOURED)]
    colours = dict(zip(most, _COLOURED, strict=False))
    is_unseen = np.isin(of, unseen)
    groups = [
        ("seen classes", ~is_unseen, _SEEN, 5),
        ("other unseen classes", is_unseen & ~np.isin(of, most), _OTHER, 7),
        *((names[i], of == i, colour, 12) for i, colour in colours.items()),
    ]
    for label, rows, colour, size in groups:
        if rows.any():
            axes.scatter(*flat[:n][rows].T, s=size, color=colour, label=label, linewidths=0)
    for i, place in zip(ids, flat[n:], strict=True):
        colour = colours.get(i, _OTHER if i in unseen else _SEEN)
        size, edge = (13, 0.8) if i in colours else (7, 0.3)
        _star(axes, place, colour, size, edge)
    if len(ids):
        _star(axes, ([], []), "white", 11, 0.8, label="class vector (of that colour)")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, frameon=False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel("t-SNE 1 (no unit)")
    axes.set_ylabel("t-SNE 2 (no unit)")
    note = f"{n} samples; neighbours are similar, distances far apart mean little"
    axes.set_title(f"{title}\n{note}", fontsize=10)
    return png(figure)


def _star(axes: Any, place: Any, colour: str, size: float, edge: float, label: str = "") -> None:
    style = {"markersize": size, "markeredgecolor": "black", "markeredgewidth": edge}
    axes.plot(*place, "*", color=colour, label=label or "_", **style)


def canvas(
    width: float, height: float, rows: int = 1, columns: int = 1
) -> tuple[Figure, list[Any]]:
    """Return a figure of so many inches and its axes, row by row."""
    figure = Figure(figsize=(width, height), dpi=120)
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def png(figure: Figure) -> bytes:
    """Render without a timestamp: same data, same bytes."""
    agg = FigureCanvasAgg(figure)
    figure.tight_layout()
    buffer = io.BytesIO()
    # Not savefig, which draws everything once in vain before it draws.
    agg.print_png(buffer, metadata={"Software": None})  # type: ignore[no-untyped-call]
    return buffer.getvalue()
