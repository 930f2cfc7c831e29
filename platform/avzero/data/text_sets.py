"""Class text vectors of a release, joined to classes through the name map, never by position."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from avzero.data.benchmark import Classes, ClassRole, TextSet
from avzero.data.class_lists import ClassTable, read_name_map
from avzero.data.safe_pickle import load_text_vectors
from avzero.errors import UserError
from avzero.spec import PLAIN_NAME, PLAIN_NAME_RULE

CLIP = "clip"
WAVCAPS = "wavcaps"
CLIPCLAP = "clipclap"
"""Text of the ClipClap release: its two files, and their vectors side by side."""
W2V = "w2v"
CLIP_WIDTH = 512
"""Values of a CLIP text vector; word vectors have 300."""


def find_text_files(feature_root: Path, clip: bool = False) -> dict[str, Path]:
    """Return {text set name: file} of the ``text`` folder of a feature set.

    Args:
        feature_root: the feature set's folder.
        clip: CLIP and CLAP features: where WavCaps text lies beside it, the file called
            ``word_embeddings_…`` holds CLIP text, not word vectors.
    """
    files: dict[str, Path] = {}
    for path in sorted((feature_root / "text").glob("*.npy")):
        name = text_set_name(path)
        if name in files:
            raise UserError(
                f"{path}: would be text set {name!r}, as {files[name].name} is; remove one, or say "
                f"which with --text {name}=FILE"
            )
        files[name] = path
    if not files:
        raise UserError(
            f"{feature_root / 'text'}: no .npy text vectors; copy "
            "word_embeddings_<dataset>_normed.npy there or give --text NAME=FILE"
        )
    if clip and files.keys() >= {W2V, WAVCAPS}:
        files[CLIP] = files.pop(W2V)
    return files


def read_text_sets(
    files: Mapping[str, Path], split_root: Path, table: ClassTable
) -> dict[str, TextSet]:
    """Read text files and join each to the classes by name.

    Raises:
        UserError: a name the store cannot take, or a file that does not fit the classes.
    """
    result: dict[str, TextSet] = {}
    for text_name, path in files.items():
        if not PLAIN_NAME.fullmatch(text_name):
            raise UserError(
                f"{path}: text set name {text_name!r}: {PLAIN_NAME_RULE}; give it another with "
                "--text NAME=FILE"
            )
        keys, vectors = load_text_vectors(path)
        map_path, name_map = _map_for(split_root, set(keys))
        by_class: dict[str, str] = {}
        for original, key in name_map.items():
            class_id = table.find(original, str(map_path))
            if key in keys:
                by_class[table.classes.names[class_id]] = key
        _check_covered(table.classes, by_class, name_map, path)
        result[text_name] = TextSet(keys, vectors, by_class)
    if CLIP in result and WAVCAPS in result and CLIPCLAP not in result:
        result[CLIPCLAP] = _joined(result, files)
    return result


def check_clip_text(sets: Mapping[str, TextSet], files: Mapping[str, Path]) -> None:
    """Refuse, beside CLIP and CLAP features, CLIP text whose WavCaps partner is missing.

    ``word_embeddings_…`` is then either file, and a benchmark would keep the wrong name for good:
    a release that is not complete is refused, and only a person can say what such a file holds.
    """
    if WAVCAPS not in files and W2V in sets and sets[W2V].vectors.shape[1] == CLIP_WIDTH:
        path = files[W2V]
        raise UserError(
            f"{path}: {CLIP_WIDTH} wide, so CLIP text, but wavcaps_{path.name} is missing beside "
            f"it; copy that file from the release, or use CLIP text alone: --text {CLIP}={path}"
        )


def _joined(sets: Mapping[str, TextSet], files: Mapping[str, Path]) -> TextSet:
    """Return [CLIP | WavCaps] vectors, joined by text key (the public loader joins by position)."""
    clip, wavcaps = sets[CLIP], sets[WAVCAPS]
    lonely = set(clip.keys) ^ set(wavcaps.keys)
    if lonely:
        key = min(lonely)
        has, lacks = (CLIP, WAVCAPS) if key in clip.keys else (WAVCAPS, CLIP)
        raise UserError(
            f"{files[has]}: text key {key!r} is not in {files[lacks]}; the two are concatenated by "
            "key, so both must name the same classes. Get both from one release"
        )
    row_of = {key: row for row, key in enumerate(wavcaps.keys)}
    order = [row_of[key] for key in clip.keys]
    vectors = np.concatenate([clip.vectors, wavcaps.vectors[order]], axis=1)
    return TextSet(clip.keys, vectors, clip.key_of_class)


def _map_for(split_root: Path, keys: set[str]) -> tuple[Path, dict[str, str]]:
    """Return the name map whose keys fit a text file: ``manual``, else ``clip_class_name``."""
    best = read_name_map(split_root, "manual")
    if not keys.issuperset(best[1].values()) and list(split_root.glob("*_clip_class_names.csv")):
        other = read_name_map(split_root, "clip_class_name")
        if len(keys & set(other[1].values())) > len(keys & set(best[1].values())):
            return other
    return best


def _check_covered(
    classes: Classes, by_class: Mapping[str, str], name_map: Mapping[str, str], path: Path
) -> None:
    """Refuse a text file that lacks the vector of a class the benchmark uses."""
    used = classes.ids(ClassRole.TRAIN, ClassRole.VAL_UNSEEN, ClassRole.TEST_UNSEEN)
    for name in (classes.names[i] for i in used):
        if name not in by_class:
            key = name_map.get(name)
            raise UserError(
                f"{path}: no text vector for class {name!r} "
                + (f"(text key {key!r})" if key else "(the name map does not list it)")
                + "; add it, or use the text file of this release"
            )


def text_set_name(path: Path) -> str:
    """Return a short name for a text file: ``w2v``, ``wavcaps`` or the stem without trimmings."""
    stem = path.stem.removesuffix("_normed")
    if stem.startswith("word_embeddings"):
        return W2V
    if stem.startswith("wavcaps_word_embeddings"):
        return WAVCAPS
    return stem.split("_embeddings")[0]
