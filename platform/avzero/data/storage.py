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


class Storage(Protocol):
    """Whole objects by key (``a/b/c``, forward slashes); every write is all or nothing."""

    url: str

    def read(self, key: str) -> bytes:
        """Return an object's bytes. Raises ``KeyError`` when it does not exist."""

    def write(self, key: str, data: bytes) -> None:
        """Store bytes under a key, replacing what was there."""

    def upload(self, key: str, path: Path) -> None:
        """Store a local file under a key."""

    def download(self, key: str, path: Path) -> None:
        """Copy an object to a local file. Raises ``KeyError`` when it does not exist."""

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


def open_storage(url: str) -> Storage:
    """Open ``url``: a folder (created when first written to) or ``s3://bucket[/prefix]``.

    Raises:
        UserError: the scheme is unknown, or the bucket cannot be reached.
    """
    if url.startswith("s3://"):
        return S3Storage(url)
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


class S3Storage:
    """Objects in a bucket below a prefix. The endpoint comes from ``AWS_ENDPOINT_URL_S3``."""

    def __init__(self, url: str) -> None:
        import boto3
        from botocore.config import Config

        self.url = url.rstrip("/")
        bucket, _, prefix = self.url.removeprefix("s3://").partition("/")
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        config = Config(
            retries={"mode": "standard", "max_attempts": 5}, connect_timeout=5, read_timeout=60
        )
        with self._errors(""):
            self._client: Any = boto3.client("s3", config=config)
            self._client.head_bucket(Bucket=bucket)

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        """Turn what S3 or the network refuses into one clear line; a missing key is KeyError."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError
        from s3transfer.exceptions import RetriesExceededError

        where = f"{self.url}/{key}" if key else self.url
        try:
            yield
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if key and code in ("404", "NoSuchKey"):
                raise KeyError(key) from error
            remedy = {
                "404": "no such bucket; create it or correct the URL",
                "NoSuchBucket": "no such bucket; create it or correct the URL",
                "403": "access denied; check the credentials and the bucket's policy",
                "AccessDenied": "access denied; check the credentials and the bucket's policy",
            }.get(code, f"the store refused ({code}: {error}); check the URL and credentials")
            raise UserError(f"{where}: {remedy}") from error
        except (BotoCoreError, Boto3Error, RetriesExceededError, ValueError) as error:
            raise UserError(
                f"{where}: cannot be reached ({error}); check AWS_ENDPOINT_URL_S3, the "
                "credentials and the network"
            ) from error

    def read(self, key: str) -> bytes:
        """Return an object's bytes. Raises ``KeyError`` when it does not exist."""
        import io

        buffer = io.BytesIO()
        with self._errors(key):
            # download_fileobj resumes a body cut off half-way; get_object().read() does not.
            self._client.download_fileobj(self._bucket, self._prefix + key, buffer)
        return buffer.getvalue()

    def write(self, key: str, data: bytes) -> None:
        """Store bytes under a key, replacing what was there."""
        with self._errors(key):
            self._client.put_object(Bucket=self._bucket, Key=self._prefix + key, Body=data)

    def upload(self, key: str, path: Path) -> None:
        """Store a local file under a key."""
        with self._errors(key):
            self._client.upload_file(str(path), self._bucket, self._prefix + key)

    def download(self, key: str, path: Path) -> None:
        """Copy an object to a local file. Raises ``KeyError`` when it does not exist."""
        with self._errors(key), disk_errors(path):
            self._client.download_file(self._bucket, self._prefix + key, str(path))

    def local_path(self, key: str) -> Path | None:
        """Return None: objects in a bucket are not local files."""
        del key
        return None

    def keys(self, prefix: str) -> list[str]:
        """Return the sorted keys that start with ``prefix``."""
        return sorted(self.marks(prefix))

    def marks(self, prefix: str) -> dict[str, str]:
        """Return size and entity tag of every object whose key starts with ``prefix``."""
        found = {}
        with self._errors(""):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix
            )
            for page in pages:
                for entry in page.get("Contents", ()):
                    key = entry["Key"].removeprefix(self._prefix)
                    found[key] = f"{entry['Size']}-{entry['ETag']}"
        return dict(sorted(found.items()))

    def size(self, key: str) -> int | None:
        """Return an object's size in bytes, None when it does not exist."""
        try:
            with self._errors(key):
                head = self._client.head_object(Bucket=self._bucket, Key=self._prefix + key)
        except KeyError:
            return None
        return int(head["ContentLength"])

    def delete(self, key: str) -> None:
        """Remove an object; a missing one is no error."""
        with self._errors(key):
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + key)
