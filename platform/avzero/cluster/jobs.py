"""The Jobs API of a Ray cluster over HTTP, every request with a time limit.

Ray's own client has none: a head that is cut off would block it for good.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from avzero.cluster.package import Package
from avzero.errors import UserError

RUNNING = ("PENDING", "RUNNING")
_TIMEOUT = 20.0
_UPLOAD_TIMEOUT = 120.0


class Unreachable(UserError):
    """Nothing answers at the address: wrong, not started, or down for the moment."""


@dataclass(frozen=True)
class JobInfo:
    """A submitted job as the cluster sees it."""

    id: str
    status: str
    """``PENDING``, ``RUNNING``, ``SUCCEEDED``, ``FAILED`` or ``STOPPED``."""
    message: str = ""
    exit_code: int | None = None
    """Of the driver process; None while it runs, or where Ray lost sight of it."""
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def running(self) -> bool:
        """Whether the cluster believes that it runs, or will."""
        return self.status in RUNNING

    @property
    def attempt(self) -> int:
        """The last part of the identity."""
        tail = self.id.rpartition("-")[2]
        return int(tail) if tail.isdecimal() else 0


class JobsApi:
    """Talks to a cluster's head.

    Args:
        address: ``http://host:8265``, the dashboard's.

    Raises:
        UserError: the address is none.
    """

    def __init__(self, address: str) -> None:
        parts = urlsplit(address if "://" in address else f"http://{address}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                f"--address {address}: give the address of the cluster's dashboard, "
                "http://HOST:8265"
            )
        self.address = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self.host = parts.hostname

    def _call(self, method: str, path: str, timeout: float = _TIMEOUT, **more: Any) -> Any:
        """Send a request; return the answer, whatever its status but 401 and 403."""
        import requests

        token = auth_token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            answer = requests.request(
                method, self.address + path, headers=headers, timeout=timeout, **more
            )
        except (requests.RequestException, ValueError) as error:
            raise Unreachable(
                f"{self.address}: no answer ({_cause(error)}); check that the cluster runs "
                "and that the address is its dashboard's (http://HOST:8265)"
            ) from error
        if answer.status_code == 401 and not token:
            raise UserError(
                f"{self.address}: the cluster wants a token; set RAY_AUTH_TOKEN, or "
                "RAY_AUTH_TOKEN_PATH to a file that holds it"
            )
        if answer.status_code in (401, 403):
            raise UserError(
                f"{self.address}: the cluster refuses "
                + ("this token; correct RAY_AUTH_TOKEN" if token else "access; set RAY_AUTH_TOKEN")
                + " (or the file RAY_AUTH_TOKEN_PATH names)"
            )
        if answer.status_code in (502, 503, 504):
            raise Unreachable(f"{self.address}: the head does not answer ({answer.status_code})")
        return answer

    def _json(self, method: str, path: str, **more: Any) -> Any:
        """Return the JSON of a good answer."""
        answer = self._call(method, path, **more)
        try:
            if answer.status_code == 200:
                return answer.json()
        except ValueError:
            pass
        raise UserError(
            f"{self.address}{path}: unexpected answer {answer.status_code} "
            f"({_last_line(answer.text)}); check that this is a Ray dashboard with the Jobs API "
            "(ray[default])"
        )

    def ray_version(self) -> str:
        """Return the cluster's Ray version."""
        said = self._json("GET", "/api/version")
        if not isinstance(said, dict) or "ray_version" not in said:
            raise UserError(f"{self.address}: something answers that is no Ray dashboard")
        return str(said["ray_version"])

    def nodes(self) -> list[dict[str, float]]:
        """Return what every living node that holds CPUs or GPUs has."""
        said = self._json("GET", "/api/v0/nodes?limit=10000&detail=true")
        rows = said["data"]["result"]["result"]
        alive = [row.get("resources_total") or {} for row in rows if row["state"] == "ALIVE"]
        return [node for node in alive if node.get("CPU") or node.get("GPU")]

    def jobs(self, sweep: str, store: str | None = None) -> list[JobInfo]:
        """Return the submissions of a sweep, the oldest first."""
        found = [
            _info(row)
            for row in self._json("GET", "/api/jobs/")
            if row.get("submission_id")
            and (row.get("metadata") or {}).get("avzero_sweep") == sweep
            and (store is None or row["metadata"].get("avzero_store") == store)
        ]
        return sorted(found, key=lambda job: job.attempt)

    def job(self, job_id: str) -> JobInfo | None:
        """Return a job; None where the cluster knows none of the name."""
        answer = self._call("GET", f"/api/jobs/{job_id}")
        return None if answer.status_code == 404 else _info(self._checked(answer))

    def _checked(self, answer: Any) -> Any:
        if answer.status_code != 200:
            raise UserError(f"{self.address}: {_last_line(answer.text)}")
        return answer.json()

    def logs(self, job_id: str) -> str:
        """Return all that a job has printed; nothing where the cluster has lost it."""
        answer = self._call("GET", f"/api/jobs/{job_id}/logs")
        return str(answer.json()["logs"]) if answer.status_code == 200 else ""

    def upload(self, package: Package) -> None:
        """Give the cluster the code, unless it has it."""
        path = f"/api/packages/gcs/{package.name}"
        if self._call("GET", path).status_code == 200:
            return
        answer = self._call("PUT", path, timeout=_UPLOAD_TIMEOUT, data=package.data)
        if answer.status_code != 200:
            raise UserError(f"{self.address}: the code was not taken ({_last_line(answer.text)})")

    def submit(
        self,
        job_id: str,
        entrypoint: str,
        package: Package,
        variables: dict[str, str],
        metadata: dict[str, str],
    ) -> bool:
        """Start a job; return whether it is new: False if somebody has just started the same.

        Raises:
            UserError: the cluster does not take it.
        """
        self.upload(package)
        body = {
            "entrypoint": entrypoint,
            "submission_id": job_id,
            "runtime_env": {"py_modules": [package.uri], "env_vars": variables},
            "metadata": metadata,
        }
        answer = self._call("POST", "/api/jobs/", timeout=_UPLOAD_TIMEOUT, json=body)
        if answer.status_code == 200:
            return True
        if "already exists" in answer.text:
            return False
        raise UserError(
            f"{self.address}: the job was not taken, nothing was started "
            f"({_last_line(answer.text)})"
        )

    def stop(self, job_id: str) -> None:
        """Ask a job's driver to end; Ray kills it if it does not."""
        self._call("POST", f"/api/jobs/{job_id}/stop")

    def delete(self, job_id: str) -> None:
        """Remove an ended job from the cluster's list."""
        self._call("DELETE", f"/api/jobs/{job_id}")


def auth_token() -> str:
    """Return the token Ray's own tools would send: from the environment, a file, or the home.

    Raises:
        UserError: ``RAY_AUTH_TOKEN_PATH`` names no readable file.
    """
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"].strip()
    named = os.environ.get("RAY_AUTH_TOKEN_PATH", "")
    if named:
        try:
            return Path(named).read_text().strip()
        except OSError as error:
            raise UserError(f"RAY_AUTH_TOKEN_PATH {named}: cannot be read ({error})") from error
    own = Path("~/.ray/auth_token").expanduser()
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "token" and own.is_file():
        return own.read_text().strip()
    return ""


def _info(row: dict[str, Any]) -> JobInfo:
    return JobInfo(
        id=str(row.get("submission_id") or ""),
        status=str(row["status"]),
        message=str(row.get("message") or ""),
        exit_code=row.get("driver_exit_code"),
        metadata={k: str(v) for k, v in (row.get("metadata") or {}).items()},
    )


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "no explanation"


def _cause(error: BaseException) -> str:
    """Return the innermost reason of a failed request, without object addresses."""
    text = str(error)
    for mark, meaning in (
        ("Name or service not known", "no such host"),
        ("Temporary failure in name resolution", "no such host"),
        ("Connection refused", "connection refused"),
        ("timed out", "timed out"),
        ("No route to host", "no route to host"),
        ("CERTIFICATE_VERIFY_FAILED", "its TLS certificate is not trusted"),
    ):
        if mark in text:
            return meaning
    return text[:200]
