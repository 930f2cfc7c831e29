"""Real servers on loopback for tests and ``make stack``: PostgreSQL, Ceph RGW or moto, MLflow.

Each class knows how to start one server below a folder and to end it by its pid, also from another
process than the one that started it. Nothing listens on anything but 127.0.0.1.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

LOOPBACK = "127.0.0.1"
KEY, SECRET = "avzero-stack", "avzero-stack-secret"
"""Credentials of the development S3 servers; they guard nothing."""
PATIENCE = 240.0
"""Seconds a server may take to answer; MLflow's first start makes its tables."""


class ServerError(Exception):
    """A server cannot be started; one line that says why and what to do."""


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def port_is_taken(port: int) -> bool:
    """Return whether somebody listens on a port of 127.0.0.1."""
    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) == 0


def s3_environment(url: str) -> dict[str, str]:
    """Return the environment of programs that use an S3 server of ours."""
    return {
        "AWS_ENDPOINT_URL_S3": url,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        # RGW refuses the checksum trailers that newer SDKs send unasked.
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    }


def answers(url: str, timeout: float = 2.0) -> bool:
    """Return whether an HTTP server answers, whatever it says."""
    try:
        with urllib.request.urlopen(url, timeout=timeout):  # noqa: S310 - loopback
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False


def wait_until(ready: Callable[[], bool], what: str, log: Path, alive: Callable[[], bool]) -> None:
    """Wait until a server is ready.

    Raises:
        ServerError: it ended, or took longer than ``PATIENCE``; with the last line of its log.
    """
    deadline = time.monotonic() + PATIENCE
    while not ready():
        ended = not alive()
        if ended or time.monotonic() > deadline:
            lines = log.read_text(errors="replace").splitlines() if log.exists() else []
            why = "has ended" if ended else f"does not answer after {PATIENCE:.0f} s"
            raise ServerError(f"{what} {why} ({lines[-1] if lines else 'no output'}); see {log}")
        time.sleep(0.1)


class Process:
    """A daemon known by a file with its pid and start time, so that no other one is ended."""

    def __init__(self, folder: Path, name: str) -> None:
        self.log = folder / f"{name}.log"
        self._file = folder / f"{name}.pid"

    @property
    def pid(self) -> int | None:
        """Its pid while it runs."""
        try:
            pid, born = map(int, self._file.read_text().split())
        except (FileNotFoundError, ValueError):
            return None
        return pid if _born(pid) == born else None

    def alive(self) -> bool:
        """Return whether it runs."""
        return self.pid is not None

    def start(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        """Start it in a session of its own."""
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command,
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._file.write_text(f"{process.pid} {_born(process.pid)}")

    def stop(self, grace: float = 15.0) -> None:
        """End it and what it started: politely, then not."""
        pid = self.pid
        if pid is not None:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, number)
                deadline = time.monotonic() + grace
                while self.alive() and time.monotonic() < deadline:
                    time.sleep(0.05)
                if not self.alive():
                    break
            # What it started may linger; the group is still its own.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        self._file.unlink(missing_ok=True)


def _born(pid: int) -> int:
    """Return a process's start time in clock ticks; 0 where there is none, or only a zombie."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if fields[0] == "Z" else int(fields[19])


class Postgres:
    """PostgreSQL with one database ``mlflow``; as root it runs under the account ``postgres``."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self._data = folder / "data"
        self._log = folder / "postgres.log"

    @staticmethod
    def missing() -> str:
        """Return what keeps it from running here; nothing when it can."""
        if _pg("initdb") is None:
            return "PostgreSQL is not installed (apt-get install postgresql)"
        if os.getuid() == 0 and not _has_account("postgres"):
            return "there is no account 'postgres' to run PostgreSQL under (it refuses root)"
        return ""

    @property
    def url(self) -> str:
        """Its SQLAlchemy URL."""
        return f"postgresql+psycopg2://postgres@{LOOPBACK}:{self.port}/mlflow"

    def alive(self) -> bool:
        """Return whether it runs."""
        return self._data.exists() and self._call("pg_ctl", "status", "-D", str(self._data)) == 0

    def start(self) -> None:
        """Start it, unless it runs; the first time make its files."""
        if self.alive():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if os.getuid() == 0:
            shutil.chown(self.folder, "postgres")
            if self._call("psql", "--version", cwd=self.folder):
                raise ServerError(
                    f"{self.folder}: the account 'postgres' may not enter; choose "
                    "a folder it may read"
                )
        if not self._data.exists():
            self._do(
                "initdb",
                "-D",
                str(self._data),
                "-U",
                "postgres",
                "-A",
                "trust",
                "--no-sync",
                "--locale=C.UTF-8",
            )
        options = f"-c listen_addresses={LOOPBACK} -p {self.port} -k '{self.folder}'"
        self._do(
            "pg_ctl", "-w", "-D", str(self._data), "-l", str(self._log), "-o", options, "start"
        )
        self._call("createdb", "-h", LOOPBACK, "-p", str(self.port), "-U", "postgres", "mlflow")

    def stop(self, mode: str = "fast") -> None:
        """Stop it."""
        if self.alive():
            self._do("pg_ctl", "-w", "-D", str(self._data), "-m", mode, "stop")

    def restart(self) -> None:
        """Stop it without asking its clients, and start it again."""
        self.stop()
        self.start()

    def query(self, sql: str) -> list[list[str]]:
        """Return the rows of a query as text."""
        done = self._run(
            "psql",
            "-h",
            LOOPBACK,
            "-p",
            str(self.port),
            "-U",
            "postgres",
            "-d",
            "mlflow",
            "-At",
            "-F",
            "\t",
            "-c",
            sql,
        )
        if done.returncode:
            raise ServerError(f"psql: {done.stderr.strip()}")
        return [line.split("\t") for line in done.stdout.splitlines()]

    def _do(self, program: str, *arguments: str) -> None:
        done = self._run(program, *arguments)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            raise ServerError(f"{program}: {lines[-1] if lines else 'failed'}; see {self._log}")

    def _call(self, program: str, *arguments: str, cwd: Path | None = None) -> int:
        return self._run(program, *arguments, cwd=cwd).returncode

    def _run(
        self, program: str, *arguments: str, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        prefix = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
        # Output to a file: the server that pg_ctl leaves behind would keep a pipe open.
        with (self.folder / ".out").open("w+") as out, (self.folder / ".err").open("w+") as err:
            done = subprocess.run(
                [*prefix, str(_pg(program)), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=cwd or "/",
                check=False,
            )
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(done.args, done.returncode, out.read(), err.read())


def _pg(program: str) -> Path | None:
    """Return a PostgreSQL program: of Debian's newest version, or from the path."""
    found = sorted(
        Path("/usr/lib/postgresql").glob(f"*/bin/{program}"), key=lambda p: float(p.parts[4])
    )
    path = found[-1] if found else shutil.which(program)
    return Path(path) if path else None


def _has_account(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


class _Web:
    """A server that is one process and answers HTTP on loopback."""

    def __init__(self, folder: Path, port: int, name: str) -> None:
        self.folder, self.port = folder, port
        self._process = Process(folder, name)

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://{LOOPBACK}:{self.port}"

    def alive(self) -> bool:
        """Return whether it runs."""
        return self._process.alive()

    def stop(self) -> None:
        """End it."""
        self._process.stop()


class Moto(_Web):
    """moto's S3 server: in memory, gone when it ends."""

    name = "moto (in memory: gone when it stops)"

    def __init__(self, folder: Path, port: int, env: Mapping[str, str] | None = None) -> None:
        super().__init__(folder, port, "moto")
        self._env = env

    def start(self) -> None:
        """Start it, unless it runs."""
        if not self.alive():
            self.folder.mkdir(parents=True, exist_ok=True)
            code = "import sys; from moto.server import main; main(sys.argv[1:])"
            self._process.start(
                [sys.executable, "-c", code, "-H", LOOPBACK, "-p", str(self.port)], self._env
            )
        wait_until(lambda: answers(self.url), "moto", self._process.log, self.alive)


class Mlflow(_Web):
    """The MLflow server: metadata in a database, artifacts in a bucket it alone talks to."""

    def __init__(self, folder: Path, port: int, backend: str, artifacts: str, s3: str) -> None:
        super().__init__(folder, port, "mlflow")
        self._backend, self._artifacts, self._s3 = backend, artifacts, s3

    def start(self) -> None:
        """Start it, unless it runs, and wait until it answers from its database."""
        if not self.alive():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._process.start(
                [
                    *(sys.executable, "-m", "mlflow", "server"),
                    *("--host", LOOPBACK, "--port", str(self.port), "--workers", "1"),
                    *("--backend-store-uri", self._backend, "--serve-artifacts"),
                    *("--artifacts-destination", self._artifacts),
                    # With any other Host header it answers 403: no page elsewhere can reach it.
                    *("--allowed-hosts", f"{LOOPBACK}:{self.port},localhost:{self.port}"),
                ],
                s3_environment(self._s3)
                | {
                    "MLFLOW_S3_ENDPOINT_URL": self._s3,
                    "AWS_RETRY_MODE": "standard",
                    "AWS_MAX_ATTEMPTS": "6",
                    # Off: 11 processes and 1.5 GB that only scheduled judges need.
                    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                    "MLFLOW_DISABLE_TELEMETRY": "true",
                    "DO_NOT_TRACK": "true",
                },
            )
        wait_until(self.ready, "MLflow", self._process.log, self.alive)

    def ready(self) -> bool:
        """Return whether the API answers; /health says OK even while the database is down."""
        request = urllib.request.Request(  # noqa: S310 - loopback
            f"{self.url}/api/2.0/mlflow/experiments/search",
            json.dumps({"max_results": 1}).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310 - loopback
                return int(answer.status) == 200
        except OSError:
            return False

    def kill(self) -> None:
        """End it as a power cut would."""
        self._process.stop(0.0)
