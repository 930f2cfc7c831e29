"""Schemas of what is sent to the API server: KubeRay's CRDs made strict, and Kubernetes' own kinds.

A check takes a bundle's documents and returns what is wrong, one line each. Loading the CRDs takes
seconds, so everything here is made once.
"""

from __future__ import annotations

import functools
import gzip
from collections.abc import Iterator, Sequence
from typing import Any

import jsonschema
import pytest
import yaml

from tests.conftest import SHARED
from tests.infra.manifest import Document

CRDS = SHARED / "data" / "kuberay_crds_v1.7.0"
KUBERNETES = ("1.32", "1.37")
"""The oldest and the newest version whose kinds the manifests must fit."""
OTHERS = {"ResourceFlavor", "ClusterQueue", "LocalQueue"}
"""Kinds of Kueue, for which there is no schema here; their references are checked."""


@functools.cache
def crd(kind: str) -> Document:
    """Return the OpenAPI schema of a KubeRay kind; skips where ../shared is absent."""
    path = CRDS / f"ray.io_{kind.lower()}s.yaml.gz"
    if not path.is_file():
        pytest.skip(f"{path} is absent: KubeRay's CRDs are not part of the repository")
    with gzip.open(path) as file:
        definition = yaml.load(file, Loader=yaml.CSafeLoader)
    version = next(v for v in definition["spec"]["versions"] if v["name"] == "v1")
    return version["schema"]["openAPIV3Schema"]  # type: ignore[no-any-return]


def strict(schema: Document) -> Document:
    """Return a JSON schema that refuses unknown fields, which the API server would drop."""
    result: Document = {}
    for key, value in schema.items():
        if key in ("properties", "patternProperties"):
            result[key] = {name: strict(part) for name, part in value.items()}
        elif key in ("items", "additionalProperties", "not") and isinstance(value, dict):
            result[key] = strict(value)
        elif key in ("allOf", "anyOf", "oneOf"):
            result[key] = [strict(part) for part in value]
        else:
            result[key] = value
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
    if schema.get("nullable") and isinstance(result.get("type"), str):
        result["type"] = [result["type"], "null"]
    if "properties" in result and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    return result


@functools.cache
def _validator(kind: str) -> jsonschema.Draft202012Validator:
    schema = strict(crd(kind))
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(schema)


def check_crds(documents: Sequence[Document]) -> list[str]:
    """Check Ray's kinds against the strict schemas of their CRDs."""
    found = []
    for document in documents:
        if document["apiVersion"].startswith("ray.io/"):
            for error in _validator(document["kind"]).iter_errors(document):
                found.append(f"{_name(document)}: {error.json_path}: {error.message[:200]}")
    return found


def check_core(documents: Sequence[Document]) -> list[str]:
    """Check Kubernetes' own kinds against the oldest and the newest supported version."""
    validate = pytest.importorskip("kubernetes_validate", reason="extra infra is not installed")
    found = []
    for document in documents:
        if document["apiVersion"].startswith("ray.io/") or document["kind"] in OTHERS:
            continue
        for version in KUBERNETES:
            try:
                validate.validate(document, version, strict=True)
            except validate.ValidationError as error:
                where = ".".join(str(part) for part in error.path)
                found.append(f"{_name(document)} in {version}: {where}: {error.message[:200]}")
    return found


def _name(document: Document) -> str:
    return f"{document['kind']} {document['metadata']['name']}"


def _rules(schema: Document, value: Any, path: str = "") -> Iterator[tuple[str, Any, Document]]:
    """Yield the CEL rules a value must keep: where, the value they are about, and the rule."""
    for rule in schema.get("x-kubernetes-validations", []):
        if "oldSelf" not in rule["rule"]:  # those are about changes
            yield path, value, rule
    if isinstance(value, dict):
        for key, part in schema.get("properties", {}).items():
            if key in value:
                yield from _rules(part, value[key], f"{path}.{key}")
        rest = schema.get("additionalProperties")
        if isinstance(rest, dict):
            for key, inner in value.items():
                yield from _rules(rest, inner, f"{path}.{key}")
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        for index, inner in enumerate(value):
            yield from _rules(schema["items"], inner, f"{path}[{index}]")


@functools.cache
def _program(rule: str) -> Any:
    celpy = pytest.importorskip("celpy", reason="extra infra is not installed")
    environment = celpy.Environment()
    return environment.program(environment.compile(rule))


def check_cel(documents: Sequence[Document]) -> list[str]:
    """Evaluate the CEL rules of KubeRay's CRDs, which no JSON schema holds."""
    found = []
    for document in documents:
        if not document["apiVersion"].startswith("ray.io/"):
            continue
        for path, value, rule in _rules(crd(document["kind"]), document):
            program = _program(rule["rule"])
            from celpy import json_to_cel

            if not program.evaluate({"self": json_to_cel(value)}):
                found.append(f"{_name(document)}: {path}: {rule['message']}")
    return found
