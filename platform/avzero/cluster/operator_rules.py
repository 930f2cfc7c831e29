"""The KubeRay operator's own rules for RayClusters and RayJobs, checked before anything is sent.

The API server checks types; these the operator checks later, and answers with an event few people
look for. They restate KubeRay v1.7.0's validation (feature gates as shipped).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

Document = Mapping[str, Any]

NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
"""DNS-1035: the names become names of Services."""
NAME_LIMITS = {"RayCluster": 53, "RayJob": 47}
"""Longer ones would be cut in the names of what KubeRay makes from them."""
_QUANTITY = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))([numkMGTPE]|[KMGTPE]i|[eE][+-]?\d+)?")
_SUFFIXES = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "k": 1e3} | {
    letter + "i" * binary: (1024.0 if binary else 1000.0) ** power
    for power, letter in enumerate("KMGTPE", start=1)
    for binary in (0, 1)
    if letter != "K" or binary
}
_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
_GATED = {"networkPolicy": "RayClusterNetworkPolicy", "tlsOptions": "RayClusterMTLS"}
_GATED |= {"historyServerOptions": "RayClusterHistoryServer"}


def quantity(value: object) -> float:
    """Return a Kubernetes quantity such as ``500m`` or ``2Gi`` as a number.

    Raises:
        ValueError: it is none.
    """
    found = _QUANTITY.fullmatch(str(value))
    if not found:
        raise ValueError(f"{value!r} is no quantity; write it like 500m, 2 or 4Gi")
    number, suffix = float(found[1]), found[2] or ""
    if suffix in _SUFFIXES or not suffix:
        return number * _SUFFIXES.get(suffix, 1.0)
    return number * float(f"1{suffix}")


def problems(document: Document) -> list[str]:
    """Return what the operator would refuse in a RayCluster or RayJob, each as one line."""
    kind, name = document["kind"], str(document["metadata"]["name"])
    spec = document["spec"]
    found = [*_name(kind, name)]
    if kind == "RayJob":
        found += _job(spec)
        if "rayClusterSpec" in spec:
            found += _cluster(spec["rayClusterSpec"], in_job=True)
    else:
        found += _cluster(spec, in_job=False)
    return [f"{kind} {name}: {problem}" for problem in found]


def pod_problems(pod: Document) -> Iterator[str]:
    """Yield what is wrong with a pod's quantities; no schema knows that limits bound requests."""
    for container in [*pod.get("initContainers", []), *pod.get("containers", [])]:
        resources = container.get("resources", {})
        amounts: dict[tuple[str, str], float] = {}
        for part in ("requests", "limits"):
            for key, value in resources.get(part, {}).items():
                try:
                    amounts[part, key] = quantity(value)
                except ValueError as error:
                    yield f"container {container.get('name')}: {part}.{key}: {error}"
        for (part, key), amount in amounts.items():
            if part == "requests" and amount > amounts.get(("limits", key), amount):
                yield (
                    f"container {container.get('name')}: requests {resources['requests'][key]} "
                    f"{key}, more than its limit {resources['limits'][key]}"
                )


def _name(kind: str, name: str) -> Iterator[str]:
    limit = NAME_LIMITS[kind]
    if len(name) > limit:
        yield f"the name has {len(name)} characters, at most {limit} are allowed"
    if not NAME.fullmatch(name):
        yield "the name must start with a-z, end with a-z or 0-9, and hold only those and '-'"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def _cluster(spec: Document, *, in_job: bool) -> Iterator[str]:
    head, groups = spec.get("headGroupSpec", {}), spec.get("workerGroupSpecs", [])
    for where, group in [("head", head), *((_group_name(g), g) for g in groups)]:
        yield from (f"{where}: {problem}" for problem in _pods_of(group))
    names = [_group_name(group) for group in groups]
    if len(set(names)) != len(names):
        yield f"two worker groups have one name: {', '.join(names)}"
    scaled = bool(spec.get("enableInTreeAutoscaling"))
    for group in groups:
        yield from (f"{_group_name(group)}: {p}" for p in _replicas(group, scaled))
    yield from _autoscaling(spec, head, groups)
    yield from _authentication(spec, in_job=in_job)
    yield from _fault_tolerance(spec, head)
    for field, gate in _GATED.items():
        if field in spec:
            yield f"{field} needs the feature gate {gate}, which is off; remove it"


def _group_name(group: Document) -> str:
    return f"worker group {group.get('groupName', '(without a name)')}"


def _pod(group: Document) -> Document:
    return group.get("template", {}).get("spec", {})  # type: ignore[no-any-return]


def _pods_of(group: Document) -> Iterator[str]:
    if not _pod(group).get("containers"):
        yield "has no container"
    parameters = group.get("rayStartParams", {})
    if group.get("resources") and parameters.keys() & {
        "num-cpus",
        "num-gpus",
        "memory",
        "resources",
    }:
        yield "names resources in rayStartParams and in resources; keep one"
    if "labels" in parameters:
        yield "rayStartParams.labels is not supported; use labels"
    yield from pod_problems(_pod(group))


def _replicas(group: Document, scaled: bool) -> Iterator[str]:
    least, most = group.get("minReplicas"), group.get("maxReplicas")
    if not scaled and (least is None or most is None):
        yield "without autoscaling minReplicas and maxReplicas must both be set"
    count, least, most = group.get("replicas"), least or 0, most if most is not None else 2**31 - 1
    if least < 0 or most < 0:
        yield "minReplicas and maxReplicas cannot be negative"
    if least > most:
        yield f"minReplicas {least} is more than maxReplicas {most}"
    elif count is not None and not least <= count <= most:
        yield f"replicas {count} is outside minReplicas {least} … maxReplicas {most}"
    if group.get("suspend") and scaled:
        yield "cannot be suspended with autoscaling"


def _autoscaling(spec: Document, head: Document, groups: list[Document]) -> Iterator[str]:
    scaled = bool(spec.get("enableInTreeAutoscaling"))
    version = spec.get("autoscalerOptions", {}).get("version")
    variable = _variables(head).get("RAY_enable_autoscaler_v2")
    if variable is not None and (version or not scaled):
        yield (
            "RAY_enable_autoscaler_v2 is set; use enableInTreeAutoscaling and "
            "autoscalerOptions.version instead"
        )
    second = scaled and (version == "v2" or variable in ("1", "true"))
    for where, group in [("head", head), *((_group_name(g), g) for g in groups)]:
        policy = _pod(group).get("restartPolicy", "Never")
        if second and policy != "Never":
            yield f"{where}: restartPolicy is {policy}; autoscaler v2 needs Never"
    for group in groups:
        for field in ("idleTimeoutSeconds", "priority"):
            if group.get(field) and not second:
                yield f"{_group_name(group)}: {field} needs autoscaler v2"
        if group.get("priority") and _version(spec.get("rayVersion", "")) < (2, 56):
            yield f"{_group_name(group)}: priority needs rayVersion 2.56.0 or later"


def _variables(group: Document) -> dict[str, str]:
    containers = _pod(group).get("containers") or [{}]
    return {e["name"]: e.get("value", "") for e in containers[0].get("env", []) if "name" in e}


def _authentication(spec: Document, *, in_job: bool) -> Iterator[str]:
    options = spec.get("authOptions", {})
    if options.get("mode") != "token":
        return
    kubernetes = options.get("enableK8sTokenAuth")
    needed = (2, 55) if kubernetes else (2, 52)
    if _version(spec.get("rayVersion", "")) < needed:
        yield f"token authentication needs rayVersion {needed[0]}.{needed[1]}.0 or later, and set"
    if kubernetes and in_job:
        yield "enableK8sTokenAuth is for RayClusters only"


def _fault_tolerance(spec: Document, head: Document) -> Iterator[str]:
    variables = _variables(head)
    options = spec.get("gcsFaultToleranceOptions")
    if options is None:
        if "RAY_REDIS_ADDRESS" in variables:
            yield "RAY_REDIS_ADDRESS is set without gcsFaultToleranceOptions"
        return
    if options.get("backend") == "rocksdb":
        yield "backend rocksdb needs GCSFaultToleranceEmbeddedStorage, a feature gate that is off"
    for name in ("RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"):
        if name in variables:
            yield f"{name} is set beside gcsFaultToleranceOptions; use the latter alone"
    if "redis-password" in head.get("rayStartParams", {}):
        yield "rayStartParams.redis-password is set; use gcsFaultToleranceOptions.redisPassword"


def _job(spec: Document) -> Iterator[str]:
    mode = spec.get("submissionMode", "K8sJobMode")
    if mode not in _MODES:
        yield f"submissionMode {mode!r} is unknown; known: {', '.join(_MODES)}"
    if mode != "InteractiveMode" and not str(spec.get("entrypoint", "")).strip():
        yield "entrypoint is missing"
    own, selector = spec.get("rayClusterSpec"), spec.get("clusterSelector")
    if (own is None) == (not selector):
        yield "give either rayClusterSpec or clusterSelector"
    for field in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(field) is not None and spec[field] <= 0:
            yield f"{field} must be positive"
    if spec.get("backoffLimit", 0) < 0:
        yield "backoffLimit cannot be negative"
    if mode == "InteractiveMode" and spec.get("backoffLimit"):
        yield "InteractiveMode takes no backoffLimit"
    if selector:
        yield from _selected(spec, mode)
    if mode == "SidecarMode":
        yield from _sidecar(spec, own or {})
    yield from _ending(spec, own or {})


def _selected(spec: Document, mode: str) -> Iterator[str]:
    if not spec["clusterSelector"].get("ray.io/cluster"):
        yield "clusterSelector must name the cluster as ray.io/cluster"
    for field in ("suspend", "backoffLimit"):
        if spec.get(field):
            yield f"clusterSelector does not go with {field}; give the job its own rayClusterSpec"
    if mode == "SidecarMode":
        yield "clusterSelector does not go with SidecarMode"
    if any(policy in ("DeleteCluster", "DeleteWorkers") for policy in _policies(spec)):
        yield "clusterSelector does not go with deleting the cluster"


def _sidecar(spec: Document, own: Document) -> Iterator[str]:
    for field in ("submitterPodTemplate", "submitterConfig"):
        if field in spec:
            yield f"SidecarMode takes no {field}"
    if _pod(own.get("headGroupSpec", {})).get("restartPolicy", "Never") != "Never":
        yield "SidecarMode needs the head's restartPolicy Never"


def _policies(spec: Document) -> list[str]:
    strategy = spec.get("deletionStrategy", {})
    parts = [strategy.get("onSuccess", {}), strategy.get("onFailure", {})]
    return [part["policy"] for part in [*parts, *strategy.get("deletionRules", [])] if part]


def _ending(spec: Document, own: Document) -> Iterator[str]:
    ends = bool(spec.get("shutdownAfterJobFinishes"))
    if spec.get("ttlSecondsAfterFinished", 0) < 0:
        yield "ttlSecondsAfterFinished cannot be negative"
    for field in ("ttlSecondsAfterFinished", "suspend"):
        if spec.get(field) and not ends:
            yield f"{field} needs shutdownAfterJobFinishes: true"
    if ends and spec.get("deletionStrategy", {}).get("deletionRules"):
        yield "shutdownAfterJobFinishes and deletionRules exclude each other"
    if "DeleteWorkers" in _policies(spec) and own.get("enableInTreeAutoscaling"):
        yield "DeleteWorkers does not go with autoscaling"
