"""Reports: records in the store become tables, pages and progress displays.

For notebooks, ``from avzero.report import trials, results, recalls, published_results``: each
returns an Arrow table (``.to_pandas()``), scores in percent; ``report.records`` says what its
columns mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from avzero import DEFAULT_STORE

if TYPE_CHECKING:
    import pyarrow as pa


def trials(*sweeps: str, store: str = DEFAULT_STORE) -> pa.Table:
    """Return a row per trial that has ended, of some sweeps or all.

    Raises:
        UserError: a sweep does not exist.
    """
    from avzero.data.storage import open_storage
    from avzero.report.records import load

    return load(open_storage(store), sweeps).trials.drop_columns(["key", "mark"])


def results(*sweeps: str, store: str = DEFAULT_STORE) -> pa.Table:
    """Return a row per seed whose TEST has been scored, of some sweeps or all.

    ``current`` is false for results of an earlier winner of a search that went on: those stay in
    the store and count as looks at TEST, and reports leave them out.

    Raises:
        UserError: a sweep does not exist.
    """
    from avzero.data.storage import open_storage
    from avzero.report.records import current, load

    records = load(open_storage(store), sweeps)
    table = records.results.drop_columns(["key", "mark"])
    return table.append_column("current", current(records))


def recalls(*sweeps: str, store: str = DEFAULT_STORE) -> pa.Table:
    """Return a row per class and seed: recall among all classes, and among unseen ones (``zsl``).

    Raises:
        UserError: a sweep does not exist.
    """
    from avzero.data.storage import open_storage
    from avzero.report.records import load, recall_table

    return recall_table(load(open_storage(store), sweeps))


def published_results() -> pa.Table:
    """Return the published rows with what their arithmetic says about them."""
    from avzero.report.records import published_table

    return published_table()
