"""A job file becomes a RayJob: names, command, job file, pods; and what is refused, in one line."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from avzero.cluster.kubernetes import (
    FORM,
    entrypoint,
    load_form,
    rayjob_documents,
    rayjob_name,
    render_rayjob,
)
from avzero.cluster.operator_rules import problems, quantity
from avzero.errors import UserError
from avzero.spec import Job, load_job
from tests.conftest import ROOT

DEMO = load_job(ROOT / "jobs" / "demo.yaml")
SWEEP = load_form()


def changed(**changes: Any) -> Job:
    """Return the demo with other values."""
    return Job.model_validate(DEMO.model_dump(mode="json", exclude_unset=True) | changes)


def workers(job: Job, pods: int = 0) -> dict[str, Any]:
    """Return the worker group rendered for a job."""
    (group,) = rayjob_documents(job, SWEEP, pods)[1]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    return group  # type: ignore[no-any-return]


def size(group: dict[str, Any]) -> tuple[str, int, dict[str, str]]:
    """Return a group's name, its pods, and what each has."""
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
    resources = group["template"]["spec"]["containers"][0]["resources"]
    assert resources["requests"] == resources["limits"]
    return group["groupName"], group["replicas"], resources["limits"]


def test_the_job_file_travels_beside_the_rayjob(tmp_path: Path) -> None:
    files, rayjob = yaml.safe_load_all(render_rayjob(DEMO))
    name = rayjob_name(DEMO)
    assert rayjob["metadata"]["name"] == rayjob["spec"]["jobId"] == name
    assert rayjob["spec"]["entrypoint"] == "avzero sweep /etc/avzero/jobs/demo.yaml --address auto"
    head = rayjob["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert {"name": "jobs", "configMap": {"name": files["metadata"]["name"]}} in head["volumes"]
    (tmp_path / "job.yaml").write_text(files["data"]["demo.yaml"])
    assert load_job(tmp_path / "job.yaml") == DEMO


def test_rendering_leaves_the_form_alone_and_is_repeatable() -> None:
    form = load_form()
    before = copy.deepcopy(form)
    assert rayjob_documents(DEMO, form) == rayjob_documents(DEMO, form)
    assert form == before


@pytest.mark.parametrize("name", ["a", "7b", "ucf.avca_2", "a" * 63, "a-" * 20 + "b", "9" * 63])
def test_names_suit_kuberay(name: str) -> None:
    for step in ("sweep", "test"):
        given = rayjob_name(changed(name=name), step)
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", given) and len(given) <= 47


def test_the_same_job_has_the_same_name_and_another_has_another() -> None:
    assert rayjob_name(changed()) == rayjob_name(DEMO)
    others = {rayjob_name(changed(search={"trials": 9})), rayjob_name(changed(name="de-mo"))}
    others |= {rayjob_name(changed(name="de.mo")), rayjob_name(DEMO, "test"), rayjob_name(DEMO)}
    assert len(others) == 5


def test_places_pods_can_reach_are_kept_and_others_are_the_clusters() -> None:
    job = changed(store="s3://lab/avzero", tracking={"uri": "http://mlflow.lab:5000"})
    assert entrypoint(job).endswith(
        "--address auto --store s3://lab/avzero --tracking http://mlflow.lab:5000"
    )
    assert entrypoint(changed(tracking={"uri": "off"})).endswith("auto --tracking off")
    assert entrypoint(changed(store="/data/store")).endswith("--address auto")


SIZES: list[tuple[dict[str, Any], tuple[str, int, dict[str, str]]]] = [
    # As many as the template has: two pods of four cores.
    ({"slots": 1}, ("cpu", 2, {"cpu": "4", "memory": "16Gi"})),
    # Never more than there is to do: 16 trials, four to an array, are four arrays on one pod.
    ({"concurrent": 9, "slots": 4}, ("cpu", 1, {"cpu": "4", "memory": "16Gi"})),
    ({"concurrent": 9, "slots": 1}, ("cpu", 3, {"cpu": "4", "memory": "16Gi"})),
    # A worker larger than the pod enlarges it, memory in proportion.
    ({"cpus": 8, "concurrent": 2}, ("cpu", 2, {"cpu": "8", "memory": "32768Mi"})),
    ({"workers": 6, "concurrent": 2}, ("cpu", 3, {"cpu": "4", "memory": "16Gi"})),
    (
        {"gpus": 0.25, "concurrent": 8, "slots": 1},
        ("gpu", 2, {"cpu": "8", "memory": "32Gi", "nvidia.com/gpu": "1"}),
    ),
    ({"gpus": 1}, ("gpu", 1, {"cpu": "8", "memory": "32Gi", "nvidia.com/gpu": "1"})),
    (
        {"gpus": 2, "workers": 2, "concurrent": 3},
        ("gpu", 6, {"cpu": "8", "memory": "32Gi", "nvidia.com/gpu": "2"}),
    ),
    (
        {"gpus": 0.25, "cpus": 4, "concurrent": 4, "slots": 1},
        ("gpu", 1, {"cpu": "16", "memory": "65536Mi", "nvidia.com/gpu": "1"}),
    ),
]


@pytest.mark.parametrize(("resources", "expected"), SIZES)
def test_pods_follow_from_resources(
    resources: dict[str, Any], expected: tuple[str, int, dict[str, str]]
) -> None:
    assert size(workers(changed(resources=resources, search={"trials": 16}))) == expected


def test_pods_can_be_given() -> None:
    assert size(workers(DEMO, pods=5))[1] == 5
    with pytest.raises(UserError, match=r"a run has 6 workers, 4 to a pod .* needs 2 pods, not 1"):
        workers(changed(resources={"workers": 6}), pods=1)


def test_whole_runs_fit_into_what_is_rendered() -> None:
    for workers_ in (1, 2, 3, 5):
        for cpus in (0.5, 1, 3, 4, 5):
            for gpus in (0, 1, 2):
                need = {"workers": workers_, "cpus": cpus, "gpus": gpus, "concurrent": 2}
                _, pods, each = size(workers(changed(resources=need)))
                held = int(quantity(each["cpu"]) / cpus)
                if gpus:
                    held = min(held, int(quantity(each["nvidia.com/gpu"]) / gpus))
                assert held * pods >= workers_, need


def test_stage_2_takes_the_workers_of_the_test() -> None:
    job = changed(test={"seeds": 3, "workers": 4})
    _, rayjob = rayjob_documents(job, load_form(), step="test")
    assert rayjob["spec"]["entrypoint"].startswith("avzero test ")
    assert rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 3


def without_gpu(form: dict[str, Any]) -> None:
    form["spec"]["rayClusterSpec"]["workerGroupSpecs"].pop()


REFUSALS: dict[str, tuple[Callable[[dict[str, Any]], Any], dict[str, Any], str]] = {
    "no GPU group": (without_gpu, {"resources": {"gpus": 1}}, "no worker group with nvidia.com"),
    "shell": (lambda form: None, {"store": "s3://lab/$(id)"}, "submitter's shell"),
    "no cluster": (
        lambda form: form["spec"].pop("rayClusterSpec"), {}, "a sweep gets a cluster of its own",
    ),
    "no mount": (
        lambda form: form["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"][
            "volumes"
        ].pop(),
        {},
        "mounts no ConfigMap at /etc/avzero/jobs",
    ),
    "no limits": (
        lambda form: form["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"][
            "containers"
        ][0].pop("resources"),
        {},
        "sets no limits for cpu and memory",
    ),
    "operator": (
        lambda form: form["spec"].update(submissionMode="K8s"), {}, "submissionMode 'K8s' is",
    ),
    "no workers": (
        lambda form: form["spec"]["rayClusterSpec"].pop("workerGroupSpecs"), {}, "no worker group",
    ),
    "no sweep": (
        lambda form: form["metadata"].update(labels={}), {}, "no RayJob with the label",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_one_line(case: str, tmp_path: Path) -> None:
    change, job, says = REFUSALS[case]
    form = yaml.safe_load(FORM.read_text())
    change(form)
    file = tmp_path / "form.yaml"
    file.write_text(yaml.safe_dump(form))
    with pytest.raises(UserError) as refused:
        render_rayjob(changed(**job), str(file))
    assert says in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("text", [None, "a: [", "kind: Pod\n", "- 1\n", ""])
def test_a_file_that_is_no_template(text: str | None, tmp_path: Path) -> None:
    file = tmp_path / "form.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=re.escape(str(file))):
        render_rayjob(DEMO, str(file))


def test_the_form_passes_the_operators_rules() -> None:
    assert problems(load_form()) == []


def test_quantities() -> None:
    values = {"500m": 0.5, "2": 2, "4Gi": 2**32, "1e3": 1000, "2E": 2e18, ".5": 0.5, "1.5k": 1500}
    assert {text: quantity(text) for text in values} == pytest.approx(values)
    for wrong in ("", "2Gigs", "1Ki1", "KiB", "1 Gi", "--1"):
        with pytest.raises(ValueError, match="is no quantity"):
            quantity(wrong)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path to everything in a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


def test_a_damaged_template_is_refused_in_one_line_or_rendered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refused = 0
    for number, path in enumerate(places(SWEEP)):
        damaged = copy.deepcopy(SWEEP)
        at = damaged
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = (None, "x", [], {})[number % 4]
        monkeypatch.setattr("avzero.cluster.kubernetes.load_form", lambda _, d=damaged: d)
        monkeypatch.setattr("yaml.dump_all", lambda *_, **__: "")  # the slow part
        try:
            render_rayjob(DEMO)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 20
