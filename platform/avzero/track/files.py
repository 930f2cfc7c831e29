"""Files of runs in MLflow, made when they are sent. What they show is in the store as well."""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from avzero.data.benchmark import BenchmarkInfo
from avzero.errors import UserError
from avzero.track.figures import (
    confusion,
    embedding,
    learning_curves,
    recall_bars,
    seen_unseen_curve,
)
from avzero.track.study_figures import importance_bars, importances, parallel_coordinates
from avzero.train.folder import RunFolder
from avzero.train.records import Epoch, Result
from avzero.tune.listener import TrialView

Files = Callable[[], dict[str, bytes]]
"""Name -> content: pictures and weights should not wait in memory."""


def result_files(
    result: Result, folder: RunFolder, info: BenchmarkInfo, title: str
) -> dict[str, bytes]:
    """Return the figures of a result and the tables behind them.

    Args:
        result: on VAL or TEST.
        folder: of its run, with the portrait; without one there are fewer figures.
        info: of the benchmark, for the names of classes.
        title: what was scored.
    """
    names = info.classes.names
    name = f"{title}, {result.kind.upper()}"
    curve = zip(*(result.curve[k] for k in ("beta", "S", "U")), strict=True)
    files = {
        "seen_unseen_curve.png": seen_unseen_curve(result, f"{name}: seen-unseen curve"),
        "seen_unseen_curve.csv": _csv(("beta", "S", "U"), curve),
        "per_class_recall.png": recall_bars(result, names, f"{name}: recall by class"),
        "per_class.csv": per_class(result, names),
    }
    portrait = folder.load_portrait(result.kind, result.frozen)
    if "confusion" in portrait:
        picture = confusion(portrait, names, f"{name}: confusion among unseen classes")
        files["confusion_unseen.png"] = picture
    plane = embedding(portrait, names, f"{name}: embeddings (t-SNE)")
    if plane:
        files["embeddings_tsne.png"] = plane
    retrieval = [(k, 100 * v) for k, v in result.extra.items() if k.startswith("mAP_")]
    if retrieval:
        files["retrieval.csv"] = _csv(("measure", "%"), retrieval)
    return files


def learning_files(epochs: Sequence[Epoch], title: str) -> dict[str, bytes]:
    """Return the learning curves of a run."""
    return {"learning_curves.png": learning_curves(epochs, title)} if epochs else {}


def study_files(trials: Sequence[TrialView], title: str) -> dict[str, bytes]:
    """Return figures of a search and the table behind them."""
    found = importances(trials)
    names = list(dict.fromkeys(name for trial in trials for name in trial.values))
    rows: list[list[Any]] = []
    for trial in trials:
        score = 100 * trial.hm if trial.best else None
        rows.append([trial.number, trial.state, len(trial.epochs), score])
        rows[-1] += [trial.values.get(name) for name in names]
    header = ("trial", "state", "epochs", "best_val_hm", *names)
    files = {"trials.csv": _csv(header, rows)}
    lines = parallel_coordinates(trials, found, f"{title}: hyperparameters and score")
    if lines:
        files["parallel_coordinates.png"] = lines
    if found:
        bars = importance_bars(found, len(trials), f"{title}: what mattered")
        files["hyperparameter_importances.png"] = bars
    return files


def per_class(result: Result, names: Sequence[str]) -> bytes:
    """Return the table of recalls by class."""
    columns = [result.per_class[k] for k in ("class_id", "recall", "zsl", "count")]
    rows = ((i, names[i], *rest) for i, *rest in zip(*columns, strict=True))
    return _csv(("class_id", "class", "recall", "zsl", "count"), rows)


def per_class_of_trials(trials: Sequence[TrialView]) -> bytes:
    """Return the recalls by class of all complete trials as one Parquet table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"class_id": pa.int32(), "recall": pa.float32(), "zsl": pa.float32()}
    columns: dict[str, list[Any]] = {name: [] for name in ("trial", *kinds)}
    for trial in trials:
        table = trial.result.per_class if trial.result else {name: [] for name in kinds}
        columns["trial"] += [trial.number] * len(table["class_id"])
        for name in kinds:
            columns[name] += table[name]
    out = io.BytesIO()
    pq.write_table(pa.table(columns, pa.schema({"trial": pa.int32()} | kinds)), out)
    return out.getvalue()


def weights(folder: RunFolder) -> dict[str, bytes]:
    """Return the best weights of a finished run; nothing where they are gone."""
    state = folder.load_state()
    if state is None or "best" not in state.files:
        return {}
    try:
        return {"model.safetensors": folder.storage.read(folder.best_weights_key(state))}
    except KeyError:
        return {}


def model_files(folder: RunFolder, result: Result) -> dict[str, bytes]:
    """Return the files of a stage-2 run's recogniser; nothing where its weights are gone."""
    from avzero.train.recogniser import write

    with tempfile.TemporaryDirectory() as scratch:
        try:
            write(folder, result, Path(scratch))
        except UserError:
            return {}
        return {path.name: path.read_bytes() for path in Path(scratch).iterdir()}


def yaml_file(data: Mapping[str, Any]) -> bytes:
    """Return a YAML file."""
    return yaml.safe_dump(dict(data), sort_keys=False).encode()


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """Return a CSV file; a missing value is an empty cell."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(header)
    writer.writerows(rows)
    return out.getvalue().encode()
