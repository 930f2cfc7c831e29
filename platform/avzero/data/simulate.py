"""Simulated benchmarks in the layouts of the releases: demos and tests need no download.

Every class has a latent vector. Its text vector is a fixed linear image of the latent, its
samples are rectified linear images of the latent plus noise; so what is learned on some classes
carries over to others through their text, and zero-shot recognition is possible but not trivial.
The files carry the quirks of the releases (data_formats.md): column orders, both string
encodings, names that sort differently from their text keys, a class written in two ways.

Nothing simulated can be mistaken for real: the root holds ``SIMULATED.json``, and the mark stays
with the benchmark into every record.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from avzero.data.benchmark import AUDIO, VIDEO, Float32, Progress, Role
from avzero.data.class_lists import FOLDER_OF_ROLE, STAGE_2_TRAIN
from avzero.data.official import OFFICIAL
from avzero.data.release import SIMULATED_MARKER
from avzero.data.simulate_releases import (
    MEAN_STEPS,
    clip_names,
    feature_folder,
    sequences,
    unit_vectors,
    write_class_pickle,
    write_clip_names,
    write_clipclap_text,
)
from avzero.data.storage import disk_errors, require_space
from avzero.errors import UserError

LAYOUTS = ("hdf5", "clipclap", "temporal")
"""Releases that can be simulated: AVCA's, ClipClap's and TCaF's."""
LATENT = 8
TEXT_WIDTH = 300
DIMS: Mapping[str, Mapping[str, int]] = {
    "main": {AUDIO: 512, VIDEO: 512},
    "cls": {AUDIO: 128, VIDEO: 4096},
    "tiny": {AUDIO: 32, VIDEO: 48},
    "clipclap": {AUDIO: 1024, VIDEO: 512},
}
NOISE: Mapping[str, float] = {AUDIO: 0.9, VIDEO: 0.6}


@dataclass(frozen=True)
class Shape:
    """Size and style of a simulated dataset.

    ``classes`` counts all, train, val_unseen, test_unseen (main) and test_unseen (cls) classes;
    ``samples`` the samples per role. ``style`` picks names, columns and text file of a release.
    """

    classes: tuple[int, int, int, int, int]
    samples: Mapping[Role, int]
    style: str
    features: str


def _official_shape(dataset: str, features: str) -> Shape:
    """Return the real size of an official dataset."""
    main, cls = OFFICIAL[dataset, "main"], OFFICIAL[dataset, "cls"]
    unseen = Role.TEST_UNSEEN
    return Shape(
        (
            main.n_classes,
            main.classes[Role.TRAIN],
            main.classes[Role.VAL_UNSEEN],
            main.classes[unseen],
            cls.classes[unseen],
        ),
        main.samples,
        dataset,
        features,
    )


def _small_shape(per_class: int, features: str) -> Shape:
    """Return a dataset of 40 classes that trains in seconds."""
    counts = (
        24 * per_class,
        24 * per_class // 4,
        8 * per_class,
        32 * per_class // 4,
        8 * per_class,
    )
    return Shape((42, 24, 8, 8, 7), dict(zip(Role, counts, strict=True)), "UCF", features)


SHAPES: Mapping[str, Callable[[], Shape]] = {
    "tiny": partial(_small_shape, 8, "tiny"),
    "small": partial(_small_shape, 32, "main"),
    **{
        f"{dataset}-{features}": partial(_official_shape, dataset, features)
        for dataset in ("UCF", "VGGSound", "ActivityNet")
        for features in ("main", "cls")
    },
}
"""What ``avzero simulate --size`` offers."""


@dataclass(frozen=True)
class _World:
    """Everything drawn once: class names, latents and the maps from latents to features."""

    shape: Shape
    originals: tuple[str, ...]
    manuals: tuple[str, ...]
    written: tuple[str, ...]
    used: Mapping[str, tuple[int, ...]]
    latents: Float32
    text: Float32
    maps: Mapping[str, Float32]
    seed: int
    layout: str = "hdf5"

    @property
    def folder(self) -> str:
        """The feature set's folder."""
        return feature_folder(self.shape.features, self.layout)


def simulate(
    root: Path,
    size: str,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
    layout: str = "hdf5",
) -> Path:
    """Write a simulated dataset in the layout of a release.

    Args:
        root: the folder to make; its name becomes the dataset's name. It must not exist, except
            when it holds the same simulation already.
        size: a key of ``SHAPES``.
        seed: of everything random; same seed, same bytes of data.
        progress: called while files are written.
        layout: ``hdf5`` (averaged), ``clipclap`` or ``temporal`` (both pickled).

    Returns:
        ``root``.

    Raises:
        UserError: unknown size or layout, the folder holds something else, or the device is full.
    """
    if size not in SHAPES:
        raise UserError(f"simulate: no size {size!r}; choose one of {', '.join(SHAPES)}")
    if layout not in LAYOUTS:
        raise UserError(f"simulate: no layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    marker = root / SIMULATED_MARKER
    stamp = {"size": size, "seed": seed, "version": 1}
    stamp |= {"layout": layout} if layout != "hdf5" else {}
    if marker.exists() and marker.read_text() == json.dumps(stamp):
        return root
    if root.exists():
        raise UserError(
            f"{root}: exists and is not this simulation (size {size}, seed {seed}, "
            f"layout {layout}); remove it or choose another folder"
        )
    shape = SHAPES[size]()
    world = _draw_world(shape, seed, layout)
    width = sum(to_features.shape[1] for to_features in world.maps.values())
    total = sum(shape.samples.values()) * 2 * 4 * width
    total *= MEAN_STEPS if layout == "temporal" else 1
    with disk_errors(root):
        require_space(root, total)
        _write_lists(world, root / "class-split")
        _write_text(world, root / "features" / world.folder / "text")
        _write_features(world, root, progress)
        # The marker is written last: a folder without it was cut off and is refused above.
        marker.write_text(json.dumps(stamp))
    return root


def _draw_world(shape: Shape, seed: int, layout: str) -> _World:
    """Draw class names, class roles, latents and feature maps."""
    rng = np.random.default_rng([seed, 0])
    total, n_train, n_val, n_test, _ = shape.classes
    originals, manuals = _names(shape.style, total)
    order = rng.permutation(total)
    used = {
        "train": tuple(sorted(order[:n_train].tolist())),
        "val_unseen": tuple(sorted(order[n_train : n_train + n_val].tolist())),
        "test_unseen": tuple(sorted(order[n_train + n_val : n_train + n_val + n_test].tolist())),
    }
    written = list(originals)
    if shape.style == "UCF":  # one class is written two ways, as HandStandPushups is (D-04)
        first = used["train"][0]
        written[first] = originals[first].replace("Move", "MOVE")
    latents = rng.standard_normal((total, LATENT)).astype(np.float32)
    text = latents @ rng.standard_normal((LATENT, TEXT_WIDTH)).astype(np.float32)
    text += 0.1 * rng.standard_normal(text.shape).astype(np.float32)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    features = shape.features
    if layout == "clipclap" and features != "tiny":
        features = "clipclap"
    maps = {
        m: (rng.standard_normal((LATENT, d)) / np.sqrt(LATENT)).astype(np.float32)
        for m, d in DIMS[features].items()
    }
    return _World(
        shape,
        originals,
        manuals,
        tuple(written),
        used,
        latents,
        text.astype(np.float32),
        maps,
        seed,
        layout,
    )


def _names(style: str, total: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return original and manual names; the two sort differently, as in the releases (D-01)."""
    numbers = [
        (i * 37 + 11) % total if np.gcd(37, total) == 1 else total - 1 - i for i in range(total)
    ]
    if style == "VGGSound":
        originals = [f"sim event {i:03d}, kind ({'abc'[i % 3]})" for i in range(total)]
        manuals = [f"sound {n:03d} of event {i:03d}" for i, n in enumerate(numbers)]
    else:
        originals = [f"SimMove{i:03d}" for i in range(total)]
        manuals = [f"Kind {n:03d} Move {i:03d}" for i, n in enumerate(numbers)]
    return tuple(originals), tuple(manuals)


def _class_list(world: _World, stem: str, split: str) -> list[int]:
    """Return the class ids a stage list names."""
    used = world.used
    dropped = set(used["test_unseen"][world.shape.classes[4] :]) if split == "cls" else set()
    return {
        "stage_1_train": list(used["train"]),
        "stage_1_val_seen": list(used["train"]),
        "stage_1_val_unseen": list(used["val_unseen"]),
        STAGE_2_TRAIN: sorted(used["train"] + used["val_unseen"]),
        "stage_2_test_seen": sorted(used["train"] + used["val_unseen"]),
        "stage_2_test_unseen": [c for c in used["test_unseen"] if c not in dropped],
    }[stem]


def _per_class(world: _World, role: Role) -> dict[int, int]:
    """Spread a role's samples over its classes as evenly as the total allows.

    Test-unseen files hold the classes of the main list; what the cls list drops is the tail.
    """
    classes = _class_list(world, FOLDER_OF_ROLE[role], "main")
    total = world.shape.samples[role]
    if role is Role.TEST_UNSEEN and (world.shape.style, "cls") in OFFICIAL:
        kept = world.shape.classes[4]
        official = OFFICIAL[world.shape.style, "cls"].samples[role]
        if world.shape.classes[0] == OFFICIAL[world.shape.style, "cls"].n_classes:
            return _spread(classes[:kept], official) | _spread(classes[kept:], total - official)
    return _spread(classes, total)


def _spread(classes: list[int], total: int) -> dict[int, int]:
    """Return {class: samples} that add up to ``total`` and differ by at most one."""
    base, extra = divmod(total, len(classes))
    return {c: base + (i < extra) for i, c in enumerate(classes)}


def _sample_name(world: _World, role: Role, class_id: int, index: int) -> str:
    """Return a sample's name in the style of the dataset."""
    unique = role.code * 1_000_000 + class_id * 1_000 + index
    if world.shape.style == "VGGSound":
        return f"-s{unique:09d}_{index:06d}"
    if world.shape.style == "ActivityNet":
        return f"_s{unique:09d}_{index % 9}"
    group, clip = divmod(index, 8)
    return f"v_{world.written[class_id]}_r{role.code}g{group:03d}_c{clip:02d}"


def _names_of(world: _World, role: Role, class_id: int, count: int) -> list[str]:
    return [_sample_name(world, role, class_id, i) for i in range(count)]


def _write_lists(world: _World, folder: Path) -> None:
    """Write class lists, name maps and sample lists."""
    folder.mkdir(parents=True)
    shuffled = np.random.default_rng(world.seed).permutation(len(world.originals))
    lines = [world.originals[i] for i in shuffled]  # file order is irrelevant (D-07)
    (folder / "all_class.txt").write_text("\n".join(lines) + "\n")
    prefix = world.shape.style.lower()
    with (folder / f"{prefix}_w2v_class_names.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["original", "manual"])
        writer.writerows(zip(world.originals, world.manuals, strict=True))
    if world.layout == "clipclap" and world.shape.style == "UCF":
        path = folder / "ucf_clip_class_names.csv"
        write_clip_names(path, world.originals, world.manuals)
    for split in ("main", "cls"):
        target = folder / f"{split}_split"
        target.mkdir()
        for stem in (*FOLDER_OF_ROLE.values(), STAGE_2_TRAIN):
            names = [world.written[c] for c in _class_list(world, stem, split)]
            (target / f"{stem}.txt").write_text("\n".join(names))
            _write_sample_list(world, target / f"{stem}.csv", stem)


def _write_sample_list(world: _World, path: Path, stem: str) -> None:
    """Write a ``stage_*.csv`` with the columns, in the order, of the dataset's release."""
    roles = [role for role, s in FOLDER_OF_ROLE.items() if s == stem] or [
        Role.TRAIN,
        Role.VAL_SEEN,
        Role.VAL_UNSEEN,
    ]
    columns = {
        "UCF": ["filename", "label", "label_code"],
        "ActivityNet": ["filename", "label_code", "label"],
        "VGGSound": ["youtube_id", "start_seconds", "label", "split", "filename", "label_code"],
    }[world.shape.style]
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, columns, extrasaction="ignore")
        writer.writeheader()
        for role in roles:
            for class_id, count in _per_class(world, role).items():
                for name in _names_of(world, role, class_id, count):
                    source, _, start = name.rpartition("_")
                    writer.writerow(
                        {
                            "filename": name,
                            "label": world.written[class_id],
                            "label_code": class_id,
                            "youtube_id": source,
                            "start_seconds": start.lstrip("0") or "0",
                            "split": "test"
                            if role in (Role.VAL_UNSEEN, Role.TEST_UNSEEN)
                            else "train",
                        }
                    )


def _write_text(world: _World, folder: Path) -> None:
    """Write the class vectors as the 0-d object array the releases use."""
    if world.layout == "clipclap":
        style = world.shape.style
        keys = clip_names(world.manuals) if style == "UCF" else world.manuals
        write_clipclap_text(folder, style.lower(), keys, world.latents, world.seed)
        return
    folder.mkdir(parents=True)
    order = np.random.default_rng([world.seed, 1]).permutation(len(world.manuals))
    vectors = {world.manuals[i]: world.text[i] for i in order}
    name = {"ActivityNet": "activity"}.get(world.shape.style, world.shape.style.lower())
    boxed: npt.NDArray[Any] = np.array(vectors, dtype=object)
    np.save(folder / f"word_embeddings_{name}_normed.npy", boxed, allow_pickle=True)


def _features(world: _World, role: Role, class_id: int, count: int) -> dict[str, Any]:
    """Draw one class's features: non-negative, like pooled rectified activations."""
    rng = np.random.default_rng([world.seed, 2, role.code, class_id])
    if world.layout != "hdf5":
        noisy = {
            m: world.latents[class_id]
            + NOISE[m] * rng.standard_normal((count, LATENT), dtype=np.float32)
            for m in world.maps
        }
        if world.layout == "clipclap":
            return dict(unit_vectors(rng, noisy, world.maps))
        return dict(sequences(rng, noisy, world.maps, world.folder.partition("_")[0]))
    result: dict[str, Any] = {}
    for modality, to_features in world.maps.items():
        latent = world.latents[class_id] + NOISE[modality] * rng.standard_normal(
            (count, LATENT), dtype=np.float32
        )
        noise = 0.3 * rng.standard_normal((count, to_features.shape[1]), dtype=np.float32)
        values = np.maximum(latent @ to_features + noise, 0)
        if world.shape.features == "cls" and modality == AUDIO:
            # VGGish averages: 8-bit values averaged in double precision (D-11).
            result[modality] = np.minimum(values * 64.0, 255.0).astype(np.float64)
        else:
            result[modality] = values.astype(np.float32)
    return result


def _write_features(world: _World, root: Path, progress: Progress) -> None:
    """Write one file per class, split folder and modality, stage_2_train included."""
    base = root / "features" / world.folder
    stage_2: dict[int, list[tuple[Role, int]]] = {}
    for role in Role:
        counts = _per_class(world, role)
        for done, (class_id, count) in enumerate(counts.items()):
            progress(FOLDER_OF_ROLE[role], done, len(counts))
            _write_class(world, base, FOLDER_OF_ROLE[role], class_id, [(role, count)])
            if not role.sealed:
                stage_2.setdefault(class_id, []).append((role, count))
    for done, (class_id, pieces) in enumerate(sorted(stage_2.items())):
        progress(STAGE_2_TRAIN, done, len(stage_2))
        _write_class(world, base, STAGE_2_TRAIN, class_id, pieces)


def _write_class(
    world: _World, base: Path, stem: str, class_id: int, pieces: list[tuple[Role, int]]
) -> None:
    """Write the audio and the video file of one class; the video rows in another order."""
    names = [name for role, count in pieces for name in _names_of(world, role, class_id, count)]
    blocks = [_features(world, role, class_id, count) for role, count in pieces]
    for modality in (AUDIO, VIDEO):
        order = np.arange(len(names))
        if modality == VIDEO:  # rows must be joined by name, never by position
            order = np.random.default_rng([world.seed, 3, class_id]).permutation(len(names))
        listed = [names[i] for i in order]
        path = base / modality / stem / f"{world.written[class_id]}.h5"
        path.parent.mkdir(parents=True, exist_ok=True)
        if world.layout != "hdf5":
            rows = [row for block in blocks for row in block[modality]]
            write_class_pickle(path.with_suffix(".pkl"), listed, [rows[i] for i in order])
            continue
        data = np.concatenate([block[modality] for block in blocks])[order]
        with h5py.File(path, "w") as file:
            file.create_dataset("data", data=data)
            if world.shape.style == "VGGSound":
                fixed = np.array([name.encode() for name in listed], dtype="S80")
                file.create_dataset("video_urls", data=fixed)
            else:
                file.create_dataset("video_urls", data=listed, dtype=h5py.string_dtype())
