"""KDA: knowledge-augmented audio-visual learning with class descriptions.

Chen, Li, Hong, Huang, Xu, Gu, Lan, Zhu, Wang; arXiv 2023; https://arxiv.org/abs/2311.12268

Built from specs/models/kda.md. A sample is mapped into the space of the class text vectors, which
are the prototypes as they are: nothing on the text side is learnt. In the release a prototype is
the mean of CLIP's embeddings of the class name and of three descriptions of it (what happens, what
is seen, what is heard). Nothing here encodes the release's table of descriptions: you bring a file
with one vector per class (``avzero ingest avca ... --text NAME=FILE``) and name it as the
protocol's ``text``. Which of the parts it holds (``text_parts`` of the spec) is thus decided where
you make it. The system takes vectors of any width t, and so 300-d word vectors as well. Join
descriptions by name: the release indexes their rows by class id, and so describes 8 ActivityNet and
205 VGGSound classes by other ones (P-01).

Options: ``loss_variant`` (the released code trains on the alignment only), ``margin``,
``norm_inputs`` (unit length of the *fused* vector), ``normalise_prototypes``. The release builds
two further nets, ``av2com`` and ``t2com``, and never calls them; a parameter without a gradient has
no place here, so their weights are dropped when a checkpoint is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from avzero.models._contract import Batch, Card, Context, Model, ModelConfig, Shapes, scalar
from avzero.models._layers import MLP, Transformer
from avzero.models._losses import cross_entropy, mse
from avzero.models._reference import load_strictly
from avzero.spec import NonNegative, Probability

WIDTH = 512
VIDEO_HIDDEN = 1024
FIXED_MARGIN = 0.3
"""Subtracted from the score of every wrong class by ``margin: fixed``."""


class KDAConfig(ModelConfig):
    """Hyperparameters of KDA, named as in kda.md section 8."""

    p_enc: Probability = 0.2
    p_proj: Probability = 0.3
    bn_momentum_second: float = Field(0.1, gt=0, le=1)
    align_weight: NonNegative = 5.0
    norm_inputs: bool = True
    loss_variant: Literal["paper", "released"] = "paper"
    margin: Literal["adaptive", "fixed", "none"] = "adaptive"
    normalise_prototypes: bool = False


class KDA(Model):
    """Encoders, attention over (audio, video), projections, and one matrix W to the text space."""

    card: ClassVar[Card] = Card(
        title="KDA",
        authors="Chen, Li, Hong, Huang, Xu, Gu, Lan, Zhu, Wang",
        year=2023,
        venue="arXiv",
        link="https://arxiv.org/abs/2311.12268",
        options=(
            "loss_variant paper|released",
            "margin adaptive|fixed|none",
            "norm_inputs",
            "normalise_prototypes",
        ),
    )
    Config: ClassVar[type[ModelConfig]] = KDAConfig
    compat: ClassVar[Mapping[str, object]] = {"loss_variant": "released"}

    align_weight: Tensor

    def __init__(self, config: KDAConfig, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        c, momentum = config, config.bn_momentum_second
        audio, video = shapes.features["audio"], shapes.features["video"]
        self.A_enc = MLP(audio, WIDTH, WIDTH, c.p_enc, momentum)
        self.V_enc = MLP(video, VIDEO_HIDDEN, WIDTH, c.p_enc, momentum)
        self.pos_emb1D = nn.Parameter(torch.randn(2, WIDTH))
        self.cross_attention = Transformer(WIDTH, 1, 3, 100, 64, 0.1)
        self.A_proj = MLP(WIDTH, WIDTH, WIDTH, c.p_proj, momentum)
        self.V_proj = MLP(WIDTH, WIDTH, WIDTH, c.p_proj, momentum)
        self.ALE_vector = nn.Parameter(2e-4 * torch.rand(shapes.text, 2 * WIDTH))
        self.classifies = c.loss_variant == "paper"
        self.margin = c.margin
        # Only what the loss reaches is built: the released objective leaves a and b alone.
        if self.classifies and c.margin == "adaptive":
            self.margin_generator = nn.ParameterDict(
                {"a": nn.Parameter(torch.ones(())), "b": nn.Parameter(torch.zeros(()))}
            )
        self.norm_inputs = c.norm_inputs
        self.normalise_prototypes = c.normalise_prototypes
        scalar(self, "align_weight", c.align_weight)

    def _samples(self, features: Mapping[str, Tensor], context: Context | None = None) -> Tensor:
        """Return rho [n, t]: samples in the space of the class text."""
        phi_a = self.A_enc(features["audio"], context)
        phi_v = self.V_enc(features["video"], context)
        tokens = torch.stack([phi_a, phi_v], dim=-2)
        attended = self.cross_attention(tokens + self.pos_emb1D, context)
        fused_a, fused_v = (tokens + attended).unbind(-2)
        x = torch.cat([self.V_proj(fused_v, context), self.A_proj(fused_a, context)], dim=-1)
        if self.norm_inputs:
            x = F.normalize(x, dim=-1)
        return x @ self.ALE_vector.T

    def _margins(self, prototypes: Tensor) -> Tensor:
        """Return M [K, K], added to the scores of a sample of class y as row y (section 4).

        ``adaptive``: a S + b - I with the cosine similarities S of the prototypes. b shifts all
        scores alike, so that its gradient is zero but for rounding; the release has it.
        """
        one = torch.eye(len(prototypes), dtype=prototypes.dtype, device=prototypes.device)
        if self.margin == "none":
            return torch.zeros_like(one)
        if self.margin == "fixed":
            return (one - 1) * FIXED_MARGIN
        unit = F.normalize(prototypes, dim=1)
        a, b = self.margin_generator["a"], self.margin_generator["b"]
        margins: Tensor = a * (unit @ unit.T) + b - one
        return margins

    def loss(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Return the terms of kda.md section 4: ``align``, and ``kaml`` as in the paper.

        ``kaml`` is a cross-entropy of probabilities plus margin, not of logits: the log-softmax
        comes on top of a softmax, as in the release.
        """
        rho = self._samples({m: x[:, 0] for m, x in batch.features.items()}, context)
        label, prototypes = batch.label[:, 0], self.embed_classes(batch.class_text)
        target = self.embed_classes(batch.text[:, 0])
        terms = {"align": mse(rho, target) * self.align_weight}
        if self.classifies:
            p = torch.softmax(rho @ prototypes.T, dim=1)
            margins = self._margins(prototypes).index_select(0, label)
            terms["kaml"] = cross_entropy(p + margins, label)
        return terms

    def embed(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return rho [n, t]; of either sign, W being linear."""
        return {"both": self._samples(features)}

    def embed_classes(self, text: Tensor) -> Tensor:
        """Return the prototypes [C, t]: the class text itself, of unit length if asked for."""
        return F.normalize(text, dim=-1) if self.normalise_prototypes else text

    def load_reference(self, state: Mapping[str, Tensor]) -> None:
        """Take a released checkpoint (kda.md section 7), less its text tower and unused nets."""
        unused = ["clip.", "av2com.", "t2com."]
        if not hasattr(self, "margin_generator"):
            unused.append("margin_generator.")

        def rename(key: str) -> str | None:
            return None if key.startswith(tuple(unused)) else key

        load_strictly(self, self.card.title, state, rename)
