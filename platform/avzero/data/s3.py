"""Objects in a bucket: ``s3://bucket/prefix``, on any server that speaks S3.

What servers do differently is kept out of what avzero relies on. Some ignore conditional writes
and some let several writers win; some refuse the SDK's checksums and some never look at them. So an
object carries the SHA-256 of its content as metadata, which is compared whenever it is read, and
``create`` finds out by reading whether what is stored is its own.

The endpoint comes from ``AWS_ENDPOINT_URL_S3``, credentials from the SDK's usual places.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

from avzero.canon import sha256_file, sha256_hex
from avzero.data.storage import Damaged, disk_errors
from avzero.errors import UserError

ATTEMPTS = 8
"""Per request; with the SDK's pauses about half a minute, more than a gateway's restart takes."""
_FIRST_ATTEMPTS = 3
"""When a store is opened: a wrong address is told within seconds."""
_READS = 4
"""How often a body that was cut off or altered is asked for."""
_CONNECT_SECONDS, _ANSWER_SECONDS = 5, 60
_SHA256, _WRITER = "sha256", "writer"
"""Names of our metadata."""

_MISSING = "no such bucket; create it, or correct the URL"
_CLOCK = "this machine's clock is wrong; set it"
_EXPIRED = "the credentials have expired; get new ones"
_REMEDIES = {
    "404": _MISSING,
    "NoSuchBucket": _MISSING,
    "InvalidAccessKeyId": "the server does not know this access key; check AWS_ACCESS_KEY_ID and "
    "that AWS_ENDPOINT_URL_S3 names the right server",
    "SignatureDoesNotMatch": "the secret key is wrong; check AWS_SECRET_ACCESS_KEY",
    "RequestTimeTooSkewed": _CLOCK,
    "RequestExpired": _CLOCK,
    "ExpiredToken": _EXPIRED,
    "QuotaExceeded": "the bucket is full; free some space, or choose another store",
}
_DENIED = ("403", "AccessDenied", "AllAccessDisabled")
_OVERLOADED = ("500", "502", "503", "504", "InternalError", "ServiceUnavailable", "SlowDown")


class S3Storage:
    """Objects in a bucket below a prefix; see ``storage.Storage``.

    Args:
        url: ``s3://bucket[/prefix]``.
        check: ask the server whether the bucket can be listed. A worker whose driver has asked
            does not ask again: it would fail where waiting helps.

    Raises:
        UserError: nobody answers, no such bucket, or the credentials do not open it.
    """

    def __init__(self, url: str, check: bool = True) -> None:
        import boto3

        # RGW refuses the trailers that newer SDKs add unasked. pyarrow's SDK, which Ray uses, can
        # be told only so.
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        self.url = url.rstrip("/")
        bucket, _, prefix = self.url.removeprefix("s3://").partition("/")
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._endpoint = "the server"
        with self._errors(""):
            # Of its own: the SDK's common one keeps the first credentials it saw.
            session = boto3.Session()
            if check:
                first = session.client("s3", config=_config(_FIRST_ATTEMPTS))
                self._endpoint = first.meta.endpoint_url
                # Not HeadBucket: without a body it cannot say what is wrong.
                first.list_objects_v2(Bucket=bucket, Prefix=self._prefix, MaxKeys=1)
            self._client: Any = session.client("s3", config=_config(ATTEMPTS))
            self._endpoint = self._client.meta.endpoint_url

    @contextmanager
    def _errors(self, key: str, writing: bool = False) -> Iterator[None]:
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
            raise UserError(f"{where}: {self._remedy(code, error, writing)}") from error
        except (BotoCoreError, Boto3Error, RetriesExceededError, ValueError) as error:
            raise UserError(f"{where}: {self._trouble(error, writing)}") from error

    def _remedy(self, code: str, error: Exception, writing: bool) -> str:
        """Return what a refusal means and what to do about it."""
        if code in _DENIED:
            return (
                "may be read but not written with these credentials; use others, have the bucket's "
                "policy changed, or choose another store"
                if writing
                else "access denied; check the credentials and the bucket's policy"
            )
        if code in _OVERLOADED:
            return (
                f"{self._endpoint} is overloaded or failing ({code}, {ATTEMPTS} tries); run the "
                "same command again when it is well"
            )
        return _REMEDIES.get(
            code, f"{self._endpoint} refused ({code}: {error}); check the URL and credentials"
        )

    def _trouble(self, error: Exception, writing: bool) -> str:
        """Return what an error on this side, or on the way, means."""
        from boto3.exceptions import S3UploadFailedError
        from botocore.exceptions import ClientError, NoCredentialsError, PartialCredentialsError

        cause = error.__context__
        if isinstance(error, S3UploadFailedError) and isinstance(cause, ClientError):
            code = str(cause.response.get("Error", {}).get("Code", ""))
            return self._remedy(code, cause, writing)
        if isinstance(error, NoCredentialsError | PartialCredentialsError):
            return (
                "there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                "AWS_PROFILE"
            )
        return f"cannot be reached ({error}); check AWS_ENDPOINT_URL_S3, the URL and the network"

    def read(self, key: str) -> bytes:
        """Return an object's bytes.

        Raises:
            KeyError: it does not exist.
            Damaged: what comes is not what was written, however often it is asked for.
        """
        from botocore.exceptions import HTTPClientError, IncompleteReadError

        problem = ""
        for number in range(_READS):
            time.sleep(0.2 * number)
            with self._errors(key):
                answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key)
            try:
                data: bytes = answer["Body"].read()
            except (HTTPClientError, IncompleteReadError) as error:
                problem = str(error)  # cut off on its way: the SDK repeats requests, not bodies
                continue
            problem = _difference(answer, len(data), sha256_hex(data))
            if not problem:
                return data
        raise Damaged(f"{self.url}/{key}: {problem} ({_READS} tries)")

    def write(self, key: str, data: bytes) -> None:
        """Store bytes under a key, replacing what was there."""
        with self._errors(key, writing=True):
            self._client.put_object(
                Bucket=self._bucket,
                Key=self._prefix + key,
                Body=data,
                Metadata={_SHA256: sha256_hex(data)},
            )

    def create(self, key: str, data: bytes) -> bool:
        """Store bytes under a key that has none; return whether they are what is there now.

        A server that ignores the condition, or lets several writers pass, is not found out:
        nothing may rest on being the only one who is told yes.
        """
        from botocore.exceptions import ClientError

        nonce = uuid.uuid4().hex
        with self._errors(key, writing=True):
            if self.size(key) is not None:
                return False
            try:
                self._client.put_object(
                    Bucket=self._bucket,
                    Key=self._prefix + key,
                    Body=data,
                    IfNoneMatch="*",
                    Metadata={_SHA256: sha256_hex(data), _WRITER: nonce},
                )
            except ClientError as error:
                status = error.response["ResponseMetadata"]["HTTPStatusCode"]
                if status == 501:  # no such thing here: the look above has to do
                    self.write(key, data)
                elif status in (409, 412):
                    # Perhaps it was us: an answer was lost, and the SDK asked again.
                    return bool(self._head(key)["Metadata"].get(_WRITER) == nonce)
                else:
                    raise
        return True

    def upload(self, key: str, path: Path) -> None:
        """Store a local file under a key."""
        digest = sha256_file(path)
        with self._errors(key, writing=True):
            self._client.upload_file(
                str(path),
                self._bucket,
                self._prefix + key,
                ExtraArgs={"Metadata": {_SHA256: digest}},
            )

    def download(self, key: str, path: Path) -> None:
        """Copy an object to a local file; what was there stays if that fails.

        Raises:
            KeyError: it does not exist.
            Damaged: what comes is not what was written, however often it is asked for.
        """
        scratch = path.with_name(f".tmp-{uuid.uuid4().hex}")
        problem = ""
        try:
            for _ in range(_READS):
                with self._errors(key), disk_errors(path):
                    # In parts, side by side; it repeats what was cut off.
                    self._client.download_file(self._bucket, self._prefix + key, str(scratch))
                    head = self._head(key)
                problem = _difference(head, scratch.stat().st_size, sha256_file(scratch))
                if not problem:
                    scratch.replace(path)
                    return
        finally:
            scratch.unlink(missing_ok=True)
        raise Damaged(f"{self.url}/{key}: {problem} ({_READS} tries)")

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
                return int(self._head(key)["ContentLength"])
        except KeyError:
            return None

    def _head(self, key: str) -> dict[str, Any]:
        return dict(self._client.head_object(Bucket=self._bucket, Key=self._prefix + key))

    def delete(self, key: str) -> None:
        """Remove an object; a missing one is no error."""
        with self._errors(key, writing=True):
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + key)

    def arrow(self, folder: str) -> tuple[str, Any] | None:
        """Return a folder as pyarrow, and so Ray, sees it: its path and the file system."""
        scheme, _, host = str(self._endpoint).partition("://")
        system = PatientFileSystem(host, scheme, self._client.meta.region_name)
        return f"{self._bucket}/{self._prefix}{folder}", system


class PatientFileSystem(S3FileSystem):  # type: ignore[misc]
    """pyarrow's view of an S3 server, explicit where its defaults bite.

    By default it gives up after three tries in half a second; and its pickles forget whatever
    else was chosen, so Ray's workers would have the default again.
    """

    def __init__(self, host: str, scheme: str, region: str) -> None:
        self._arguments = (host, scheme, region)
        super().__init__(
            endpoint_override=host,
            scheme=scheme,
            region=region,
            connect_timeout=_CONNECT_SECONDS,
            request_timeout=_ANSWER_SECONDS,
            retry_strategy=AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        )

    def __reduce__(self) -> tuple[type[PatientFileSystem], tuple[str, str, str]]:
        return PatientFileSystem, self._arguments


def _config(attempts: int) -> Any:
    """Return the SDK's settings: which errors are tried again, how often and for how long."""
    from botocore.config import Config

    return Config(
        retries={"mode": "standard", "total_max_attempts": attempts},
        connect_timeout=_CONNECT_SECONDS,
        read_timeout=_ANSWER_SECONDS,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        tcp_keepalive=True,
    )


def _difference(answer: dict[str, Any], size: int, digest: str) -> str:
    """Return how content differs from what the answer's head announces; nothing if it does not.

    Objects that another program wrote have no digest; for them the length must do.
    """
    if size != answer["ContentLength"]:
        return f"{size} of {answer['ContentLength']} bytes arrived"
    written = answer.get("Metadata", {}).get(_SHA256)
    if written is not None and written != digest:
        return f"the content has SHA-256 {digest[:12]}…, {written[:12]}… was written"
    return ""
