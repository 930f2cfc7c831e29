"""Figures of a whole search: which hyperparameters were tried, and which of them mattered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from avzero.track.figures import BLUE, RED, canvas, png
from avzero.tune.listener import TrialView

_AXES = 9
_FEWEST = 8
"""Trials below which importances would be noise."""


def importances(trials: Sequence[TrialView]) -> dict[str, float]:
    """Return how much of what separates good trials each hyperparameter explains, largest first.

    PED-ANOVA (Watanabe et al., IJCAI 2023) on the best VAL HM of every trial, early-stopped ones
    included; they sum to 1. Nothing for too few trials, or where nothing differs.
    """
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    if not trials:
        return {}
    ranges = trials[0].group.distributions
    study = optuna.create_study(direction="maximize")
    for trial in trials:
        inside = trial.values.keys() == ranges.keys() and all(
            ranges[name]._contains(ranges[name].to_internal_repr(value))
            for name, value in trial.values.items()
        )
        if inside and trial.best is not None:
            made = optuna.trial.create_trial(
                params=dict(trial.values), distributions=ranges, value=trial.hm
            )
            study.add_trial(made)
    if len(study.trials) < _FEWEST or len({t.value for t in study.trials}) < 2:
        return {}
    evaluator = PedAnovaImportanceEvaluator(target_quantile=0.2)
    found = get_param_importances(study, evaluator=evaluator)
    return dict(found) if sum(found.values()) > 0 else {}


def importance_bars(found: Mapping[str, float], trials: int, title: str) -> bytes:
    """Draw importances, the largest on top."""
    figure, (axes,) = canvas(6.4, 1.6 + 0.3 * len(found))
    names = list(found)[::-1]
    bars = axes.barh(names, [100 * found[name] for name in names], color=BLUE)
    axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
    axes.set_xlabel("importance (% of what separates the best fifth of trials)")
    axes.margins(x=0.1)
    axes.set_title(
        f"{title}\nPED-ANOVA over {trials} trials, early-stopped ones included", fontsize=10
    )
    return png(figure)


def parallel_coordinates(
    trials: Sequence[TrialView], found: Mapping[str, float], title: str
) -> bytes | None:
    """Draw a line per trial through its hyperparameters to its VAL HM; None where none vary.

    Args:
        trials: of one group; those without an epoch are left out.
        found: importances: the hyperparameters that matter most stand nearest to HM.
        title: of the figure.
    """
    lines = sorted((t for t in trials if t.best is not None), key=lambda t: t.hm)
    varying = [
        name
        for name in (lines[0].group.distributions if lines else ())
        if len({repr(t.values.get(name)) for t in lines}) > 1
    ]
    names = sorted(varying, key=lambda name: found.get(name, 0.0))[-_AXES:]
    if len(lines) < 2 or not names:
        return None
    columns = [
        _Column([t.values.get(name) for t in lines], _is_log(lines[0], name)) for name in names
    ]
    columns.append(_Column([100 * t.hm for t in lines], False))
    figure, (axes,) = canvas(max(6.4, 1.4 * (len(names) + 1)), 4.6)
    colours = _draw_lines(axes, lines, columns)
    for x, column in enumerate(columns):
        axes.axvline(x, color="black", linewidth=0.8)
        box = {"facecolor": "white", "alpha": 0.75, "pad": 0.6, "linewidth": 0}
        for place, label in column.ticks:
            axes.text(x + 0.03, place, label, fontsize=7, va="center", bbox=box)
    axes.set_xticks(range(len(columns)), [*names, "best VAL\nHM (%)"], fontsize=8)
    axes.tick_params(axis="x", length=0)
    axes.set_yticks([])
    axes.set_xlim(-0.15, len(columns) - 0.6)
    axes.set_ylim(-0.05, 1.05)
    for side in axes.spines.values():
        side.set_visible(False)
    figure.colorbar(colours, ax=axes, pad=0.02).set_label("best VAL HM (%)")
    note = f"{len(lines)} trials; red: the best; dashed: stopped early"
    axes.set_title(f"{title}\n{note}", fontsize=10)
    return png(figure)


def _draw_lines(axes: Any, lines: Sequence[TrialView], columns: Sequence[_Column]) -> Any:
    """Draw a line per trial, the worst first; return what gives them their colours."""
    norm = Normalize(100 * lines[0].hm, 100 * lines[-1].hm)
    colours: Any = ScalarMappable(norm, "cividis")
    for row, trial in enumerate(lines):
        best = trial is lines[-1]
        axes.plot(
            range(len(columns)),
            [column.place[row] for column in columns],
            linestyle="-" if trial.state == "complete" else (0, (3, 2)),
            color=RED if best else colours.to_rgba(100 * trial.hm),
            linewidth=2.6 if best else 1.0,
            alpha=1.0 if best else 0.75,
        )
    return colours


def _is_log(trial: TrialView, name: str) -> bool:
    return bool(getattr(trial.group.distributions[name], "log", False))


class _Column:
    """One axis: where each value lies between 0 and 1, and what is written beside it."""

    def __init__(self, values: Sequence[Any], log: bool) -> None:
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        kinds = sorted({repr(v) for v in values})
        if not numbers or len(kinds) <= 2:
            span = max(len(kinds) - 1, 1)
            place = {kind: i / span for i, kind in enumerate(kinds)}
            self.place = [place[repr(v)] for v in values]
            self.ticks = [(at, kind.strip("'")) for kind, at in place.items()]
            return
        scale = np.log if log else np.asarray
        x = scale(np.array(values, dtype=float))
        low, high = float(x.min()), float(x.max())
        self.place = ((x - low) / ((high - low) or 1.0)).tolist()
        back = np.exp if log else np.asarray
        self.ticks = [(at, f"{float(back(low + at * (high - low))):.3g}") for at in (0.0, 0.5, 1.0)]
