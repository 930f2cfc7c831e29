"""Hyper-alignment, Hyper-single, Hyper-multiple: audio-visual alignment on the Poincaré ball.

Hong, Hayder, Han, Fang, Harandi, Petersson; ICCV 2023; https://arxiv.org/abs/2308.12558

Built from specs/models/hyper_multiple.md: AVCA plus a loss that aligns the two modalities' B x B
similarities after a map to the ball and back. Options: ``framework`` (curvature fixed, learnt per
sample, several per sample, or no alignment), ``similarity`` (neither released one is faithful:
``norm_product`` of 2023 ignores directions, ``cosine`` of today's release ignores the curvature,
``geodesic`` is ours and sees both), ``dead_passes`` (the release's unused passes and its extra
train-mode pass after every step; they only move BatchNorm statistics), ``train_pos_emb`` (P-10).
The published rows on CLIP/CLAP features (ClipClap's paper) put a ``W_enc`` (1536 -> 300 or 512) in
front of the text branch; it is not offered, so those rows are not of this network.

geoopt is not used. The maps are two closed formulas, without an exponential map. On the ball's
inside ours equal geoopt's to 1e-6 (tests/test_hyper_multiple.py, where geoopt is installed), but
its float32 boundary is 0.996 / sqrt(c) where the released numbers were made with 0.999, and its
formulas branch on tensor values, so that configurations could not be stacked (design rule 4).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from avzero.models._basic import Linear, sigmoid
from avzero.models._contract import Batch, Card, Context, ModelConfig, Shapes, scalar
from avzero.models._two_branch import TERMS, WIDTH, Sizes, TwoBranch
from avzero.spec import NonNegative, Positive, Probability

_EDGE = 0.999
_FLOOR = 1e-5


class HyperConfig(ModelConfig):
    """Hyperparameters of the hyperbolic systems, named as in hyper_multiple.md section 7."""

    framework: Literal["alignment", "single", "multiple", "baseline"] = "multiple"
    curvature: Positive = 0.3
    num_curvature: int = Field(3, ge=1)
    align_weight: NonNegative = 1e-3
    similarity: Literal["norm_product", "cosine", "geodesic"] = "norm_product"
    r_enc: Probability = 0.2
    r_proj: Probability = 0.3
    r_dec: Probability = 0.5
    bn_momentum: float = Field(0.1, gt=0, le=1)
    f1: NonNegative = 1.0
    f2: NonNegative = 1.0
    train_pos_emb: bool = False
    dead_passes: bool = False


class HyperMultiple(TwoBranch):
    """AVCA's network; ``fusenet1`` gives every sample its curvatures in training."""

    card: ClassVar[Card] = Card(
        title="Hyper-multiple",
        authors="Hong, Hayder, Han, Fang, Harandi, Petersson",
        year=2023,
        venue="ICCV",
        link="https://arxiv.org/abs/2308.12558",
        options=(
            "framework alignment|single|multiple|baseline",
            "similarity norm_product|cosine|geodesic",
            "train_pos_emb (P-10)",
            "dead_passes (P-11)",
        ),
    )
    Config: ClassVar[type[ModelConfig]] = HyperConfig
    compat: ClassVar[Mapping[str, object]] = {"train_pos_emb": False, "dead_passes": True}

    curvature: Tensor
    align_weight: Tensor
    f1: Tensor
    f2: Tensor

    def __init__(self, config: HyperConfig, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        c = config
        self.build(shapes, Sizes(c.r_enc, c.r_proj, c.r_dec, c.bn_momentum), 1.0)
        if c.framework in ("single", "multiple"):
            count = c.num_curvature if c.framework == "multiple" else 1
            self.fusenet1 = Linear(2 * WIDTH, count)
        self.framework, self.similarity = c.framework, c.similarity
        self.train_pos_emb, self.legacy_updates = c.train_pos_emb, c.dead_passes
        for name in ("curvature", "align_weight", "f1", "f2"):
            scalar(self, name, getattr(c, name))

    def _alignment(self, phi: Tensor) -> Tensor:
        """Return l_align of encoded samples [B, G, 2, 300], all rows of the global batch.

        The mean over curvatures, summed over the members (anchors; negatives).
        """
        if self.framework == "alignment":
            c = self.curvature.expand(*phi.shape[:2], 1)
        else:
            share = sigmoid(self.fusenet1(phi.flip(-2).flatten(-2)))
            c = self.curvature * share.clamp_min(1e-6)  # at 0 there is no ball
        # [B, G, 2, 300] and [B, G, N] to [G, N, 2, B, ...]: rows are compared within the rest.
        points = phi.movedim(0, 2)[:, None]
        curvatures = c.movedim(0, 2)[:, :, None, :, None]
        sims = similarities(points, curvatures, self.similarity)
        return (sims[:, :, 0] - sims[:, :, 1]).square().mean((-1, -2)).mean(1).sum()

    def loss(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Return the terms of hyper_multiple.md section 3 (weights applied)."""
        values, phi = self.terms(batch, context)
        t = dict(zip(TERMS, values.unbind(), strict=True))
        terms = {
            "rec": t["rec_v"] + t["rec_a"] + t["rec_w"],
            "ct": t["ct_a"] + t["ct_v"],
            "w": t["t_wa_a"] + t["t_wv_v"] + t["t_aw_w"] + t["t_vw_w"],
            "t": self.f1 * (t["add1_a"] + t["add1_v"]) + self.f2 * (t["add2_a"] + t["add2_v"]),
            "r": t["reg_phi_v"] + t["reg_phi_a"] + t["reg_theta_v"] + t["reg_theta_a"],
        }
        if self.framework != "baseline":
            terms["align"] = self._alignment(context.gather(phi)) * self.align_weight
        return terms


def _norm(x: Tensor) -> Tensor:
    """Return the norms [..., 1] of rows [..., d], floored where a quotient needs it."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.clamp_min(_FLOOR)


def project(x: Tensor, c: Tensor) -> Tensor:
    """Return points [..., d] pulled back to norm 0.999 / sqrt(c) where they lie beyond."""
    norm = _norm(x)
    return x * (_EDGE / (c.sqrt() * norm)).clamp_max(1)


def log0(y: Tensor, c: Tensor) -> Tensor:
    """Return the logarithmic map at the origin of points [..., d] on the ball of curvature c."""
    scaled = c.sqrt() * _norm(y)
    return torch.atanh(scaled.clamp_max(1 - _FLOOR)) / scaled * y


def similarities(x: Tensor, c: Tensor, kind: str) -> Tensor:
    """Return Sim [..., B, B] of rows x [..., B, d] with curvatures c [..., B, 1] (section 3).

    ``geodesic`` is minus the distance on the ball. Rows of different curvature lie on different
    balls: each is scaled to the unit ball, and the distance divided by the fourth root of the
    product of both curvatures, which for equal ones is the distance on their ball.
    """
    if kind == "geodesic":
        unit = c.sqrt() * project(x, c)
        square = unit.square().sum(-1, keepdim=True)
        one = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
        apart = square + square.mT - 2 * unit @ unit.mT
        # A row is at distance 0 from itself, where the square root has no gradient.
        apart = (apart + one).clamp_min(1e-12).sqrt() * (1 - one)
        inside = (1 - square).sqrt()
        scale = c.pow(0.25)
        return -2 * torch.asinh(apart / (inside @ inside.mT)) / (scale @ scale.mT)
    h = log0(project(x, c), c)
    rows = F.normalize(h, dim=-1)
    if kind == "norm_product":
        rows = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    return rows @ rows.mT
