"""A counting stand-in for an MLflow server, in memory, with faults on demand.

In a test: ``with MlflowStub() as stub: MlflowTracker(stub.uri, job)``. By itself, for a benchmark
that measures its client only: ``python -m tests.mlflow_stub`` prints the port, and answers
``GET /counts``.
"""

from __future__ import annotations

import json
import re
import threading
import uuid
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse

Fault = str | None
"""``refuse``: no answer; ``lose``: done, but no answer; or an HTTP status."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    stub: MlflowStub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or an answer waits 40 ms for the acknowledgement of its head

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlparse(self.path)
        stub: MlflowStub = self.server.stub  # type: ignore[attr-defined]
        if url.path == "/counts":
            return self._reply(200, dict(stub.counts))
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        fault, answer = stub.take(url.path, query, body)
        if fault in ("refuse", "lose"):
            self.close_connection = True
            return None
        if fault is not None:
            code = "INVALID_PARAMETER_VALUE" if fault == "400" else "TEMPORARILY_UNAVAILABLE"
            return self._reply(int(fault), {"error_code": code, "message": f"stub says {fault}"})
        return self._reply(404 if answer is None else 200, answer or NOT_FOUND)

    do_GET = do_POST = do_PUT = _answer

    def _reply(self, status: int, data: dict[str, Any]) -> None:
        text = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


NOT_FOUND = {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such thing"}


class MlflowStub:
    """The server, its counts by endpoint, and what it was told."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.sent: list[tuple[str, dict[str, Any]]] = []
        """(endpoint, body) of every request with a JSON body."""
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.artifacts: dict[str, bytes] = {}
        self.page = 1000
        self.fault: Callable[[str, tuple[str, bytes]], Fault] = lambda endpoint, request: None
        """Endpoint, (path, body) -> what goes wrong."""
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.stub = self
        self.uri = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> MlflowStub:
        threading.Thread(target=self.serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def serve(self) -> None:
        """Answer until closed."""
        self._server.serve_forever(0.05)

    def kind(self, name: str) -> list[dict[str, Any]]:
        """Return the runs whose tag ``avzero.kind`` is ``name``."""
        return [run for run in self.runs.values() if run["tags"].get("avzero.kind") == name]

    def take(self, path: str, query: dict[str, str], body: bytes) -> tuple[Fault, Any]:
        """Count a request and carry it out."""
        endpoint = "/".join(path.split("/")[-2:])
        if "/mlflow-artifacts/" in path:
            endpoint = "artifacts"
        with self._lock:
            self.counts[endpoint] += 1
            fault = self.fault(endpoint, (path + str(query), body))
            if fault is not None and fault != "lose":
                return fault, None
            if endpoint == "artifacts":
                self.artifacts[path.partition("/artifacts/")[2]] = body
                return fault, {}
            data = json.loads(body) if body else query
            self.sent.append((endpoint, data))
            method = getattr(self, "_" + endpoint.replace("/", "_").replace("-", "_"), None)
            try:
                return fault, {} if method is None else method(data)
            except KeyError:
                return fault, None

    def _experiments_get_by_name(self, query: dict[str, Any]) -> Any:
        name = query["experiment_name"]
        if name not in self.experiments:
            return None
        return {"experiment": {"experiment_id": self.experiments[name], "name": name}}

    def _experiments_create(self, body: dict[str, Any]) -> Any:
        self.experiments[body["name"]] = str(len(self.experiments) + 1)
        return {"experiment_id": self.experiments[body["name"]]}

    def _runs_create(self, body: dict[str, Any]) -> Any:
        run = {
            "id": uuid.uuid4().hex,
            "experiment": body["experiment_id"],
            "status": "RUNNING",
            "start_time": body["start_time"],
            "tags": {tag["key"]: tag["value"] for tag in body["tags"]},
            "params": {},
            "metrics": [],
            "inputs": [],
        }
        self.runs[run["id"]] = run
        return {"run": self._run(run)}

    def _run(self, run: dict[str, Any]) -> dict[str, Any]:
        latest = {m["key"]: m for m in run["metrics"]}
        return {
            "info": {
                "run_id": run["id"],
                "run_uuid": run["id"],
                "experiment_id": run["experiment"],
                "status": run["status"],
                "start_time": run["start_time"],
                "artifact_uri": f"mlflow-artifacts:/{run['experiment']}/{run['id']}/artifacts",
            },
            "data": {
                "tags": [{"key": k, "value": v} for k, v in run["tags"].items()],
                "params": [{"key": k, "value": v} for k, v in run["params"].items()],
                "metrics": list(latest.values()),
            },
            "inputs": {"dataset_inputs": run["inputs"]},
        }

    def _runs_get(self, query: dict[str, Any]) -> Any:
        return {"run": self._run(self.runs[query["run_id"]])}

    def _runs_log_batch(self, body: dict[str, Any]) -> Any:
        run = self.runs[body["run_id"]]
        # As MLflow's key does: the same value of the same moment twice is once.
        run["metrics"] += [m for m in body.get("metrics", []) if m not in run["metrics"]]
        run["params"] |= {p["key"]: p["value"] for p in body.get("params", [])}
        run["tags"] |= {t["key"]: t["value"] for t in body.get("tags", [])}
        return {}

    def _runs_log_inputs(self, body: dict[str, Any]) -> Any:
        self.runs[body["run_id"]]["inputs"] += body["datasets"]
        return {}

    def _runs_update(self, body: dict[str, Any]) -> Any:
        run = self.runs[body["run_id"]]
        run["status"] = body["status"]
        run["end_time"] = body.get("end_time")
        return {"run_info": self._run(run)["info"]}

    def _runs_delete(self, body: dict[str, Any]) -> Any:
        del self.runs[body["run_id"]]
        return {}

    def _runs_search(self, body: dict[str, Any]) -> Any:
        """Knows conditions on tags, and pages."""
        conditions = re.findall(r"tags\.`([^`]+)` (=|!=) '([^']*)'", body["filter"])
        found = [
            run
            for run in self.runs.values()
            if all(
                (run["tags"].get(tag) == value) == (sign == "=") for tag, sign, value in conditions
            )
        ]
        start = int(body.get("page_token") or 0)
        page = {"runs": [self._run(run) for run in found[start : start + self.page]]}
        more = len(found) > start + self.page
        return page | ({"next_page_token": str(start + self.page)} if more else {})

    def _metrics_get_history(self, query: dict[str, Any]) -> Any:
        run = self.runs[query.get("run_id") or query["run_uuid"]]
        return {"metrics": [m for m in run["metrics"] if m["key"] == query["metric_key"]]}


if __name__ == "__main__":
    stub = MlflowStub()
    print(stub.uri, flush=True)
    stub.serve()
