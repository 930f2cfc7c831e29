"""The contract of a system: what training, scoring and checkpoints ask of it, and nothing more.

A system is a pure module of one configuration. ``forward`` code writes no Python state; every
continuous hyperparameter is a 0-d buffer, so that many configurations can be stacked and trained
at once; randomness comes in through the context. Systems derive from ``Model`` directly and
override no concrete method.

Shapes: B rows of a batch, G = 2 members per row (anchor, negative), d_m width of modality m,
t width of class text, K training classes, C evaluated classes, n samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from avzero.spec import Strict


class World(Protocol):
    """The workers a batch is split over."""

    size: int
    rank: int

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of ``values`` over all workers; gradients pass through."""


class Context(NamedTuple):
    """What a training step hands to the layers besides the batch.

    ``keys``: int32 [sites, 2], this step's random keys of every dropout site. ``world``: the
    workers the batch is split over, None for one.
    """

    keys: Tensor
    world: World | None = None

    def salted(self, salt: int) -> Context:
        """Return a context whose dropout masks are unrelated: for another pass of one step."""
        return self._replace(keys=self.keys ^ (salt * 0x1B873593 & 0x7FFFFFFF))


class Batch(NamedTuple):
    """One training batch: pairs of an anchor (member 0) and a negative of another class."""

    features: dict[str, Tensor]
    """Per modality [B, G, d_m]."""
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


@dataclass(frozen=True)
class Card:
    """Where a system comes from and what it can use."""

    title: str
    authors: str
    year: int
    venue: str
    link: str
    features: tuple[str, ...] = ("averaged",)


class ModelConfig(Strict):
    """Base of a system's hyperparameters; every field has a default."""


class Model(nn.Module, ABC):
    """A system. Subclasses set ``card`` and ``Config`` and implement the abstract methods."""

    card: ClassVar[Card]
    Config: ClassVar[type[ModelConfig]]
    compat: ClassVar[Mapping[str, Any]] = {}
    """Values of ``Config`` fields under the ``compat`` preset."""

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

    @abstractmethod
    def distances(
        self, samples: Mapping[str, Tensor], classes: Tensor, squared: bool
    ) -> dict[str, Tensor]:
        """Return distances {name: [n, C]}; ``both`` is the headline, others are modalities."""

    def settle(self, batch: Batch, context: Context) -> None:
        """Do what the released code does after each optimiser step (default: nothing)."""
        del batch, context

    def frozen(self) -> frozenset[str]:
        """Return names of parameters that get gradients and are never updated (default: none)."""
        return frozenset()


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
