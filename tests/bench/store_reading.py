"""Reading a benchmark of VGGSound-cls size: the store against the field's per-row HDF5 loop.

    make bench B=store_reading        (5 GB of disk, about 5 minutes)

The reference's way is rebuilt from its description (one HDF5 file per class, rows appended one by
one, a list turned into a tensor); no code is copied. Every measurement is a fresh process on warm
page cache. Goals (issue 2): first read at least 25x faster and at most 1.25x the array bytes of
peak memory; later opens under 0.1 s with one copy in memory for all workers.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROWS, CLASSES = 93_752, 276
DIMS = {"audio": 128, "video": 4_096}
ME = "tests.bench.store_reading"


def make(folder: Path) -> None:
    """Write the same random features as per-class HDF5 and into a store."""
    import h5py

    from avzero.data.benchmark import (
        AUDIO,
        VIDEO,
        Classes,
        ClassRole,
        Part,
        RawBenchmark,
        Role,
        Samples,
        TextSet,
    )
    from avzero.data.cache import NodeCache
    from avzero.data.store import FeatureStore

    rng = np.random.default_rng(0)
    features = {m: rng.random((ROWS, d), dtype=np.float32) for m, d in DIMS.items()}
    class_id = np.sort(np.arange(ROWS) % CLASSES).astype(np.int32)
    names = tuple(f"-s{i:09d}_{i % 9:06d}" for i in range(ROWS))
    for modality, array in features.items():
        (folder / "hdf5" / modality).mkdir(parents=True)
        for c in range(CLASSES):
            rows = np.flatnonzero(class_id == c)
            with h5py.File(folder / "hdf5" / modality / f"{c:03d}.h5", "w") as file:
                file.create_dataset("data", data=array[rows])
                urls = np.array([names[i].encode() for i in rows], dtype="S80")
                file.create_dataset("video_urls", data=urls)

    def samples(rows: slice, role: Role) -> Samples:
        mine = class_id[rows]
        return Samples(
            names[rows],
            mine,
            np.full(len(mine), role.code, np.int8),
            names[rows],
            ("",) * len(mine),
            np.ones(len(mine), np.bool_),
        )

    # All rows in the open part, so that one open reads the whole matrix.
    everything, nothing = slice(0, ROWS), slice(0, 0)
    class_names = tuple(f"c{i:03d}" for i in range(CLASSES))
    keys = dict(zip(class_names, class_names, strict=True))
    raw = RawBenchmark(
        "big",
        "BIG",
        "cls",
        "cls",
        True,
        Classes(class_names, (ClassRole.TRAIN,) * CLASSES, (None,) * CLASSES),
        {"w2v": TextSet(class_names, rng.random((CLASSES, 300), dtype=np.float32), keys)},
        Part(samples(everything, Role.TRAIN), features),
        Part(samples(nothing, Role.TEST_SEEN), {m: a[:0] for m, a in features.items()}),
    )
    assert tuple(features) == (AUDIO, VIDEO)
    FeatureStore(str(folder / "store"), NodeCache(folder / "cache")).put(raw)


def reference(folder: Path) -> dict[str, float]:
    """Read as the released loaders do: file by file, row by row, list to tensor."""
    import h5py
    import torch

    from tests.bench._measure import peak_bytes

    base, wall, cpu = peak_bytes(), time.perf_counter(), time.process_time()
    tensors = {}
    for modality in DIMS:
        rows, urls = [], []
        for path in sorted((folder / "hdf5" / modality).iterdir()):
            with h5py.File(path) as file:
                for row, url in zip(file["data"], file["video_urls"], strict=True):
                    rows.append(row)
                    urls.append(str(url, "utf-8"))
        tensors[modality] = torch.FloatTensor(rows)
    return {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "peak": peak_bytes() - base,
        "sum": float(tensors["video"][::97].double().sum()),
    }


def first(folder: Path) -> dict[str, float]:
    """Open through the store with an empty cache, and touch every value."""
    from avzero.data.cache import NodeCache
    from avzero.data.store import FeatureStore
    from tests.bench._measure import peak_bytes

    shutil.rmtree(folder / "cache", ignore_errors=True)
    base, wall, cpu = peak_bytes(), time.perf_counter(), time.process_time()
    benchmark = FeatureStore(str(folder / "store"), NodeCache(folder / "cache")).open("big")
    taken = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    for array in benchmark.part.features.values():
        array.max()
    return taken | {
        "peak": peak_bytes() - base,
        "peak_with_libraries": peak_bytes(),
        "sum": float(benchmark.part.features["video"][::97].astype(np.float64).sum()),
    }


def later(folder: Path) -> dict[str, float]:
    """Open again; then touch every value and see how much memory is this process's own."""
    from avzero.data.cache import NodeCache
    from avzero.data.store import FeatureStore

    store = FeatureStore(str(folder / "store"), NodeCache(folder / "cache"))
    wall = time.perf_counter()
    benchmark = store.open("big")
    wall = time.perf_counter() - wall

    def private() -> int:
        """Memory no other process can share: pages of a mapped file are not anonymous."""
        text = Path("/proc/self/smaps_rollup").read_text()
        return 1024 * sum(
            int(line.split()[1]) for line in text.splitlines() if line.startswith("Anonymous")
        )

    before = private()
    for array in benchmark.part.features.values():
        array.max()
    return {"wall": wall, "private": private() - before}


def main() -> None:
    """Make the data, run every measurement in a process of its own, print the comparison."""
    from tests.bench._measure import in_fresh_process, machine

    if len(sys.argv) == 3:
        action = {"reference": reference, "first": first, "later": later}[sys.argv[1]]
        print(json.dumps(action(Path(sys.argv[2]))))
        return
    array_bytes = 4 * ROWS * sum(DIMS.values())
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as scratch:
        print(machine())
        make(Path(scratch))
        fast = [in_fresh_process(ME, "first", scratch) for _ in range(5)]
        slow = [in_fresh_process(ME, "reference", scratch) for _ in range(2)]
        fast += [in_fresh_process(ME, "first", scratch) for _ in range(6)]
        again = [in_fresh_process(ME, "later", scratch) for _ in range(5)]
    assert {r["sum"] for r in slow} == {r["sum"] for r in fast}, "the two ways read other numbers"
    for what in ("wall", "cpu"):
        theirs, ours = sorted(r[what] for r in slow), sorted(r[what] for r in fast)
        print(
            f"first read, {what} seconds: reference {theirs[0]:.1f}-{theirs[-1]:.1f}; store "
            f"{', '.join(f'{x:.2f}' for x in ours)}; ratio of medians "
            f"{statistics.median(theirs) / statistics.median(ours):.1f} (goal at least 25)"
        )
    peaks = [r["peak"] / array_bytes for r in fast]
    whole = max(r["peak_with_libraries"] for r in fast) / array_bytes
    print(
        f"peak memory over array bytes: store {max(peaks):.3f} ({whole:.3f} with the libraries; "
        f"goal at most 1.25), reference {max(r['peak'] for r in slow) / array_bytes:.2f}"
    )
    print(
        f"later opens: {min(r['wall'] for r in again):.4f}-{max(r['wall'] for r in again):.4f} s "
        f"(goal under 0.1); memory of its own after touching everything: "
        f"{max(r['private'] for r in again) / 1e6:.1f} MB of {array_bytes / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
