"""APN: attribute prototype network, reduced to vectors.

Xu, Xian, Wang, Schiele, Akata; NeurIPS 2020, IJCV 2022; https://arxiv.org/abs/2008.08290

Built from specs/models/apn.md, the adaptation of the AVCA benchmark: on averaged features the map
is 1x1, so two matrices into the space of the class vectors remain, each with a classification and
a regression loss. Options: ``ce_input`` (P-13: the released code takes a softmax of probabilities),
``use_prototype_at_test`` (the second matrix has no say in the released test rule), ``test_rule``
(P-14), ``norm_inputs``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from avzero.models._contract import Batch, Card, Context, ModelConfig, Shapes, scalar
from avzero.models._losses import cross_entropy, mse
from avzero.models._ranking import WordSpace, WordSpaceConfig
from avzero.spec import NonNegative


class APNConfig(WordSpaceConfig):
    """Hyperparameters of APN, named as in apn.md section 7."""

    w_regression: NonNegative = 1.0
    temperature: float = Field(1.0, gt=0)
    init_scale: float = Field(2e-4, gt=0)
    ce_input: Literal["logits", "softmax"] = "logits"
    use_prototype_at_test: Literal["no", "average"] = "no"


class APN(WordSpace):
    """Two bias-free matrices from [video, audio] into the space of the class vectors."""

    card: ClassVar[Card] = Card(
        title="APN",
        authors="Xu, Xian, Wang, Schiele, Akata",
        year=2020,
        venue="NeurIPS",
        link="https://arxiv.org/abs/2008.08290",
        options=(
            "ce_input logits|softmax (P-13)",
            "test_rule euclidean|dot (P-14)",
            "use_prototype_at_test no|average",
            "norm_inputs",
        ),
        fixture="apn_main",
    )
    Config: ClassVar[type[ModelConfig]] = APNConfig
    scoring: ClassVar[frozenset[str]] = WordSpace.scoring | {"average"}
    compat: ClassVar[Mapping[str, object]] = {"ce_input": "softmax"}

    w_regression: Tensor
    temperature: Tensor

    def __init__(self, config: APNConfig, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        size = (shapes.text, sum(shapes.features.values()))
        self.ALE_vector = nn.Parameter(config.init_scale * torch.rand(size))
        self.prototype_vectors = nn.ParameterDict(
            {"layer4": nn.Parameter(config.init_scale * torch.rand(size))}
        )
        self.ce_input = config.ce_input
        self.average = config.use_prototype_at_test == "average"
        scalar(self, "w_regression", config.w_regression)
        scalar(self, "temperature", config.temperature)

    def _attributes(self, features: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the final and the prototype attribute predictions [..., t]."""
        x = self.joined(features)
        return x @ self.ALE_vector.T, x @ self.prototype_vectors["layer4"].T

    def loss(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Return cross-entropy and regression of both predictions (apn.md section 3)."""
        anchors = {m: x[:, 0] for m, x in batch.features.items()}
        terms = {}
        for name, predicted in zip(("final", "prototype"), self._attributes(anchors), strict=True):
            logits = predicted @ batch.class_text.T / self.temperature
            given = torch.softmax(logits, 1) if self.ce_input == "softmax" else logits
            terms[f"ce_{name}"] = cross_entropy(given, batch.label[:, 0])
            terms[f"mse_{name}"] = self.w_regression * mse(predicted, batch.text[:, 0])
        return terms

    def embed(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the attribute prediction [n, t] as ``both``."""
        final, prototype = self._attributes(features)
        return {"both": (final + prototype) / 2 if self.average else final}
