"""SJE: structured joint embedding, on concatenated audio-visual features.

Akata, Reed, Walter, Lee, Schiele; CVPR 2015; https://arxiv.org/abs/1409.8403

Built from specs/models/sje.md, the adaptation of the AVCA benchmark: DeViSE's matrix, trained on
the most violating classes only. Options: ``topk`` of them, and those of DeViSE (P-14, P-23).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from avzero.models._contract import Card, ModelConfig, Shapes
from avzero.models._ranking import Bilinear, BilinearConfig


class SJEConfig(BilinearConfig):
    """Hyperparameters of SJE, named as in sje.md."""

    topk: int = Field(1, ge=1)


class SJE(Bilinear):
    """Trained on the most violating classes."""

    card: ClassVar[Card] = Card(
        title="SJE",
        authors="Akata, Reed, Walter, Lee, Schiele",
        year=2015,
        venue="CVPR",
        link="https://arxiv.org/abs/1409.8403",
        options=(
            "topk",
            "test_rule euclidean|dot (P-14)",
            "text_dropout same|none (P-23)",
            "norm_inputs",
        ),
        fixture="devise_ale_sje_main",
    )
    Config: ClassVar[type[ModelConfig]] = SJEConfig

    def __init__(self, config: SJEConfig, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        self.topk = config.topk

    def ranking_loss(self, hinge: Tensor) -> Tensor:
        """Return the sum of the ``topk`` largest violations (sje.md section 1)."""
        return hinge.topk(min(self.topk, hinge.shape[1]), dim=1).values.sum(1)
