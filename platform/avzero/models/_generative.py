"""What the systems that synthesise features share: critics, an encoder, classifiers of rows.

Specs: fvaegan_d2.md and avfs.md. A pass of an adversarial system updates whatever its loss
reaches, so networks of the other side are used ``fixed``: with weights cut off from gradients.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avzero.models._basic import Linear, linear
from avzero.models._contract import Model, TrainingRows

CRITIC, GENERATOR = "critic", "generator"
"""Names of the passes of an adversarial system."""
_LEAK = 0.2


def adversarial_passes(step: int, every: int) -> tuple[str, ...]:
    """Return the critic's pass, and the generator's too in the first of every ``every`` steps."""
    return (CRITIC,) if step % every else (CRITIC, GENERATOR)


def dense(layer: Linear, x: Tensor, fixed: bool = False) -> Tensor:
    """Return the layer's output; ``fixed``: gradients pass to ``x``, not to the weights."""
    if fixed:
        return linear(x, layer.weight.detach(), layer.bias.detach())
    out: Tensor = layer(x)
    return out


def leaky(x: Tensor) -> Tensor:
    """Return LeakyReLU with slope 0.2."""
    return F.leaky_relu(x, _LEAK)


def draw_small(network: nn.Module) -> None:
    """Draw all linear layers' weights from N(0, 0.02) and set their biases to zero."""
    for layer in network.modules():
        if isinstance(layer, Linear):
            nn.init.normal_(layer.weight, 0.0, 0.02)
            nn.init.zeros_(layer.bias)


def criticise(first: Linear, second: Linear, x: Tensor, fixed: bool = False) -> Tensor:
    """Return a two-layer critic's scores [B] of rows [B, d]."""
    return dense(second, leaky(dense(first, x, fixed)), fixed).squeeze(-1)


def gradient_penalty(
    first: Linear, second: Linear, rows: Tensor, condition: Tensor | None = None
) -> Tensor:
    """Return the mean of (||gradient of the critic with respect to ``rows``|| - 1)^2.

    The gradient is written out: (slopes * second weight) @ first weight, where the slopes are 1
    or 0.2. The slopes are piecewise constant, so differentiating this with respect to the weights
    is exactly what double backward gives, for one matrix product instead of a second graph.

    Args:
        first: Linear(d [+ c], h).
        second: Linear(h, 1).
        rows: [B, d], where the gradient is taken.
        condition: [B, c] appended to the rows; no gradient with respect to it is counted.
    """
    x = rows if condition is None else torch.cat([rows, condition], dim=-1)
    slopes = torch.where(first(x).detach() > 0, 1.0, _LEAK).to(rows.dtype)
    gradient = (slopes * second.weight) @ first.weight[:, : rows.shape[-1]]
    penalty: Tensor = (torch.linalg.vector_norm(gradient, dim=-1) - 1).square().mean()
    return penalty


class Encoder(nn.Module):
    """Mean and log-variance of a latent code given a feature row and its class text."""

    def __init__(self, width: int, hidden: int, latent: int) -> None:
        super().__init__()
        self.MLP = nn.ModuleDict({"L0": Linear(width, hidden)})
        self.linear_means = Linear(hidden, latent)
        self.linear_log_var = Linear(hidden, latent)

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance, [B, latent] each."""
        hidden = F.relu(self.MLP["L0"](torch.cat([x, text], dim=-1)))
        return self.linear_means(hidden), self.linear_log_var(hidden)


def divergence(mean: Tensor, log_var: Tensor) -> Tensor:
    """Return KL(N(mean, exp(log_var)) || N(0, 1)) per row [B], summed over latent dimensions."""
    return -0.5 * (1 + log_var - mean.square() - log_var.exp()).sum(-1)


def contrastive(z: Tensor, label: Tensor, tau: Tensor) -> Tensor:
    """Return the supervised contrastive loss of unit rows [n, p] (avfs.md section 2).

    -mean_i mean_{j in Pos(i)} log softmax_{k != i}(z_i . z_k / tau)_j over the rows that have
    another one of their class; 0 where none has.
    """
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (z @ z.T / tau).masked_fill(itself, -torch.inf)
    positive = (label[:, None] == label) & ~itself
    count = positive.sum(1)
    log_share = torch.where(positive, logits - logits.logsumexp(1, keepdim=True), 0.0)
    per_row = -log_share.sum(1) / count.clamp_min(1)
    return per_row.sum() / (count > 0).sum().clamp_min(1)


class Table:
    """Rows [n, d] with labels, filled in place: these tables can take most of the memory.

    Args:
        rows: how many there will be.
        width: d.
        like: gives precision and device.
    """

    def __init__(self, rows: int, width: int, like: Tensor) -> None:
        self.x = like.new_empty(rows, width)
        self.label = torch.empty(rows, dtype=torch.int64, device=like.device)
        self.filled = 0

    def add(self, rows: Tensor, label: Tensor | int) -> None:
        """Append rows [b, d] and their labels [b], or one label for all."""
        place = slice(self.filled, self.filled + len(rows))
        self.x[place], self.label[place] = rows, label
        self.filled += len(rows)


@torch.enable_grad()
def fit_softmax(
    table: Table,
    classes: int,
    epochs: int,
    batch: int,
    lr: float,
    generator: torch.Generator,
    balanced: bool = False,
) -> Tensor:
    """Train a linear softmax classifier; return weights and biases [classes, d + 1].

    Weights start at N(0, 0.02), biases at zero; Adam with betas 0.5 and 0.999. It runs inside
    evaluation, hence without the caller's ``no_grad``.

    Args:
        table: rows to train on.
        classes: number of outputs.
        epochs: passes over the table.
        batch: rows per step; the last step of an epoch takes what is left.
        lr: learning rate.
        generator: of the CPU, so that every device draws alike.
        balanced: draw every row from a uniformly drawn class (with repetition) instead of
            shuffling the rows once.
    """
    x, label = table.x, table.label
    weights = 0.02 * torch.randn(classes, x.shape[1], generator=generator, dtype=x.dtype)
    weight = weights.to(x.device).requires_grad_()
    bias = x.new_zeros(classes).requires_grad_()
    optimizer = torch.optim.Adam([weight, bias], lr=lr, betas=(0.5, 0.999))
    order = torch.randperm(len(x), generator=generator).to(x.device)
    by_class = label.argsort(stable=True)
    count = torch.bincount(label, minlength=classes)
    for _ in range(epochs):
        if balanced:
            # Classes without rows cannot be drawn.
            of = torch.multinomial((count > 0).double().cpu(), len(x), True, generator=generator)
            at = torch.rand(len(x), generator=generator, dtype=torch.float64).to(x.device)
            drawn = of.to(x.device)
            order = by_class[(count.cumsum(0) - count)[drawn] + (at * count[drawn]).long()]
        for start in range(0, len(x), batch):
            take = order[start : start + batch]
            optimizer.zero_grad()
            loss = F.cross_entropy(F.linear(x[take], weight, bias), label[take])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return torch.cat([weight, bias[:, None]], dim=1).detach()


class Generative(Model):
    """Compares samples with linear classifiers fitted on real and synthetic rows.

    A classifier is weights and a bias per class [C, d + 1], so rows get a one at the end.
    """

    lengths = False

    @abstractmethod
    def rows(self, features: Mapping[str, Tensor]) -> Tensor:
        """Return what classifiers read of real samples, [n, d]."""

    @abstractmethod
    def made(self, noise: Tensor, text: Tensor) -> Tensor:
        """Return the like of synthetic samples, [n, d], from noise [n, z] and text [n, t]."""

    def embed(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the rows with a one appended, [n, d + 1], as ``x``."""
        return {"x": F.pad(self.rows(features), (0, 1), value=1.0)}

    def distances(
        self, samples: Mapping[str, Tensor], classes: Tensor, squared: bool
    ) -> dict[str, Tensor]:
        """Return minus the classifiers' logits; there is nothing to square (P-18)."""
        return {"both": -(samples["x"] @ classes.T)}

    def table(
        self,
        text: Tensor,
        seen: int,
        rows: TrainingRows,
        each: int,
        latent: int,
        generator: torch.Generator,
    ) -> Table:
        """Return all real rows of seen classes, then ``each`` synthetic ones per unseen class.

        Args:
            text: [C, t], seen classes first.
            seen: how many those are.
            rows: training samples of seen classes.
            each: synthetic rows per unseen class.
            latent: width of the noise they are made from.
            generator: of the CPU, so that every device draws alike.
        """
        width = self.embed_classes(text[:1]).shape[1] - 1  # without the bias
        table = Table(len(rows.label) + each * (len(text) - seen), width, text)
        for features, label in rows.blocks():
            table.add(self.rows(features), label)
        for at in range(seen, len(text)):
            noise = torch.randn(each, latent, generator=generator, dtype=text.dtype)
            table.add(self.made(noise.to(text.device), text[at].expand(each, -1)), at)
        return table
