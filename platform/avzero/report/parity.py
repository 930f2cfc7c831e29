"""The parity board: is a published number reached here, by its checkpoint or by training again?

The rule, in the order it is applied (``RULE`` says it to readers):

1. **not run**: nothing here to put beside the published row.
2. **not comparable**: the row cannot be right, or our result is of something else: other features,
   simulated data, another protocol than the published runs (preset ``compat``, texts by
   ``legacy_sorted``), fewer seeds than ``Rule.seeds``, a beta that has seen the test weights' own
   training data. All reasons are listed.
3. A **checkpoint** is the published weights on the published rows: only rounding and near ties are
   left, so it is reproduced within ``Rule.exact`` points of HM, else not.
4. **Retrained** over n seeds. Published numbers are single runs, so the difference d = mean -
   published has the interval in which one more run of ours would lie (``against_one_run``). With
   the tolerance b (``Rule.share`` of the published value, at least ``Rule.floor`` points):
   *not reproduced* where abs(d) exceeds both b and the interval's half width; *reproduced* where
   abs(d) is within b and so is the uncertainty of our mean; *undecided* otherwise: more seeds.

The verdict is on HM; the differences of S, U and ZSL stand beside it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from avzero.report.published import Reference, base_features, references
from avzero.report.statistics import Interval, against_one_run, over_seeds
from avzero.spec import Protocol

SCORES = ("HM", "S", "U", "ZSL")
Verdict = Literal["reproduced", "not reproduced", "undecided", "not comparable", "not run"]
Origin = Literal["checkpoint", "retrained"]

TEXT_OF = {"main": "w2v", "cls": "w2v", "clipclap": "clipclap"}
"""Class text of the published runs by feature set."""
MODALITY_OF = {"": "both", "audio only": "audio", "visual only": "video"}
"""The protocol's ``modality`` of published variants; other variants are ablations of a model."""
_FREE = frozenset({"max_steps", "max_steps_eval"})
"""Protocol fields that belong to a published point, not to the protocol all points share."""


@dataclass(frozen=True)
class Rule:
    """What counts as reproduced; scores in percent."""

    seeds: int = 3
    """Trainings a verdict needs."""
    share: float = 0.1
    """Tolerance as a share of the published HM; protocol.md section 6 asks for a band."""
    floor: float = 1.0
    """The tolerance is never below so many points."""
    exact: float = 0.2
    """What rounding and near ties may change when the same weights are scored."""

    def band(self, published: float) -> float:
        """Return the tolerance around a published score, in points."""
        return max(self.floor, self.share * published)

    @property
    def text(self) -> str:
        """The rule, for readers of the board."""
        return (
            f"Verdicts are on HM. Published numbers are single runs. Retrained over at least "
            f"{self.seeds} seeds: reproduced if our mean is within {100 * self.share:.0f} % of the "
            f"published value (at least {self.floor:g} point) and known that well; not reproduced "
            "if it is further away than that and than one more run of ours would vary (95 %); "
            "undecided in between. A checkpoint is reproduced within "
            f"{self.exact:g} points. Not comparable: other features, simulated data, another "
            "protocol than the published runs (preset compat, legacy_sorted texts), too few seeds, "
            "or a published row that cannot be right."
        )


DEFAULT = Rule()


@dataclass(frozen=True)
class Ours:
    """TEST scores of one configuration on one benchmark, as a result record has them."""

    model: str
    benchmark: str
    dataset: str
    feature_set: str
    simulated: bool
    protocol: Mapping[str, Any]
    """``Protocol`` as JSON values."""
    origin: Origin
    seeds: tuple[int, ...]
    scores: Mapping[str, tuple[float, ...]]
    """Score name -> one value per seed, percent."""
    sweep: str = ""
    """Where it was trained; of a checkpoint, its file."""
    runs: tuple[str, ...] = ()
    """Identities of the stage-2 runs, in the order of the seeds."""
    remarks: tuple[str, ...] = field(default=())
    """Why it is not comparable with anything, from whoever made the row."""

    def mean(self, score: str) -> float:
        """Return the mean over seeds."""
        return statistics.fmean(self.scores[score])

    def cell(self, score: str) -> str:
        """Return ``mean ± std``, or the one value."""
        values = self.scores[score]
        if len(values) < 2:
            return f"{values[0]:.2f}"
        return f"{self.mean(score):.2f} ± {statistics.stdev(values):.2f}"

    @property
    def what(self) -> str:
        """What it is, for a table's cell."""
        if self.origin == "checkpoint":
            return "checkpoint"
        return f"{len(self.seeds)} seed{'s' if len(self.seeds) != 1 else ''}"


@dataclass(frozen=True)
class Parity:
    """One line of the board: a published result, what there is here, and the verdict."""

    published: Reference
    ours: Ours | None
    differences: Mapping[str, Interval]
    """Score -> ours minus published, for scores both sides have."""
    verdict: Verdict
    why: tuple[str, ...]
    """The reasons, a clause each."""

    @property
    def reason(self) -> str:
        """The reasons as one line."""
        return "; ".join(self.why)


def board(
    ours: Iterable[Ours], published: Sequence[Reference] | None = None, rule: Rule = DEFAULT
) -> list[Parity]:
    """Put every published result beside what there is of it here.

    Args:
        ours: results, in any order; those of data nobody has published on are left out
            (``unmatched`` names them).
        published: default: all published results, each once.
        rule: what counts as reproduced.

    Returns:
        In the order of the published rows: a line per result of ours, checkpoints first; one line
        without where there is none.
    """
    rows = references() if published is None else list(published)
    lines: dict[int, list[Parity]] = {i: [] for i in range(len(rows))}
    for mine in sorted(ours, key=_order):
        for i in _partners(mine, rows):
            lines[i].append(compare(rows[i], mine, rule))
    return [line for i, row in enumerate(rows) for line in lines[i] or [_not_run(row)]]


def unmatched(ours: Iterable[Ours], published: Sequence[Reference] | None = None) -> list[Ours]:
    """Return the results for which no published row exists."""
    rows = references() if published is None else list(published)
    return [mine for mine in sorted(ours, key=_order) if not _partners(mine, rows)]


def _order(mine: Ours) -> tuple[str, ...]:
    return (mine.model, mine.benchmark, mine.origin, mine.sweep, repr(sorted(mine.scores.items())))


def _partners(mine: Ours, rows: Sequence[Reference]) -> list[int]:
    """Return the rows a result belongs beside: of its features, else of any other."""
    modality = mine.protocol.get("modality", "both")
    near = [
        i
        for i, ref in enumerate(rows)
        if (ref.row.model, ref.row.dataset.casefold()) == (mine.model, mine.dataset.casefold())
        and MODALITY_OF.get(ref.row.variant) == modality
    ]
    features = base_features(mine.feature_set)
    return [i for i in near if rows[i].row.feature_set == features] or near


def compare(published: Reference, ours: Ours, rule: Rule = DEFAULT) -> Parity:
    """Return the line of one published and one result of ours; see the module for the rule."""
    differences = {}
    for score in SCORES:
        printed = published.row.scores[score]
        if printed is not None and score in ours.scores:
            differences[score] = _difference(ours, score, printed)
    verdict, why = _verdict(published, ours, differences, rule)
    return Parity(published, ours, differences, verdict, tuple(why))


def _difference(ours: Ours, score: str, printed: float) -> Interval:
    """Return ours minus published."""
    if ours.origin == "retrained":
        return against_one_run(ours.scores[score], printed)
    note = "the same weights: no interval over seeds"
    return Interval(ours.mean(score) - printed, None, None, "seeds", note=note)


def _verdict(
    published: Reference, ours: Ours, differences: Mapping[str, Interval], rule: Rule
) -> tuple[Verdict, list[str]]:
    """Apply the rule."""
    obstacles = _obstacles(published, ours, rule)
    if "HM" not in differences:
        obstacles.append("no HM on one of the sides")
    if obstacles:
        return "not comparable", obstacles
    interval, printed = differences["HM"], published.row.scores["HM"] or 0.0
    distance = abs(interval.estimate)
    if ours.origin == "checkpoint":
        reached = distance <= rule.exact
        bound = "within" if reached else "more than"
        text = f"HM differs by {distance:.2f}, {bound} {rule.exact:g} points"
        return ("reproduced" if reached else "not reproduced"), [text]
    return _retrained(over_seeds(ours.scores["HM"]), interval, rule.band(printed))


def _retrained(mean: Interval, interval: Interval, band: float) -> tuple[Verdict, list[str]]:
    """Return the verdict on a mean over seeds.

    Args:
        mean: of our HM, over seeds.
        interval: of the difference.
        band: the tolerance.
    """
    distance, spread, known = abs(interval.estimate), interval.half or 0.0, mean.half or 0.0
    if distance > max(band, spread):
        text = (
            f"HM differs by {distance:.2f}: more than {band:.2f}, and one more run ± {spread:.2f}"
        )
        return "not reproduced", [text]
    if distance <= band and known <= band:
        text = (
            f"HM differs by {distance:.2f}, within {band:.2f}; our mean is known to ± {known:.2f}"
        )
        return "reproduced", [text]
    what = (
        f"our mean is known to ± {known:.2f}"
        if distance <= band
        else (f"one more run would vary by ± {spread:.2f}")
    )
    return "undecided", [f"HM differs by {distance:.2f} (tolerance {band:.2f}), but {what}"]


def _obstacles(published: Reference, ours: Ours, rule: Rule) -> list[str]:
    """Return why the two are not the same thing; empty where they are."""
    row, found = published.row, []
    if published.judged.verdict == "cannot be right":
        found.append(f"published row cannot be right: {published.judged.text('hm', 'zsl')}")
    if base_features(ours.feature_set) != row.feature_set:
        found.append(f"features {ours.feature_set}, published on {row.feature_set}")
    if ours.simulated:
        found.append("simulated data")
    found += _protocol_differences(ours.protocol, row.feature_set, row.variant)
    if ours.origin == "retrained" and len(ours.seeds) < rule.seeds:
        found.append(f"{ours.what}, a verdict needs {rule.seeds}")
    return found + list(ours.remarks)


def _protocol_differences(protocol: Mapping[str, Any], feature_set: str, variant: str) -> list[str]:
    """Return where a protocol is another than that of the published runs."""
    theirs = Protocol.model_validate(
        {
            "preset": "compat",
            "text": TEXT_OF.get(feature_set, "w2v"),
            "modality": MODALITY_OF.get(variant, "both"),
        }
    ).model_dump(mode="json")
    return [
        f"{key.replace('_', ' ')} {protocol[key]}, published {theirs[key]}"
        for key in theirs
        if key in protocol and key not in _FREE and protocol[key] != theirs[key]
    ]


def _not_run(row: Reference) -> Parity:
    """Return the line of a row with nothing beside it."""
    if not row.row.model:
        why = ["not implemented here"]
    elif row.row.variant not in MODALITY_OF:
        why = ["an ablation, not run here"]
    else:
        why = [f"no result on {row.row.benchmark} here"]
    if row.judged.verdict == "cannot be right":
        why.append(f"published row cannot be right: {row.judged.text('hm', 'zsl')}")
    return Parity(row, None, {}, "not run", tuple(why))
