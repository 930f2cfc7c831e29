"""Each way in which a manifest goes wrong is caught, and by the check that is there for it.

The first thirteen are those of shared/notes/infra.md, section 6: no single tool caught them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from tests.infra.manifest import Document, bundle, container, find, group, ray_spec
from tests.infra.test_manifests import CHECKS

pytestmark = pytest.mark.infra


class Mutant(NamedTuple):
    """A change to a good bundle, the check that must find it, and a word of what it says."""

    change: Callable[[list[Document]], Any]
    check: str
    says: str


def _job(documents: list[Document]) -> Document:
    return find(documents, "RayJob", "sweep")["spec"]  # type: ignore[no-any-return]


def _workers(documents: list[Document]) -> Document:
    return group(ray_spec(find(documents, "RayCluster", "avzero")), "cpu")


def _worker(documents: list[Document]) -> Document:
    return container(_workers(documents)["template"]["spec"])


def _mlflow(documents: list[Document]) -> Document:
    return find(documents, "Deployment", "mlflow")["spec"]  # type: ignore[no-any-return]


def _mlflow_container(documents: list[Document]) -> Document:
    return container(_mlflow(documents)["template"]["spec"], "mlflow")


NOTES = {
    "unknown field": Mutant(
        lambda d: _job(d).update(entryPoint="avzero sweep"), "crds", "'entryPoint' was unexpected"
    ),
    "enum": Mutant(
        lambda d: ray_spec(find(d, "RayCluster", "avzero"))["autoscalerOptions"].update(
            upscalingMode="Fast"
        ),
        "crds",
        "'Fast' is not one of",
    ),
    "int where string": Mutant(
        lambda d: group(ray_spec(find(d, "RayCluster", "avzero")))["rayStartParams"].update(
            {"num-cpus": 0}
        ),
        "crds",
        "0 is not of type 'string'",
    ),
    "missing groupName": Mutant(
        lambda d: _workers(d).pop("groupName"), "crds", "'groupName' is a required property"
    ),
    "nameless container": Mutant(
        lambda d: _worker(d).pop("name"), "crds", "'name' is a required property"
    ),
    "bad probe field": Mutant(
        lambda d: _worker(d).update(
            livenessProbe={"httpGet": {"path": "/", "port": 1, "url": "x"}}
        ),
        "crds",
        "'url' was unexpected",
    ),
    "bad quantity in a CRD": Mutant(
        lambda d: _worker(d)["resources"]["limits"].update(memory="2Gigs"), "crds", "'2Gigs'"
    ),
    "bad quantity in a core kind": Mutant(
        lambda d: _mlflow_container(d)["resources"]["limits"].update(memory="1Gigs"),
        "operator",
        "'1Gigs' is no quantity",
    ),
    "unknown submissionMode": Mutant(
        lambda d: _job(d).update(submissionMode="K8sJob"),
        "operator",
        "submissionMode 'K8sJob' is unknown",
    ),
    "CEL": Mutant(
        lambda d: _job(d).update(managedBy="someone"),
        "cel",
        "the managedBy field value must be either",
    ),
    "min over max replicas": Mutant(
        lambda d: _workers(d).update(minReplicas=3), "operator", "minReplicas 3 is more than"
    ),
    "limits below requests": Mutant(
        lambda d: _worker(d)["resources"]["requests"].update(cpu="1500m"),
        "operator",
        "requests 1500m cpu, more than its limit 1",
    ),
    "selector is not the labels": Mutant(
        lambda d: _mlflow(d)["template"]["metadata"].update(labels={"avzero.dev/role": "mlfow"}),
        "references",
        "does not select its own pods",
    ),
}

OWN = {
    "CEL over two fields": Mutant(
        lambda d: _job(d).update(deletionStrategy={"onSuccess": {"policy": "DeleteSelf"}}),
        "cel",
        "requires either BOTH onSuccess and onFailure",
    ),
    "unknown field in a core kind": Mutant(
        lambda d: _mlflow(d).update(replica=2), "core", "replica"
    ),
    "name too long": Mutant(
        lambda d: find(d, "RayJob", "sweep")["metadata"].update(name="s" * 48),
        "operator",
        "at most 47",
    ),
    "name with a dot": Mutant(
        lambda d: find(d, "RayJob", "sweep")["metadata"].update(name="a.b"),
        "operator",
        "hold only those",
    ),
    "autoscaler v2 restarts": Mutant(
        lambda d: _workers(d)["template"]["spec"].update(restartPolicy="Always"),
        "operator",
        "autoscaler v2 needs Never",
    ),
    "priority without autoscaler": Mutant(
        lambda d: group(ray_spec(find(d, "RayJob", "sweep")), "cpu").update(priority=1),
        "operator",
        "priority needs autoscaler v2",
    ),
    "selector with retries": Mutant(
        lambda d: find(d, "RayJob", "report")["spec"].update(backoffLimit=1),
        "operator",
        "does not go with backoffLimit",
    ),
    "sidecar with a submitter": Mutant(
        lambda d: _job(d).update(submissionMode="SidecarMode"),
        "operator",
        "SidecarMode takes no submitterPodTemplate",
    ),
    "both clusters": Mutant(
        lambda d: _job(d).update(clusterSelector={"ray.io/cluster": "avzero"}),
        "operator",
        "either rayClusterSpec or clusterSelector",
    ),
    "ttl without shutdown": Mutant(
        lambda d: _job(d).update(shutdownAfterJobFinishes=False), "operator", "needs shutdownAfter"
    ),
    "gated field": Mutant(
        lambda d: ray_spec(find(d, "RayCluster", "avzero")).update(networkPolicy={"mode": "x"}),
        "operator",
        "feature gate RayClusterNetworkPolicy",
    ),
    "token without version": Mutant(
        lambda d: _job(d)["rayClusterSpec"].update(rayVersion="2.40.0"),
        "operator",
        "token authentication needs rayVersion 2.52.0",
    ),
    "another Ray": Mutant(
        lambda d: _worker(d).update(image="avzero:0.1.0-ray2.59.0"), "policy", "is not of Ray"
    ),
    "latest": Mutant(
        lambda d: _mlflow_container(d).update(image="avzero:latest"), "policy", "is not pinned"
    ),
    "root": Mutant(
        lambda d: _workers(d)["template"]["spec"].pop("securityContext"), "policy", "run as root"
    ),
    "open token": Mutant(
        lambda d: _job(d)["rayClusterSpec"].pop("authOptions"),
        "policy",
        "token authentication is off",
    ),
    "secret written out": Mutant(
        lambda d: _worker(d)["env"].append({"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}),
        "policy",
        "is written out",
    ),
    "missing ConfigMap": Mutant(
        lambda d: find(d, "ConfigMap", "avzero-settings")["metadata"].update(name="settings-a1b2"),
        "references",
        "ConfigMap avzero-settings does not exist",
    ),
    "undeclared Secret": Mutant(
        lambda d: _worker(d)["envFrom"].append({"secretRef": {"name": "mine"}}),
        "references",
        "Secret mine is used",
    ),
    "missing cluster": Mutant(
        lambda d: find(d, "RayCluster", "avzero")["metadata"].update(name="other"),
        "references",
        "RayCluster avzero does not exist",
    ),
    "policy for no one": Mutant(
        lambda d: find(d, "NetworkPolicy", "mlflow")["spec"].update(
            podSelector={"matchLabels": {"app": "mlflow"}}
        ),
        "references",
        "selects no pod",
    ),
}


@pytest.mark.parametrize("name", [*NOTES, *OWN])
def test_mutant_is_caught(name: str) -> None:
    mutant = (NOTES | OWN)[name]
    documents = bundle("kind")  # passes as it is: test_manifests
    mutant.change(documents)
    found = CHECKS[mutant.check](documents)
    assert any(mutant.says in line for line in found), found
    assert all("\n" not in line for line in found)


def test_there_are_thirteen() -> None:
    assert len(NOTES) == 13
