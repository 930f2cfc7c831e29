"""Every rendered overlay passes every check; and what its parts promise each other."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from avzero.cluster.kubernetes import FORM, load_form, rayjob_documents
from avzero.spec import Resources, load_job
from tests.conftest import ROOT
from tests.infra import manifest
from tests.infra.manifest import BUNDLES, K8S, Document, bundle, find, ray_spec, render
from tests.infra.policy import (
    check_operator,
    check_policy,
    check_references,
    pods,
    reaches,
)
from tests.infra.schemas import check_cel, check_core, check_crds

pytestmark = pytest.mark.infra

Check = Callable[[Sequence[Document]], list[str]]
CHECKS: dict[str, Check] = {
    "crds": check_crds,
    "core": check_core,
    "cel": check_cel,
    "operator": check_operator,
    "policy": check_policy,
    "references": check_references,
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("overlay", BUNDLES)
def test_overlay_passes(overlay: str, check: str) -> None:
    documents = bundle(overlay)
    assert len(documents) > 20
    assert CHECKS[check](documents) == []


@pytest.mark.parametrize("overlay", ["kind", "cloud-gpu"])
@pytest.mark.parametrize("job", sorted(p.name for p in (ROOT / "jobs").glob("*.yaml")))
def test_rendered_job_passes_beside_its_platform(job: str, overlay: str) -> None:
    loaded = load_job(ROOT / "jobs" / job)
    if overlay == "cloud-gpu":
        loaded = loaded.model_copy(update={"resources": Resources(gpus=0.5, concurrent=4)})
    form = find(bundle(overlay), "RayJob", "sweep")
    documents = rayjob_documents(loaded, form)
    for check in CHECKS.values():
        assert check([*bundle(overlay), *documents]) == []


def test_the_form_avzero_brings_is_the_base() -> None:
    sweep = find(render("base-jobs"), "RayJob", "sweep")
    assert load_form(str(K8S / "base-jobs")) == sweep
    assert load_form() == sweep, f"{FORM} is behind k8s/; run python -m tests.infra.form"


def test_demo_is_the_demo() -> None:
    data = find(render("base"), "ConfigMap", "avzero-jobs")["data"]["demo.yaml"]
    assert data == (ROOT / "jobs" / "demo.yaml").read_text()


def test_cloud_has_no_static_keys() -> None:
    text = yaml.safe_dump_all(bundle("cloud-gpu"))
    assert "AWS_SECRET_ACCESS_KEY" not in text and "avzero-s3" not in text
    for account in ("ray-head", "ray-worker", "mlflow"):
        annotations = find(bundle("cloud-gpu"), "ServiceAccount", account)["metadata"][
            "annotations"
        ]
        assert annotations["eks.amazonaws.com/role-arn"].startswith("arn:aws:iam::")


def test_cloud_prefers_spot_and_queues_what_brings_its_cluster() -> None:
    documents = bundle("cloud-gpu")
    groups = {
        g["groupName"]: g
        for g in ray_spec(find(documents, "RayCluster", "avzero"))["workerGroupSpecs"]
    }
    assert groups["gpu-spot"]["priority"] > groups["gpu"]["priority"] > 0
    pools = {
        step: manifest.group(ray_spec(find(documents, "RayJob", step)), "gpu")["template"]["spec"][
            "nodeSelector"
        ]["avzero.dev/pool"]
        for step in ("sweep", "test")
    }
    assert pools == {"sweep": "gpu-spot", "test": "gpu"}
    queued = {
        d["metadata"]["name"]
        for d in documents
        if d["kind"] == "RayJob" and "kueue.x-k8s.io/queue-name" in d["metadata"]["labels"]
    }
    assert queued == {"ingest", "sweep", "test"}


def test_only_the_autoscaler_has_a_kubernetes_token() -> None:
    for overlay in BUNDLES:
        documents = bundle(overlay)
        off = {
            d["metadata"]["name"]
            for d in documents
            if d["kind"] == "ServiceAccount" and d.get("automountServiceAccountToken") is False
        }
        holders = {
            pod.where
            for pod in pods(documents)
            if pod.spec.get("automountServiceAccountToken", True)
            and pod.spec.get("serviceAccountName") not in off
        }
        assert holders == {"RayCluster avzero head"}, overlay


FLOWS = {
    ("ray-head", "ray-worker", 10002): True,
    ("ray-worker", "ray-head", 6379): True,
    ("submitter", "ray-head", 8265): True,
    ("submitter", "ray-head", 6379): False,
    ("submitter", "mlflow", 5000): False,
    ("ray-head", "mlflow", 5000): True,
    ("ray-worker", "mlflow", 5000): False,
    ("mlflow", "ray-head", 8265): False,
    ("mlflow", "postgres", 5432): True,
    ("ray-head", "postgres", 5432): False,
    ("ray-worker", "store", 9000): True,
    ("mlflow", "store", 9000): True,
    ("submitter", "store", 9000): False,
    ("postgres", "store", 9000): False,
    ("ray-head", "redis", 6379): True,
    ("ray-worker", "redis", 6379): False,
}


@pytest.mark.parametrize(("source", "target", "port"), FLOWS)
def test_who_reaches_whom(source: str, target: str, port: int) -> None:
    assert reaches(bundle("gcs-ft"), source, target, port) is FLOWS[source, target, port]


def test_everything_is_denied_first_and_every_pod_has_a_rule_of_its_own() -> None:
    for overlay in BUNDLES:
        policies = [d["spec"] for d in bundle(overlay) if d["kind"] == "NetworkPolicy"]
        assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in policies
        named = {str(p["podSelector"]) for p in policies if p["podSelector"]}
        for pod in pods(bundle(overlay)):
            assert any(pod.labels["avzero.dev/role"] in selector for selector in named), pod.where


def test_jobs_start_nothing_but_jobs() -> None:
    for _, folder in BUNDLES.values():
        kinds = {d["kind"] for d in render(folder)}
        assert kinds <= {"RayJob", "PersistentVolumeClaim"}
        steps = {d["metadata"]["labels"]["avzero.dev/step"] for d in render(folder)}
        assert steps == {"ingest", "sweep", "test", "report"}


def test_fast_health_checks_go_with_an_overlay(tmp_path: Path) -> None:
    up = os.path.relpath(K8S, tmp_path)
    (tmp_path / "kustomization.yaml").write_text(
        f"resources: [{up}/overlays/kind]\ncomponents: [{up}/components/fast-health-checks]\n"
    )
    documents = [*render(tmp_path), *render("overlays/kind-jobs")]
    for check in CHECKS.values():
        assert check(documents) == []
    pod = ray_spec(find(documents, "RayCluster", "avzero"))["headGroupSpec"]["template"]["spec"]
    secrets = {n: dict.fromkeys(("username", "password"), "x") for n in ("avzero-mlflow",)}
    values = manifest.environment(documents, manifest.container(pod), secrets | {"avzero-s3": {}})
    assert values["RAY_health_check_failure_threshold"] == "3"
    assert values["RAY_gcs_rpc_server_reconnect_timeout_s"] == "30"


def test_commands_are_what_the_manifests_say() -> None:
    documents = bundle("kind")
    spec = ray_spec(find(documents, "RayJob", "sweep"))
    head = manifest.ray_start(spec)
    assert head[:3] == ["ray", "start", "--head"] and "--num-cpus=0" in head and "--block" in head
    worker = manifest.ray_start(spec, "cpu", "sweep-head-svc")
    assert "--address=sweep-head-svc:6379" in worker and "--num-cpus=1" in worker
    pod = spec["headGroupSpec"]["template"]["spec"]
    files = manifest.mounted_files(documents, pod, manifest.container(pod))
    submitted = manifest.submit_command(find(documents, "RayJob", "sweep"), "http://head:8265")
    assert any(path in submitted for path in files)
    assert manifest.command(manifest.container(manifest.mlflow_pod(documents), "mlflow"))[:2] == [
        "mlflow",
        "server",
    ]


def test_image_is_pinned_and_not_root() -> None:
    lines = (K8S / "Dockerfile").read_text().splitlines()
    assert re.fullmatch(r"ARG PYTHON=3\.11\.\d+-slim-\w+", lines[5]), lines[5]
    assert {line for line in lines if line.startswith("FROM")} == {
        "FROM python:${PYTHON} AS build",
        "FROM python:${PYTHON}",
    }
    assert "PIP_CONSTRAINT=/src/constraints.txt" in " ".join(lines)
    uid = next(line for line in lines if line.startswith("USER")).split()[1].partition(":")[0]
    users = {pod.spec["securityContext"]["runAsUser"] for pod in pods(bundle("base"))}
    assert users == {int(uid)}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = {
        w
        for line in lines
        if line.startswith("COPY") and "--from" not in line
        for w in line.split()[1:-1]
    }
    assert {f"!{name}" for name in copied} <= set(ignored)
