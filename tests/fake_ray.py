"""A Ray dashboard's Jobs API on loopback, for tests of what talks to it."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeRay(ThreadingHTTPServer):
    """Keeps jobs and packages; jobs stay PENDING until a test says otherwise."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.version = "2.60.0"
        self.token = ""
        self.nodes: list[dict[str, float]] = [{"CPU": 4.0}, {"CPU": 4.0}]
        self.jobs: dict[str, dict[str, Any]] = {}
        self.packages: dict[str, bytes] = {}
        self.logs: dict[str, str] = {}
        self.down = False
        """Whether the head answers 503."""
        self.thread = threading.Thread(target=self.serve_forever, daemon=True)
        self.thread.start()

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_port}"

    def close(self) -> None:
        """Stop."""
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FakeRay

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def _answer(self, status: int, body: object) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refused(self) -> bool:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.server.down:
            self._answer(503, "down")
        elif self.server.token and not given:
            self._answer(401, "Unauthorized: Missing authentication token")
        elif self.server.token and given != self.server.token:
            self._answer(403, "Forbidden: Invalid authentication token")
        else:
            return False
        return True

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self) -> None:
        if self._refused():
            return
        fake, parts = self.server, self.path.partition("?")[0].strip("/").split("/")
        if parts == ["api", "version"]:
            self._answer(200, {"version": "4", "ray_version": fake.version})
        elif parts == ["api", "v0", "nodes"]:
            rows = [{"state": "ALIVE", "resources_total": node} for node in fake.nodes]
            self._answer(200, {"result": True, "data": {"result": {"result": rows}}})
        elif parts == ["api", "jobs"]:
            self._answer(200, list(fake.jobs.values()))
        elif parts[:2] == ["api", "packages"]:
            self._answer(200 if parts[-1] in fake.packages else 404, "")
        elif parts[:2] == ["api", "jobs"] and parts[2] in fake.jobs:
            logs = {"logs": fake.logs.get(parts[2], "")}
            self._answer(200, logs if parts[-1] == "logs" else fake.jobs[parts[2]])
        else:
            self._answer(404, "not found")

    def do_PUT(self) -> None:
        if not self._refused():
            self.server.packages[self.path.rpartition("/")[2]] = self._body()
            self._answer(200, "")

    def do_POST(self) -> None:
        body = self._body()
        if self._refused():
            return
        if self.path.endswith("/stop"):
            job = self.server.jobs[self.path.split("/")[3]]
            job["status"] = "STOPPED"
            self._answer(200, {"stopped": True})
            return
        wanted = json.loads(body)
        name = wanted["submission_id"]
        if name in self.server.jobs:
            self._answer(500, f"ValueError: Job with submission_id {name} already exists.")
            return
        self.server.jobs[name] = wanted | {"status": "PENDING", "message": ""}
        self._answer(200, {"submission_id": name})
