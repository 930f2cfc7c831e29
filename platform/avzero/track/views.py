"""What MLflow's pages show first: saved views with the columns this field compares.

MLflow keeps a saved view as a tag of the experiment, so an experiment is made with them. A version
that keeps them elsewhere ignores the tags.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from typing import Any

_METRICS = ("HM", "S", "U", "ZSL", "beta", "AUSUC", "audio_HM", "video_HM")
_COST = ("parameters", "seconds", "samples_per_s")
_TAGS = ("model", "feature_set", "stage", "seed", "preset", "selection", "state")
_PREFIX = "mlflow.sharedViewState."


def experiment_tags() -> dict[str, str]:
    """Return the tags of a new experiment."""
    columns = [f"metrics.`{name}`" for name in (*_METRICS, *_COST)]
    columns += [f"tags.`{name}`" for name in _TAGS]
    return {
        # Makes the UI open the page of runs instead of its chat tooling.
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.experiment.primaryMetric.name": "HM",
        "mlflow.experiment.primaryMetric.greaterIsBetter": "True",
        f"{_PREFIX}1avzeroall": _view("All runs: scores and costs", columns),
        f"{_PREFIX}2avzerotest": _view(
            "TEST results, best HM first",
            columns,
            {"searchFilter": "tags.`avzero.kind` = 'test'", "orderByKey": "metrics.`HM`"},
        ),
        f"{_PREFIX}3avzeroval": _view(
            "Trials on VAL, best HM first",
            columns,
            {"searchFilter": "tags.`avzero.kind` = 'trial'", "orderByKey": "metrics.`HM`"},
        ),
    }


def _view(name: str, columns: list[str], changes: Mapping[str, Any] | None = None) -> str:
    """Return a saved view in MLflow's form: named, its state deflated."""
    state = {
        "searchFilter": "",
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": columns,
        "columnOrder": [],
        "columnWidths": {},
        "runsHiddenMode": "FIRST_10_RUNS",
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": False,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "globalLineChartConfig": {
            "xAxisKey": "step",
            "lineSmoothness": 0,
            "selectedXAxisMetricKey": "",
        },
    } | dict(changes or {})
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    return json.dumps({"name": name, "createdAt": 1, "updatedAt": 1, "state": f"deflate;{packed}"})
