"""One adapter for the two places avzero keeps things: a local folder or ``s3://bucket/prefix``.

Correctness never depends on locks or conditional writes (they differ from store to store): keys
are content-addressed or carry an identity, and what makes an object visible is a manifest that is
written last.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from avzero.errors import UserError


class Damaged(UserError):
    """An object's content is not what was written under its key."""


class Storage(Protocol):
    """Whole objects by key (``a/b/c``, forward slashes); every write is all or nothing."""

    url: str

    def read(self, key: str) -> bytes:
        """Return an object's bytes. Raises ``KeyError`` when it does not exist, or ``Damaged``."""

    def write(self, key: str, data: bytes) -> None:
        """Store bytes under a key, replacing what was there."""

    def create(self, key: str, data: bytes) -> bool:
        """Store bytes under a key that has none; return whether they are what is there now.

        A saving, not a lock: on some stores two writers are told yes at the same moment.
        """

    def upload(self, key: str, path: Path) -> None:
        """Store a local file under a key."""

    def download(self, key: str, path: Path) -> None:
        """Copy an object to a local file. Raises ``KeyError`` when it does not exist, or
        ``Damaged``."""

    def local_path(self, key: str) -> Path | None:
        """Return the object's own file where objects are local files, else None."""

    def keys(self, prefix: str) -> list[str]:
        """Return the sorted keys that start with ``prefix``."""

    def marks(self, prefix: str) -> dict[str, str]:
        """Return, for the keys that start with ``prefix``, text that changes with the content."""

    def size(self, key: str) -> int | None:
        """Return an object's size in bytes, None when it does not exist."""

    def delete(self, key: str) -> None:
        """Remove an object; a missing one is no error."""

    def arrow(self, folder: str) -> tuple[str, Any] | None:
        """Return a folder as pyarrow, and so Ray, sees it: its path and the file system; None
        where objects are local files."""


def open_storage(url: str, check: bool = True) -> Storage:
    """Open ``url``: a folder (created when first written to) or ``s3://bucket[/prefix]``.

    Args:
        url: where.
        check: ask a bucket's server at once. Not in a worker: its driver has asked.

    Raises:
        UserError: the scheme is unknown, or the bucket cannot be reached.
    """
    if url.startswith("s3://"):
        from avzero.data.s3 import S3Storage

        return S3Storage(url, check)
    if "://" in url:
        raise UserError(f"{url}: unknown kind of storage; use a folder or s3://bucket/prefix")
    return LocalStorage(Path(url))


@contextmanager
def disk_errors(path: Path, elsewhere: str = "choose another --store") -> Iterator[None]:
    """Turn the file system's refusals into one clear line that ends with ``elsewhere``."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"{path}: no space left on the device; free some, or {elsewhere}"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR):
            raise UserError(f"{path}: cannot be written ({error.strerror}); {elsewhere}") from error
        raise


def require_space(folder: Path, needed: int) -> None:
    """Refuse early when a folder's file system has less than ``needed`` bytes free."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{folder}: {needed / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free on the device; "
            "free some, or choose another place"
        )


class LocalStorage:
    """Objects as files below a folder; a write goes to a temporary file that is then renamed."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self.url = str(self.root)

    def _path(self, key: str) -> Path:
        path = (self.root / key).absolute()
        if ".." in Path(key).parts or not path.is_relative_to(self.root):
            raise ValueError(f"key {key!r} leaves the storage root")
        return path

    def read(self, key: str) -> bytes:
        """Return an object's bytes. Raises ``KeyError`` when it does not exist."""
        try:
            return self._path(key).read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise KeyError(key) from error

    def write(self, key: str, data: bytes) -> None:
        """Store bytes under a key, replacing what was there."""
        with self._replacing(self._path(key)) as temporary, temporary.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())

    def create(self, key: str, data: bytes) -> bool:
        """Store bytes under a key that has none; return whether they are what is there now."""
        if self._path(key).exists():
            return False
        self.write(key, data)
        return True

    def upload(self, key: str, path: Path) -> None:
        """Store a local file under a key; a hard link where the file system allows one."""
        with self._replacing(self._path(key)) as temporary:
            try:
                os.link(path, temporary)
            except OSError:
                require_space(self.root, path.stat().st_size)
                shutil.copyfile(path, temporary)
            # On the disk before a manifest may name it.
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())

    def download(self, key: str, path: Path) -> None:
        """Copy an object to a local file. Raises ``KeyError`` when it does not exist."""
        source = self._path(key)
        if not source.is_file():
            raise KeyError(key)
        with disk_errors(path):
            shutil.copyfile(source, path)

    def local_path(self, key: str) -> Path | None:
        """Return the object's file."""
        return self._path(key)

    def keys(self, prefix: str) -> list[str]:
        """Return the sorted keys that start with ``prefix``."""
        folder = self._path(prefix.rpartition("/")[0])
        found = (
            path.relative_to(self.root).as_posix()
            for path in (folder.rglob("*") if folder.is_dir() else ())
            if path.is_file() and not path.name.startswith(".tmp-")
        )
        return sorted(key for key in found if key.startswith(prefix))

    def marks(self, prefix: str) -> dict[str, str]:
        """Return size and time of every file whose key starts with ``prefix``."""
        found = {}
        # Thousands of files: scandir asks the system once per file, rglob several times.
        waiting = [self._path(prefix.rpartition("/")[0])]
        while waiting:
            folder = waiting.pop()
            try:
                entries = list(os.scandir(folder))
            except (FileNotFoundError, NotADirectoryError):
                continue
            for entry in entries:
                if entry.is_dir():
                    waiting.append(Path(entry.path))
                elif not entry.name.startswith(".tmp-"):
                    key = entry.path[len(self.url) :].lstrip("/")
                    with suppress(FileNotFoundError):  # gone since it was listed
                        at = entry.stat()
                        found[key] = f"{at.st_size}-{at.st_mtime_ns}"
        return {key: mark for key, mark in sorted(found.items()) if key.startswith(prefix)}

    def size(self, key: str) -> int | None:
        """Return an object's size in bytes, None when it does not exist."""
        path = self._path(key)
        return path.stat().st_size if path.is_file() else None

    def delete(self, key: str) -> None:
        """Remove an object; a missing one is no error."""
        self._path(key).unlink(missing_ok=True)

    def arrow(self, folder: str) -> tuple[str, Any] | None:
        """Return None: objects are local files."""
        del folder
        return None

    @contextmanager
    def _replacing(self, path: Path) -> Iterator[Path]:
        """Yield a temporary path beside ``path``; rename it on success, remove it on failure."""
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".tmp-{uuid.uuid4().hex}")
            try:
                yield temporary
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
