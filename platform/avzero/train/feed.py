"""An epoch's batches for every slot of a stack, gathered together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from avzero.models._contract import Batch
from avzero.protocol.sampling import Draws
from avzero.train.data import StageData


def slot(batch: Batch, at: int) -> Batch:
    """Return one slot's batch out of a stack's."""
    return Batch({m: x[at] for m, x in batch.features.items()}, *(x[at] for x in batch[1:]))


class Feed:
    """Draws an epoch's pairs for K slots at once and gathers them step by step.

    Slots that read the same data share one gather. What a slot draws depends on its own seed,
    stage and epoch alone.

    Args:
        slots: per slot its data and the draws of its epoch.
        rank: which worker this is.
        size: how many workers the global batch is split over.
    """

    def __init__(
        self, slots: Sequence[tuple[StageData, Draws]], rank: int = 0, size: int = 1
    ) -> None:
        together: dict[int, list[int]] = {}
        for at, (data, _) in enumerate(slots):
            # Windows of sequences are drawn with the slot's own key.
            together.setdefault(at if data.info.temporal else id(data) + len(slots), []).append(at)
        self._groups = [
            (
                slots[members[0]][0],
                slots[members[0]][1].key,
                torch.stack([slots[at][1].row for at in members], dim=1),
                torch.stack([slots[at][1].label for at in members], dim=1),
            )
            for members in together.values()
        ]
        order = [at for members in together.values() for at in members]
        self._place = None
        if order != sorted(order):
            self._place = torch.tensor(order, device=slots[0][0].device).argsort()
        share = slots[0][1].row.shape[1] // size
        self._mine = slice(rank * share, (rank + 1) * share)

    def batch(self, step: int) -> Batch:
        """Return the worker's share of a step's batches; everything has a leading dimension K."""
        parts = []
        for data, key, rows, label in self._groups:
            size = rows.shape[2] * 2
            counters = torch.arange(size, device=rows.device) + step * size
            parts.append(data.gather(rows[step], label[step], (key, counters), self._mine))
        if len(parts) == 1:
            return parts[0]
        tables = [part.class_text for part in parts]
        if len({table.shape[1:] for table in tables}) > 1:
            # Systems that read the table are not stacked across sets of classes (structure.py).
            tables = [tables[0][:1].expand(len(part.label), -1, -1) for part in parts]
        return Batch(
            {m: self._joined([p.features[m] for p in parts]) for m in parts[0].features},
            self._joined([part.text for part in parts]),
            self._joined([part.label for part in parts]),
            self._joined(tables),
        )

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the parts in the order of the slots."""
        out = torch.cat(list(parts))
        return out if self._place is None else out.index_select(0, self._place)
