"""What a rendered overlay says, as the processes Kubernetes and KubeRay would make of it.

Everything is read from the manifests' own fields, so that a test can run the very commands without
a cluster. ``ray_start`` and ``submit_command`` build what KubeRay v1.7.0 builds from a RayCluster
and a RayJob (shared/notes/infra.md, section 6).
"""

from __future__ import annotations

import functools
import json
import math
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from avzero.cluster.operator_rules import quantity
from tests.conftest import ROOT

Document = dict[str, Any]

K8S = ROOT / "k8s"
BUNDLES = {
    "base": ("base", "base-jobs"),
    "kind": ("overlays/kind", "overlays/kind-jobs"),
    "cloud-gpu": ("overlays/cloud-gpu", "overlays/cloud-gpu-jobs"),
    "gcs-ft": ("overlays/gcs-ft", "overlays/kind-jobs"),
}
"""An overlay's platform, applied once, and its jobs, applied to start something."""


@functools.cache
def _rendered(folder: Path) -> str:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: it renders the manifests (kubectl kustomize)")
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise AssertionError(f"kubectl kustomize {folder}: {done.stderr.strip()}")
    return done.stdout


def render(folder: str | Path) -> list[Document]:
    """Return the documents of ``k8s/<folder>``; skips the calling test where kubectl is absent."""
    return [doc for doc in yaml.safe_load_all(_rendered(K8S / folder)) if doc]


def bundle(name: str) -> list[Document]:
    """Return the platform and the jobs of an overlay."""
    return [document for folder in BUNDLES[name] for document in render(folder)]


def find(documents: Sequence[Document], kind: str, name: str) -> Document:
    """Return one document. Raises ``KeyError`` when there is none."""
    for document in documents:
        if document["kind"] == kind and document["metadata"]["name"] == name:
            return document
    raise KeyError(f"{kind}/{name}")


def ray_spec(document: Document) -> Document:
    """Return the cluster of a RayCluster, or that of a RayJob which brings its own."""
    spec: Document = document["spec"]
    return spec["rayClusterSpec"] if document["kind"] == "RayJob" else spec


def group(spec: Document, name: str = "") -> Document:
    """Return a cluster's worker group, or with no name its head group."""
    if not name:
        return spec["headGroupSpec"]  # type: ignore[no-any-return]
    return next(g for g in spec["workerGroupSpecs"] if g["groupName"] == name)  # type: ignore[no-any-return]


def container(pod: Document, name: str = "") -> Document:
    """Return a container of a pod's spec by name, or the first (which is Ray's)."""
    every = [*pod.get("initContainers", []), *pod["containers"]]
    return next(c for c in every if c["name"] == name) if name else pod["containers"][0]  # type: ignore[no-any-return]


def environment(
    documents: Sequence[Document], of: Document, secrets: Mapping[str, Mapping[str, str]]
) -> dict[str, str]:
    """Return the variables a container starts with, as the kubelet would put them together.

    Args:
        documents: where its ConfigMaps are.
        of: the container.
        secrets: name of every Secret it refers to -> key -> value.

    Raises:
        KeyError: it refers to a ConfigMap, a Secret or a key that is not there.
    """
    values: dict[str, str] = {}
    for source in of.get("envFrom", []):
        if "configMapRef" in source:
            values |= find(documents, "ConfigMap", source["configMapRef"]["name"])["data"]
        else:
            values |= secrets[source["secretRef"]["name"]]
    for entry in of.get("env", []):
        value_from = entry.get("valueFrom", {})
        if "secretKeyRef" in value_from:
            key = value_from["secretKeyRef"]
            values[entry["name"]] = secrets[key["name"]][key["key"]]
        elif "configMapKeyRef" in value_from:
            key = value_from["configMapKeyRef"]
            values[entry["name"]] = find(documents, "ConfigMap", key["name"])["data"][key["key"]]
        else:
            values[entry["name"]] = entry["value"]
    return values


def ray_environment(cluster: str, head: str, token: str, *, on_head: bool) -> dict[str, str]:
    """Return what KubeRay adds to a Ray container: where the head is, and the token.

    Args:
        cluster: name of the RayCluster.
        head: name of the head's Service.
        token: what the Secret named after the cluster holds as ``auth_token``.
        on_head: for the head's container, which is its own address.
    """
    address = "127.0.0.1" if on_head else head
    return {
        "RAY_CLUSTER_NAME": cluster,
        "FQ_RAY_IP": head,
        "RAY_IP": address,
        "RAY_PORT": "6379",
        "RAY_ADDRESS": f"{address}:6379",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
    }


def ray_start(spec: Document, name: str = "", head: str = "") -> list[str]:
    """Return the ``ray start`` command KubeRay generates.

    Args:
        spec: a cluster (``ray_spec``).
        name: the worker group; empty for the head.
        head: name or address of the head's Service, for workers.
    """
    of = group(spec, name)
    limits = container(of["template"]["spec"])["resources"]["limits"]
    parameters = {
        "block": "true",
        "dashboard-agent-listen-port": "52365",
        "memory": str(math.ceil(quantity(limits["memory"]))),
        "metrics-export-port": "8080",
        "num-cpus": str(math.ceil(quantity(limits["cpu"]))),
    }
    gpus = [quantity(value) for key, value in limits.items() if key.endswith("gpu")]
    if gpus and gpus[0]:
        parameters["num-gpus"] = str(math.ceil(gpus[0]))
    if name:
        parameters["address"] = f"{head}:6379"
    else:
        parameters["dashboard-host"] = "0.0.0.0"  # noqa: S104 - in its pod
        if spec.get("enableInTreeAutoscaling"):
            parameters["no-monitor"] = "true"
    parameters |= of.get("rayStartParams", {})
    flags = ("block", "no-monitor")
    arguments = [
        f"--{key}" if key in flags else f"--{key}={value}"
        for key, value in sorted(parameters.items())
        if key not in flags or value == "true"
    ]
    return ["ray", "start", *([] if name else ["--head"]), *arguments]


def entrypoint(job: Document) -> str:
    """Return a RayJob's command line."""
    return str(job["spec"]["entrypoint"])


def runtime_env(job: Document) -> Document:
    """Return a RayJob's Ray runtime environment."""
    return yaml.safe_load(job["spec"].get("runtimeEnvYAML", "{}"))  # type: ignore[no-any-return]


def submit_command(job: Document, dashboard: str) -> str:
    """Return the shell command of KubeRay's submitter (K8sJobMode), for ``bash -c``.

    It submits unless the job is there already, and follows the logs. (KubeRay first waits until
    ``GET <dashboard>/api/gcs_healthz`` answers 200.)

    Args:
        job: the RayJob.
        dashboard: http://host:8265 of the head's Service.
    """
    spec = job["spec"]
    extra: list[str] = []
    if "runtimeEnvYAML" in spec:
        extra += ["--runtime-env-json", shlex.quote(json.dumps(runtime_env(job)))]
    if "metadata" in spec:
        extra += ["--metadata-json", shlex.quote(json.dumps(spec["metadata"]))]
    at = f"--address {dashboard}"
    submit = f"ray job submit {at} --no-wait {' '.join(extra)} --submission-id {spec['jobId']}"
    return (
        f"if ! ray job status {at} {spec['jobId']} >/dev/null 2>&1 ; "
        f"then {submit} -- {entrypoint(job)} ; "
        f"fi ; ray job logs {at} --follow {spec['jobId']}"
    )


def mounted_files(documents: Sequence[Document], pod: Document, of: Document) -> dict[str, str]:
    """Return the files a container finds mounted from ConfigMaps: path -> text."""
    maps = {v["name"]: v["configMap"]["name"] for v in pod.get("volumes", []) if "configMap" in v}
    return {
        f"{mount['mountPath']}/{key}": text
        for mount in of.get("volumeMounts", [])
        if mount["name"] in maps
        for key, text in find(documents, "ConfigMap", maps[mount["name"]])["data"].items()
    }


def mlflow_pod(documents: Sequence[Document]) -> Document:
    """Return the spec of MLflow's pod; its containers are ``db-upgrade`` and ``mlflow``."""
    return find(documents, "Deployment", "mlflow")["spec"]["template"]["spec"]  # type: ignore[no-any-return]


def command(of: Document) -> list[str]:
    """Return a container's command and arguments."""
    return [*of.get("command", []), *of.get("args", [])]
