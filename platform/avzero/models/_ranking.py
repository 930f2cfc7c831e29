"""What the ranking systems share: inputs, margins, the test rule, and the one-matrix base.

All of them map samples into the space of the class vectors, which stay as they are: that is
``WordSpace``. DeViSE, ALE and SJE are the same matrix and differ in one line, the loss;
``Bilinear`` holds the rest once. Both are abstract; the systems derived from them are final.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from avzero.models._basic import Linear
from avzero.models._contract import Batch, Context, Model, ModelConfig, Shapes, scalar
from avzero.models._joint import joint, joint_width
from avzero.models._layers import Dropout
from avzero.models._reference import load_strictly
from avzero.spec import Probability

TestRule = Literal["euclidean", "dot"]
"""P-14: Euclidean distance to the class vector as the benchmark has it, or the trained product."""


def violations(scores: Tensor, label: Tensor, margin: Tensor) -> Tensor:
    """Return by how much each wrong class comes too close: [N, K], 0 for the true class.

    max(0, margin + F[n, c] - F[n, y_n]) (devise.md section 3).

    Args:
        scores: [N, K].
        label: int64 [N].
        margin: 0-d.
    """
    true = scores.gather(1, label[:, None])
    every = torch.arange(scores.shape[1], device=label.device)
    wrong = (label[:, None] != every).to(scores.dtype)
    return (margin + scores - true).clamp_min(0) * wrong


class WordSpaceConfig(ModelConfig):
    """Hyperparameters of every system that maps samples into the space of the class vectors."""

    norm_inputs: bool = False
    test_rule: TestRule = "euclidean"


class WordSpace(Model):
    """Maps [video, audio] into the space of the class vectors, and compares it with those."""

    scoring: ClassVar[frozenset[str]] = frozenset({"test_rule", "lengths"})

    def __init__(self, config: Any, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        self.norm_inputs = config.norm_inputs
        self.test_rule: TestRule = config.test_rule
        self.lengths = config.test_rule == "euclidean"

    def joined(self, features: Mapping[str, Tensor]) -> Tensor:
        """Return [video, audio] of samples [..., d_v + d_a], of unit length if asked for."""
        x = joint(features)
        return F.normalize(x, dim=-1) if self.norm_inputs else x

    def embed_classes(self, text: Tensor) -> Tensor:
        """Return the class vectors themselves."""
        return text

    def distances(
        self, samples: Mapping[str, Tensor], classes: Tensor, squared: bool
    ) -> dict[str, Tensor]:
        """Return distances [n, C] by the test rule; minus a product has no square."""
        if self.test_rule == "dot":
            return {"both": -samples["both"] @ classes.T}
        distance = torch.cdist(samples["both"], classes)
        return {"both": distance.square() if squared else distance}

    def load_reference(self, state: Mapping[str, Tensor]) -> None:
        """Take a checkpoint of the AVCA benchmark.

        Nothing in it tells DeViSE, ALE and SJE apart; APN's 1x1 kernels are our matrices.
        """
        load_strictly(self, self.card.title, state)


class BilinearConfig(WordSpaceConfig):
    """Hyperparameters of the one-matrix systems, named as in devise.md section 8."""

    margin: float = Field(0.1, gt=0)
    dropout: Probability = 0.2
    text_dropout: Literal["same", "none"] = "same"


class Bilinear(WordSpace):
    """One matrix from [video, audio] into the space of the class vectors (devise.md section 1)."""

    margin: Tensor

    def __init__(self, config: Any, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        self.bilinear = Linear(joint_width(shapes), shapes.text, bias=False)
        self.dropout = Dropout(config.dropout)
        self.text_dropout = Dropout(config.dropout if config.text_dropout == "same" else 0.0)
        scalar(self, "margin", config.margin)

    @abstractmethod
    def ranking_loss(self, hinge: Tensor) -> Tensor:
        """Return the loss per row [N] of violations [N, K]."""

    def loss(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Return the mean ranking loss over the anchors as ``hinge``."""
        anchors = {m: x[:, 0] for m, x in batch.features.items()}
        x = self.dropout(self.joined(anchors), context)
        table = self.text_dropout(batch.class_text, context.alone())
        hinge = violations(self.bilinear(x) @ table.T, batch.label[:, 0], self.margin)
        return {"hinge": self.ranking_loss(hinge).mean()}

    def embed(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the projections [n, t] as ``both``."""
        return {"both": self.bilinear(self.joined(features))}
