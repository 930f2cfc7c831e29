"""The node-local cache: each part of a benchmark once, as memory-mapped arrays, keyed by digest.

All workers of a node map the same files, so a benchmark is in memory once however many workers
read it. Entries are made in a temporary folder and renamed: a reader sees a whole entry or none.
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from avzero.data.benchmark import Part, array_digest, samples_digest
from avzero.data.columns import (
    cache_samples,
    copy_column,
    map_samples,
    read_lengths,
    read_samples,
)
from avzero.data.sequences import Features, Sequences, starts_of
from avzero.data.storage import disk_errors, require_space
from avzero.errors import UserError

_ELSEWHERE = "set AVZERO_CACHE to another folder"
_DAY = 86_400.0


def cache_root() -> Path:
    """Return the cache folder: ``AVZERO_CACHE`` or ``~/.cache/avzero``."""
    return Path(os.environ.get("AVZERO_CACHE", "~/.cache/avzero")).expanduser()


class NodeCache:
    """Maps parts of benchmarks, filling the cache from the store when needed."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or cache_root()

    def open(
        self,
        digest: str,
        entry: Mapping[str, Any],
        fetch: Callable[[Path], Path],
        scratch_bytes: int = 0,
    ) -> Part:
        """Return a part as memory-mapped arrays.

        Args:
            digest: the part's identity; the entry's folder name.
            entry: the manifest's description of the part (rows, dims, content digests, bytes).
            fetch: called with a scratch folder when the entry is missing; returns the Parquet
                file, which may lie in that folder.
            scratch_bytes: what ``fetch`` puts into the scratch folder.

        Raises:
            UserError: the file is damaged, or the device is full.
        """
        folder = self.root / digest
        part = self._map(folder, entry)
        if part is not None:
            return part
        with self._one_at_a_time(digest):
            # Another process may have filled the entry while this one waited.
            part = self._map(folder, entry)
            if part is None:
                self._fill(folder, entry, fetch, scratch_bytes)
                part = self._map(folder, entry)
        if part is None:
            raise UserError(f"{folder}: cache entry unusable; delete the folder and try again")
        return part

    def _map(self, folder: Path, entry: Mapping[str, Any]) -> Part | None:
        """Map an entry; None when it is missing or does not have the expected size."""
        rows = int(entry["rows"])
        features: dict[str, Features] = {}
        try:
            for modality in entry["dims"]:
                # Copy-on-write: pages stay shared between processes, and torch gets an array it
                # may call writable without anybody being able to change the file.
                array = np.load(folder / f"{modality}.npy", mmap_mode="c")
                if array.shape != _shape(entry, modality) or array.dtype != np.dtype("<f4"):
                    return None
                features[modality] = array
                if modality in entry.get("steps", {}):
                    starts = np.load(folder / f"{modality}_starts.npy")
                    features[modality] = Sequences(array, starts)
            samples = map_samples(folder)
        except (FileNotFoundError, EOFError, KeyError, ValueError, pa.ArrowInvalid):
            return None
        whole = {len(samples), *map(len, features.values())} == {rows}
        return Part(samples, features) if whole else None

    def _fill(
        self,
        folder: Path,
        entry: Mapping[str, Any],
        fetch: Callable[[Path], Path],
        scratch_bytes: int,
    ) -> None:
        """Make an entry in a scratch folder and rename it into place."""
        needed = sum(4 * math.prod(_shape(entry, modality)) for modality in entry["dims"])
        with disk_errors(self.root, _ELSEWHERE):
            self._remove_leftovers()
            require_space(self.root, needed + scratch_bytes)
            scratch = self.root / f".tmp-{uuid.uuid4().hex}"
            scratch.mkdir(parents=True)
            try:
                source = fetch(scratch)
                for modality in entry["dims"]:
                    copy_column(
                        source,
                        modality,
                        _shape(entry, modality),
                        scratch / f"{modality}.npy",
                        entry["content"]["features"][modality],
                    )
                    if modality in entry.get("steps", {}):
                        self._fill_starts(source, modality, entry, scratch)
                samples = read_samples(source)
                if samples_digest(samples) != entry["content"]["samples"]:
                    raise UserError(
                        f"{source}: the samples table does not have the content the manifest "
                        "names; the file is damaged. Ingest the release again"
                    )
                cache_samples(samples, scratch)
                if source.parent == scratch:
                    source.unlink()
                if folder.exists():  # an entry _map refused: wrong size or cut off
                    shutil.rmtree(folder)
                scratch.replace(folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)

    def _fill_starts(
        self, source: Path, modality: str, entry: Mapping[str, Any], scratch: Path
    ) -> None:
        """Write where the sequences of a modality start."""
        lengths = read_lengths(source, modality)
        if array_digest(lengths) != entry["content"]["lengths"][modality]:
            raise UserError(
                f"{source}: column {modality}_length does not have the content the manifest names; "
                "the file is damaged. Ingest the release again"
            )
        np.save(scratch / f"{modality}_starts.npy", starts_of(lengths))

    def _remove_leftovers(self) -> None:
        """Remove scratch folders of processes that were killed more than a day ago."""
        for leftover in self.root.glob(".tmp-*"):
            if time.time() - leftover.stat().st_mtime > _DAY:
                shutil.rmtree(leftover, ignore_errors=True)

    @contextmanager
    def _one_at_a_time(self, digest: str) -> Iterator[None]:
        """Let one process of the node fill an entry while others wait; a saving, not a guard."""
        with disk_errors(self.root, _ELSEWHERE):
            self.root.mkdir(parents=True, exist_ok=True)
            handle = (self.root / f".{digest}.lock").open("w")
        with handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield


def _shape(entry: Mapping[str, Any], modality: str) -> tuple[int, int]:
    """Return the shape of a modality's matrix: [rows, width], of sequences [steps, width]."""
    return int(entry.get("steps", {}).get(modality, entry["rows"])), int(entry["dims"][modality])
