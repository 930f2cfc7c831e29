"""``make stack``: PostgreSQL, an S3 server and MLflow on loopback, to develop against.

    python -m tests.infra.stack start | stop | status

It is no part of the package: a lab brings its own servers (``k8s/`` has manifests), and what runs
here guards nothing. Starting twice changes nothing; everything lies below ``.avzero/stack``, and
what is there is found again by the next start (with moto instead of Ceph: except objects).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.infra.ceph import Rgw
from tests.infra.servers import Mlflow, Moto, Postgres, ServerError, port_is_taken, s3_environment

FOLDER = Path(os.environ.get("AVZERO_STACK", ".avzero/stack")).absolute()
PORTS = {"postgres": 15432, "s3": 19000, "mlflow": 15000}
BUCKET = "avzero"


class Stack:
    """The three servers below a folder; without ``ceph`` moto is the S3 server."""

    def __init__(
        self, folder: Path = FOLDER, ports: dict[str, int] = PORTS, ceph: bool = True
    ) -> None:
        self.folder = folder
        self.postgres = Postgres(folder / "postgres", ports["postgres"])
        s3 = folder / "s3"
        self.s3 = Rgw(s3, ports["s3"]) if ceph and not Rgw.missing() else Moto(s3, ports["s3"])
        self.mlflow = Mlflow(
            folder / "mlflow",
            ports["mlflow"],
            self.postgres.url,
            f"s3://{BUCKET}/mlflow",
            self.s3.url,
        )

    def start(self) -> None:
        """Start what does not run.

        Raises:
            ServerError: something is missing, or a port is another program's.
        """
        if reason := Postgres.missing():
            raise ServerError(reason)
        for server in (self.postgres, self.s3, self.mlflow):
            if not server.alive() and port_is_taken(server.port):
                raise ServerError(
                    f"port {server.port} is taken by another program; end it, or set "
                    "AVZERO_STACK_PORTS=postgres,s3,mlflow to three others"
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        with _took("PostgreSQL"):
            self.postgres.start()
        with _took(self.s3.name):
            self.s3.start()
            self._make_bucket()
        with _took("MLflow (the first time it makes its tables)"):
            self.mlflow.start()

    def _make_bucket(self) -> None:
        import boto3

        os.environ.update(s3_environment(self.s3.url))
        client = boto3.Session().client("s3")
        if BUCKET not in {b["Name"] for b in client.list_buckets()["Buckets"]}:
            client.create_bucket(Bucket=BUCKET)

    def stop(self) -> None:
        """End what runs, the clients first."""
        for server in (self.mlflow, self.s3, self.postgres):
            server.stop()

    def lines(self) -> list[str]:
        """Return what a person wants to know: the two URLs, what to export, how to stop."""
        running = {
            "MLflow": (self.mlflow.url, self.mlflow.alive()),
            "S3": (f"{self.s3.url}  bucket {BUCKET}; {self.s3.name}", self.s3.alive()),
            "PostgreSQL": (self.postgres.url, self.postgres.alive()),
        }
        lines = [
            f"{name:<11}{url if alive else 'does not run'}"
            for name, (url, alive) in running.items()
        ]
        if all(alive for _, alive in running.values()):
            lines += ["", "For this shell:"]
            lines += [f"  export {k}={v}" for k, v in s3_environment(self.s3.url).items()]
            lines += [
                f"  export AVZERO_STORE=s3://{BUCKET}/store",
                "",
                f"Then:    avzero sweep jobs/demo.yaml --tracking {self.mlflow.url}",
                f"Stop:    make stack-stop      (data stays in {self.folder})",
            ]
        else:
            lines += ["", "Start:   make stack"]
        return lines


@contextmanager
def _took(what: str) -> Iterator[None]:
    """Say what is being started and how long it took."""
    print(f"{what} …", end=" ", flush=True)
    start = time.monotonic()
    yield
    print(f"{time.monotonic() - start:.1f} s", flush=True)


def main() -> None:
    """Run one of the three commands."""
    command = sys.argv[1] if len(sys.argv) == 2 else ""
    if command not in ("start", "stop", "status"):
        sys.exit(__doc__)
    own = os.environ.get("AVZERO_STACK_PORTS")
    ports = dict(zip(PORTS, map(int, own.split(",")), strict=True)) if own else PORTS
    stack = Stack(ports=ports)
    try:
        if command == "start":
            stack.start()
            print()
        elif command == "stop":
            stack.stop()
    except ServerError as error:
        print()
        sys.stderr.write(f"make stack: {error}\n")
        sys.exit(2)
    print("\n".join(stack.lines()))


if __name__ == "__main__":
    main()
