"""One result as lines of text."""

from __future__ import annotations

from avzero.protocol.calibration import BOTH
from avzero.train.records import Result

_SCORES = ("S", "U", "HM", "ZSL")
_RETRIEVAL = "mAP_"


def score_lines(result: Result) -> list[str]:
    """Return a line per modality, and one per kind of retrieval; percent."""
    where = "VAL" if result.kind == "val" else "TEST"
    names = sorted(result.scores, key=lambda name: name != BOTH)
    wide = max(len(name) for name in names)
    lines = [
        f"{where:4}  {name:{wide}}  "
        + "  ".join(f"{key} {100 * result.scores[name][key]:5.2f}" for key in _SCORES)
        + f"  beta {result.scores[name]['beta']:.3g}"
        for name in names
    ]
    if result.at_grid_end and result.kind == "val":
        lines.append(f"{where:4}  beta lies at an end of its grid")
    tasks = [key.removesuffix("_hm") for key in result.extra if key.endswith("_hm")]
    for task in tasks:
        query, items = task.removeprefix(_RETRIEVAL).split("_")
        seen, unseen, hm = (100 * result.extra[f"{task}_{g}"] for g in ("seen", "unseen", "hm"))
        lines.append(
            f"{where:4}  mAP {query} -> {items}: seen {seen:.2f}  unseen {unseen:.2f}  HM {hm:.2f}"
        )
    return lines
