"""The description of a sweep's run in MLflow: a short summary in Markdown. VAL only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from avzero.models._registry import model_class
from avzero.protocol.calibration import BOTH
from avzero.tune.listener import TrialView


def sweep_note(best: TrialView, trials: Sequence[TrialView], run: str) -> str:
    """Return what a sweep found.

    Args:
        best: the winner on VAL.
        trials: all of its group.
        run: MLflow's id of the sweep's run, whose pictures are shown.
    """
    group, info = best.group, best.group.benchmark
    states = Counter(trial.state for trial in trials)
    counts = [
        f"{states[state]} {word}"
        for state, word in (
            ("complete", "complete"),
            ("pruned", "stopped early"),
            ("failed", "failed"),
        )
        if states[state]
    ]
    kind = "simulated data" if info.simulated else f"{info.dataset}, {info.feature_set} features"
    lines = [
        f"**{model_class(group.model).card.title}** on **{info.name}** ({kind}, class text "
        f"{group.protocol.text}), preset {group.protocol.preset.value}.",
        "",
        f"{len(trials)} trials: {', '.join(counts)}. Trial {best.number} is the best on VAL:",
        "",
    ]
    if best.result is not None:
        s = best.result.scores[BOTH]
        lines += [
            f"**HM {100 * s['HM']:.2f} %** (S {100 * s['S']:.2f}, U {100 * s['U']:.2f}, ZSL "
            f"{100 * s['ZSL']:.2f}, beta {s['beta']:.3g}, AUSUC {100 * best.result.area:.2f}).",
            "",
        ]
    start = next((trial for trial in trials if trial.number == 0 and trial.best), None)
    if start is not None and start is not best:
        what = "published point" if group.published else "defaults"
        lines += [f"Trial 0 ({what}) reached HM {100 * start.hm:.2f} %.", ""]
    searched = ", ".join(f"`{k}` {_short(v)}" for k, v in best.values.items())
    lines += [
        f"Its hyperparameters: {searched or 'nothing was searched'}.",
        "",
        "S and U: mean recall of seen and unseen classes; HM: their harmonic mean; ZSL: unseen "
        "classes alone; beta: handicap of seen classes; AUSUC: area under the curve below.",
        "TEST scores are on the runs named TEST, never here.",
        "",
        f"![seen-unseen curve](get-artifact?path=seen_unseen_curve.png&run_uuid={run})",
    ]
    return "\n".join(lines)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
