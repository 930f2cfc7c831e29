"""Class-uniform sampling by index (protocol.md section 2): no loader, no worker processes.

An anchor is a class drawn uniformly, then one of its samples; its negative is another class drawn
uniformly, then one of its samples. All draws of an epoch are made at once on the device that
trains, as rows of tables that already lie there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from avzero.errors import UserError
from avzero.protocol.counter import fold, uniform_below

_SAMPLING = 0x53414D50  # names the stream; dropout and initialisation use others
_KINDS = 4  # draws per pair: anchor class, anchor, negative class, negative


class Draws(NamedTuple):
    """One epoch of pairs; every tensor is int64 [batches, batch, 2], anchor first.

    ``key`` is the epoch's own, for what else is drawn per pair.
    """

    row: Tensor
    label: Tensor
    key: int = 0


class ClassUniformSampler:
    """Draws pairs of rows for an epoch.

    Args:
        class_id: int64 [N], class of every training row.
        rows: int64 [N], the row numbers to return for those training rows.

    ``classes`` is the ascending list of class ids that occur; labels are positions in it.
    """

    def __init__(self, class_id: Tensor, rows: Tensor) -> None:
        self.classes, label, counts = torch.unique(
            class_id, sorted=True, return_inverse=True, return_counts=True
        )
        if len(self.classes) < 2:
            raise UserError(
                f"training needs samples of at least 2 classes, found {len(self.classes)}; "
                "negatives come from other classes. Check the class lists of the split"
            )
        self._rows = rows[torch.argsort(label, stable=True)]
        self._counts = counts
        self._starts = torch.cumsum(counts, 0) - counts

    def epoch(self, seed: int, stage: int, epoch: int, batches: int, batch: int) -> Draws:
        """Draw ``batches`` x ``batch`` pairs; the same arguments give the same pairs anywhere."""
        key = fold(_SAMPLING, seed, stage, epoch)
        device = self._rows.device
        counter = torch.arange(batches * batch, dtype=torch.int64, device=device) * _KINDS
        n = len(self.classes)
        anchor = uniform_below(key, counter, n)
        # One of the n - 1 others: a nonzero rotation keeps every other class equally likely.
        other = (anchor + 1 + uniform_below(key, counter + 2, n - 1)) % n
        label = torch.stack([anchor, other], dim=1)
        within = torch.stack([counter + 1, counter + 3], dim=1)
        pick = uniform_below(key, within, self._counts[label])
        row = self._rows[self._starts[label] + pick]
        return Draws(row.view(batches, batch, 2), label.view(batches, batch, 2), key)
