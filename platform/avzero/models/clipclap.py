"""ClipClap-GZSL: CLIP and CLAP features, fused by concatenation, with the text of both models.

Kurzendörfer, Mercea, Koepke, Akata; CVPR Workshops 2024; https://arxiv.org/abs/2404.06309

Built from specs/models/clipclap.md. Options: ``modality`` (a network of one modality: smaller than
``protocol.modality``, which gives zeros for the other), ``word_embeddings`` (which part of the
1536-wide class text is read; any other text has no parts), ``extra_bn_pass`` (the released code's
train-mode pass after every step, which only moves BatchNorm statistics). It works on every averaged
feature set; the published one is ``clipclap``. Only anchors are used. Two options of the release
are not offered: ``embeddings_batch_norm: false`` (two-layer blocks without their first BatchNorm)
and ``adam-sam`` (a sharpness-aware optimiser).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from avzero.models._contract import Batch, Card, Context, Model, ModelConfig, Shapes, scalar
from avzero.models._joint import WordEmbeddings, joint, joint_width, text_part
from avzero.models._layers import MLP
from avzero.models._losses import cross_entropy, mse
from avzero.models._reference import load_strictly
from avzero.spec import BetaGrid, Modality, NonNegative, Probability


class ClipClapConfig(ModelConfig):
    """Hyperparameters of ClipClap-GZSL, named as in clipclap.md section 8."""

    p_enc: Probability = 0.1
    p_o: Probability = 0.1
    p_w: Probability = 0.1
    d_model: int = Field(512, ge=1)
    d_hidden: int = Field(512, ge=1)
    d_out: int = Field(64, ge=1)
    w_ce: NonNegative = 1.0
    w_rec: NonNegative = 1.0
    w_reg: NonNegative = 1.0
    modality: Modality = "both"
    word_embeddings: WordEmbeddings = "both"
    extra_bn_pass: bool = False


class ClipClap(Model):
    """One branch for the joint sample vector, one for text, compared in a space of ``d_out``."""

    card: ClassVar[Card] = Card(
        title="ClipClap-GZSL",
        authors="Kurzendörfer, Mercea, Koepke, Akata",
        year=2024,
        venue="CVPR Workshops",
        link="https://arxiv.org/abs/2404.06309",
        options=(
            "modality both|audio|video",
            "word_embeddings both|clip|wavcaps",
            "extra_bn_pass",
        ),
    )
    Config: ClassVar[type[ModelConfig]] = ClipClapConfig
    compat: ClassVar[Mapping[str, object]] = {"extra_bn_pass": True}
    beta_grid: ClassVar[BetaGrid] = BetaGrid(start=0, stop=5, count=76)

    w_ce: Tensor
    w_rec: Tensor
    w_reg: Tensor

    def __init__(self, config: ClipClapConfig, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        c = config
        self.part = text_part(self.card.title, shapes.text, c.modality, c.word_embeddings)
        self.modality = c.modality
        words = self.part.stop - self.part.start
        self.O_enc = MLP(joint_width(shapes, c.modality), 0, c.d_model, c.p_enc)
        self.W_enc = MLP(words, 0, c.d_model, c.p_enc)
        self.O_proj = MLP(c.d_model, c.d_hidden, c.d_out, c.p_o)
        self.D_o = MLP(c.d_out, c.d_hidden, c.d_model, c.p_o)
        self.W_proj = MLP(c.d_model, 0, c.d_out, c.p_w)
        self.D_w = MLP(c.d_out, 0, c.d_model, c.p_w)
        self.extra_bn_pass = c.extra_bn_pass
        for name in ("w_ce", "w_rec", "w_reg"):
            scalar(self, name, getattr(c, name))

    def _samples(self, features: Mapping[str, Tensor], context: Context | None = None) -> Tensor:
        """Return theta_o [n, d_out]."""
        out: Tensor = self.O_proj(self.O_enc(joint(features, self.modality), context), context)
        return out

    def _words(self, text: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Return omega [C, d_model] and theta_w [C, d_out] of class text [C, t]."""
        omega = self.W_enc(text[..., self.part], context)
        return omega, self.W_proj(omega, context)

    def loss(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Return the four terms of clipclap.md section 3 (weights applied).

        Nothing is detached: the reconstructions pull their target omega as well.
        """
        theta_o = self._samples({m: x[:, 0] for m, x in batch.features.items()}, context)
        omega, theta_w = self._words(batch.text[:, 0], context)
        rho_o, rho_w = self.D_o(theta_o, context), self.D_w(theta_w, context)
        # After the batch, and with statistics over classes, which all workers have alike.
        _, table = self._words(batch.class_text, context.alone().salted(1))
        return {
            "ce": cross_entropy(theta_o @ table.T, batch.label[:, 0]) * self.w_ce,
            "reg": mse(theta_o, theta_w) * self.w_reg,
            "rec_o": mse(omega, rho_o) * self.w_rec,
            "rec_w": mse(omega, rho_w) * self.w_rec,
        }

    def settle(self, batch: Batch, context: Context) -> None:
        """With the extra pass: embed the anchors once more in train mode (section 6)."""
        if self.extra_bn_pass:
            again = context.salted(2)
            self._samples({m: x[:, 0] for m, x in batch.features.items()}, again)
            self._words(batch.text[:, 0], again)

    def embed(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return theta_o [n, d_out]; non-negative, and possibly an all-zero row."""
        return {"both": self._samples(features)}

    def embed_classes(self, text: Tensor) -> Tensor:
        """Return theta_w [C, d_out]."""
        return self._words(text)[1]

    def load_reference(self, state: Mapping[str, Tensor]) -> None:
        """Take a released checkpoint (clipclap.md section 7)."""
        load_strictly(self, self.card.title, state)
