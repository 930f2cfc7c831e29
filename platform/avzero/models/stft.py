"""STFT: a spiking network and a transformer, joined by a low-rank Tucker fusion.

Li, Wang, Xiong, Fan; IEEE TIP 33, 2024; https://arxiv.org/abs/2407.08130

A reconstruction (specs/models/stft.md section 2): there is no public code. Ours where even that is
silent: temporal features enter as the mean over their real steps; a branch's blocks share one
threshold per sample; the reset is differentiated as written; dropout of the cross layer is r_enc.

Why the neuron is written here and not taken from snntorch: they differ, and not by rounding.
snntorch 1.0 (``Leaky``) fires above the threshold, not at it; has one threshold per layer, not one
per sample that moves every step; keeps membranes in the module and neurons in a global list, which
design rule 4 forbids; and its surrogates are autograd functions that ``torch.func`` refuses. With a
fixed threshold, ``reset_mechanism="zero"`` and ``reset_delay=False`` its spikes are the same:
tests/test_stft.py compares them where snntorch is installed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from avzero.models._basic import LayerNorm, Linear, sigmoid
from avzero.models._contract import Batch, Card, Context, Model, ModelConfig, Shapes, scalar
from avzero.models._layers import MLP, Transformer
from avzero.models._losses import mse, triplets
from avzero.models._sequences import one_vector
from avzero.spec import Count, Probability

HIDDEN, OUT, HEADS, HEAD_WIDTH = 512, 64, 8, 64


class STFTConfig(ModelConfig):
    """Hyperparameters of STFT, named as in stft.md section 5."""

    T: Count = 10
    tau: float = Field(2.0, ge=1)
    tucker_rank: Count = 60
    slots: Count = 4
    d: Count = 512
    w_triplet: float = Field(0.5, ge=0, le=1)
    """Weight of the triplet terms; the other terms get 1 - w_triplet."""
    r_enc: Probability = 0.2
    r_proj: Probability = 0.3
    r_dec: Probability = 0.5
    bn_momentum: float = Field(0.1, gt=0, le=1)
    dynamic_threshold: bool = True
    glp: bool = True
    tsf: bool = True
    test_head: Literal["video", "mean"] = "video"


def fire(excess: Tensor) -> Tensor:
    """Return spikes: 1 where ``excess`` is not negative; the derivative is sigmoid(4 excess)'s."""
    soft = sigmoid(4 * excess)
    return (excess >= 0).to(excess.dtype) + (soft - soft.detach())


class Spiking(nn.Module):
    """Three blocks of Linear, LayerNorm, global-local pooling and leaky integrate-and-fire."""

    tau: Tensor

    def __init__(self, width: int, config: STFTConfig) -> None:
        super().__init__()
        sizes = ((width, HIDDEN), (HIDDEN, config.d), (config.d, config.d))
        self.lin = nn.ModuleList(Linear(*size) for size in sizes)
        self.norm = nn.ModuleList(LayerNorm(out) for _, out in sizes)
        self.glp_logit = nn.Parameter(torch.zeros(3))
        self.tsf = nn.Parameter(torch.zeros(config.T))
        self.steps, self.glp, self.over_time = config.T, config.glp, config.tsf
        self.dynamic_threshold = config.dynamic_threshold
        scalar(self, "tau", config.tau)

    def current(self, block: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return a block's current [..., o], gated by its pooling, and the pooling [..., 1]."""
        current = self.norm[block](self.lin[block](x))
        top, mean = current.amax(-1, keepdim=True), current.mean(-1, keepdim=True)
        share = sigmoid(self.glp_logit[block])
        pooled = 0.5 * (top + mean) + share * top + (1 - share) * mean
        return ((1 + sigmoid(pooled)) * current if self.glp else current), pooled

    def spikes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return block 3's spikes [..., T, d] and the thresholds they fired at [..., T, 1]."""
        first = self.current(0, x)  # the input is the same at every step, and so is this
        membrane: list[Tensor | float] = [0.0, 0.0, 0.0]
        theta = torch.ones_like(x[..., :1])
        spikes, thetas = [], []
        for _ in range(self.steps):
            spike, pooled = x, theta
            for block, v in enumerate(membrane):
                current, pooled = self.current(block, spike) if block else first
                u = v + (current - v) / self.tau
                spike = fire(u - theta)
                membrane[block] = u * (1 - spike)
            spikes.append(spike)
            thetas.append(theta)
            if self.dynamic_threshold:
                rate = spike.detach().mean(-1, keepdim=True)
                bits = (torch.special.entr(rate) + torch.special.entr(1 - rate)) / math.log(2)
                goal = (0.5 * sigmoid(pooled.detach()) + bits).clamp(0.25, 2)
                theta = 0.5 * theta + 0.5 * goal
        return torch.stack(spikes, dim=-2), torch.stack(thetas, dim=-2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the weighted mean of the spikes over time [..., d]; unweighted without TSF."""
        spikes, _ = self.spikes(x)
        if not self.over_time:
            return spikes.mean(-2)
        weights = torch.softmax(spikes.sum(-1) / spikes.shape[-1] ** 0.5 + self.tsf, dim=-1)
        return (weights[..., None] * spikes).sum(-2)


class Combiner(nn.Module):
    """Knowledge slots shared by both modalities, then one transformer layer on three tokens."""

    def __init__(self, config: STFTConfig) -> None:
        super().__init__()
        d = config.d
        bound = math.sqrt(3 / d)  # Xavier's for a d x d matrix
        self.slots = nn.Parameter(torch.empty(config.slots, d, d).uniform_(-bound, bound))
        self.gate_a, self.gate_v = Linear(d, d), Linear(d, d)
        self.alpha = nn.Parameter(torch.zeros(()))
        self.prior = nn.Parameter(torch.zeros(d))
        self.layer = Transformer(d, 1, HEADS, HEAD_WIDTH, 2 * d, config.r_enc)

    def forward(self, phi: Tensor, context: Context | None) -> Tensor:
        """Map encoded [..., 2, d] (audio, video) to the same shape."""
        u = sigmoid(torch.einsum("...d,kde->...ke", phi, self.slots)).sum(-2) * phi
        u_a, u_v = u.unbind(-2)
        g_a, g_v = F.relu(self.gate_a(u_a)), F.relu(self.gate_v(u_v))
        share = sigmoid(self.alpha)
        k = share * (g_a * u_a + g_v * u_v) + (1 - share) * self.prior
        tokens = torch.stack([u_a + g_a + k, u_v + g_v + k, k], dim=-2)
        out: Tensor = self.layer(tokens, context)[..., :2, :]
        return out


class Tucker(nn.Module):
    """Second-order interactions of transformer and spike outputs through a low-rank core."""

    def __init__(self, d: int, rank: int) -> None:
        super().__init__()
        inner = ({m: Linear(d, rank, bias=False) for m in "av"} for _ in range(2))
        self.sem, self.tem = map(nn.ModuleDict, inner)
        self.core = nn.Parameter(torch.randn(2, rank, rank, rank) / rank)
        self.out = nn.ModuleDict({m: Linear(rank, d) for m in "av"})

    def forward(self, m: str, semantic: Tensor, spikes: Tensor) -> Tensor:
        """Return the fusion [..., d] of modality ``a`` or ``v``."""
        r, s = self.sem[m](semantic), self.tem[m](spikes)
        # One matrix product instead of a three-way contraction.
        y = (r[..., :, None] * s[..., None, :]).flatten(-2) @ self.core["av".index(m)].flatten(0, 1)
        out: Tensor = self.out[m](y)
        return out


class STFT(Model):
    """Semantic encoders and spiking branches, combined, fused and projected."""

    card: ClassVar[Card] = Card(
        title="STFT",
        authors="Li, Wang, Xiong, Fan",
        year=2024,
        venue="IEEE TIP",
        link="https://arxiv.org/abs/2407.08130",
        features=("averaged", "clipclap", "temporal"),
        options=("dynamic_threshold", "glp", "tsf", "test_head"),
        evidence="reconstruction",
    )
    Config: ClassVar[type[ModelConfig]] = STFTConfig
    reads_table: ClassVar[bool] = False
    scoring: ClassVar[frozenset[str]] = frozenset({"test_head"})

    w_triplet: Tensor

    def __init__(self, config: STFTConfig, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        c = config
        audio, video = (shapes.features[m] for m in ("audio", "video"))
        encoders = (MLP(w, HIDDEN, c.d, c.r_enc, c.bn_momentum) for w in (audio, video))
        self.A_enc, self.V_enc = encoders
        self.snn_a, self.snn_v = Spiking(audio, c), Spiking(video, c)
        self.lkc = Combiner(c)
        self.tucker = Tucker(c.d, c.tucker_rank)
        layer = Transformer(c.d, 1, HEADS, HEAD_WIDTH, 2 * c.d, c.r_enc)
        self.cross = nn.ModuleDict({"layer": layer})
        heads = (MLP(c.d, HIDDEN, OUT, c.r_proj, c.bn_momentum) for _ in "av")
        self.A_proj, self.V_proj = heads
        self.W_proj, self.D = MLP(shapes.text, 0, OUT, c.r_dec), MLP(OUT, 0, shapes.text, c.r_dec)
        self.A_rec, self.V_rec = MLP(OUT, 0, c.d, c.r_dec), MLP(OUT, 0, c.d, c.r_dec)
        self.glp, self.tsf, self.test_head = c.glp, c.tsf, c.test_head
        scalar(self, "w_triplet", c.w_triplet)

    def _branches(
        self, features: Mapping[str, Tensor], context: Context | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return phi_a, phi_v [..., d] and theta_a, theta_v [..., 64]."""
        audio, video = (one_vector(features, m) for m in ("audio", "video"))
        phi_a, phi_v = self.A_enc(audio, context), self.V_enc(video, context)
        r_a, r_v = self.lkc(torch.stack([phi_a, phi_v], dim=-2), context).unbind(-2)
        y_a = self.tucker("a", r_a, self.snn_a(audio))
        y_v = self.tucker("v", r_v, self.snn_v(video))
        z_a, z_v = self.cross["layer"](torch.stack([y_a, y_v], dim=-2), context).unbind(-2)
        return phi_a, phi_v, self.A_proj(z_a, context), self.V_proj(z_v, context)

    def loss(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Return the terms of stft.md section 2, weights applied."""
        phi_a, phi_v, theta_a, theta_v = self._branches(batch.features, context)
        theta_w = self.W_proj(batch.text, context)
        rows = torch.cat([(theta_a + theta_v) / 2, theta_w], dim=1)  # o, o_, w, w_
        a, v, w, text = theta_a[:, 0], theta_v[:, 0], theta_w[:, 0], batch.text[:, 0]
        joint = triplets(rows, [(0, 2, 3), (2, 0, 1)], w.new_ones(()))
        rho_w, rho_a, rho_v = self.D(torch.stack([w, a, v], 1), context).unbind(1)
        half, rest = 0.5 * self.w_triplet, 1 - self.w_triplet
        return {
            "t_ow": half * joint[0],
            "t_wo": half * joint[1],
            "p_a": rest * 0.5 * mse(a, w),
            "p_v": rest * 0.5 * mse(v, w),
            "rec_phi_a": rest * 0.2 * mse(self.A_rec(a, context), phi_a[:, 0]),
            "rec_phi_v": rest * 0.2 * mse(self.V_rec(v, context), phi_v[:, 0]),
            "rec_a": rest * 0.2 * mse(rho_a, text),
            "rec_v": rest * 0.2 * mse(rho_v, text),
            "rec_w": rest * 0.2 * mse(rho_w, text),
        }

    def frozen(self) -> frozenset[str]:
        """Return the parameters of a part that is switched off."""
        on = {"glp_logit": self.glp, "tsf": self.tsf}
        return frozenset(f"snn_{m}.{name}" for m in "av" for name in on if not on[name])

    def embed(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return theta_v, or the mean of theta_a and theta_v, [n, 64], as ``both``."""
        _, _, theta_a, theta_v = self._branches(features, None)
        return {"both": theta_v if self.test_head == "video" else (theta_a + theta_v) / 2}

    def embed_classes(self, text: Tensor) -> Tensor:
        """Return theta_w [C, 64]."""
        out: Tensor = self.W_proj(text)
        return out
