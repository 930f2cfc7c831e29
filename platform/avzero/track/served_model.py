"""The code of a logged MLflow model ("models from code"): MLflow copies and runs this file.

    mlflow models serve -m models:/<model id> --env-manager local
    curl localhost:5000/invocations -H 'Content-Type: application/json' \\
        -d '{"inputs": {"audio": [[…]], "video": [[…]]}}'

It answers ``{"predictions": [{"class": "Archery", "distances": […]}, …]}``. Nothing is pickled:
weights are safetensors, and the package itself is the requirement.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import mlflow
import pandas as pd  # type: ignore[import-untyped]
from mlflow.types.type_hints import TypeFromExample

from avzero.train.recogniser import Recogniser


class ZeroShotModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
    """Audio and video features in; class and distances to all classes out."""

    def load_context(self, context: Any) -> None:
        """Read the weights."""
        self._recogniser = Recogniser(Path(context.artifacts["recogniser"]))

    # Any hint that says what comes in, {modality: array}, makes MLflow advise against it in three
    # coloured paragraphs; this one it leaves to the signature.
    def predict(
        self, context: Any, model_input: TypeFromExample, params: Any = None
    ) -> pd.DataFrame:
        """Return a row per sample: ``class`` and ``distances``, a list in the order of classes."""
        names, distances = self._recogniser(cast(Mapping[str, Any], model_input))
        return pd.DataFrame({"class": names, "distances": distances.tolist()})


mlflow.models.set_model(ZeroShotModel())
