"""AVCA's network, which the hyperbolic systems train with one more loss.

Two encoders, a transformer over the (audio, video) pair of tokens, projections into one space with
the class text, decoders back. Only the video embedding is compared with the classes; where there is
audio alone, it gets there through the transformer's attention and in no other way. ``TwoBranch`` is
abstract and its subclasses are final.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from avzero.models._contract import Batch, Context, Model, Shapes, scalar
from avzero.models._layers import MLP, Transformer
from avzero.models._losses import hinge, mses, pick, triplets
from avzero.models._reference import load_strictly

WIDTH = 300
"""Width of the encoders' output; equals the word vectors', which the decoder reconstructs."""
OUT = 64
JOINT = [(0, 2, 3), (0, 4, 5), (2, 0, 1), (4, 0, 1), (2, 0, 3), (4, 0, 5), (0, 2, 1), (0, 4, 1)]
"""(anchor, positive, negative) of l_w and l_t among w, w_, a, a_, v, v_ (``_``: negative)."""
TERMS = (
    *("t_wa_a", "t_wv_v", "t_aw_w", "t_vw_w", "add1_a", "add1_v", "add2_a", "add2_v"),
    *("ct_a", "ct_v", "rec_w", "rec_a", "rec_v"),
    *("reg_phi_a", "reg_phi_v", "reg_theta_a", "reg_theta_v"),
)
"""The terms of avca.md section 3."""


class Sizes(NamedTuple):
    """What can be chosen of the network (avca.md section 1)."""

    r_enc: float
    r_proj: float
    r_add: float
    bn_momentum: float
    encoder_hidden: int = 512
    proj_hidden: int = 512
    depth: int = 1
    heads: int = 3
    head_width: int = 100


class TwoBranch(Model):
    """The network, its seventeen loss terms, and what the released training loop does besides."""

    reads_table: ClassVar[bool] = False

    margin: Tensor
    train_pos_emb: bool
    legacy_updates: bool

    def build(self, shapes: Shapes, sizes: Sizes, margin: float) -> None:
        """Make the modules, named as in released checkpoints."""
        s, text = sizes, shapes.text
        audio, video = shapes.features["audio"], shapes.features["video"]
        self.pos_emb1D = nn.Parameter(torch.randn(2, WIDTH))
        self.A_enc = MLP(audio, s.encoder_hidden, WIDTH, s.r_enc, s.bn_momentum)
        self.V_enc = MLP(video, s.encoder_hidden, WIDTH, s.r_enc, s.bn_momentum)
        self.cross_attention = Transformer(WIDTH, s.depth, s.heads, s.head_width, 64, s.r_enc)
        self.W_proj = MLP(text, 0, OUT, s.r_add)
        self.D = MLP(OUT, 0, text, s.r_add)
        self.A_proj = MLP(WIDTH, s.proj_hidden, OUT, s.r_proj, s.bn_momentum)
        self.V_proj = MLP(WIDTH, s.proj_hidden, OUT, s.r_proj, s.bn_momentum)
        self.A_rec = MLP(OUT, 0, WIDTH, s.r_add)
        self.V_rec = MLP(OUT, 0, WIDTH, s.r_add)
        scalar(self, "margin", margin)

    def branches(
        self, features: Mapping[str, Tensor], context: Context | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return phi [..., 2, 300] of (audio, video), and theta_a, theta_v [..., 64]."""
        phi_a = self.A_enc(features["audio"], context)
        phi_v = self.V_enc(features["video"], context)
        phi = torch.stack([phi_a, phi_v], dim=-2)
        fused_a, fused_v = (phi + self.cross_attention(phi + self.pos_emb1D, context)).unbind(-2)
        return phi, self.A_proj(fused_a, context), self.V_proj(fused_v, context)

    def terms(self, batch: Batch, context: Context) -> tuple[Tensor, Tensor]:
        """Return the values [17] of ``TERMS``, unweighted, and phi [B, 2, 2, 300]."""
        phi, theta_a, theta_v = self.branches(batch.features, context)
        theta_w = self.W_proj(batch.text, context)
        theta = torch.cat([theta_w, theta_a, theta_v], dim=1)
        # Decoder groups in the released order; the decoded negative text is dead code there.
        rho = self.D(theta if self.legacy_updates else pick(theta, (0, 2, 3, 4, 5)), context)
        w, av = torch.split(pick(theta, (0, 2, 4)), [1, 2], dim=1)
        a, v = av.unbind(1)
        rec_a, rec_v = self.A_rec(a, context), self.V_rec(v, context)
        if self.legacy_updates and context.tracked:
            with torch.no_grad():
                self.V_proj(rec_v.detach(), context.salted(1))
                self.A_proj(rec_a.detach(), context.salted(1))
        rho_w, _, others = torch.split(rho, [1, rho.shape[1] - 5, 4], dim=1)
        near, far = others.view(-1, 2, 2, others.shape[-1]).unbind(2)
        text = batch.text[:, :1]
        values = (
            triplets(theta, JOINT, self.margin),
            hinge(rho_w, near, far, self.margin).mean(0),
            mses(rho_w, text),
            mses(near, text),
            mses(torch.stack([rec_a, rec_v], dim=1), phi[:, 0]),
            mses(av, w),
        )
        return torch.cat(values), phi

    def settle(self, batch: Batch, context: Context) -> None:
        """With legacy updates: one more train-mode pass of the anchors (avca.md section 5)."""
        if self.legacy_updates:
            again = context.salted(2)
            self.branches({m: x[:, 0] for m, x in batch.features.items()}, again)
            self.W_proj(batch.text[:, 0], again)

    def frozen(self) -> frozenset[str]:
        """Return the positional embedding where it is left at its random start (P-10)."""
        return frozenset() if self.train_pos_emb else frozenset({"pos_emb1D"})

    def embed(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return theta_a and theta_v, [n, 64] each; ``both`` is theta_v: only it is compared."""
        _, theta_a, theta_v = self.branches(features, None)
        return {"audio": theta_a, "video": theta_v, "both": theta_v}

    def embed_classes(self, text: Tensor) -> Tensor:
        """Return theta_w [C, 64]."""
        out: Tensor = self.W_proj(text)
        return out

    def load_reference(self, state: Mapping[str, Tensor]) -> None:
        """Take a published checkpoint; its names are ours."""
        load_strictly(self, self.card.title, state)
