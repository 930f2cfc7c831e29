"""S3 servers for tests: moto always, Ceph's gateway where installed, and one the user names."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest

from tests.conftest import USERS_AWS, USERS_BUCKET
from tests.infra.ceph import Rgw
from tests.infra.servers import free_port, s3_environment


@dataclass
class Endpoint:
    """A server and a bucket on it."""

    name: str
    url: str
    bucket: str
    """``s3://bucket[/prefix]``."""
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port, for a proxy."""
        parts = urlparse(self.url)
        if parts.scheme != "http":
            pytest.skip("faults are injected into plain HTTP only")
        return str(parts.hostname), parts.port or 80

    def client(self) -> Any:
        """Return a boto3 client."""
        import boto3

        # A session of its own: the common one keeps the first credentials it saw.
        return boto3.Session().client("s3", endpoint_url=self.url)


@contextmanager
def moto() -> Iterator[Endpoint]:
    """A moto server in this process."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = Endpoint("moto", f"http://{host}:{port}", "s3://lab")
    endpoint.client().create_bucket(Bucket="lab")
    yield endpoint
    server.stop()


@contextmanager
def rgw() -> Iterator[Endpoint]:
    """Ceph's gateway, on disk; skips where it is not installed."""
    if reason := Rgw.missing():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="avzero-rgw-"))
    server = Rgw(folder, free_port())
    try:
        server.start()
        endpoint = Endpoint("rgw", server.url, "s3://lab", s3_environment(server.url))
        with pytest.MonkeyPatch.context() as patch:
            for name, value in endpoint.environment.items():
                patch.setenv(name, value)
            endpoint.client().create_bucket(Bucket="lab")
        yield endpoint
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def yours() -> Iterator[Endpoint]:
    """The bucket in ``AVZERO_TEST_S3``, with the credentials and the endpoint of the caller."""
    if not USERS_BUCKET:
        pytest.skip("AVZERO_TEST_S3=s3://bucket/prefix names no store of yours to test")
    url = USERS_AWS.get("AWS_ENDPOINT_URL_S3", "https://s3.amazonaws.com")
    bucket = f"{USERS_BUCKET}/test-{uuid.uuid4().hex[:8]}"
    yield Endpoint("yours", url, bucket, USERS_AWS)


SERVERS = {"moto": moto, "rgw": rgw, "yours": yours}
