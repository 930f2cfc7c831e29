"""AVCA: audio-visual generalised zero-shot learning with cross-modal attention and language.

Mercea, Riesch, Koepke, Akata; CVPR 2022; https://arxiv.org/abs/2203.03598

Built from specs/models/avca.md. Options: ``train_pos_emb`` (P-10) and ``bn_legacy_updates``
(P-11: the released code's dead re-projection and its extra train-mode pass after every step, both
of which only move BatchNorm statistics). Only the video branch is compared with the classes: in
audio-only runs, audio reaches what is compared through the cross-attention alone. The published
rows on CLIP/CLAP features (ClipClap's paper) put a ``W_enc`` (1536 -> 300 or 512) in front of the
text branch; it is not offered, so those rows are not of this network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from avzero.models._contract import Batch, Card, Context, ModelConfig, Shapes, scalar
from avzero.models._losses import pick
from avzero.models._two_branch import TERMS, Sizes, TwoBranch
from avzero.spec import NonNegative, Positive, Probability

_WEIGHTED = ("", "add1", "add2", "rec", "reg")
_WEIGHT = tuple(
    _WEIGHTED.index(kind) if (kind := name.split("_")[0]) in _WEIGHTED else 0 for name in TERMS
)
"""Which weight a term has: none, k1, k2, w_rec or w_reg."""


class AVCAConfig(ModelConfig):
    """Hyperparameters of AVCA, named as in avca.md section 9."""

    r_enc: Probability = 0.2
    r_proj: Probability = 0.3
    r_add: Probability = 0.5
    bn_momentum: float = Field(0.1, gt=0, le=1)
    encoder_hidden: int = Field(512, ge=0)
    proj_hidden: int = Field(512, ge=0)
    depth: int = Field(1, ge=1)
    heads: Literal["3x100", "6x50", "5x60"] = "3x100"
    margin: Positive = 1.0
    k1: NonNegative = 1.0
    k2: NonNegative = 1.0
    w_rec: NonNegative = 1.0
    w_reg: NonNegative = 1.0
    train_pos_emb: bool = True
    bn_legacy_updates: bool = False


class AVCA(TwoBranch):
    """Two encoders, one cross-attention over (audio, video), projections to a joint space."""

    card: ClassVar[Card] = Card(
        title="AVCA",
        authors="Mercea, Riesch, Koepke, Akata",
        year=2022,
        venue="CVPR",
        link="https://arxiv.org/abs/2203.03598",
        options=("train_pos_emb (P-10)", "bn_legacy_updates (P-11)"),
        fixture="avca_main",
    )
    Config: ClassVar[type[ModelConfig]] = AVCAConfig
    compat: ClassVar[Mapping[str, object]] = {"train_pos_emb": False, "bn_legacy_updates": True}

    k1: Tensor
    k2: Tensor
    w_rec: Tensor
    w_reg: Tensor

    def __init__(self, config: AVCAConfig, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        c = config
        heads, head_width = (int(part) for part in c.heads.split("x"))
        rates = (c.r_enc, c.r_proj, c.r_add, c.bn_momentum)
        sizes = Sizes(*rates, c.encoder_hidden, c.proj_hidden, c.depth, heads, head_width)
        self.build(shapes, sizes, c.margin)
        self.train_pos_emb, self.legacy_updates = c.train_pos_emb, c.bn_legacy_updates
        for name in ("k1", "k2", "w_rec", "w_reg"):
            scalar(self, name, getattr(c, name))

    def loss(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Return the 17 terms of avca.md section 3 (weights applied)."""
        values, _ = self.terms(batch, context)
        weights = [torch.ones_like(self.k1), self.k1, self.k2, self.w_rec, self.w_reg]
        values = values * pick(torch.stack(weights)[None, :, None], _WEIGHT).view(-1)
        return dict(zip(TERMS, values.unbind(), strict=True))
