"""The final system as a logged MLflow model that ``mlflow models serve`` serves."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import avzero

_CODE = Path(__file__).with_name("served_model.py")


def log_model(
    client: Any, model_id: str, run_id: str, files: Mapping[str, bytes], scratch: Path
) -> None:
    """Fill a logged model that exists, and link it to its run; again, the same.

    Args:
        client: an ``MlflowClient``.
        model_id: of the logged model.
        run_id: of the run it comes from.
        files: of a recogniser.
        scratch: an empty folder.
    """
    from mlflow.entities import LoggedModelOutput

    save_model(scratch / "model", files, run_id, model_id)
    client.log_model_artifacts(model_id, str(scratch / "model"))
    client.finalize_logged_model(model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model_id, 0)])


def save_model(
    path: Path, files: Mapping[str, bytes], run_id: str = "", model_id: str = ""
) -> None:
    """Write an MLflow model: our code by its path, weights as safetensors, nothing pickled.

    Args:
        path: of the new folder.
        files: of a recogniser (``train.recogniser.write``).
        run_id: the run it comes from.
        model_id: of the logged model.
    """
    import mlflow
    from mlflow.models import Model

    with tempfile.TemporaryDirectory() as scratch:
        for name, data in files.items():
            (Path(scratch) / name).write_bytes(data)
        mlflow.pyfunc.save_model(
            str(path),
            python_model=str(_CODE),
            artifacts={"recogniser": scratch},
            signature=_signature(json.loads(files["recogniser.json"])),
            pip_requirements=[f"avzero=={avzero.__version__}"],
            mlflow_model=Model(run_id=run_id or None, model_id=model_id or None),
        )


def _signature(record: Mapping[str, Any]) -> Any:
    """Return (audio, video) -> (class, distances), with the widths of this benchmark."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec
    from mlflow.types.schema import Array

    steps = (-1,) if record["temporal"] else ()
    inputs: list[Any] = [
        TensorSpec(np.dtype("float32"), (-1, *steps, width), name)
        for name, width in record["dims"].items()
    ]
    outputs: list[Any] = [
        ColSpec(DataType.string, "class"),
        ColSpec(Array(DataType.double), "distances"),
    ]
    return ModelSignature(Schema(inputs), Schema(outputs))
