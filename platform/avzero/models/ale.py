"""ALE: attribute label embedding, on concatenated audio-visual features.

Akata, Perronnin, Harchaoui, Schmid; CVPR 2013, TPAMI 2016;
https://doi.org/10.1109/CVPR.2013.111

Built from specs/models/ale.md, the adaptation of the AVCA benchmark: DeViSE's matrix, trained with
a hinge weighted by the rank of the true class. Options as DeViSE (P-14, P-23).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from avzero.models._contract import Card, ModelConfig
from avzero.models._ranking import Bilinear, BilinearConfig


class ALEConfig(BilinearConfig):
    """Hyperparameters of ALE, named as in ale.md."""


class ALE(Bilinear):
    """Trained on all violating classes, weighted by how many there are."""

    card: ClassVar[Card] = Card(
        title="ALE",
        authors="Akata, Perronnin, Harchaoui, Schmid",
        year=2013,
        venue="CVPR",
        link="https://doi.org/10.1109/CVPR.2013.111",
        options=("test_rule euclidean|dot (P-14)", "text_dropout same|none (P-23)", "norm_inputs"),
        fixture="devise_ale_sje_main",
    )
    Config: ClassVar[type[ModelConfig]] = ALEConfig

    def ranking_loss(self, hinge: Tensor) -> Tensor:
        """Return the rank-weighted sum (ale.md section 1); the rank carries no gradient."""
        rank = (hinge > 0).sum(1)
        steps = torch.arange(1, hinge.shape[1], dtype=hinge.dtype, device=hinge.device)
        harmonic = torch.cat([steps.new_zeros(1), (1 / steps).cumsum(0)])
        return harmonic[rank] / (rank + 1e-8) * hinge.sum(1)
