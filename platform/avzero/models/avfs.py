"""AVFS: generative zero-shot learning with contrastive and discriminative terms.

Zheng, Hong, Farazi; IJCNN 2023; https://doi.org/10.1109/IJCNN54540.2023.10191705

Neither text nor code of the paper could be found, so everything but the title's three words is a
reconstruction (specs/models/avfs.md section 2): a Wasserstein GAN with gradient penalty over
x = [video ; audio], an embedding E shaped by a supervised contrastive and a class-discriminative
term, and a linear classifier on E of real seen and synthetic unseen rows. Ours as well:

* ``use_vae`` adds an encoder as in f-VAEGAN-D2, but with a squared error: this generator ends in
  a ReLU, which is no probability. Sums over dimensions, means over rows.
* The classifier takes ``CLASSIFIER_BATCH`` rows a step and as many draws an epoch as it has rows.
* The template's learning rate x 0.99 every 100 epochs never happens within 50 and is left out.
* Zero-shot decisions use the one classifier's unseen logits; calibrated stacking acts on logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avzero.models._basic import Linear
from avzero.models._contract import (
    Batch,
    Card,
    Context,
    ModelConfig,
    Shapes,
    TrainingRows,
    scalar,
)
from avzero.models._generative import (
    CRITIC,
    Encoder,
    Generative,
    adversarial_passes,
    contrastive,
    criticise,
    dense,
    divergence,
    draw_small,
    fit_softmax,
    gradient_penalty,
    leaky,
)
from avzero.models._joint import joint, joint_width
from avzero.models._layers import Noise
from avzero.models._losses import cross_entropy
from avzero.spec import Count, InputScaling, NonNegative, Positive

LATENT = 300
ENCODER_HIDDEN = 300
CLASSIFIER_BATCH = 256


class AVFSConfig(ModelConfig):
    """Hyperparameters of AVFS, named as in avfs.md section 4."""

    input_scaling: InputScaling | Literal["protocol"] = "minmax"
    n_critic: Count = 5
    gp_weight: NonNegative = 10.0
    l1_contrastive: NonNegative = 0.1
    l2_discriminative: NonNegative = 0.1
    tau: Positive = 0.1
    embed_dim: Count = 512
    proj_dim: Count = 256
    hidden: Count = 4096
    n_syn: Count = 300
    clf_lr: Positive = 1e-3
    classifier_epochs: Count = 30
    use_vae: bool = False


class AVFS(Generative):
    """Generator G, critic D, embedding E, projection P and class vectors C."""

    card: ClassVar[Card] = Card(
        title="AVFS",
        authors="Zheng, Hong, Farazi",
        year=2023,
        venue="IJCNN",
        link="https://doi.org/10.1109/IJCNN54540.2023.10191705",
        options=("use_vae",),
        evidence="reconstruction",
    )
    Config: ClassVar[type[ModelConfig]] = AVFSConfig
    scoring: ClassVar[frozenset[str]] = frozenset({"n_syn", "clf_lr", "classifier_epochs"})
    needs_nonnegative: ClassVar[str] = (
        "the generator ends in a ReLU and cannot make negative features. Leave the system's own "
        "input_scaling at minmax"
    )

    gp_weight: Tensor
    l1_contrastive: Tensor
    l2_discriminative: Tensor
    tau: Tensor

    def __init__(self, config: AVFSConfig, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        c = config
        width = joint_width(shapes)
        self.G = _two_layers(LATENT + shapes.text, c.hidden, width)
        self.D = _two_layers(width + shapes.text, c.hidden, 1)
        self.E = nn.ModuleDict({"0": Linear(width, c.embed_dim)})
        self.P = Linear(c.embed_dim, c.proj_dim)
        self.C = Linear(shapes.text, c.embed_dim)
        draw_small(self)
        self.noise, self.alpha = Noise(), Noise(uniform=True)
        self.Q = Encoder(width + shapes.text, ENCODER_HIDDEN, LATENT) if c.use_vae else None
        self.eps = Noise() if c.use_vae else None
        self.n_critic = c.n_critic
        self.n_syn = c.n_syn
        self.clf_lr = c.clf_lr
        self.classifier_epochs = c.classifier_epochs
        for name in ("gp_weight", "l1_contrastive", "l2_discriminative", "tau"):
            scalar(self, name, getattr(c, name))

    def passes(self, step: int) -> tuple[str, ...]:
        """Return critic, and generator in the first of every ``n_critic`` steps."""
        return adversarial_passes(step, self.n_critic)

    def loss(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Return the terms of one pass (avfs.md section 2) on the anchors."""
        x = joint({m: f[:, 0] for m, f in batch.features.items()})
        text = batch.text[:, 0]
        fake = self._generate(self.noise(x, LATENT, context), text)
        if context.part == CRITIC:
            return self._critic_terms(x, text, fake.detach(), batch, context)
        return self._generator_terms(x, text, fake, batch, context)

    def _critic_terms(
        self, x: Tensor, text: Tensor, fake: Tensor, batch: Batch, context: Context
    ) -> dict[str, Tensor]:
        """Return the terms of D, E, P and C; ``fake`` [B, d] is cut off from the generator."""
        first, second = self._critic()
        real_score = criticise(first, second, torch.cat([x, text], dim=1)).mean()
        fake_score = criticise(first, second, torch.cat([fake, text], dim=1)).mean()
        alpha = self.alpha(x, 1, context)
        penalty = gradient_penalty(first, second, alpha * x + (1 - alpha) * fake, text)
        embedded = self._embed(x)
        label = batch.label[:, 0]
        z = F.normalize(self.P(embedded), dim=1)
        return {
            "D": fake_score - real_score,
            "gp": self.gp_weight * penalty,
            "con": contrastive(context.gather(z), context.gather(label), self.tau),
            "dis": self._discriminative(embedded, batch, fixed=False),
        }

    def _generator_terms(
        self, x: Tensor, text: Tensor, fake: Tensor, batch: Batch, context: Context
    ) -> dict[str, Tensor]:
        """Return the terms of G (and the VAE's encoder); all other weights are constants here."""
        first, second = self._critic()
        scores = criticise(first, second, torch.cat([fake, text], dim=1), fixed=True)
        embedded = self._embed(torch.cat([fake, x]), fixed=True)
        z = F.normalize(dense(self.P, embedded, fixed=True), dim=1)
        labels = context.gather(batch.label[:, 0].repeat(2))
        terms = {
            "gan": -scores.mean(),
            "con_gen": self.l1_contrastive * contrastive(context.gather(z), labels, self.tau),
            "dis_gen": self.l2_discriminative
            * self._discriminative(embedded[: len(x)], batch, fixed=True),
        }
        if self.Q is not None and self.eps is not None:
            mean, log_var = self.Q(x, text)
            code = mean + self.eps(x, LATENT, context) * (0.5 * log_var).exp()
            terms["rec"] = (self._generate(code, text) - x).square().sum(1).mean()
            terms["kl"] = divergence(mean, log_var).mean()
        return terms

    def _discriminative(self, embedded: Tensor, batch: Batch, fixed: bool) -> Tensor:
        """Return the cross-entropy of cosines between E(x) [B, e] and seen class vectors."""
        classes = F.normalize(dense(self.C, batch.class_text, fixed), dim=1)
        cosines = torch.einsum("nd,cd->nc", F.normalize(embedded, dim=1), classes)
        return cross_entropy(cosines / self.tau, batch.label[:, 0])

    def _generate(self, noise: Tensor, text: Tensor) -> Tensor:
        """Return synthetic rows [B, d], non-negative."""
        hidden = leaky(self.G["0"](torch.cat([noise, text], dim=1)))
        return F.relu(self.G["2"](hidden))

    def _embed(self, x: Tensor, fixed: bool = False) -> Tensor:
        """Return E(x), [B, e]."""
        return F.relu(dense(cast(Linear, self.E["0"]), x, fixed))

    def _critic(self) -> tuple[Linear, Linear]:
        """Return the critic's layers."""
        return cast(Linear, self.D["0"]), cast(Linear, self.D["2"])

    def rows(self, features: Mapping[str, Tensor]) -> Tensor:
        """Return E(x) of samples, [n, e]."""
        return self._embed(joint(features))

    def made(self, noise: Tensor, text: Tensor) -> Tensor:
        """Return E of synthetic samples, [n, e]."""
        return self._embed(self._generate(noise, text))

    def embed_classes(self, text: Tensor) -> Tensor:
        """Return the unit-norm class vectors C(w) with a zero bias, [C, e + 1].

        Used where something must be known of classes without training rows, such as scales.
        """
        return F.pad(F.normalize(self.C(text), dim=1), (0, 1))

    @torch.no_grad()
    def candidates(self, text: Tensor, seen: int, rows: TrainingRows) -> Tensor:
        """Return a linear classifier of all C classes, [C, e + 1], on embedded rows.

        Trained class-balanced on real rows of seen classes and ``n_syn`` synthetic ones per
        unseen class; the embedding is frozen.
        """
        generator = torch.Generator().manual_seed(rows.seed)
        return fit_softmax(
            self.table(text, seen, rows, self.n_syn, LATENT, generator),
            len(text),
            self.classifier_epochs,
            CLASSIFIER_BATCH,
            self.clf_lr,
            generator,
            balanced=True,
        )


def _two_layers(width: int, hidden: int, out: int) -> nn.ModuleDict:
    """Return Linear layers named as in a sequence with an activation between them."""
    return nn.ModuleDict({"0": Linear(width, hidden), "2": Linear(hidden, out)})
