"""Carrying the calibration value from VAL to TEST (protocol.md sections 4 and 5, P-03 to P-06).

A ``Calibration`` is made from VAL alone and is part of the frozen trial. TEST is scored with the
number it gives; no function here or in ``scoring`` chooses a beta from TEST distances.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from avzero.errors import UserError
from avzero.protocol.scoring import Nearest, Scores
from avzero.spec import BetaGrid, Protocol

BOTH = "both"
"""The headline entry of a system's distances."""
MISSING = "missing_"
"""Starts the names of scores where one modality was withheld at test time."""


@dataclass(frozen=True)
class Calibration:
    """Beta per modality as chosen on VAL, in distance units or in units of ``scale``."""

    betas: Mapping[str, float]
    scale: float
    at_grid_end: bool
    """Whether the headline optimum lies at an end of the grid (P-06): widen it if so."""

    def beta(self, modality: str, protocol: Protocol, test_scale: float) -> float:
        """Return the value TEST is scored with.

        Args:
            modality: a key of ``betas``.
            protocol: P-03 and P-04.
            test_scale: the class-distance scale of the stage-2 weights (only for ``scaled``).
        """
        if protocol.beta_reduction == "mean3":
            # Systems with one result count it three times: the mean is that one value. Tests
            # with a missing modality are ours and do not enter it.
            whole = [b for name, b in self.betas.items() if not name.startswith(MISSING)]
            beta = self.betas[modality] if modality.startswith(MISSING) else sum(whole) / len(whole)
        else:
            beta = self.betas[modality]
        if protocol.calibration == "absolute":
            return beta
        if self.scale == 0:
            raise UserError(
                "calibration scaled: the class embeddings of stage 1 coincide, so beta has no "
                "unit; use calibration: absolute"
            )
        ratio = test_scale / self.scale
        return beta * (ratio**2 if protocol.distance == "squared_l2" else ratio)


def calibrate(
    nearest: Mapping[str, Nearest], grid: BetaGrid, scale: float
) -> tuple[Calibration, dict[str, Scores]]:
    """Choose beta on VAL: the first grid value with the highest HM, per modality.

    Args:
        nearest: VAL distances by modality; must contain ``both``.
        grid: the values to try.
        scale: class-distance scale of the stage-1 weights.

    Returns:
        The calibration and the VAL scores at the chosen values.
    """
    values = grid.values()
    scores = {modality: facts.sweep(values) for modality, facts in nearest.items()}
    at_end = scores[BOTH].beta in (values[0], values[-1]) and len(values) > 1
    betas = {modality: score.beta for modality, score in scores.items()}
    return Calibration(betas, scale, at_end), scores
