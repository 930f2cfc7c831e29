"""What a benchmark is in memory: classes, samples, features and class text, joined by name.

A benchmark has two parts. The *open* part holds TRAIN, VAL_SEEN and VAL_UNSEEN rows; the *test*
part holds TEST rows and leaves the store only for a frozen trial (``protocol.seal``). No object
in this module can hold both unless it was just read from a release (``RawBenchmark``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from avzero.canon import canonical, sha256_hex
from avzero.data.sequences import Features, Sequences, values_of
from avzero.errors import UserError
from avzero.spec import TextAlignment

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
Int8 = npt.NDArray[np.int8]
Bool = npt.NDArray[np.bool_]

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total) by whatever takes long."""

AUDIO = "audio"
VIDEO = "video"
MODALITIES = (AUDIO, VIDEO)


class Role(StrEnum):
    """What a sample is for; every sample has exactly one role."""

    TRAIN = "train"
    VAL_SEEN = "val_seen"
    VAL_UNSEEN = "val_unseen"
    TEST_SEEN = "test_seen"
    TEST_UNSEEN = "test_unseen"

    @property
    def code(self) -> int:
        """Position of the role in the fixed order used in arrays and files."""
        return ROLES.index(self)

    @property
    def sealed(self) -> bool:
        """Whether rows of this role leave the store only for a frozen trial."""
        return self in (Role.TEST_SEEN, Role.TEST_UNSEEN)


ROLES = tuple(Role)
OPEN_ROLES = tuple(role for role in ROLES if not role.sealed)
TEST_ROLES = tuple(role for role in ROLES if role.sealed)


class ClassRole(StrEnum):
    """The role of a class; ``UNUSED`` classes keep their id (ids have gaps, never re-indexed)."""

    TRAIN = "train"
    VAL_UNSEEN = "val_unseen"
    TEST_UNSEEN = "test_unseen"
    UNUSED = "unused"


@dataclass(frozen=True)
class TextSet:
    """Class text vectors as released: ``keys[i]`` names row ``i`` of ``vectors`` [T, d] float32.

    ``key_of_class`` maps a class name to its key; classes outside the map have no vector.
    """

    keys: tuple[str, ...]
    vectors: Float32
    key_of_class: Mapping[str, str]

    def digest_entry(self) -> dict[str, Any]:
        """Return what identifies this text set inside a benchmark digest."""
        return {
            "keys": list(self.keys),
            "vectors": array_digest(self.vectors),
            "key_of_class": dict(self.key_of_class),
        }


@dataclass(frozen=True)
class Classes:
    """The classes table. ``names`` is in code-point order, so a class id is a position in it."""

    names: tuple[str, ...]
    roles: tuple[ClassRole, ...]
    categories: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.names)

    def ids(self, *roles: ClassRole) -> Int32:
        """Return the ascending class ids whose role is one of ``roles``."""
        return np.array([i for i, role in enumerate(self.roles) if role in roles], dtype=np.int32)


@dataclass(frozen=True)
class Samples:
    """The samples table, sorted by (role, class id, sample id); all columns have N rows.

    ``source_id`` names the video a clip was cut from, ``source_split`` the source dataset's own
    train or test flag (empty where the release has none, D-03). ``evaluated`` is false for rows
    whose class the split's class list left out (D-06); they are kept and never used.
    """

    sample_id: Sequence[str]
    class_id: Int32
    role: Int8
    source_id: Sequence[str]
    source_split: Sequence[str]
    evaluated: Bool

    def __len__(self) -> int:
        return len(self.class_id)

    def rows(self, *roles: Role) -> npt.NDArray[np.int64]:
        """Return the ascending row numbers of the used samples with one of ``roles``."""
        wanted = np.isin(self.role, [role.code for role in roles])
        return np.flatnonzero(wanted & self.evaluated)


@dataclass(frozen=True)
class Part:
    """One part of a benchmark: samples and, per modality, a contiguous [N, d] float32 array.

    In a temporal benchmark every modality is a ``Sequences`` instead.
    """

    samples: Samples
    features: Mapping[str, Features]

    def __post_init__(self) -> None:
        for name, array in self.features.items():
            if array.ndim != 2 or len(array) != len(self.samples):
                raise ValueError(f"{name}: {array.shape} does not fit {len(self.samples)} samples")


@dataclass(frozen=True)
class BenchmarkInfo:
    """What is known of a benchmark without its rows: enough to plan, align text and label runs."""

    name: str
    digest: str
    dataset: str
    feature_set: str
    split: str
    simulated: bool
    classes: Classes
    text: Mapping[str, TextSet]
    dims: Mapping[str, int]
    counts: Mapping[str, int]
    step_seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds per step of every modality's sequences; empty where a sample is one vector."""

    @property
    def temporal(self) -> bool:
        """Whether samples are sequences; ``dims`` are the widths of a step."""
        return bool(self.step_seconds)

    def class_vectors(self, text_set: str, alignment: TextAlignment) -> Float32:
        """Return class text vectors [C, d], row = class id; NaN rows for classes without one.

        Raises:
            UserError: the text set does not exist, or legacy pairing runs out of vectors.
        """
        if text_set not in self.text:
            raise UserError(
                f"benchmark {self.name}: no text set {text_set!r}; it has "
                f"{', '.join(sorted(self.text))}. Set 'text' to one of these"
            )
        return align_text(self.text[text_set], self.classes, alignment)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark opened from the store: its description and one part (open or test)."""

    info: BenchmarkInfo
    part: Part


@dataclass(frozen=True)
class RawBenchmark:
    """A release as a reader found it, before it enters the store: both parts side by side."""

    name: str
    dataset: str
    feature_set: str
    split: str
    simulated: bool
    classes: Classes
    text: Mapping[str, TextSet]
    open: Part
    test: Part
    audit: Mapping[str, Any] = field(default_factory=dict)
    step_seconds: Mapping[str, float] = field(default_factory=dict)
    """As in ``BenchmarkInfo``."""

    @property
    def dims(self) -> dict[str, int]:
        """Feature width per modality."""
        return {name: int(array.shape[1]) for name, array in self.open.features.items()}

    def counts(self) -> dict[str, int]:
        """Return the number of used samples per role."""
        return {
            role.value: len((self.test if role.sealed else self.open).samples.rows(role))
            for role in ROLES
        }

    def digest(self) -> str:
        """Return the SHA-256 that names the content, whatever files or versions carry it."""
        return content_digest(
            self, {"open": part_digest(self.open), "test": part_digest(self.test)}
        )


def content_digest(raw: RawBenchmark, parts: Mapping[str, Any]) -> str:
    """Return the benchmark digest from the digests of its parts and its small tables."""
    entry = {
        "schema": 1,
        "dataset": raw.dataset,
        "feature_set": raw.feature_set,
        "split": raw.split,
        "simulated": raw.simulated,
        "classes": {
            "names": list(raw.classes.names),
            "roles": [role.value for role in raw.classes.roles],
        },
        "text": {name: text.digest_entry() for name, text in sorted(raw.text.items())},
        "parts": parts,
    }
    if raw.step_seconds:
        entry["step_seconds"] = dict(raw.step_seconds)
    return sha256_hex(canonical(entry).encode())


def array_digest(array: npt.NDArray[Any]) -> str:
    """Return the SHA-256 over dtype, shape and the little-endian C-order bytes of ``array``."""
    contiguous = np.ascontiguousarray(array)
    header = f"{contiguous.dtype.newbyteorder('<').str}{contiguous.shape}".encode()
    digest = hashlib.sha256(header)
    digest.update(contiguous.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def samples_digest(samples: Samples) -> str:
    """Return the digest of a samples table."""
    entry = {
        "sample_id": sha256_hex("\n".join(samples.sample_id).encode()),
        "source_id": sha256_hex("\n".join(samples.source_id).encode()),
        "source_split": sha256_hex("\n".join(samples.source_split).encode()),
        "class_id": array_digest(samples.class_id),
        "role": array_digest(samples.role),
        "evaluated": array_digest(samples.evaluated),
    }
    return sha256_hex(canonical(entry).encode())


def part_digest(part: Part) -> dict[str, Any]:
    """Return the digests of one part: its samples table, each feature array, row lengths."""
    features = sorted(part.features.items())
    entry: dict[str, Any] = {
        "samples": samples_digest(part.samples),
        "features": {name: array_digest(values_of(a)) for name, a in features},
    }
    lengths = {n: array_digest(a.lengths) for n, a in features if isinstance(a, Sequences)}
    return entry | ({"lengths": lengths} if lengths else {})


def align_text(text: TextSet, classes: Classes, alignment: TextAlignment) -> Float32:
    """Return [C, d] float32 class vectors, row = class id, NaN where a class has none.

    Raises:
        UserError: legacy pairing has fewer vectors than a used class id needs.
    """
    out = np.full((len(classes), text.vectors.shape[1]), np.nan, dtype=np.float32)
    for class_id, row in enumerate(text_rows(text, classes, alignment)):
        if row is not None:
            out[class_id] = text.vectors[row]
    return out


def text_rows(text: TextSet, classes: Classes, alignment: TextAlignment) -> list[int | None]:
    """Return, for every class id, the row of ``text.vectors`` it is paired with (or None)."""
    row_of_key = {key: row for row, key in enumerate(text.keys)}
    if alignment is TextAlignment.BY_CLASS:
        keys = [text.key_of_class.get(name) for name in classes.names]
        return [None if key is None else row_of_key[key] for key in keys]
    in_key_order = [row_of_key[key] for key in sorted(text.keys)]
    used = classes.ids(ClassRole.TRAIN, ClassRole.VAL_UNSEEN, ClassRole.TEST_UNSEEN)
    if len(used) and int(used[-1]) >= len(in_key_order):
        raise UserError(
            f"text_alignment legacy_sorted: class id {int(used[-1])} "
            f"({classes.names[int(used[-1])]}) but only {len(in_key_order)} text vectors; "
            "use text_alignment: by_class"
        )
    return [in_key_order[i] if i < len(in_key_order) else None for i in range(len(classes))]
