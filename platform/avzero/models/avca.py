"""AVCA: audio-visual generalised zero-shot learning with cross-modal attention and language.

Mercea, Riesch, Koepke, Akata; CVPR 2022; https://arxiv.org/abs/2203.03598

Built from specs/models/avca.md. Options: ``train_pos_emb`` (P-10) and ``bn_legacy_updates``
(P-11: the released code's dead re-projection and its extra train-mode pass after every step, both
of which only move BatchNorm statistics). Only the video branch is compared with the classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from avzero.models._contract import Batch, Card, Context, Model, ModelConfig, Shapes, scalar
from avzero.models._layers import MLP, Transformer
from avzero.models._losses import mse, triplets
from avzero.models._reference import load_strictly
from avzero.spec import NonNegative, Positive, Probability

WIDTH = 300
"""Width of the encoders' output; equals the word vectors', which the decoder reconstructs."""
OUT = 64


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


class AVCA(Model):
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

    margin: Tensor
    k1: Tensor
    k2: Tensor
    w_rec: Tensor
    w_reg: Tensor

    def __init__(self, config: AVCAConfig, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        c = config
        heads, head_width = (int(part) for part in c.heads.split("x"))
        audio, video = shapes.features["audio"], shapes.features["video"]
        self.pos_emb1D = nn.Parameter(torch.randn(2, WIDTH))
        self.A_enc = MLP(audio, c.encoder_hidden, WIDTH, c.r_enc, c.bn_momentum)
        self.V_enc = MLP(video, c.encoder_hidden, WIDTH, c.r_enc, c.bn_momentum)
        self.cross_attention = Transformer(WIDTH, c.depth, heads, head_width, 64, c.r_enc)
        self.W_proj = MLP(shapes.text, 0, OUT, c.r_add)
        self.D = MLP(OUT, 0, shapes.text, c.r_add)
        self.A_proj = MLP(WIDTH, c.proj_hidden, OUT, c.r_proj, c.bn_momentum)
        self.V_proj = MLP(WIDTH, c.proj_hidden, OUT, c.r_proj, c.bn_momentum)
        self.A_rec = MLP(OUT, 0, WIDTH, c.r_add)
        self.V_rec = MLP(OUT, 0, WIDTH, c.r_add)
        self.train_pos_emb = c.train_pos_emb
        self.bn_legacy_updates = c.bn_legacy_updates
        for name in ("margin", "k1", "k2", "w_rec", "w_reg"):
            scalar(self, name, getattr(c, name))

    def _branches(
        self, features: Mapping[str, Tensor], context: Context | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return phi_a, phi_v [..., 300] and theta_a, theta_v [..., 64]."""
        phi_a = self.A_enc(features["audio"], context)
        phi_v = self.V_enc(features["video"], context)
        tokens = torch.stack([phi_a, phi_v], dim=-2)
        attended = self.cross_attention(tokens + self.pos_emb1D, context)
        fused_a, fused_v = (tokens + attended).unbind(-2)
        return phi_a, phi_v, self.A_proj(fused_a, context), self.V_proj(fused_v, context)

    def loss(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Return the 17 terms of avca.md section 3 (weights applied)."""
        phi_a, phi_v, theta_a, theta_v = self._branches(batch.features, context)
        theta_w = self.W_proj(batch.text, context)
        (a, a_), (v, v_), (w, w_) = (x.unbind(1) for x in (theta_a, theta_v, theta_w))
        # Decoder groups in the released order; the decoded negative text is dead code there.
        decoded = [w, w_, a, a_, v, v_] if self.bn_legacy_updates else [w, a, a_, v, v_]
        rho = self.D(torch.stack(decoded, dim=1), context).unbind(1)
        rho_w, (rho_a, rho_a_, rho_v, rho_v_) = rho[0], rho[-4:]
        rec_a, rec_v = self.A_rec(a, context), self.V_rec(v, context)
        if self.bn_legacy_updates:
            with torch.no_grad():
                self.V_proj(rec_v.detach(), context.salted(1))
                self.A_proj(rec_a.detach(), context.salted(1))
        # (anchor, positive, negative) of l_w and l_t, then of l_ct.
        joint = triplets(
            torch.stack([w, w, a, v, a, v, w, w], dim=1),
            torch.stack([a, v, w, w, w, w, a, v], dim=1),
            torch.stack([a_, v_, w_, w_, a_, v_, w_, w_], dim=1),
            self.margin,
        )
        cross = triplets(
            torch.stack([rho_w, rho_w], dim=1),
            torch.stack([rho_a, rho_v], dim=1),
            torch.stack([rho_a_, rho_v_], dim=1),
            self.margin,
        )
        text, p_a, p_v = batch.text[:, 0], phi_a[:, 0], phi_v[:, 0]
        return {
            "t_wa_a": joint[0],
            "t_wv_v": joint[1],
            "t_aw_w": joint[2],
            "t_vw_w": joint[3],
            "add1_a": joint[4] * self.k1,
            "add1_v": joint[5] * self.k1,
            "add2_a": joint[6] * self.k2,
            "add2_v": joint[7] * self.k2,
            "ct_a": cross[0],
            "ct_v": cross[1],
            "rec_v": mse(text, rho_v) * self.w_rec,
            "rec_a": mse(text, rho_a) * self.w_rec,
            "rec_w": mse(text, rho_w) * self.w_rec,
            "reg_phi_v": mse(rec_v, p_v) * self.w_reg,
            "reg_phi_a": mse(rec_a, p_a) * self.w_reg,
            "reg_theta_v": mse(v, w) * self.w_reg,
            "reg_theta_a": mse(a, w) * self.w_reg,
        }

    def settle(self, batch: Batch, context: Context) -> None:
        """With legacy updates: one more train-mode pass of the anchors (avca.md section 5)."""
        if self.bn_legacy_updates:
            again = context.salted(2)
            self._branches({m: x[:, 0] for m, x in batch.features.items()}, again)
            self.W_proj(batch.text[:, 0], again)

    def frozen(self) -> frozenset[str]:
        """Return the positional embedding where it is left at its random start (P-10)."""
        return frozenset() if self.train_pos_emb else frozenset({"pos_emb1D"})

    def embed(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return theta_a and theta_v, [n, 64] each, as ``audio`` and ``video``."""
        _, _, theta_a, theta_v = self._branches(features, None)
        return {"audio": theta_a, "video": theta_v}

    def embed_classes(self, text: Tensor) -> Tensor:
        """Return theta_w [C, 64]."""
        out: Tensor = self.W_proj(text)
        return out

    def distances(
        self, samples: Mapping[str, Tensor], classes: Tensor, squared: bool
    ) -> dict[str, Tensor]:
        """Return Euclidean distances of the video branch, the one result the system reports."""
        distance = torch.cdist(samples["video"], classes)
        return {"both": distance.square() if squared else distance}

    def load_reference(self, state: Mapping[str, Tensor]) -> None:
        """Take an ``AVCA`` checkpoint (avca.md section 7): its keys are ours."""
        load_strictly(self, self.card.title, state)
