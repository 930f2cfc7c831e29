"""Sequences on a device: taken by row numbers, padded to one length, cut to a window.

Beside a plain table [N, d] of an averaged feature set stands ``Steps``. ``take`` gives a system
what the contract says: [n, d], or [n, T, d] with zeros behind each sequence and its length as
``<modality>_length``. Rows are found by index arithmetic; nothing loops over samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from avzero.data.benchmark import VIDEO, Part
from avzero.data.sequences import Sequences
from avzero.protocol.counter import fold, uniform_below

ROWS = 4096
"""Rows embedded at once in evaluation; fewer where padded sequences would not fit."""
_VALUES = 1 << 26
"""Padded values of one modality at once in evaluation: 256 MiB of float32."""
_WINDOW = 0x57494E44


class Steps(NamedTuple):
    """``values`` [sum T, d]; row i is ``length[i]`` steps from ``start[i]`` (int64 [N])."""

    values: Tensor
    start: Tensor
    length: Tensor


Table = Tensor | Steps
"""One modality of a part: [N, d], or sequences."""
Spans = Mapping[str, tuple[Tensor, Tensor]]
"""Per modality of sequences: first step (position in ``values``) and length of each row."""


class Scales(Protocol):
    """What ``take`` needs of ``train.data.Scaling``."""

    @property
    def absent(self) -> frozenset[str]:
        """Modalities that are withheld."""

    def apply(self, modality: str, rows: Tensor) -> Tensor:
        """Return scaled rows [..., d]."""


def tables(part: Part, device: torch.device) -> dict[str, Table]:
    """Return the features as tensors; on the CPU they stay the cache's shared memory map."""
    out: dict[str, Table] = {}
    for modality, features in part.features.items():
        if isinstance(features, Sequences):
            values = torch.from_numpy(np.asarray(features.values)).to(device)
            start = torch.from_numpy(features.starts[:-1].copy()).to(device)
            length = torch.from_numpy(features.lengths).to(device)
            out[modality] = Steps(values, start, length)
        else:
            out[modality] = torch.from_numpy(np.asarray(features)).to(device)
    return out


@dataclass(frozen=True)
class Window:
    """How much of a sequence is used: all of it, or at most ``steps`` video steps.

    The audio of the same seconds goes with them: it starts at ``round(start * s_v / s_a)`` and
    has ``round(steps * s_v / s_a)`` steps (the public code multiplies both step lengths where a
    quotient is meant, data_formats.md 2.6). ``seconds`` per step come from the benchmark.
    """

    steps: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    def spans(
        self,
        features: Mapping[str, Table],
        rows: Tensor,
        draw: tuple[int, Tensor] | None = None,
    ) -> Spans:
        """Return where the sequences of ``rows`` [n] start and how long they are.

        Args:
            features: the tables.
            rows: int64 row numbers.
            draw: key and int64 counters [n] of random starts; None takes the centre.
        """
        spans = {
            m: (table.start[rows], table.length[rows])
            for m, table in features.items()
            if isinstance(table, Steps)
        }
        if self.steps is None or VIDEO not in spans:
            return spans
        spare = (spans[VIDEO][1] - self.steps).clamp_min(0)
        begin = spare // 2
        if draw is not None:
            begin = uniform_below(fold(_WINDOW, draw[0]), draw[1], spare + 1)
        return {m: self._cut(m, *span, begin, spare > 0) for m, span in spans.items()}

    def _cut(
        self, modality: str, first: Tensor, length: Tensor, begin: Tensor, long: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cut the sequences that are ``long`` to the window that starts at video step ``begin``."""
        ratio = self.seconds.get(VIDEO, 1.0) / self.seconds.get(modality, 1.0)
        offset = (begin.to(torch.float64) * ratio).round().to(torch.int64)
        offset = torch.minimum(offset, length - 1)  # audio may end before the video does
        most = max(1, round((self.steps or 1) * ratio))
        kept = torch.where(long, (length - offset).clamp_max(most), length)
        return first + offset, kept


def take(
    features: Mapping[str, Table],
    rows: Tensor,
    scaling: Scales,
    window: Window,
    draw: tuple[int, Tensor] | None = None,
    mine: slice = slice(None),
    pad: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Return scaled features of some rows, as a system gets them.

    Args:
        features: the tables.
        rows: int64 row numbers [n] of the global batch.
        scaling: scales rows; padding is zero after scaling.
        window: how much of sequences is used.
        draw: see ``Window.spans``.
        mine: this worker's part of ``rows``.
        pad: length of padded sequences by modality; default: the longest of ``rows``.

    Returns:
        Per modality [n', d]; of sequences [n', T, d] and ``<modality>_length`` int64 [n']. A
        withheld modality is one step of zeros: with no step at all a softmax over steps, or a
        mean, would be NaN.
    """
    spans = window.spans(features, rows, draw)
    rows = rows[mine]
    out: dict[str, Tensor] = {}
    for m, table in features.items():
        if not isinstance(table, Steps):
            out[m] = scaling.apply(m, table.index_select(0, rows))
            continue
        first, length = spans[m][0][mine], spans[m][1][mine]
        if m in scaling.absent:
            out[m] = scaling.apply(m, table.values[:1].expand(len(rows), 1, -1))
            out[f"{m}_length"] = torch.ones_like(length)
            continue
        steps = int(spans[m][1].max()) if pad is None else pad[m]
        at = torch.arange(steps, device=length.device)
        real = at < length[:, None]
        index = first[:, None] + torch.where(real, at, 0)
        values = table.values.index_select(0, index.reshape(-1)).view(*index.shape, -1)
        out[m] = scaling.apply(m, values).masked_fill(~real[:, :, None], 0)
        out[f"{m}_length"] = length
    return out


def rows_at_once(features: Mapping[str, Table], rows: Tensor, window: Window) -> int:
    """Return how many of ``rows`` are embedded at once without gradients."""
    spans = window.spans(features, rows)
    padded = [
        int(spans[m][1].max()) * table.values.shape[1]
        for m, table in features.items()
        if isinstance(table, Steps) and len(rows)
    ]
    return max(1, min([ROWS, *(_VALUES // values for values in padded)]))


def vectors(table: Table, rows: Tensor) -> Iterator[Tensor]:
    """Yield the vectors [k, d] of some rows: one per row, or every step of sequences."""
    if isinstance(table, Steps):
        length = table.length[rows]
        rows = torch.repeat_interleave(table.start[rows] - (length.cumsum(0) - length), length)
        rows = rows + torch.arange(len(rows), device=rows.device)
        table = table.values
    for start in range(0, len(rows), ROWS):
        yield table.index_select(0, rows[start : start + ROWS])
