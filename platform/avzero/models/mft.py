"""MFT: a multimodal fusion transformer on CLIP/CLAP features. A reconstruction.

Yang, Li, Ruan et al.; JEIT 47(7), 2025, 2375-2384; https://doi.org/10.11999/JEIT241090

There is no public code, and no full text was found. Built from specs/models/mft.md, which labels:

*Stated by a source* (abstract and tables of the paper): multi-head self-attention between audio and
visual features; a KL divergence between predicted and target distributions; a cosine loss for
consistency within a class; ablations without attention, without either loss, and with one modality;
results on CLIP/CLAP features beside ClipClap's.

*Our reconstruction* (from a sibling model in the same group's repository, and from ClipClap, whose
code base that is): everything else. The base losses and modules are ClipClap's; the transformer has
6 layers of 8 heads; ``variant: fused`` attends over one token, where
attention weights are 1 and attention is a linear map, while ``av_tokens`` gives each modality a
token, which fits the abstract's words better; the KL divergence compares softmaxes over the
coordinates of embeddings (``kl_on: embedding``), or over seen classes (``class``: the target is the
softmax of the class's similarities to all seen classes in the joint space, as a one-hot target
would repeat the cross-entropy); the cosine is taken between a sample and its class text
(``cosine_on: text``) or between samples of one class (``pairs``); the weights are a commented line
of the sibling. ``attention: false`` leaves out transformer and positions (the paper's "w/o att").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from avzero.models._contract import Batch, Card, Context, Model, ModelConfig, Shapes, scalar
from avzero.models._joint import joint, joint_width, text_part
from avzero.models._layers import MLP, Transformer
from avzero.models._losses import cross_entropy, mse
from avzero.spec import BetaGrid, Modality, NonNegative, Probability

WIDTH = 512
"""Width of encoders, tokens, hidden layers and of queries, keys and values over all heads."""
OUT = 64


class MFTConfig(ModelConfig):
    """Hyperparameters of MFT, named as in mft.md section 6."""

    variant: Literal["fused", "av_tokens"] = "fused"
    attention: bool = True
    modality: Modality = "both"
    layers: int = Field(6, ge=1)
    heads: Literal[4, 8] = 8
    ff_width: int = Field(512, ge=1)
    p_transformer: Probability = 0.2
    p_enc: Probability = 0.1
    p_o: Probability = 0.1
    p_w: Probability = 0.1
    lambda_kl: NonNegative = 1.0
    lambda_cos: NonNegative = 0.7
    kl_on: Literal["embedding", "class"] = "embedding"
    cosine_on: Literal["text", "pairs"] = "text"


class MFT(Model):
    """ClipClap with a transformer between encoder and projection, and two more losses."""

    card: ClassVar[Card] = Card(
        title="MFT",
        authors="Yang, Li, Ruan et al.",
        year=2025,
        venue="JEIT",
        link="https://doi.org/10.11999/JEIT241090",
        options=(
            "variant fused|av_tokens",
            "attention true|false",
            "modality both|audio|video",
            "kl_on embedding|class",
            "cosine_on text|pairs",
        ),
        evidence="reconstruction",
    )
    Config: ClassVar[type[ModelConfig]] = MFTConfig
    beta_grid: ClassVar[BetaGrid] = BetaGrid(start=0, stop=5, count=76)

    lambda_kl: Tensor
    lambda_cos: Tensor

    def __init__(self, config: MFTConfig, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        c = config
        self.part = text_part(self.card.title, shapes.text, c.modality, "both")
        self.modality, self.attention = c.modality, c.attention
        self.kl_on, self.cosine_on = c.kl_on, c.cosine_on
        self.encoders = self._encoders(c, shapes)
        if c.attention:
            tokens = len(self.encoders)
            self.pos_emb1D = nn.Parameter(torch.randn(tokens, WIDTH))
            self.cross_attention = Transformer(
                WIDTH, c.layers, c.heads, WIDTH // c.heads, c.ff_width, c.p_transformer
            )
        self.O_proj = MLP(WIDTH, WIDTH, OUT, c.p_o)
        self.D_o = MLP(OUT, WIDTH, WIDTH, c.p_o)
        self.W_enc = MLP(self.part.stop - self.part.start, 0, WIDTH, c.p_enc)
        self.W_proj = MLP(WIDTH, 0, OUT, c.p_w)
        self.D_w = MLP(OUT, 0, WIDTH, c.p_w)
        scalar(self, "lambda_kl", c.lambda_kl)
        scalar(self, "lambda_cos", c.lambda_cos)

    def _encoders(self, c: MFTConfig, shapes: Shapes) -> dict[str, Modality]:
        """Build the encoder of every token; return {its name: what it reads}."""
        names: dict[str, Modality] = {"O_enc": c.modality}
        if c.variant == "av_tokens":
            both: dict[str, Modality] = {"A_enc": "audio", "V_enc": "video"}
            names = {name: m for name, m in both.items() if c.modality in ("both", m)}
        for name, modality in names.items():
            self.add_module(name, MLP(joint_width(shapes, modality), 0, WIDTH, c.p_enc))
        return names

    def _samples(self, features: Mapping[str, Tensor], context: Context | None = None) -> Tensor:
        """Return theta_o [n, 64]."""
        parts = [
            self.get_submodule(name)(joint(features, modality), context)
            for name, modality in self.encoders.items()
        ]
        tokens = torch.stack(parts, dim=-2)
        if self.attention:
            tokens = self.cross_attention(tokens + self.pos_emb1D, context)
        out: Tensor = self.O_proj(tokens.mean(-2), context)
        return out

    def _words(self, text: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Return omega [C, 512] and theta_w [C, 64] of class text [C, t]."""
        omega = self.W_enc(text[..., self.part], context)
        return omega, self.W_proj(omega, context)

    def loss(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Return the six terms of mft.md section 3 (weights applied)."""
        label = batch.label[:, 0]
        theta_o = self._samples({m: x[:, 0] for m, x in batch.features.items()}, context)
        omega, theta_w = self._words(batch.text[:, 0], context)
        rho_o, rho_w = self.D_o(theta_o, context), self.D_w(theta_w, context)
        # Statistics over classes, which all workers have alike.
        _, table = self._words(batch.class_text, context.alone().salted(1))
        scores = theta_o @ table.T
        if self.kl_on == "class":
            divergence = kl(scores, theta_w @ table.T)
        else:
            divergence = kl(theta_o, theta_w)
        if self.cosine_on == "pairs":
            gap = same_class_gap(context.gather(theta_o), context.gather(label))
        else:
            gap = (1 - F.cosine_similarity(theta_o, theta_w, dim=1)).mean()
        return {
            "ce": cross_entropy(scores, label),
            "reg": mse(theta_o, theta_w),
            "rec_o": mse(omega, rho_o),
            "rec_w": mse(omega, rho_w),
            "kl": divergence * self.lambda_kl,
            "cos": gap * self.lambda_cos,
        }

    def embed(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return theta_o [n, 64]; non-negative, and possibly an all-zero row."""
        return {"both": self._samples(features)}

    def embed_classes(self, text: Tensor) -> Tensor:
        """Return theta_w [C, 64]."""
        return self._words(text)[1]


def kl(predicted: Tensor, target: Tensor) -> Tensor:
    """Return KL(softmax(target) || softmax(predicted)) of rows [B, d], averaged over rows."""
    log_p, log_q = torch.log_softmax(predicted, 1), torch.log_softmax(target, 1)
    return (log_q.exp() * (log_q - log_p)).sum(1).mean()


def same_class_gap(theta: Tensor, label: Tensor) -> Tensor:
    """Return the mean of 1 - cosine over pairs of different rows of one class; 0 without pairs.

    Args:
        theta: [B, o], all rows of the global batch.
        label: int64 [B].
    """
    unit = F.normalize(theta, dim=1)
    one = torch.eye(len(theta), dtype=theta.dtype, device=theta.device)
    same = (label[:, None] == label).to(theta.dtype) - one
    return (same * (1 - unit @ unit.T)).sum() / same.sum().clamp_min(1)
