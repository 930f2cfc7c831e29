"""CJME: coordinated joint multimodal embeddings with modality attention.

Parida, Matiyali, Guha, Sharma; WACV 2020; https://arxiv.org/abs/1910.08732

Built from specs/models/cjme.md, the re-implementation of the AVCA benchmark. Option:
``attention_broadcast`` (P-12: the released code multiplies attention and triplets as an outer
product, so that attention enters through its batch mean only). The published rows on CLIP/CLAP
features (ClipClap's paper) put a ``W_enc`` (1536 -> 300 or 512) in front of the text branch; it is
not offered, so those rows are not of this network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from avzero.models._basic import Linear, sigmoid
from avzero.models._contract import Batch, Card, Context, Model, ModelConfig, Shapes, scalar
from avzero.models._layers import BatchNorm, Projection
from avzero.models._losses import hinge, mse
from avzero.models._reference import load_strictly
from avzero.spec import NonNegative, Positive, Probability

TEXT_HIDDEN = 300


class CJMEConfig(ModelConfig):
    """Hyperparameters of CJME, named as in cjme.md section 7."""

    dropout: Probability = 0.2
    hidden: int = Field(1024, ge=1)
    out_dim: int = Field(64, ge=1)
    margin: Positive = 1.0
    entropy_eps: NonNegative = 0.1
    w_align: NonNegative = 1.0
    w_gate: NonNegative = 1.0
    attention_broadcast: Literal["per_sample", "outer"] = "per_sample"


class CJME(Model):
    """Three projections into one space and a gate that says which modality to trust."""

    card: ClassVar[Card] = Card(
        title="CJME",
        authors="Parida, Matiyali, Guha, Sharma",
        year=2020,
        venue="WACV",
        link="https://arxiv.org/abs/1910.08732",
        options=("attention_broadcast per_sample|outer (P-12)",),
        fixture="cjme_main",
    )
    Config: ClassVar[type[ModelConfig]] = CJMEConfig
    compat: ClassVar[Mapping[str, object]] = {"attention_broadcast": "outer"}

    margin: Tensor
    entropy_eps: Tensor
    w_align: Tensor
    w_gate: Tensor

    def __init__(self, config: CJMEConfig, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        c = config
        audio, video = shapes.features["audio"], shapes.features["video"]
        self.triplet_net = nn.ModuleDict(
            {
                "embedding_net1": Projection(audio, c.hidden, c.out_dim, c.dropout),
                "embedding_net2": Projection(video, c.hidden, c.out_dim, c.dropout),
                "embedding_net3": Projection(shapes.text, TEXT_HIDDEN, c.out_dim, c.dropout),
            }
        )
        self.attention_model = nn.ModuleDict(
            {"0": BatchNorm(audio + video), "1": Linear(audio + video, 1)}
        )
        self.outer = c.attention_broadcast == "outer"
        for name in ("margin", "entropy_eps", "w_align", "w_gate"):
            scalar(self, name, getattr(c, name))

    def _project(self, number: int, x: Tensor, context: Context | None = None) -> Tensor:
        """Return non-negative embeddings of audio (1), video (2) or text (3)."""
        return F.relu(self.triplet_net[f"embedding_net{number}"](x, context))

    def _gate(self, features: Mapping[str, Tensor], context: Context | None = None) -> Tensor:
        """Return the weight of the video branch, in 0 … 1, [n]."""
        x = torch.cat([features["audio"], features["video"]], dim=-1)
        x = self.attention_model["0"](x, context)
        return sigmoid(self.attention_model["1"](x)).squeeze(-1)

    def gate_target(self, a: Tensor, v: Tensor, table: Tensor) -> Tensor:
        """Return what the gate should say [n]: the branch that is surer of the class, or 0.5.

        Args:
            a: audio embeddings [n, o]; v: video embeddings likewise.
            v: see a.
            table: class embeddings [K, o].
        """
        with torch.no_grad():
            entropy_a, entropy_v = _entropy(a @ table.T), _entropy(v @ table.T)
            lead = entropy_a - entropy_v
            sure = (lead > self.entropy_eps).to(a.dtype) - (-lead > self.entropy_eps).to(a.dtype)
            return 0.5 + 0.5 * sure

    def attended(self, gate: Tensor, t_a: Tensor, t_v: Tensor, context: Context) -> Tensor:
        """Return the attention-weighted triplet loss of per-row losses [n] (P-12)."""
        if self.outer:
            # A product of batch means needs the whole batch.
            gate, t_a, t_v = (context.gather(x).mean() for x in (gate, t_a, t_v))
        return ((1 - gate) * t_a + gate * t_v).mean()

    def loss(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Return triplet, alignment and gate terms (cjme.md section 3)."""
        a, a_ = self._project(1, batch.features["audio"], context).unbind(1)
        v, v_ = self._project(2, batch.features["video"], context).unbind(1)
        t = self._project(3, batch.text, context)[:, 0]
        gate = self._gate({m: x[:, 0] for m, x in batch.features.items()}, context)
        with torch.no_grad():
            table = self._project(3, batch.class_text, context.alone().salted(1))
        target = self.gate_target(a, v, table)
        t_a, t_v = (hinge(t, near, far, self.margin) for near, far in ((a, a_), (v, v_)))
        return {
            "triplet": self.attended(gate, t_a, t_v, context),
            "align": self.w_align * mse(a, v),
            "gate": self.w_gate * mse(gate, target),
        }

    def embed(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return audio and video embeddings [n, o] and the hard ``gate`` [n, 1] (1 = video)."""
        gate = (self._gate(features) >= 0.5).to(features["audio"].dtype)
        return {
            "audio": self._project(1, features["audio"]),
            "video": self._project(2, features["video"]),
            "gate": gate[:, None],
        }

    def embed_classes(self, text: Tensor) -> Tensor:
        """Return the text embeddings [C, o]."""
        return self._project(3, text)

    def distances(
        self, samples: Mapping[str, Tensor], classes: Tensor, squared: bool
    ) -> dict[str, Tensor]:
        """Return Euclidean distances of each modality, and of the one the gate picks."""
        one = {m: torch.cdist(samples[m], classes) for m in ("audio", "video")}
        one = {m: d.square() for m, d in one.items()} if squared else one
        gate = samples["gate"]
        return one | {"both": (1 - gate) * one["audio"] + gate * one["video"]}

    def load_reference(self, state: Mapping[str, Tensor]) -> None:
        """Take a ``CJME`` checkpoint."""
        load_strictly(self, self.card.title, state)


def _entropy(logits: Tensor) -> Tensor:
    """Return the entropy (nats) of softmax(logits) [n, K] per row."""
    log_p = torch.log_softmax(logits, dim=1)
    return -(log_p.exp() * log_p).sum(1)
