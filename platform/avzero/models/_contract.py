"""The contract of a system: what training, scoring and checkpoints ask of it, and nothing more.

A system is a pure module of one configuration. ``forward`` code writes no Python state; every
continuous hyperparameter is a 0-d buffer, so that many configurations can be stacked and trained
at once; randomness comes in through the context. A system is a final class;
what several share stands once, in an abstract class between it and ``Model``. Of concrete methods
only the hooks below may be overridden.

Shapes: B rows of a batch, G = 2 members per row (anchor, negative), d_m width of modality m,
t width of class text, K training classes, C evaluated classes, n samples. With temporal features
[…, d_m] is [..., T, d_m], and ``<modality>_length`` (int64 [...]) says how many of the T steps are
real; the rest is zero padding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from avzero.errors import UserError
from avzero.spec import BetaGrid, InputScaling, Strict


class World(Protocol):
    """The workers a batch is split over."""

    size: int
    rank: int

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of ``values`` over all workers; gradients pass through."""

    def gather(self, values: Tensor) -> Tensor:
        """Return all workers' rows [size * n, ...] in rank order; gradients pass through."""

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its mean over the workers."""


class Context(NamedTuple):
    """What a training step hands to the layers besides the batch.

    ``keys``: int32 [sites, 2], this step's random keys of every random site. ``world``: the
    workers the batch is split over, None for one. ``part``: which of ``Model.passes`` this is.
    ``tracked``: whether running statistics still remember this step when they are next used;
    where not, nothing need be computed for them.
    """

    keys: Tensor
    world: World | None = None
    part: str = ""
    tracked: bool = True

    def salted(self, salt: int) -> Context:
        """Return a context whose dropout masks are unrelated: for another pass of one step."""
        if not salt:
            return self
        # Even: the second of a site's keys stays odd.
        return self._replace(keys=self.keys ^ (salt * 0x1B873593 & 0x7FFFFFFE))

    def alone(self) -> Context:
        """Return a context for rows every worker has alike, such as the table of class texts."""
        return self._replace(world=None)

    def gather(self, values: Tensor) -> Tensor:
        """Return the rows of the global batch, for terms that compare rows with each other."""
        return values if self.world is None else self.world.gather(values)


class Batch(NamedTuple):
    """One training batch: pairs of an anchor (member 0) and a negative of another class."""

    features: dict[str, Tensor]
    """Per modality [B, G, d_m]; temporal: [B, G, T, d_m] and ``<modality>_length`` [B, G]."""
    text: Tensor
    """[B, G, t] class text vectors of the members."""
    label: Tensor
    """int64 [B, G], positions in the ascending list of training classes."""
    class_text: Tensor
    """[K, t] text vectors of the training classes."""


class Shapes(NamedTuple):
    """Sizes a system is built for."""

    features: dict[str, int]
    text: int
    temporal: bool = False


class TrainingRows(Protocol):
    """The stage's training samples of seen classes, for systems that fit a classifier on them."""

    seed: int

    @property
    def label(self) -> Tensor:
        """int64 [n], positions among the seen candidate classes."""

    def blocks(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield (features {modality: [b, d_m]}, labels [b]) of all rows, in a fixed order."""


Kind = Literal["averaged", "clipclap", "temporal"]
"""Kinds of feature sets: one vector per video, CLIP/CLAP vectors with their text, sequences."""


@dataclass(frozen=True)
class Card:
    """Where a system comes from, what it can use and how far it has been checked."""

    title: str
    authors: str
    year: int
    venue: str
    link: str
    features: tuple[Kind, ...] = ("averaged", "clipclap")
    options: tuple[str, ...] = ()
    """What can be switched beyond the numbers, with the protocol's ids (P-nn)."""
    evidence: Literal["code", "reconstruction"] = "code"
    """Built after public code; or parts of it are our reconstruction, listed in the file."""
    fixture: str = "formulas"
    """Name of the reference fixture it matches, or ``formulas`` of its spec on small cases."""


class ModelConfig(Strict):
    """Base of a system's hyperparameters; every field has a default."""

    input_scaling: InputScaling | Literal["protocol"] = "protocol"
    """How inputs are scaled: as the protocol says, or a rule of the system's own (P-17)."""


class Model(nn.Module, ABC):
    """A system. Subclasses set ``card`` and ``Config`` and implement the abstract methods."""

    card: ClassVar[Card]
    Config: ClassVar[type[ModelConfig]]
    compat: ClassVar[Mapping[str, Any]] = {}
    """Values of ``Config`` fields under the ``compat`` preset."""
    beta_grid: ClassVar[BetaGrid] = BetaGrid()
    """Calibration values tried on VAL where the protocol names none (P-06)."""
    lengths: bool = True
    """Whether distances are lengths in the space of the class embeddings (not logits, products)."""
    reads_table: ClassVar[bool] = True
    """Whether the loss reads ``Batch.class_text``; if not, runs on different sets of classes can
    be stacked."""
    scoring: ClassVar[frozenset[str]] = frozenset()
    """Attributes that only scoring reads, which runs in one stack may differ in."""
    needs_nonnegative: ClassVar[str] = ""
    """Why negative (scaled) features cannot be used, and what to do; empty where they can."""

    @abstractmethod
    def __init__(self, config: Any, shapes: Shapes) -> None:
        super().__init__()

    @abstractmethod
    def loss(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Return the named loss terms (0-d each, weights applied); the objective is their sum.

        Every term is a mean over rows, so that the mean over equal workers is the global value.
        """

    @abstractmethod
    def embed(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return embeddings {name: [n, o]} of samples {modality: [n, d_m]}, in eval mode."""

    @abstractmethod
    def embed_classes(self, text: Tensor) -> Tensor:
        """Return class embeddings [C, o] of class text vectors [C, t], in eval mode."""

    # Hooks: what most systems leave as it is.

    def distances(
        self, samples: Mapping[str, Tensor], classes: Tensor, squared: bool
    ) -> dict[str, Tensor]:
        """Return distances {name: [n, C]}; ``both`` is the headline, others are modalities.

        By default Euclidean, between the embedding ``both`` and the classes.
        """
        z, norm = samples["both"], torch.linalg.vector_norm
        if len(classes) > z.shape[1]:
            distance = torch.cdist(z, classes)
            return {"both": distance.square() if squared else distance}
        # |z|^2 + |c|^2 - 2 z.c, as there; but its widened copies of z cost more than few classes.
        square = norm(z, dim=1, keepdim=True).square_() + norm(classes, dim=1).square_()
        square = square.addmm_(z, classes.T, alpha=-2).clamp_min_(0)
        return {"both": square if squared else square.sqrt_()}

    def passes(self, step: int) -> tuple[str, ...]:
        """Return the optimiser passes of a step (counted within its epoch): one, unnamed.

        Adversarial systems name several; each calls ``loss`` with ``context.part`` and updates
        what that loss reaches. No pass at all skips the step.
        """
        del step
        return ("",)

    def candidates(self, text: Tensor, seen: int, rows: TrainingRows) -> Tensor:
        """Return what ``distances`` compares samples with: [C, o], seen classes first.

        Args:
            text: [C, t] text vectors of the candidate classes.
            seen: how many of them, at the start, are seen.
            rows: training samples of those.

        Systems that fit a classifier on generated features return its weights here. Rows beyond
        C are a second classifier, of the C - seen unseen classes alone, used for ZSL.
        """
        del seen, rows
        return self.embed_classes(text)

    def settle(self, batch: Batch, context: Context) -> None:
        """Do what the released code does after each optimiser step (default: nothing)."""
        del batch, context

    def frozen(self) -> frozenset[str]:
        """Return names of parameters that get gradients and are never updated (default: none)."""
        return frozenset()

    def load_reference(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of a published checkpoint.

        Raises:
            UserError: something is missing, left over or of another shape; or there is no
                public code, as by default.
        """
        del state
        raise UserError(f"{self.card.title}: no public code, so no published checkpoints")


def scalar(module: nn.Module, name: str, value: float) -> None:
    """Register a continuous hyperparameter as a 0-d buffer that checkpoints leave out.

    It is float64 until the model is moved to its precision: 0.1 must not become 0.10000000149.
    """
    module.register_buffer(name, torch.tensor(value, dtype=torch.float64), persistent=False)


def trainable(model: Model) -> Iterable[tuple[str, nn.Parameter]]:
    """Yield (name, parameter) of what the optimiser updates."""
    held = model.frozen()
    for name, parameter in model.named_parameters():
        if name not in held:
            yield name, parameter
