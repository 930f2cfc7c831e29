"""The tier of hosts: skipped with a reason where network namespaces cannot be made."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.net import missing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies here, and skip it where it cannot run."""
    own = [item for item in items if Path(__file__).parent in Path(item.path).parents]
    for item in own:
        item.add_marker(pytest.mark.hosts)
        item.add_marker(pytest.mark.timeout(900))
    if own and missing():
        for item in own:
            item.add_marker(pytest.mark.skip(reason=f"hosts: {missing()}"))


@pytest.fixture(scope="module")
def ground() -> Iterator[Path]:
    """A folder for the hosts' files that no host hides behind its own ``/tmp``."""
    folder = Path(tempfile.mkdtemp(prefix="avzero-hosts-", dir="/var/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
