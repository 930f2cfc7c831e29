"""Many small JSON records as one Parquet file, which is never trusted beyond what it was made of.

The JSON records are the truth: whoever runs a trial writes one, all or nothing, and nobody edits
them. Reading ten thousand takes a second on a disk and minutes on S3, so they are kept once more
as a table. Every row carries its record's key and mark (size and time, or entity tag); a row whose
record has another mark by now, or is gone, is not used, and what the table lacks is read from the
records. So a table that is missing, old, cut off or of another version costs time and no
correctness, and it does not matter who writes it, when, or how often.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from avzero.data.storage import Damaged, Storage
from avzero.errors import UserError

KEY, MARK = "key", "mark"
_READERS = 16
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, IndexError, pa.ArrowException)

Row = Callable[[str, dict[str, Any]], dict[str, Any]]
"""Makes a table's row from a record's key and content."""


def compacted(
    storage: Storage, prefix: str, target: str, schema: pa.Schema, row: Row, problems: list[str]
) -> pa.Table:
    """Return the records below a prefix as a table sorted by key; bring its Parquet up to date.

    Args:
        storage: where both are.
        prefix: of the records' keys; ``.json`` below it is a record.
        target: key of the Parquet file.
        schema: of the table; includes ``KEY`` and ``MARK``.
        row: makes the other columns of one record.
        problems: gets a sentence for every record that cannot be read; the next call tries again.
    """
    marks = {k: m for k, m in storage.marks(prefix).items() if k.endswith(".json")}
    kept = _kept(storage, target, schema)
    have = (
        {} if kept is None else dict(zip(*(kept[c].to_pylist() for c in (KEY, MARK)), strict=True))
    )
    valid = [marks.get(key) == mark for key, mark in have.items()]
    wanted = [key for key, mark in marks.items() if have.get(key) != mark]
    if kept is not None and not wanted and all(valid):
        return kept
    fresh = _table(_read(storage, wanted, row, problems), marks, schema, problems)
    parts = [fresh] if kept is None else [fresh, kept.filter(pa.array(valid, pa.bool_()))]
    table = pa.concat_tables(parts).sort_by(KEY)
    if len(fresh) or not all(valid):
        _write(storage, target, table)
    return table


def read_all(storage: Storage, keys: Sequence[str]) -> list[bytes | None]:
    """Return the content of several keys; S3 is asked in parallel.

    None for those that are gone; nothing (``b""``), which no reader takes, for damaged ones.
    """

    def read(key: str) -> bytes | None:
        try:
            return storage.read(key)
        except KeyError:
            return None
        except Damaged:
            return b""

    if storage.local_path("x") is not None:  # threads would only wait for each other
        return [read(key) for key in keys]
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(read, keys))


def _read(
    storage: Storage, keys: Sequence[str], row: Row, problems: list[str]
) -> dict[str, dict[str, Any]]:
    """Return the rows of records by key; a record that makes none is named in ``problems``."""
    rows = {}
    for key, data in zip(keys, read_all(storage, keys), strict=True):
        if data is not None:  # else removed since it was listed
            try:
                rows[key] = row(key, json.loads(data))
            except _UNREADABLE as error:
                problems.append(_problem(key, error))
    return rows


def _table(
    rows: dict[str, dict[str, Any]], marks: dict[str, str], schema: pa.Schema, problems: list[str]
) -> pa.Table:
    """Return rows as a table, without those whose values have another type than the schema says."""
    whole = [row | {KEY: key, MARK: marks[key]} for key, row in rows.items()]
    try:
        return pa.Table.from_pylist(whole, schema=schema)
    except _UNREADABLE:
        fit = []
        for row in whole:
            try:
                pa.Table.from_pylist([row], schema=schema)
                fit.append(row)
            except _UNREADABLE as error:
                problems.append(_problem(row[KEY], error))
        return pa.Table.from_pylist(fit, schema=schema)


def _problem(key: str, error: Exception) -> str:
    """Return the sentence on a record that cannot be read."""
    why = f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
    return f"{key}: not a record this avzero can read ({why}); left out"


def _kept(storage: Storage, target: str, schema: pa.Schema) -> pa.Table | None:
    """Return the table as it was last written; None where it is absent, damaged or another's."""
    try:
        # One thread: reading takes milliseconds, and threads may outlive a short command.
        table = pq.ParquetFile(io.BytesIO(storage.read(target))).read(use_threads=False)
    except (KeyError, Damaged, OSError, pa.ArrowException):
        return None
    return table if table.schema.equals(schema, check_metadata=True) else None


def _write(storage: Storage, target: str, table: pa.Table) -> None:
    """Keep a table for the next reader, where the store can be written to."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    # A report of somebody else's store works as well; it takes longer.
    with suppress(UserError, OSError):
        storage.write(target, buffer.getvalue())
