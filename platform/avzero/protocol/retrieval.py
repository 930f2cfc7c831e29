"""Retrieval as AVGZSLNet and CJME report it: mean average precision of nearest-first rankings.

The average precision of a query is the mean, over the items of its class, of the precision at the
rank of each. **Ties** count as one rank: every item of a group of equal distances gets the
precision at the end of the group. So the value depends on no order of items or queries; where all
distances are equal it is the share of relevant items.

Every ranking is of all evaluated samples, seen and unseen classes together. Queries are averaged
within their class, then over the seen and over the unseen classes, as S and U are. ``scores``
returns fractions under the keys ``mAP_<query>_<items>_<group>``:

=================================  ================================================================
``mAP_text_both_…``                class texts as queries, samples by the system's own distances
``mAP_text_audio_…``, ``_video_…`` likewise, where the system has distances of that modality
``mAP_audio_video_…``              audio embeddings as queries, video embeddings by Euclidean
                                   distance, where ``embed`` gives both in one width; a sample's
                                   other half is one of the relevant items
``mAP_video_audio_…``              the other way round
``…_seen``, ``_unseen``, ``_hm``   group of the query's class; ``hm`` is their harmonic mean
=================================  ================================================================
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from avzero.data.benchmark import MODALITIES
from avzero.protocol.calibration import BOTH
from avzero.protocol.scoring import harmonic_mean

CELLS = 1 << 23
"""Distances held at once: three such tables of 32 MiB in float32 are the peak."""


class Gallery:
    """Keeps what one scoring pass over an evaluation set leaves for retrieval and for pictures."""

    def __init__(self) -> None:
        self._whole: list[Tensor] = []
        self._embeddings: dict[str, list[Tensor]] = {}
        self._distances: dict[str, list[Tensor]] = {}
        self._target: list[Tensor] = []

    def add(
        self, embeddings: Mapping[str, Tensor], distances: Mapping[str, Tensor], target: Tensor
    ) -> None:
        """Take a block of n samples.

        Args:
            embeddings: {name: [n, o]} of ``Model.embed``.
            distances: {name: [n, C]} to the candidate classes, seen ones first.
            target: int64 [n], true class ids.
        """
        for name in MODALITIES:
            if name in embeddings:
                self._embeddings.setdefault(name, []).append(embeddings[name])
        for name in (*MODALITIES, BOTH):
            if name in distances:
                self._distances.setdefault(name, []).append(distances[name])
        if BOTH in embeddings:
            self._whole.append(embeddings[BOTH])
        self._target.append(target)

    def confusion(self, seen_ids: Tensor, unseen_ids: Tensor) -> Tensor:
        """Return how many samples of each unseen class are nearest to each: int32 [K_u, K_u].

        Rows are true classes, columns the nearest where only unseen classes are candidates.

        Args:
            seen_ids: int64 [K_s], in the order of the distances' first columns.
            unseen_ids: int64 [K_u] ascending, in the order of those that follow.
        """
        target, n = torch.cat(self._target), len(unseen_ids)
        rows = torch.isin(target, unseen_ids)
        nearest = torch.cat(self._distances[BOTH])[rows, len(seen_ids) :].argmin(dim=1)
        cells = torch.searchsorted(unseen_ids, target[rows]) * n + nearest
        return torch.bincount(cells, minlength=n * n).view(n, n).int()

    def sample(self, limit: int) -> tuple[Tensor, Tensor]:
        """Return embeddings [n, o] of at most ``limit`` samples, evenly picked, and their classes.

        Of a system without an embedding of the whole sample, none: [0, 0] and [0].
        """
        if not self._whole or self._whole[0].dim() != 2:
            return torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64)
        target = torch.cat(self._target)
        pick = torch.linspace(0, len(target) - 1, min(limit, len(target))).long()
        return torch.cat(self._whole)[pick], target[pick]

    def scores(
        self, seen_ids: Tensor, unseen_ids: Tensor, absent: Collection[str] = ()
    ) -> dict[str, float]:
        """Return every mean average precision the system's outputs allow.

        Numbers that need a modality in ``absent`` are left out, and so are those whose distances
        are not numbers, or whose group has no samples.

        Args:
            seen_ids: int64 [K_s], in the order of the distances' first columns.
            unseen_ids: int64 [K_u], in the order of those that follow.
            absent: modalities the samples were stripped of.
        """
        target, classes = torch.cat(self._target), torch.cat([seen_ids, unseen_ids])
        found: dict[str, float] = {}
        for name, blocks in self._distances.items():
            if name not in absent:
                ap = average_precision(torch.cat(blocks).T, classes, target)
                found |= _grouped(f"mAP_text_{name}", ap, classes, seen_ids)
        if absent or len(self._embeddings) < len(MODALITIES):
            return found
        whole = {name: torch.cat(blocks) for name, blocks in self._embeddings.items()}
        if len({z.shape[1:] for z in whole.values()}) > 1 or whole[MODALITIES[0]].dim() != 2:
            return found
        for query, items in (MODALITIES, MODALITIES[::-1]):
            # An embedding nothing else is scored by may overflow: then it has no ranking.
            with suppress(FloatingPointError):
                ap = _cross_modal(whole[query], whole[items], target)
                found |= _grouped(f"mAP_{query}_{items}", ap, target, seen_ids)
        return found


def average_precision(distances: Tensor, query_class: Tensor, item_class: Tensor) -> Tensor:
    """Return the average precision of every query: float64 [q], NaN where nothing is relevant.

    Args:
        distances: [q, n], smaller is nearer.
        query_class: int64 [q].
        item_class: int64 [n]; an item is relevant to the queries of its class.

    Raises:
        FloatingPointError: a distance is NaN.
    """
    rows = max(1, CELLS // max(1, distances.shape[1]))
    relevant = _Relevant(item_class)
    blocks = zip(torch.split(distances, rows), torch.split(query_class, rows), strict=True)
    return torch.cat([relevant.precision(d.contiguous(), c) for d, c in blocks])


def _cross_modal(queries: Tensor, items: Tensor, target: Tensor) -> Tensor:
    """Return the average precision [n] of each sample's one half among all other halves [n, o]."""
    rows = max(1, CELLS // len(items))
    relevant = _Relevant(target)
    # One rule for all sizes: torch would change its formula with the number of rows.
    mode = "use_mm_for_euclid_dist"
    return torch.cat(
        [
            relevant.precision(torch.cdist(z, items, compute_mode=mode), c)
            for z, c in zip(torch.split(queries, rows), torch.split(target, rows), strict=True)
        ]
    )


class _Relevant:
    """Finds the items of a class: ``_order`` has them together, ``_start`` says where."""

    def __init__(self, item_class: Tensor) -> None:
        self._order = torch.argsort(item_class, stable=True)
        self._classes, self._count = torch.unique_consecutive(
            item_class[self._order], return_counts=True
        )
        self._start = self._count.cumsum(0) - self._count

    def precision(self, distances: Tensor, query_class: Tensor) -> Tensor:
        """Return the average precision [q] of one block of distances [q, n].

        Only the relevant items need a rank, and that is a search in the sorted distances: no
        permutation of all items is made.
        """
        if torch.isnan(distances).any():
            raise FloatingPointError("a distance is NaN")
        at = torch.searchsorted(self._classes, query_class).clamp_max(len(self._classes) - 1)
        count = torch.where(self._classes[at] == query_class, self._count[at], 0)[:, None]
        slot = torch.arange(int(self._count.max()), device=distances.device)
        place = (self._start[at][:, None] + slot).clamp_max(len(self._order) - 1)
        real = slot < count
        near = distances.gather(1, self._order[place])
        near = torch.where(real, near, torch.inf).sort(dim=1).values
        rank = torch.searchsorted(_sorted(distances), near, right=True)
        hits = torch.minimum(torch.searchsorted(near, near, right=True), count)
        gained = torch.where(real, hits.double() / rank, 0.0)
        return gained.sum(dim=1) / count[:, 0]


def _sorted(rows: Tensor) -> Tensor:
    """Return each row in ascending order; numpy's sort of bare values is the faster one."""
    if rows.device.type != "cpu":
        return rows.sort(dim=1).values
    return torch.from_numpy(np.sort(rows.numpy(), axis=1))


def _grouped(name: str, ap: Tensor, query_class: Tensor, seen_ids: Tensor) -> dict[str, float]:
    """Return the mean over classes of a class's mean, for seen and unseen classes, and their HM."""
    known = ~torch.isnan(ap)
    classes, inverse = torch.unique(query_class[known], return_inverse=True)
    mean = torch.bincount(inverse, ap[known]) / torch.bincount(inverse)
    is_seen = torch.isin(classes, seen_ids)
    if is_seen.all() or not is_seen.any():
        return {}
    seen, unseen = float(mean[is_seen].mean()), float(mean[~is_seen].mean())
    hm = float(harmonic_mean(np.array(seen), np.array(unseen)))
    return {f"{name}_seen": seen, f"{name}_unseen": unseen, f"{name}_hm": hm}
