"""An MLflow client and an outbox for tests that want every interleaving, and the same one again.

``MemoryClient`` does what ``MlflowClient`` does over HTTP, against a stub's tables, without a
server; ``stepped`` runs an outbox without a thread and without a clock: waiting is what delivers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.protos.service_pb2 import Run as RunMessage
from mlflow.store.entities.paged_list import PagedList
from mlflow.utils.proto_json_utils import parse_dict

from avzero.track import mlflow_tracker, outbox, run_tree
from avzero.track.outbox import Outbox
from tests.mlflow_stub import MlflowStub


class MemoryClient:
    """Calls a stub's methods; ``before(endpoint)`` says what goes wrong with each request."""

    def __init__(self, stub: MlflowStub, before: Callable[[str], str | None]) -> None:
        self.stub = stub
        self._before = before

    def ask(self, endpoint: str, body: dict[str, Any]) -> Any:
        fault = self._before(endpoint)
        if fault == "refuse":
            raise OSError("no answer")
        if fault == "400":
            raise MlflowException("not that", INVALID_PARAMETER_VALUE)
        self.stub.counts[endpoint] += 1
        self.stub.sent.append((endpoint, body))
        answer = getattr(self.stub, "_" + endpoint.replace("/", "_").replace("-", "_"))(body)
        if fault == "lose":
            raise OSError("the answer is lost")
        return answer

    @staticmethod
    def _run(answer: dict[str, Any]) -> Run:
        message = RunMessage()
        parse_dict(answer, message)
        return Run.from_proto(message)

    def search_experiments(self, **_: Any) -> list[Any]:
        return []

    def get_experiment_by_name(self, name: str) -> Any:
        answer = self.ask("experiments/get-by-name", {"experiment_name": name})
        return SimpleNamespace(**answer["experiment"]) if answer else None

    def create_experiment(self, name: str, tags: Any = None) -> str:
        return str(self.ask("experiments/create", {"name": name})["experiment_id"])

    def create_run(self, experiment: str, start_time: int, tags: dict[str, str]) -> Run:
        pairs = [{"key": key, "value": value} for key, value in tags.items()]
        body = {"experiment_id": experiment, "start_time": start_time, "tags": pairs}
        return self._run(self.ask("runs/create", body)["run"])

    def log_batch(self, run_id: str, **parts: list[Any]) -> None:
        body = {name: [dict(entity) for entity in part] for name, part in parts.items()}
        self.ask("runs/log-batch", json.loads(json.dumps({"run_id": run_id} | body)))

    def log_inputs(self, run_id: str, datasets: list[Any]) -> None:
        # A stub keeps what was sent; what is in it does not matter here.
        self.ask("runs/log-inputs", {"run_id": run_id, "datasets": [{} for _ in datasets]})

    def update_run(self, run_id: str, status: str) -> None:
        self.ask("runs/update", {"run_id": run_id, "status": status})

    def set_terminated(self, run_id: str, status: str, end_time: int) -> None:
        self.ask("runs/update", {"run_id": run_id, "status": status, "end_time": end_time})

    def delete_run(self, run_id: str) -> None:
        self.ask("runs/delete", {"run_id": run_id})

    def search_runs(self, _: list[str], filter_string: str, page_token: Any, **__: Any) -> Any:
        answer = self.ask("runs/search", {"filter": filter_string, "page_token": page_token})
        runs = [self._run(run) for run in answer["runs"]]
        return PagedList(runs, answer.get("next_page_token"))

    def get_metric_history(self, run_id: str, key: str) -> list[Any]:
        answer = self.ask("metrics/get-history", {"run_id": run_id, "metric_key": key})
        return [SimpleNamespace(**metric) for metric in answer["metrics"]]


class _Idle(Exception):
    """A step would wait until somebody puts something."""


class _Clock:
    """Time that passes when somebody waits; also the outbox's condition variable."""

    def __init__(self) -> None:
        self.now = 0.0
        self.boxes: list[Outbox[Any]] = []
        self.stepping = False

    def monotonic(self) -> float:
        self.now += 1e-4
        return self.now

    def __enter__(self) -> _Clock:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def notify_all(self) -> None:
        pass

    def wait(self, seconds: float | None = None) -> None:
        """Let time pass within a step; outside one, deliver."""
        if self.stepping:
            if seconds is None:
                raise _Idle
            self.now += seconds
        elif not sum(self.step(box) for box in self.boxes):
            self.now += seconds or 0.0

    def step(self, box: Outbox[Any]) -> bool:
        """Deliver one item if there is one; return whether there was."""
        if self.stepping or not box._entries:
            return False
        self.stepping = True
        try:
            return box._step()
        except _Idle:
            return False
        finally:
            self.stepping = False


def stepped(patch: pytest.MonkeyPatch, client: MemoryClient) -> _Clock:
    """Have trackers made from now on use this client, and outboxes that the returned clock runs.

    A tracker's outbox is to be added to the clock's ``boxes``. Hooks may be called from within a
    request: an outbox holds no lock while it delivers.
    """
    clock = _Clock()
    still = SimpleNamespace(start=lambda: None)
    threads = SimpleNamespace(Thread=lambda **_: still, Condition=lambda: clock)
    patch.setattr(outbox, "threading", threads)
    patch.setattr(outbox, "time", clock)
    patch.setattr("mlflow.MlflowClient", lambda tracking_uri: client)
    patch.setattr(mlflow_tracker, "_is_refusal", lambda error: isinstance(error, MlflowException))

    def upload(tree: Any, run: Any, files: dict[str, bytes]) -> None:
        for name, data in files.items():
            fault = client._before("artifacts")
            if fault == "refuse":
                raise OSError("no answer")
            tree._client.requests += 1
            client.stub.counts["artifacts"] += 1
            client.stub.artifacts[f"{run.id}/{name}"] = data

    patch.setattr(run_tree.RunTree, "_upload", upload)
    return clock
