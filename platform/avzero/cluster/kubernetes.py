"""A sweep as a RayJob: KubeRay starts a cluster for it, and another when that one fails.

The form is a RayJob rendered by kustomize (``k8s/``), so that whatever a site changed in its pods
holds for every sweep. Only what follows from the job is filled in: names, the job file in a
ConfigMap beside it, the command, and how many workers of which size.
"""

from __future__ import annotations

import copy
import math
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from avzero.canon import identity
from avzero.cluster.operator_rules import problems, quantity
from avzero.errors import UserError
from avzero.spec import Job, Resources

JOBS_FOLDER = "/etc/avzero/jobs"
"""Where pods find job files."""
STEP_LABEL = "avzero.dev/step"
SWEEP_LABEL = "avzero.dev/sweep"
FORM = Path(__file__).with_name("rayjob.yaml")
"""The form used without another one: ``kubectl kustomize k8s/base-jobs``, the sweep alone."""
_GPU = "nvidia.com/gpu"
_PLAIN = re.compile(r"[\w./:@%+=,~-]+")
"""What passes through the submitter's shell as it is."""

Document = dict[str, Any]


def render_rayjob(job: Job, template: str = "", pods: int = 0) -> str:
    """Return a sweep as YAML for ``kubectl apply``: a ConfigMap and a RayJob.

    Args:
        job: the sweep; its store and tracker are used where pods can reach them (``s3://``,
            ``http://``, ``off``), else the cluster's own settings.
        template: a kustomize folder or a rendered file with a RayJob of the step ``sweep``;
            empty: the one avzero brings.
        pods: worker pods; 0: as ``resources.concurrent`` needs, or as many as the template has.

    Raises:
        UserError: the template has no place for what the job needs, or KubeRay would refuse it.
    """
    try:
        documents = rayjob_documents(job, load_form(template), pods)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{template or FORM}: its RayJob is not shaped like one "
            f"({type(error).__name__}: {error}); render it with kubectl kustomize k8s/…-jobs"
        ) from error
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=100)


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines, such as a job file, as it would stand in a file."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def rayjob_documents(
    job: Job, form: Document, pods: int = 0, step: Literal["sweep", "test"] = "sweep"
) -> list[Document]:
    """Return the ConfigMap and the RayJob of a job.

    Args:
        job: the sweep.
        form: a RayJob with its own cluster (``load_form``); not changed.
        pods: see ``render_rayjob``.
        step: the command that is run.

    Raises:
        UserError: as ``render_rayjob``.
    """
    name = rayjob_name(job, step)
    filled = copy.deepcopy(form)
    labels = {STEP_LABEL: step, SWEEP_LABEL: name}
    space = {key: form["metadata"][key] for key in ("namespace",) if key in form["metadata"]}
    # Further labels of the form stay with the RayJob: they may put it into a queue.
    all_labels = form["metadata"].get("labels", {}) | labels
    filled["metadata"] = {"name": name, "labels": all_labels} | space
    spec = filled["spec"]
    spec["jobId"] = name
    spec["entrypoint"] = entrypoint(job, step)
    spec["metadata"] = {
        "avzero_sweep": job.name,
        "avzero_job": identity(job.model_dump(mode="json")),
    }
    cluster = spec["rayClusterSpec"]
    _mount(cluster["headGroupSpec"]["template"]["spec"], f"{name}-job")
    cluster["workerGroupSpecs"] = [_workers(job, cluster, pods, step)]
    for problem in problems(filled):
        raise UserError(f"job {job.name}: KubeRay would refuse it: {problem}")
    text = yaml.safe_dump(job.model_dump(mode="json", exclude_unset=True), sort_keys=False)
    files = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-job", "labels": labels} | space,
        "data": {f"{job.name}.yaml": text},
    }
    return [files, filled]


def rayjob_name(job: Job, step: str = "sweep") -> str:
    """Return the name of a job's RayJob, which is its submission id as well.

    The same job has the same name, so applying it again changes nothing; a changed one (more
    trials) has another, and starts.
    """
    slug = re.sub(r"[^a-z0-9-]+", "-", job.name).strip("-")
    if not slug[:1].isalpha():
        slug = f"x{slug}"
    mark = identity(job.model_dump(mode="json"))[:8]
    tail = f"-{mark}" if step == "sweep" else f"-{mark}-{step}"
    return slug[: 47 - len(tail)].rstrip("-") + tail


def entrypoint(job: Job, step: str = "sweep") -> str:
    """Return the command the driver runs on the cluster's head.

    Raises:
        UserError: the store or the tracker holds characters a shell would change.
    """
    words = ["avzero", step, f"{JOBS_FOLDER}/{job.name}.yaml", "--address", "auto"]
    # What the pods cannot reach, a folder or a file here, is left to the cluster's own settings.
    if "://" in job.store:
        words += ["--store", job.store]
    if job.tracking.uri == "off" or re.match(r"https?://", job.tracking.uri):
        words += ["--tracking", job.tracking.uri]
    for word in words:
        if not _PLAIN.fullmatch(word):
            raise UserError(
                f"job {job.name}: {word!r} would not pass through the submitter's shell; use "
                "letters, digits and . / : @ % + = , ~ _ -"
            )
    return " ".join(words)


def load_form(template: str = "", step: str = "sweep") -> Document:
    """Return the RayJob to fill in.

    Args:
        template: a kustomize folder, or a file ``kubectl kustomize`` wrote; empty: avzero's own.
        step: which of its RayJobs, by the label ``avzero.dev/step``.

    Raises:
        UserError: there is none, or it brings no cluster of its own.
    """
    path = Path(template) if template else FORM
    try:
        documents = list(yaml.safe_load_all(_template_text(path)))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({error})") from error
    for document in documents:
        if not isinstance(document, dict) or document.get("kind") != "RayJob":
            continue
        if document.get("metadata", {}).get("labels", {}).get(STEP_LABEL) == step:
            return _checked_form(document, path)
    raise UserError(f"{path}: holds no RayJob with the label {STEP_LABEL}: {step}")


def _template_text(path: Path) -> str:
    """Return a template's YAML; a folder is rendered by kubectl."""
    if not path.is_dir():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as a template ({error})") from error
    if shutil.which("kubectl") is None:
        raise UserError(f"{path}: kubectl, which renders a template's folder, is not installed")
    done = subprocess.run(
        ["kubectl", "kustomize", str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise UserError(f"kubectl kustomize {path}: {last[0]}")
    return done.stdout


def _checked_form(form: Document, path: Path) -> Document:
    """Refuse a form that lacks what is filled in."""
    where = f"{path}: RayJob {form['metadata'].get('name')}"
    spec = form.get("spec")
    cluster = spec.get("rayClusterSpec") if isinstance(spec, dict) else None
    if not isinstance(cluster, dict):
        raise UserError(f"{where}: has no rayClusterSpec; a sweep gets a cluster of its own")
    for problem in problems(form):
        raise UserError(f"{path}: KubeRay would refuse it: {problem}")
    if not cluster.get("workerGroupSpecs"):
        raise UserError(f"{where}: has no worker group")
    head = cluster["headGroupSpec"]["template"]["spec"]
    if not list(_job_volumes(head)):
        raise UserError(f"{where}: its head mounts no ConfigMap at {JOBS_FOLDER}")
    return form


def _job_volumes(head: Document) -> Iterator[Document]:
    mounts = head["containers"][0].get("volumeMounts", [])
    names = {mount["name"] for mount in mounts if mount.get("mountPath") == JOBS_FOLDER}
    return (v for v in head.get("volumes", []) if v["name"] in names and "configMap" in v)


def _mount(head: Document, config_map: str) -> None:
    for volume in _job_volumes(head):
        volume["configMap"] = {"name": config_map}


def _workers(job: Job, cluster: Document, pods: int, step: str) -> Document:
    """Return the worker group: pods that hold whole workers, as many as run at once."""
    need = job.resources
    if step == "test":
        need = need.model_copy(update={"workers": job.test.workers, "concurrent": job.test.seeds})
    group = _group_for(job, need, cluster["workerGroupSpecs"])
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    per_pod = _fit(group, need)
    groups = len(job.benchmarks) * len(job.models)
    each = math.ceil(job.search.trials / need.width) if step == "sweep" else job.test.seeds
    runs = groups * each
    most = math.ceil(runs * need.workers / per_pod)
    one = math.ceil(need.workers / per_pod)
    wanted = math.ceil(need.concurrent * need.workers / per_pod)
    count = pods or min(wanted or group.get("replicas", 0), most)
    if pods and pods < one:
        raise UserError(
            f"job {job.name}: a run has {need.workers} workers, {per_pod} to a pod of "
            f"{limits.get('cpu')} CPU and {limits.get(_GPU, 0)} GPU, so it needs {one} pods, "
            f"not {pods}"
        )
    count = max(count, one)
    return group | {"replicas": count, "minReplicas": count, "maxReplicas": count}


def _group_for(job: Job, need: Resources, groups: Sequence[Document]) -> Document:
    """Return the first group with GPUs for a job that uses them, without for one that does not."""
    for group in groups:
        limits = group["template"]["spec"]["containers"][0].get("resources", {}).get("limits", {})
        if "cpu" not in limits or "memory" not in limits:
            raise UserError(
                f"job {job.name}: worker group {group['groupName']} of the template sets no limits "
                "for cpu and memory; add them"
            )
        if bool(quantity(limits.get(_GPU, 0))) == bool(need.gpus):
            return group
    names = ", ".join(group["groupName"] for group in groups)
    kind = f"{_GPU} for resources.gpus: {need.gpus:g}" if need.gpus else "CPUs alone"
    raise UserError(
        f"job {job.name}: the template has no worker group with {kind} (it has {names}); give "
        "another --template, or change resources"
    )


def _fit(group: Document, need: Resources) -> int:
    """Enlarge a group's pod until it holds a worker; return how many it holds."""
    resources = group["template"]["spec"]["containers"][0]["resources"]
    limits = resources["limits"]
    cpus, gpus = quantity(limits["cpu"]), quantity(limits.get(_GPU, 0))
    if need.gpus:
        gpus = max(gpus, math.ceil(need.gpus))
        held = math.floor(gpus / need.gpus)
        grown = max(cpus, math.ceil(held * need.cpus))
    else:
        grown = max(cpus, math.ceil(need.cpus))
        # KubeRay rounds up; without a need for CPUs one worker is put on each.
        held = math.floor(math.ceil(grown) / (need.cpus or 1))
    changes: dict[str, str] = {_GPU: f"{gpus:g}"} if gpus else {}
    if grown != cpus:
        memory = quantity(limits["memory"]) * grown / cpus
        changes |= {"cpu": f"{grown:g}", "memory": f"{math.ceil(memory / 2**20)}Mi"}
    for part in ("requests", "limits"):
        resources[part] = resources.get(part, {}) | changes
    return held
