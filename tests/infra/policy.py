"""What holds for every manifest of k8s/: who runs as what, what refers to what, who reaches whom.

A check takes a bundle's documents and returns what is wrong, one line each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import yaml

from avzero.cluster.operator_rules import pod_problems, problems, quantity
from tests.conftest import ROOT
from tests.infra.manifest import Document, ray_spec

CLUSTER_KINDS = {"Namespace", "PriorityClass", "ResourceFlavor", "ClusterQueue"}
QUEUE = "kueue.x-k8s.io/queue-name"
SECRET_NAME = re.compile(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)
IMAGE = re.compile(r"(?P<name>[\w./-]+):(?P<tag>[\w.-]+)")


def pinned(package: str) -> str:
    """Return the version constraints.txt gives a package."""
    text = (ROOT / "constraints.txt").read_text()
    found = re.search(rf"^{re.escape(package)}==(\S+)$", text, re.MULTILINE)
    assert found, package
    return found[1]


class Pod(NamedTuple):
    """A pod some document makes."""

    where: str
    owner: Document
    spec: Document
    labels: Mapping[str, str]

    @property
    def containers(self) -> list[Document]:
        return [*self.spec.get("initContainers", []), *self.spec.get("containers", [])]


def pods(documents: Sequence[Document]) -> list[Pod]:
    """Return the pods of a bundle."""
    return [pod for document in documents for pod in _pods_of(document)]


def _pods_of(document: Document) -> Iterator[Pod]:
    kind, name = document["kind"], document["metadata"]["name"]
    templates: dict[str, Document] = {}
    if kind in ("Deployment", "StatefulSet", "Job"):
        templates[""] = document["spec"]["template"]
    if kind in ("RayCluster", "RayJob"):
        spec = ray_spec(document) if "clusterSelector" not in document["spec"] else {}
        if "headGroupSpec" in spec:
            templates[" head"] = spec["headGroupSpec"]["template"]
        for group in spec.get("workerGroupSpecs", []):
            templates[f" group {group.get('groupName')}"] = group["template"]
        if "submitterPodTemplate" in document["spec"]:
            templates[" submitter"] = document["spec"]["submitterPodTemplate"]
    for part, template in templates.items():
        labels = template.get("metadata", {}).get("labels", {})
        yield Pod(f"{kind} {name}{part}", document, template["spec"], labels)


def check_operator(documents: Sequence[Document]) -> list[str]:
    """Check Ray's kinds against KubeRay's own rules, and every pod's quantities."""
    ray = [d for d in documents if d["kind"] in ("RayCluster", "RayJob")]
    found = [problem for document in ray for problem in problems(document)]
    found += [f"{pod.where}: {p}" for pod in pods(documents) for p in pod_problems(pod.spec)]
    for document in documents:
        for path, value in _quantities(document):
            try:
                quantity(value)
            except ValueError as error:
                found.append(f"{document['kind']} {document['metadata']['name']}: {path}: {error}")
    return found


def _quantities(document: Document) -> Iterator[tuple[str, object]]:
    """Yield quantities outside pods."""
    spec = document.get("spec", {})
    if document["kind"] == "ResourceQuota":
        yield from spec["hard"].items()
    if document["kind"] == "LimitRange":
        for limit in spec["limits"]:
            for part in ("default", "defaultRequest", "max", "min"):
                yield from limit.get(part, {}).items()
    claims = [document] if document["kind"] == "PersistentVolumeClaim" else []
    for claim in claims + spec.get("volumeClaimTemplates", []):
        yield from claim["spec"]["resources"]["requests"].items()
    for pod in _pods_of(document):
        for volume in pod.spec.get("volumes", []):
            if volume.get("emptyDir", {}).get("sizeLimit"):
                yield f"volume {volume['name']}", volume["emptyDir"]["sizeLimit"]


# -- security ----------------------------------------------------------------------------------


def check_policy(documents: Sequence[Document]) -> list[str]:
    """Check what the platform promises of its pods: rights, limits, images, probes, secrets."""
    found = [problem for pod in pods(documents) for problem in _pod_policy(pod)]
    for document in documents:
        name = f"{document['kind']} {document['metadata']['name']}"
        found += [f"{name}: {problem}" for problem in _document_policy(document)]
    return found


def _pod_policy(pod: Pod) -> Iterator[str]:
    security = pod.spec.get("securityContext", {})
    if not security.get("runAsNonRoot") or security.get("runAsUser") == 0:
        yield f"{pod.where}: may run as root"
    if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield f"{pod.where}: has no seccomp profile"
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.spec.get(field):
            yield f"{pod.where}: {field}"
    for volume in pod.spec.get("volumes", []):
        if "hostPath" in volume:
            yield f"{pod.where}: volume {volume['name']} is a folder of the node"
    for container in pod.containers:
        yield from (f"{pod.where}: {c}" for c in _container_policy(container))
    if pod.owner["kind"] in ("Deployment", "StatefulSet"):
        for container in pod.spec["containers"]:
            for probe in ("readinessProbe", "livenessProbe"):
                if probe not in container:
                    yield f"{pod.where}: container {container['name']} has no {probe}"


def _container_policy(container: Document) -> Iterator[str]:
    name = f"container {container.get('name')}"
    rights = container.get("securityContext", {})
    if rights.get("allowPrivilegeEscalation") is not False or rights.get("privileged"):
        yield f"{name} may gain privileges"
    if rights.get("capabilities") != {"drop": ["ALL"]}:
        yield f"{name} keeps capabilities"
    if not rights.get("readOnlyRootFilesystem"):
        yield f"{name} may write to its image"
    resources = container.get("resources", {})
    for part in ("requests", "limits"):
        missing = {"cpu", "memory"} - resources.get(part, {}).keys()
        if missing:
            yield f"{name} has no {part} of {', '.join(sorted(missing))}"
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    if requests.get("memory") != limits.get("memory"):
        yield f"{name}: memory requested and limit differ; it would be killed when others need it"
    yield from _image_policy(name, str(container.get("image", "")))
    for entry in container.get("env", []):
        if SECRET_NAME.search(entry["name"]) and "value" in entry:
            yield f"{name}: {entry['name']} is written out; refer to a Secret"


def _image_policy(name: str, image: str) -> Iterator[str]:
    found = IMAGE.fullmatch(image)
    if not found or found["tag"] == "latest":
        yield f"{name}: image {image!r} is not pinned"
        return
    program = found["name"].rpartition("/")[2]
    if program in ("avzero", "avzero-gpu") and not found["tag"].endswith(f"-ray{pinned('ray')}"):
        yield f"{name}: image {image} is not of Ray {pinned('ray')}, as constraints.txt says"
    if program == "moto" and found["tag"] != pinned("moto"):
        yield f"{name}: image {image} is not moto {pinned('moto')}, as constraints.txt says"


def _document_policy(document: Document) -> Iterator[str]:
    kind, spec = document["kind"], document.get("spec", {})
    if kind == "Secret":
        yield "secrets are made on the cluster, never written down here"
    if kind == "ConfigMap":
        for key in document.get("data", {}):
            if SECRET_NAME.search(key):
                yield f"{key} belongs in a Secret"
    if kind not in CLUSTER_KINDS and document["metadata"].get("namespace") != "avzero":
        yield "is not in the namespace avzero"
    if kind == "Namespace":
        for mode in ("enforce", "audit", "warn"):
            if document["metadata"]["labels"].get(f"pod-security.kubernetes.io/{mode}") != (
                "restricted"
            ):
                yield f"pod security is not restricted ({mode})"
    if kind in ("RayCluster", "RayJob") and "clusterSelector" not in spec:
        cluster = ray_spec(document)
        if cluster.get("authOptions", {}).get("mode") != "token":
            yield "token authentication is off"
        if cluster.get("rayVersion") != pinned("ray"):
            yield f"rayVersion is not {pinned('ray')}, as constraints.txt says"
    if kind == "RayJob":
        yield from _job_policy(spec)


def _job_policy(spec: Document) -> Iterator[str]:
    wanted = ["activeDeadlineSeconds", "preRunningDeadlineSeconds", "submitterPodTemplate", "jobId"]
    if "rayClusterSpec" in spec:
        wanted += ["backoffLimit", "ttlSecondsAfterFinished", "shutdownAfterJobFinishes"]
    for field in wanted:
        if not spec.get(field):
            yield f"sets no {field}"


# -- references --------------------------------------------------------------------------------


def check_references(documents: Sequence[Document]) -> list[str]:
    """Check that all that is named exists, and that selectors select."""
    found = [p for pod in pods(documents) for p in _pod_references(pod, documents)]
    found += _secrets(documents)
    for document in documents:
        name = f"{document['kind']} {document['metadata']['name']}"
        found += [f"{name}: {p}" for p in _document_references(document, documents)]
    return found


def _exists(documents: Sequence[Document], kind: str, name: str) -> bool:
    return any(d["kind"] == kind and d["metadata"]["name"] == name for d in documents)


def _pod_references(pod: Pod, documents: Sequence[Document]) -> Iterator[str]:
    wanted = [
        ("ServiceAccount", pod.spec.get("serviceAccountName")),
        ("PriorityClass", pod.spec.get("priorityClassName")),
    ]
    for volume in pod.spec.get("volumes", []):
        wanted.append(("ConfigMap", volume.get("configMap", {}).get("name")))
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        wanted.append(("PersistentVolumeClaim", claim))
    volumes = {volume["name"] for volume in pod.spec.get("volumes", [])}
    claims = pod.owner["spec"].get("volumeClaimTemplates", [])
    volumes |= {claim["metadata"]["name"] for claim in claims}
    for container in pod.containers:
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in volumes:
                yield f"{pod.where}: mounts volume {mount['name']}, which the pod does not have"
        for source in container.get("envFrom", []):
            wanted.append(("ConfigMap", source.get("configMapRef", {}).get("name")))
        for entry in container.get("env", []):
            key = entry.get("valueFrom", {}).get("configMapKeyRef")
            if key and not _key_exists(documents, key):
                yield f"{pod.where}: ConfigMap {key['name']} has no key {key['key']}"
    for kind, name in wanted:
        if name and not _exists(documents, kind, name):
            yield f"{pod.where}: {kind} {name} does not exist"


def _key_exists(documents: Sequence[Document], key: Mapping[str, str]) -> bool:
    return any(
        d["kind"] == "ConfigMap"
        and d["metadata"]["name"] == key["name"]
        and key["key"] in d["data"]
        for d in documents
    )


def _secrets(documents: Sequence[Document]) -> Iterator[str]:
    """Compare the Secrets that are used with those the namespace says must be made."""
    used = set(re.findall(r"(?:secretKeyRef|secretRef): \{[^}]*?name: ([\w-]+)", _flow(documents)))
    declared: set[str] = set()
    for document in documents:
        if document["kind"] == "Namespace":
            text = document["metadata"].get("annotations", {}).get("avzero.dev/secrets", "")
            declared = set(text.split(","))
    for name in sorted(used - declared):
        yield f"Secret {name} is used, but the namespace's avzero.dev/secrets does not name it"
    for name in sorted(declared - used):
        yield f"Secret {name} is named in avzero.dev/secrets, but nothing uses it"


def _flow(documents: Sequence[Document]) -> str:
    return yaml.safe_dump(list(documents), default_flow_style=True, width=10**9)


def _document_references(document: Document, documents: Sequence[Document]) -> Iterator[str]:
    kind, spec = document["kind"], document.get("spec", {})
    wanted = [("LocalQueue", document["metadata"].get("labels", {}).get(QUEUE))]
    if kind == "RayJob":
        wanted.append(("RayCluster", spec.get("clusterSelector", {}).get("ray.io/cluster")))
    if kind == "LocalQueue":
        wanted.append(("ClusterQueue", spec["clusterQueue"]))
    if kind == "ClusterQueue":
        flavors = [flavor for group in spec["resourceGroups"] for flavor in group["flavors"]]
        wanted += [("ResourceFlavor", flavor["name"]) for flavor in flavors]
    for named, name in wanted:
        if name and not _exists(documents, named, name):
            yield f"{named} {name} does not exist"
    if QUEUE in document["metadata"].get("labels", {}) and (
        "clusterSelector" in spec or ray_spec(document).get("enableInTreeAutoscaling")
    ):
        yield "a queue admits only jobs with a cluster of their own and of fixed size"
    yield from _selections(document, pods(documents))


def _selections(document: Document, every: Sequence[Pod]) -> Iterator[str]:
    kind, spec = document["kind"], document.get("spec", {})
    if kind == "Service":
        chosen = [pod for pod in every if selects(spec["selector"], pod.labels)]
        ports = {p["name"] for pod in chosen for c in pod.containers for p in c.get("ports", [])}
        if not chosen:
            yield "selects no pod"
        for port in spec["ports"]:
            if chosen and port["targetPort"] not in ports:
                yield f"targetPort {port['targetPort']} is no port of its pods"
    if kind in ("Deployment", "StatefulSet"):
        labels = spec["template"]["metadata"].get("labels", {})
        if not matches(spec["selector"], labels):
            yield "its selector does not select its own pods"
    for selector in _selectors(document):
        if not any(matches(selector, pod.labels) for pod in every):
            yield f"selects no pod with {selector}"


def _selectors(document: Document) -> Iterator[Document]:
    spec = document.get("spec", {})
    if document["kind"] == "PodDisruptionBudget":
        yield spec["selector"]
    if document["kind"] == "NetworkPolicy":
        yield spec["podSelector"]
        for direction, side in (("ingress", "from"), ("egress", "to")):
            for rule in spec.get(direction, []):
                yield from (p["podSelector"] for p in rule.get(side, []) if "podSelector" in p)


def selects(wanted: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Return whether a Service's selector selects a pod."""
    return wanted.items() <= labels.items()


def matches(selector: Document, labels: Mapping[str, str]) -> bool:
    """Return whether a label selector (equalities and ``In``) selects a pod."""
    if not selects(selector.get("matchLabels", {}), labels):
        return False
    return all(
        labels.get(rule["key"]) in rule["values"] for rule in selector.get("matchExpressions", [])
    )


# -- network -----------------------------------------------------------------------------------


def reaches(documents: Sequence[Document], source: str, target: str, port: int) -> bool:
    """Return whether the NetworkPolicies let one role's pods open a connection to another's."""
    ends = [{"avzero.dev/role": role} for role in (source, target)]
    return _open(documents, "egress", *ends, port) and _open(
        documents, "ingress", *reversed(ends), port
    )


def _open(
    documents: Sequence[Document],
    direction: str,
    of: Mapping[str, str],
    other: Mapping[str, str],
    port: int,
) -> bool:
    side = {"egress": "to", "ingress": "from"}[direction]
    for document in documents:
        if document["kind"] != "NetworkPolicy" or not matches(document["spec"]["podSelector"], of):
            continue
        for rule in document["spec"].get(direction, []):
            peers = rule.get(side)
            named = peers is None or any(
                "podSelector" in p and matches(p["podSelector"], other) for p in peers
            )
            if named and any(p["port"] == port for p in rule.get("ports", [{"port": port}])):
                return True
    return False
