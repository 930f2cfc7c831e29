"""Saved views of a new experiment: MLflow's form, and columns that runs do have."""

from __future__ import annotations

import base64
import json
import zlib

from avzero.track.payload import epoch_metrics, result_metrics
from avzero.track.views import experiment_tags
from tests.trials import epoch_of, result_of


def test_views_name_columns_that_exist() -> None:
    result = result_of("t")
    result.scores.update(missing_audio=result.scores["both"], missing_video=result.scores["both"])
    known = {f"metrics.`{k}`" for k in result_metrics(result) | epoch_metrics(epoch_of(0))}
    tags = experiment_tags()
    assert tags == experiment_tags(), "a repeated request says the same"
    views = [json.loads(v) for k, v in tags.items() if k.startswith("mlflow.sharedViewState.")]
    assert len(views) == 3
    for view in views:
        kind, _, packed = view["state"].partition(";")
        state = json.loads(zlib.decompress(base64.b64decode(packed)))
        assert kind == "deflate" and view["name"]
        columns = state["selectedColumns"]
        assert {c for c in columns if c.startswith("metrics.")} <= known and len(columns) > 15
    assert all(len(value) < 5000 for value in tags.values()), "MLflow's limit on experiment tags"
