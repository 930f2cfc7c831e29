"""The feature store: benchmarks as content-addressed Parquet plus a manifest written last.

Keys below the store's root::

    blobs/<sha256>.parquet              parts and text sets
    audits/<benchmark digest>.json      the validation report of the import
    benchmarks/<name>/<digest>.json     the manifest: written last, it makes a benchmark visible
    ledger/<digest>/<run>-<nonce>.json  openings of TEST
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from avzero.canon import ID_LENGTH, canonical, identity, sha256_file
from avzero.data.benchmark import (
    Benchmark,
    BenchmarkInfo,
    Classes,
    ClassRole,
    Part,
    Progress,
    RawBenchmark,
    TextSet,
    array_digest,
    content_digest,
    part_digest,
)
from avzero.data.cache import NodeCache
from avzero.data.columns import read_vectors, write_part, write_vectors
from avzero.data.ledger import Opening, read_openings, record_opening
from avzero.data.sequences import Sequences
from avzero.data.storage import Storage, disk_errors, open_storage, require_space
from avzero.errors import UserError

SCHEMA = 1


class FeatureStore:
    """Benchmarks in a storage, opened through the node's cache."""

    def __init__(self, storage: Storage | str, cache: NodeCache | None = None) -> None:
        self.storage = open_storage(storage) if isinstance(storage, str) else storage
        self._cache = cache or NodeCache()

    def put(
        self, raw: RawBenchmark, progress: Progress = lambda what, done, total: None
    ) -> tuple[BenchmarkInfo, bool]:
        """Store a release; return its description and whether it was new.

        Storing the same content again changes nothing.

        Raises:
            UserError: no space, or the store cannot be written.
        """
        contents = {"open": part_digest(raw.open), "test": part_digest(raw.test)}
        digest = content_digest(raw, contents)
        key = f"benchmarks/{raw.name}/{digest}.json"
        known = self._whole(key)
        if known is not None:
            return self._info(known), False
        scratch_at = self.storage.local_path("blobs")
        if scratch_at is not None:
            require_space(scratch_at, _raw_bytes(raw))
            with disk_errors(scratch_at):
                scratch_at.mkdir(parents=True, exist_ok=True)
        # Scratch beside a local store, so that a finished file is renamed, not copied.
        with (
            tempfile.TemporaryDirectory(dir=scratch_at, prefix=".tmp-") as scratch,
            disk_errors(Path(scratch)),
        ):
            parts = {
                name: self._put_part(Path(scratch), name, part, contents[name], progress)
                for name, part in (("open", raw.open), ("test", raw.test))
            }
            text = {name: self._put_text(Path(scratch), text) for name, text in raw.text.items()}
        self.storage.write(f"audits/{digest}.json", canonical(dict(raw.audit)).encode())
        manifest = {
            "schema": SCHEMA,
            "name": raw.name,
            "digest": digest,
            "dataset": raw.dataset,
            "feature_set": raw.feature_set,
            "split": raw.split,
            "simulated": raw.simulated,
            "classes": {
                "names": list(raw.classes.names),
                "roles": [role.value for role in raw.classes.roles],
                "categories": list(raw.classes.categories),
            },
            "text": text,
            "parts": parts,
            "counts": raw.counts(),
        }
        if raw.step_seconds:
            manifest["step_seconds"] = dict(raw.step_seconds)
        self.storage.write(key, canonical(manifest).encode())
        return self._info(manifest), True

    def _whole(self, key: str) -> dict[str, Any] | None:
        """Return a stored manifest whose blobs are all there in full size, else None."""
        try:
            manifest: dict[str, Any] = json.loads(self.storage.read(key))
        except KeyError:
            return None
        entries = [*manifest["parts"].values(), *manifest["text"].values()]
        whole = all(self.storage.size(e["blob"]) == e["bytes"] for e in entries)
        return manifest if whole and manifest["schema"] == SCHEMA else None

    def _put_part(
        self, scratch: Path, name: str, part: Part, content: Mapping[str, Any], progress: Progress
    ) -> dict[str, Any]:
        """Write one part as a blob; return its manifest entry."""
        path = scratch / f"{name}.parquet"
        write_part(path, part, lambda done, total: progress(f"writing {name}", done, total))
        features = part.features.items()
        steps = {m: len(a.values) for m, a in features if isinstance(a, Sequences)}
        entry = self._put_blob(path) | {
            "rows": len(part.samples),
            "dims": {modality: int(array.shape[1]) for modality, array in features},
            "content": content,
        }
        return entry | ({"steps": steps} if steps else {})

    def _put_blob(self, path: Path) -> dict[str, Any]:
        """Move a scratch file under its digest; return where it is and how large."""
        sha256 = sha256_file(path)
        blob, size = f"blobs/{sha256}.parquet", path.stat().st_size
        self.storage.upload(blob, path)
        path.unlink(missing_ok=True)
        return {"blob": blob, "sha256": sha256, "bytes": size}

    def _put_text(self, scratch: Path, text: TextSet) -> dict[str, Any]:
        """Write one text set as a blob; return its manifest entry."""
        path = scratch / "text.parquet"
        write_vectors(path, text.keys, text.vectors)
        return self._put_blob(path) | {
            "content": array_digest(text.vectors),
            "key_of_class": dict(text.key_of_class),
        }

    def manifests(self) -> list[dict[str, Any]]:
        """Return all manifests, sorted by name and digest."""
        return [
            json.loads(self.storage.read(key))
            for key in self.storage.keys("benchmarks/")
            if key.endswith(".json")
        ]

    def manifest(self, reference: str) -> dict[str, Any]:
        """Return the manifest ``reference`` names: ``name``, ``name@digest`` or a digest's head.

        Raises:
            UserError: no benchmark fits, or several do.
        """
        name, _, head = reference.partition("@")
        found = [
            m
            for m in self.manifests()
            if (m["name"] == name and m["digest"].startswith(head))
            or (not head and len(name) >= 8 and m["digest"].startswith(name))
        ]
        if len({m["digest"] for m in found}) == 1:  # one content, perhaps under several names
            if found[0]["schema"] != SCHEMA:
                raise UserError(
                    f"benchmark {reference}: manifest schema {found[0]['schema']}, this avzero "
                    f"reads {SCHEMA}; ingest the release again"
                )
            return found[0]
        if not found:
            have = ", ".join(sorted({m["name"] for m in self.manifests()})) or "none"
            raise UserError(
                f"{self.storage.url}: no benchmark {reference!r}; there is {have}. "
                "Add it with: avzero ingest avca ROOT --features NAME --split NAME"
            )
        versions = ", ".join(f"{m['name']}@{m['digest'][:ID_LENGTH]}" for m in found)
        raise UserError(
            f"{self.storage.url}: {reference!r} has {len(found)} versions; write one of {versions}"
        )

    def info(self, reference: str) -> BenchmarkInfo:
        """Return a benchmark's description, with its text vectors and without its rows."""
        return self._info(self.manifest(reference))

    def _info(self, manifest: Mapping[str, Any]) -> BenchmarkInfo:
        classes = manifest["classes"]
        return BenchmarkInfo(
            name=manifest["name"],
            digest=manifest["digest"],
            dataset=manifest["dataset"],
            feature_set=manifest["feature_set"],
            split=manifest["split"],
            simulated=manifest["simulated"],
            classes=Classes(
                tuple(classes["names"]),
                tuple(ClassRole(role) for role in classes["roles"]),
                tuple(classes["categories"]),
            ),
            text={name: self._text(entry) for name, entry in sorted(manifest["text"].items())},
            dims=manifest["parts"]["open"]["dims"],
            counts=manifest["counts"],
            step_seconds=manifest.get("step_seconds", {}),
        )

    def _text(self, entry: Mapping[str, Any]) -> TextSet:
        """Read a text set and check its content."""
        with tempfile.TemporaryDirectory() as scratch:
            path = self._fetch(entry, Path(scratch))
            keys, vectors = read_vectors(path)
        if array_digest(vectors) != entry["content"]:
            raise UserError(
                f"{self.storage.url}/{entry['blob']}: damaged text vectors; ingest again"
            )
        return TextSet(keys, vectors, entry["key_of_class"])

    def _fetch(self, entry: Mapping[str, Any], scratch: Path) -> Path:
        """Return a blob as a local file: its own where blobs are files, else a copy."""
        path = self.storage.local_path(entry["blob"])
        try:
            if path is None:
                path = scratch / "blob.parquet"
                self.storage.download(entry["blob"], path)
            elif not path.is_file():
                raise KeyError(entry["blob"])
        except KeyError as error:
            raise UserError(
                f"{self.storage.url}/{entry['blob']}: missing although a manifest names it; "
                "ingest the release again"
            ) from error
        return path

    def open(self, reference: str) -> Benchmark:
        """Open TRAIN, VAL_SEEN and VAL_UNSEEN of a benchmark (memory-mapped)."""
        return self._open_part(self.manifest(reference), "open")

    def open_test(self, opening: Opening) -> Benchmark:
        """Open TEST for a frozen trial. The ledger line is written before any row is read.

        Only ``protocol.seal`` may call this; a test scans the source for other callers.
        """
        manifest = self.manifest(opening.benchmark)
        record_opening(self.storage, opening)
        return self._open_part(manifest, "test")

    def openings(self, reference: str) -> list[dict[str, Any]]:
        """Return the ledger of a benchmark, oldest opening first."""
        return read_openings(self.storage, self.manifest(reference)["digest"])

    def _open_part(self, manifest: Mapping[str, Any], name: str) -> Benchmark:
        entry = manifest["parts"][name]
        part = self._cache.open(
            identity([entry["content"], entry["rows"]]),
            entry,
            lambda scratch: self._fetch(entry, scratch),
            0 if self.storage.local_path(entry["blob"]) else entry["bytes"],
        )
        return Benchmark(self._info(manifest), part)

    def audit(self, reference: str) -> dict[str, Any]:
        """Return the validation report stored with a benchmark."""
        digest = self.manifest(reference)["digest"]
        try:
            return dict(json.loads(self.storage.read(f"audits/{digest}.json")))
        except KeyError as error:
            raise UserError(
                f"{self.storage.url}/audits/{digest}.json: missing; ingest the release again"
            ) from error

    def verify(self, reference: str) -> list[str]:
        """Check every blob of a benchmark against its digest; return the problems found.

        TEST is checked as bytes; its rows are not read.
        """
        manifest = self.manifest(reference)
        entries = [*manifest["parts"].values(), *manifest["text"].values()]
        problems = []
        with tempfile.TemporaryDirectory() as scratch:
            for entry in entries:
                try:
                    path = self._fetch(entry, Path(scratch))
                except UserError as error:
                    problems.append(str(error))
                    continue
                actual = sha256_file(path)
                if actual != entry["sha256"]:
                    problems.append(
                        f"{self.storage.url}/{entry['blob']}: content has digest {actual[:12]}…, "
                        f"its name says {entry['sha256'][:12]}…; restore it, or delete it and "
                        "ingest the release again"
                    )
        return problems


def _raw_bytes(raw: RawBenchmark) -> int:
    """Return the feature bytes of both parts."""
    return sum(a.nbytes for part in (raw.open, raw.test) for a in part.features.values())
