"""DeViSE: a deep visual-semantic embedding model, on concatenated audio-visual features.

Frome, Corrado, Shlens, Bengio, Dean, Ranzato, Mikolov; NeurIPS 2013;
https://papers.nips.cc/paper/5204

Built from specs/models/devise.md, the adaptation of the AVCA benchmark: frozen features, every
wrong class as a negative. Options: ``test_rule`` (P-14: trained with products, tested with
Euclidean distance), ``text_dropout`` (P-23: class vectors are dropped out too), ``norm_inputs``.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from avzero.models._contract import Card, ModelConfig
from avzero.models._ranking import Bilinear, BilinearConfig


class DeViSEConfig(BilinearConfig):
    """Hyperparameters of DeViSE, named as in devise.md."""


class DeViSE(Bilinear):
    """Trained on all violating classes at once."""

    card: ClassVar[Card] = Card(
        title="DeViSE",
        authors="Frome, Corrado, Shlens, Bengio, Dean, Ranzato, Mikolov",
        year=2013,
        venue="NeurIPS",
        link="https://papers.nips.cc/paper/5204",
        options=("test_rule euclidean|dot (P-14)", "text_dropout same|none (P-23)", "norm_inputs"),
        fixture="devise_ale_sje_main",
    )
    Config: ClassVar[type[ModelConfig]] = DeViSEConfig

    def ranking_loss(self, hinge: Tensor) -> Tensor:
        """Return the sum over all violating classes (devise.md section 3)."""
        return hinge.sum(1)
