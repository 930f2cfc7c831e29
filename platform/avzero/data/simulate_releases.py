"""What a simulated temporal or ClipClap release holds instead of averaged features.

Both keep the world of ``data.simulate``: a sample is a noisy copy of its class's latent vector.
A temporal sample wanders around that copy, step by step, over a time of its own; a CLIP or CLAP
vector is a unit vector of either sign. Quirks of the real files (lost names, empty clips) are
left out; tests put them in where they need them.
"""

from __future__ import annotations

import csv
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from avzero.data.benchmark import AUDIO, VIDEO, Float32
from avzero.data.sequences import STEP_SECONDS

MEAN_STEPS = 8
"""Video steps of a simulated sample, on average."""
_WANDER = 0.5


def feature_folder(features: str, layout: str) -> str:
    """Return the folder a release keeps these features in; ClipClap's keeps TCaF's name."""
    if layout == "hdf5":
        return f"{features}_features"
    base = "main" if features == "main" and layout == "temporal" else "cls"
    return f"{base}_features_non_averaged"


def sequences(
    rng: np.random.Generator, latents: Mapping[str, Float32], maps: Mapping[str, Float32], base: str
) -> dict[str, list[npt.NDArray[Any]]]:
    """Draw sequences: per modality a list of (T, d), T in line with the sample's duration.

    Args:
        rng: where everything random comes from.
        latents: per modality [n, latent].
        maps: per modality [latent, d].
        base: ``cls`` (VGGish audio, 8-bit; its own steps) or ``main`` (steps of a second).
    """
    count = len(latents[VIDEO])
    steps = rng.integers(MEAN_STEPS // 2, MEAN_STEPS * 3 // 2, count, endpoint=True)
    seconds = STEP_SECONDS.get(base, {})
    lengths = {
        VIDEO: steps,
        AUDIO: np.maximum(1, np.floor(steps * seconds.get(VIDEO, 1.0) / seconds.get(AUDIO, 1.0))),
    }
    result: dict[str, list[npt.NDArray[Any]]] = {}
    for modality, to_features in maps.items():
        rows = np.repeat(np.arange(count), lengths[modality].astype(np.int64))
        walk = latents[modality][rows] + _WANDER * rng.standard_normal(
            (len(rows), len(to_features)), dtype=np.float32
        )
        noise = 0.3 * rng.standard_normal((len(rows), to_features.shape[1]), dtype=np.float32)
        values = np.maximum(walk @ to_features + noise, 0)
        if base == "cls" and modality == AUDIO:
            values = np.minimum(values * 64, 255).astype(np.uint8)
        result[modality] = np.split(values, np.cumsum(lengths[modality].astype(np.int64))[:-1])
    return result


def unit_vectors(
    rng: np.random.Generator, latents: Mapping[str, Float32], maps: Mapping[str, Float32]
) -> dict[str, list[npt.NDArray[Any]]]:
    """Draw CLIP and CLAP vectors: per modality a list of unit vectors (d,)."""
    result: dict[str, list[npt.NDArray[Any]]] = {}
    for modality, to_features in maps.items():
        values = latents[modality] @ to_features
        values += 0.3 * rng.standard_normal(values.shape, dtype=np.float32)
        result[modality] = list(values / np.linalg.norm(values, axis=1, keepdims=True))
    return result


def write_class_pickle(path: Path, names: Sequence[str], rows: Sequence[npt.NDArray[Any]]) -> None:
    """Write a class file as the releases do: names as bytes, 25 frames per second."""
    value = {
        "features": list(rows),
        "video_names": [name.encode() for name in names],
        "fps": [25] * len(rows),
    }
    path.write_bytes(pickle.dumps(value, protocol=4))


def write_clipclap_text(
    folder: Path, dataset: str, keys: Sequence[str], latents: Float32, seed: int
) -> None:
    """Write CLIP text [C, 512] and WavCaps text [C, 1024], each in an order of its own."""
    folder.mkdir(parents=True)
    for stream, (prefix, width) in enumerate((("", 512), ("wavcaps_", 1024))):
        rng = np.random.default_rng([seed, 4, stream])
        vectors = latents @ rng.standard_normal((latents.shape[1], width)).astype(np.float32)
        vectors += 0.1 * rng.standard_normal(vectors.shape).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        table = {keys[i]: vectors[i] for i in rng.permutation(len(keys))}
        boxed: npt.NDArray[Any] = np.array(table, dtype=object)
        name = f"{prefix}word_embeddings_{dataset}_normed.npy"
        np.save(folder / name, boxed, allow_pickle=True)


def clip_names(manuals: Sequence[str]) -> list[str]:
    """Return UCF's text keys for CLIP, which differ from the word vectors' in some classes."""
    return [f"{name} sport" if i % 11 == 3 else name for i, name in enumerate(manuals)]


def write_clip_names(path: Path, originals: Sequence[str], manuals: Sequence[str]) -> None:
    """Write ``ucf_clip_class_names.csv``."""
    with path.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["original", "manual", "clip_class_name"])
        writer.writerows(zip(originals, manuals, clip_names(manuals), strict=True))
