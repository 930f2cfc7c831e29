"""AVGZSLNet: audio-visual generalised zero-shot learning by reconstructing label features.

Mazumder, Singh, Parida, Namboodiri; WACV 2021; https://arxiv.org/abs/2005.13402

Built from specs/models/avgzslnet.md, the re-implementation of the AVCA benchmark: three projections
into one space and one decoder shared by all of them. Options: ``distance_fn`` of the reconstruction
(triplets stay Euclidean), ``w_kl``: the divergence between audio and video embeddings that the
paper names and the benchmark's code leaves out (its exact form is our reading: softmax over the
coordinates, both directions averaged). The published rows on CLIP/CLAP features (ClipClap's paper)
put a ``W_enc`` (1536 -> 300 or 512) in front of the text branch; it is not offered, so those rows
are not of this network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from avzero.models._contract import Batch, Card, Context, Model, ModelConfig, Shapes, scalar
from avzero.models._layers import Projection
from avzero.models._losses import pick, triplets
from avzero.models._reference import load_strictly
from avzero.spec import NonNegative, Positive, Probability

TEXT_HIDDEN = 300


class AVGZSLNetConfig(ModelConfig):
    """Hyperparameters of AVGZSLNet, named as in avgzslnet.md section 8."""

    embedding_dropout: Probability = 0.8
    decoder_dropout: Probability = 0.5
    hidden: int = Field(1024, ge=1)
    decoder_hidden: int = Field(64, ge=1)
    out_dim: int = Field(64, ge=1)
    margin: Positive = 1.0
    use_bn: bool = True
    normalize_decoder_outputs: bool = True
    distance_fn: Literal["l2", "squared_l2"] = "l2"
    w_kl: NonNegative = 0.0


class AVGZSLNet(Model):
    """Audio, video and text projections into one space, decoded back to the class vector."""

    card: ClassVar[Card] = Card(
        title="AVGZSLNet",
        authors="Mazumder, Singh, Parida, Namboodiri",
        year=2021,
        venue="WACV",
        link="https://arxiv.org/abs/2005.13402",
        options=("distance_fn l2|squared_l2 (P-18)", "use_bn", "normalize_decoder_outputs", "w_kl"),
        fixture="avgzslnet_main",
    )
    Config: ClassVar[type[ModelConfig]] = AVGZSLNetConfig
    reads_table: ClassVar[bool] = False

    margin: Tensor
    w_kl: Tensor

    def __init__(self, config: AVGZSLNetConfig, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        c, out, drop = config, config.out_dim, config.embedding_dropout
        audio, video = shapes.features["audio"], shapes.features["video"]
        self.triplet_net = nn.ModuleDict(
            {
                "embedding_net1": Projection(audio, c.hidden, out, drop, c.use_bn),
                "embedding_net2": Projection(video, c.hidden, out, drop, c.use_bn),
                "embedding_net3": Projection(shapes.text, TEXT_HIDDEN, out, drop, c.use_bn),
            }
        )
        decoder = Projection(out, c.decoder_hidden, shapes.text, c.decoder_dropout, c.use_bn)
        self.decoder_net = nn.ModuleDict({"embedding_net": decoder})
        self.normalize = c.normalize_decoder_outputs
        self.squared = c.distance_fn == "squared_l2"
        self.use_kl = c.w_kl > 0
        scalar(self, "margin", c.margin)
        scalar(self, "w_kl", c.w_kl)

    def decode(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Return class vectors [..., t] of embeddings [..., o]."""
        out: Tensor = self.decoder_net["embedding_net"](x, context)
        return F.normalize(out, dim=-1) if self.normalize else out

    def loss(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Return the seven terms of avgzslnet.md section 3 (and ``kl`` where it is on)."""
        net = self.triplet_net
        rows = torch.cat(
            [
                net["embedding_net1"](batch.features["audio"], context),
                net["embedding_net2"](batch.features["video"], context),
                net["embedding_net3"](batch.text, context),
            ],
            dim=1,
        )
        # Of a, a_, v, v_, t, t_ (``_``: negative) all but the last are decoded.
        decoded = self.decode(pick(rows, (0, 2, 4, 1, 3)), context)
        gap = torch.linalg.vector_norm(decoded[:, :3] - batch.text[:, :1], dim=-1)
        cross = triplets(decoded, [(2, 0, 3), (2, 1, 4)], self.margin)
        joint = triplets(rows, [(4, 0, 1), (0, 4, 5), (4, 2, 3), (2, 4, 5)], self.margin)
        terms = {
            "rec": (gap.square() if self.squared else gap).mean(0).sum(),
            "cta": cross[0],
            "ctv": cross[1],
            "ta": joint[0],
            "at": joint[1],
            "tv": joint[2],
            "vt": joint[3],
        }
        if self.use_kl:
            log_a, log_v = (torch.log_softmax(rows[:, i], 1) for i in (0, 2))
            both = ((log_a.exp() - log_v.exp()) * (log_a - log_v)).sum(1)
            terms["kl"] = self.w_kl * both.mean() / 2
        return terms

    def embed(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the audio and video embeddings [n, o]."""
        return {
            "audio": self.triplet_net["embedding_net1"](features["audio"]),
            "video": self.triplet_net["embedding_net2"](features["video"]),
        }

    def embed_classes(self, text: Tensor) -> Tensor:
        """Return the text embeddings [C, o]."""
        out: Tensor = self.triplet_net["embedding_net3"](text)
        return out

    def distances(
        self, samples: Mapping[str, Tensor], classes: Tensor, squared: bool
    ) -> dict[str, Tensor]:
        """Return Euclidean distances of each modality, and their sum as ``both``."""
        one = {m: torch.cdist(z, classes) for m, z in samples.items()}
        one = {m: d.square() for m, d in one.items()} if squared else one
        return one | {"both": one["audio"] + one["video"]}

    def load_reference(self, state: Mapping[str, Tensor]) -> None:
        """Take an ``AVGZSLNet`` checkpoint."""
        load_strictly(self, self.card.title, state)
