"""One part of a benchmark as a Parquet file, and its fast way back into contiguous arrays.

The file is ordinary Parquet: one row per sample, features as fixed-size lists of float32, so
pandas, DuckDB and Ray Data read the columns as vectors; sequences as lists of such lists, with
their lengths in a column ``<modality>_length``. Feature columns are written plain,
uncompressed and with one page per row group. A page ends with its values, so the last
``values x 4`` bytes of such a column chunk *are* the matrix rows, and reading is a copy of byte
ranges. Whether that shortcut holds is never assumed: the bytes must have the content digest the
manifest names, else the ordinary decoder reads them, else the file is refused.

Numbers: docs/experiments.md, "reading the store".
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from avzero.data.benchmark import ROLES, Part, Samples
from avzero.data.sequences import Features, Int64, Sequences, values_of
from avzero.errors import UserError

ROW_GROUP_BYTES = 32 << 20
"""Target size of one feature column in a row group."""
_CHUNK_BYTES = 8 << 20
_MAX_ROWS_PER_GROUP = 16_384
_NUMBERS = ("class_id", "role", "evaluated")
_TEXTS = ("sample_id", "source_id", "source_split")


class ArrowStrings(Sequence[str]):
    """A memory-mapped Arrow string column that behaves as a sequence of str."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __len__(self) -> int:
        return len(self._array)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return ArrowStrings(self._array[index])
        return str(self._array[int(index)].as_py())

    def __iter__(self) -> Iterator[str]:
        return iter(self._array.to_pylist())


@dataclass(frozen=True)
class Extent:
    """A byte range of a file that holds plain little-endian float32 values."""

    offset: int
    size: int


def samples_table(samples: Samples) -> pa.Table:
    """Return the samples table as Arrow; roles by name, for people who open the file."""
    names = pa.array([role.value for role in ROLES])
    role = pa.DictionaryArray.from_arrays(pa.array(samples.role), names)
    return pa.table(
        {
            "sample_id": pa.array(list(samples.sample_id), pa.string()),
            "class_id": pa.array(samples.class_id),
            "role": role.cast(pa.string()),
            "source_id": pa.array(list(samples.source_id), pa.string()),
            "source_split": pa.array(list(samples.source_split), pa.string()),
            "evaluated": pa.array(samples.evaluated),
        }
    )


def cache_samples(samples: Samples, folder: Path) -> None:
    """Write a samples table so that ``map_samples`` opens it in milliseconds.

    Numbers as ``.npy`` and text as a mapped Arrow file: turning Arrow columns into numpy imports
    pandas, which takes longer than everything else an open does.
    """
    for name in _NUMBERS:
        np.save(folder / f"{name}.npy", getattr(samples, name))
    table = samples_table(samples).select(_TEXTS).combine_chunks()
    with pa.ipc.new_file(str(folder / "samples.arrow"), table.schema) as writer:
        writer.write_table(table)


def map_samples(folder: Path) -> Samples:
    """Open what ``cache_samples`` wrote.

    Raises:
        OSError, ValueError, KeyError, pa.ArrowInvalid: it is not there, or not whole.
    """
    with pa.memory_map(str(folder / "samples.arrow")) as source:
        reader = pa.ipc.open_file(source)
        (batch,) = [reader.get_batch(i) for i in range(reader.num_record_batches)]
    columns: dict[str, Any] = {name: ArrowStrings(batch.column(name)) for name in _TEXTS}
    columns |= {name: np.load(folder / f"{name}.npy") for name in _NUMBERS}
    if {len(column) for column in columns.values()} != {batch.num_rows}:
        raise ValueError("columns of different length")
    return Samples(**columns)


def samples_from_table(table: pa.Table) -> Samples:
    """Return the samples of an Arrow table made by ``samples_table``."""
    (batch,) = table.combine_chunks().to_batches() or [
        pa.RecordBatch.from_pylist([], schema=table.schema)
    ]
    names = pa.array([role.value for role in ROLES])

    def numpy_column(values: Any, dtype: Any) -> npt.NDArray[Any]:
        return np.asarray(values.to_numpy(zero_copy_only=False)).astype(dtype, copy=False)

    return Samples(
        sample_id=ArrowStrings(batch.column("sample_id")),
        class_id=numpy_column(batch.column("class_id"), np.int32),
        role=numpy_column(pc.index_in(batch.column("role"), value_set=names), np.int8),
        source_id=ArrowStrings(batch.column("source_id")),
        source_split=ArrowStrings(batch.column("source_split")),
        evaluated=numpy_column(batch.column("evaluated"), np.bool_),
    )


def write_part(path: Path, part: Part, progress: Callable[[int, int], None]) -> None:
    """Write one part as Parquet; the features are not copied on the way."""
    samples = samples_table(part.samples)
    for name, table in part.features.items():
        if isinstance(table, Sequences):
            samples = samples.append_column(_length(name), pa.array(table.lengths.astype(np.int32)))
    small = list(samples.schema.names)
    schema = samples.schema
    for name, table in part.features.items():
        schema = schema.append(pa.field(name, _feature_type(table), nullable=False))
    features = [
        f"{name}.list.element" + ".list.element" * isinstance(table, Sequences)
        for name, table in part.features.items()
    ]
    with pq.ParquetWriter(
        path,
        schema,
        compression=dict.fromkeys(small, "zstd") | dict.fromkeys(features, "none"),
        use_dictionary=["role"],
        write_statistics=small,
        data_page_size=1 << 30,
        data_page_version="1.0",
    ) as writer:
        for rows in _row_groups(part.features):
            progress(rows.start, len(part.samples))
            count = rows.stop - rows.start
            arrays = [c.combine_chunks() for c in samples.slice(rows.start, count).columns]
            arrays += [_lists(table, rows) for table in part.features.values()]
            writer.write_table(pa.table(arrays, schema=schema), row_group_size=count)


def _length(modality: str) -> str:
    """Return the name of the column that holds how many steps each row has."""
    return f"{modality}_length"


def _feature_type(table: Features) -> Any:
    """Return the Arrow type of a modality's column."""
    vector = pa.list_(pa.float32(), table.shape[1])
    return pa.list_(vector) if isinstance(table, Sequences) else vector


def _row_groups(features: Mapping[str, Features]) -> Iterator[slice]:
    """Yield ranges of rows in which no modality has more than ``ROW_GROUP_BYTES``."""
    rows = len(next(iter(features.values())))
    heaviest = np.zeros(rows, np.int64)
    for table in features.values():
        steps = table.lengths if isinstance(table, Sequences) else np.ones(rows, np.int64)
        heaviest = np.maximum(heaviest, 4 * table.shape[1] * steps)
    ends = np.cumsum(heaviest)
    start, before = 0, 0
    while start < rows:
        stop = int(np.searchsorted(ends, before + ROW_GROUP_BYTES, side="right"))
        stop = min(max(stop, start + 1), start + _MAX_ROWS_PER_GROUP)
        yield slice(start, stop)
        start, before = stop, int(ends[stop - 1])


def _lists(table: Features, rows: slice) -> Any:
    """Return some rows of a modality as an Arrow array of its column's type."""
    steps = rows
    if isinstance(table, Sequences):
        starts = table.starts[rows.start : rows.stop + 1]
        steps = slice(int(starts[0]), int(starts[-1]))
    block = np.ascontiguousarray(values_of(table)[steps], dtype="<f4")
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), block.shape[1])
    if not isinstance(table, Sequences):
        return vectors
    offsets = pa.array((starts - starts[0]).astype(np.int32))
    return pa.ListArray.from_arrays(offsets, vectors)


def write_vectors(path: Path, keys: Sequence[str], vectors: npt.NDArray[np.float32]) -> None:
    """Write keyed vectors (a text set) as a small Parquet file."""
    flat = pa.array(np.ascontiguousarray(vectors, dtype="<f4").reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    pq.write_table(pa.table({"key": pa.array(list(keys)), "vector": column}), path)


def read_vectors(path: Path) -> tuple[tuple[str, ...], npt.NDArray[np.float32]]:
    """Read what ``write_vectors`` wrote."""
    table = pq.ParquetFile(path).read().combine_chunks()
    column = table.column("vector").chunk(0)
    values = column.flatten()
    # The buffer itself: Arrow's own conversion imports pandas first.
    flat = np.frombuffer(values.buffers()[1], "<f4", len(values), 4 * values.offset)
    vectors = flat.reshape(len(column), column.type.list_size)
    return tuple(table.column("key").to_pylist()), vectors


def read_samples(path: Path) -> Samples:
    """Read the samples table of a part file."""
    with _parquet_errors(path):
        names = ["sample_id", "class_id", "role", "source_id", "source_split", "evaluated"]
        return samples_from_table(pq.ParquetFile(path).read(columns=names))


def read_lengths(path: Path, modality: str) -> Int64:
    """Read how many steps each row of a modality has [N]."""
    with _parquet_errors(path):
        column = pq.ParquetFile(path).read(columns=[_length(modality)]).column(0)
    return np.asarray(column.to_numpy()).astype(np.int64)


def value_extents(path: Path, column: str, width: int) -> list[Extent] | None:
    """Return where a feature column's raw values lie, or None where the shortcut cannot hold."""
    with _parquet_errors(path):
        metadata = pq.read_metadata(path)
    extents: list[Extent] = []
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for index in range(row_group.num_columns):
            chunk = row_group.column(index)
            if chunk.path_in_schema.split(".")[0] == column:
                break
        else:
            return None
        size = chunk.num_values * 4
        plain = chunk.compression == "UNCOMPRESSED" and not chunk.has_dictionary_page
        if not plain or chunk.num_values % width or chunk.total_compressed_size < size:
            return None
        end = chunk.data_page_offset + chunk.total_compressed_size
        extents.append(Extent(end - size, size))
    return extents


def copy_column(
    path: Path, column: str, shape: tuple[int, int], target: Path, expected: str
) -> None:
    """Copy a feature column into a ``.npy`` file and check its content digest.

    Args:
        path: the part's Parquet file.
        column: the modality.
        shape: rows (of sequences: steps) and width of the matrix.
        target: the ``.npy`` file to write (float32, C order).
        expected: the SHA-256 of the matrix (``array_digest``).

    Raises:
        UserError: neither the raw ranges nor the decoder give the expected content.
    """
    extents = value_extents(path, column, shape[1])
    if extents is not None:
        chunks = _range_chunks(path, extents)
        if _write_npy(chunks, shape, target) == expected:
            return
    if _write_npy(_decoded_chunks(path, column), shape, target) != expected:
        target.unlink(missing_ok=True)
        raise UserError(
            f"{path}: column {column} does not have the content the manifest names; the file is "
            "damaged. Restore it, or ingest the release again"
        )


def _range_chunks(path: Path, extents: Sequence[Extent]) -> Iterator[memoryview]:
    """Yield the bytes of several ranges; two buffers alternate, so one may still be in use."""
    buffers = [memoryview(bytearray(_CHUNK_BYTES)) for _ in range(2)]
    turn = 0
    with path.open("rb", buffering=0) as file:
        for extent in extents:
            file.seek(extent.offset)
            left = extent.size
            while left:
                view = buffers[turn][: min(left, _CHUNK_BYTES)]
                got = file.readinto(view)
                if not got:
                    return
                yield view[:got]
                left -= got
                turn = 1 - turn


def _decoded_chunks(path: Path, column: str) -> Iterator[memoryview]:
    """Yield a feature column's bytes through the ordinary Parquet decoder."""
    with _parquet_errors(path):
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            values = file.read_row_group(group, columns=[column]).column(0)
            for chunk in values.chunks:
                flat = chunk.flatten()
                flat = flat.flatten() if pa.types.is_fixed_size_list(flat.type) else flat
                flat = flat.to_numpy(zero_copy_only=False).astype("<f4", copy=False)
                yield np.ascontiguousarray(flat).view(np.uint8).data


def _write_npy(chunks: Iterator[memoryview], shape: tuple[int, int], target: Path) -> str:
    """Write a float32 ``.npy`` from chunks of bytes; return its content digest.

    Hashing runs in a second thread while the next chunk is written: on two cores the first read
    costs about the slower of the two instead of their sum.
    """
    digest = hashlib.sha256(f"<f4{shape}".encode())
    with target.open("wb") as out, ThreadPoolExecutor(1) as pool:
        np.lib.format.write_array_header_1_0(
            out, {"descr": "<f4", "fortran_order": False, "shape": shape}
        )
        pending: Future[None] | None = None
        for chunk in chunks:
            if pending is not None:
                pending.result()
            pending = pool.submit(digest.update, chunk)
            out.write(chunk)
        if pending is not None:
            pending.result()
    return digest.hexdigest()


class _parquet_errors:
    """Turn what the Parquet library raises on a damaged file into one clear line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (pa.ArrowException, OSError, KeyError)):
            raise UserError(
                f"{self._path}: not a readable Parquet file ({error}); restore it, or ingest the "
                "release again"
            ) from error
