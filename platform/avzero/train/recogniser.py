"""A finished system by itself: features in, classes and distances out. No store, no tracking.

Its folder holds ``recogniser.json`` (what the run was, class names, beta) and
``recogniser.safetensors`` (weights, input scaling, what samples are compared with). It decides as
evaluation does: the nearest of all candidate classes, seen ones handicapped by the frozen beta.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from avzero.canon import canonical
from avzero.data.store import FeatureStore
from avzero.errors import UserError
from avzero.models._contract import Shapes
from avzero.models._registry import build
from avzero.protocol.calibration import BOTH
from avzero.protocol.scoring import Nearest
from avzero.protocol.stages import STAGES
from avzero.spec import Task
from avzero.train.data import Scaling, SeenRows, StageData, of_present
from avzero.train.folder import RunFolder
from avzero.train.outcome import finished_state, load_model
from avzero.train.records import Result
from avzero.train.steps import Steps, Table, Window, take

_RECORD, _TENSORS = "recogniser.json", "recogniser.safetensors"


class Recogniser:
    """Recognises classes of samples; make it with ``write``, then ``Recogniser(folder)``.

    Args:
        folder: what ``write`` filled.

    Raises:
        UserError: it is not there, or its weights are another system's.
    """

    def __init__(self, folder: Path) -> None:
        try:
            record = json.loads((folder / _RECORD).read_text())
            tensors = load_file(folder / _TENSORS)
        except OSError as error:
            raise UserError(f"{folder}: no recogniser ({error}); write it again") from error
        task = Task.model_validate(record["task"])
        self.dims: dict[str, int] = record["dims"]
        self.temporal: bool = record["temporal"]
        self.classes: list[str] = record["classes"]
        self.beta: float = record["beta"]
        self._seen: int = record["seen"]
        self._ids = torch.tensor(record["class_ids"])
        self._squared = task.protocol.distance == "squared_l2"
        self._model = build(task, Shapes(self.dims, record["text_dim"], self.temporal)).eval()
        try:
            self._model.load_state_dict(_part(tensors, "weights."))
        except RuntimeError as error:
            raise UserError(f"{folder}: the weights do not fit {task.model}: {error}") from error
        self._table = tensors["table"]
        shift, scale = _part(tensors, "shift."), _part(tensors, "scale.")
        dtype = getattr(torch, task.train.precision)
        absent = frozenset(record["absent"])
        self._scaling = Scaling(record["scaling"], dtype, shift, scale, absent)
        self._window = Window(record["max_steps"], record["step_seconds"])

    @torch.no_grad()
    def __call__(self, features: Mapping[str, Any]) -> tuple[list[str], Any]:
        """Recognise n samples.

        Args:
            features: float arrays {modality: [n, d]}; of temporal systems [n, T, d], unpadded.

        Returns:
            The class name of each, and float64 distances [n, C] in the order of ``classes``; beta
            is added to those of seen classes, so that the smallest decides.

        Raises:
            UserError: a modality is missing or has another width.
        """
        tables = {name: self._table_of(name, features) for name in self.dims}
        rows = torch.arange(len(next(iter(features.values()))))
        taken = take(tables, rows, self._scaling, self._window)
        whole = self._model.distances(self._model.embed(taken), self._table, self._squared)
        distances = of_present(whole, self._scaling.absent)[BOTH][:, : len(self.classes)]
        seen, unseen = self._ids[: self._seen], self._ids[self._seen :]
        # The rule evaluation decides by, ties included; targets do not enter it.
        limit = Nearest.of(distances, seen[:1].expand(len(rows)), seen, unseen).limit
        nearest = (distances[:, : self._seen].argmin(1), distances[:, self._seen :].argmin(1))
        index = torch.where(
            torch.from_numpy(self.beta < limit), nearest[0], nearest[1] + self._seen
        )
        shown = distances.double().numpy()
        shown[:, : self._seen] += self.beta
        return [self.classes[i] for i in index.tolist()], shown

    def _table_of(self, name: str, features: Mapping[str, Any]) -> Table:
        if name not in features:
            raise UserError(f"input {name!r} is missing; give {' and '.join(self.dims)}")
        values = torch.from_numpy(np.array(features[name], dtype=np.float32))
        wanted = 3 if self.temporal else 2
        if values.dim() != wanted or values.shape[-1] != self.dims[name]:
            shape = f"[n{', steps' if self.temporal else ''}, {self.dims[name]}]"
            raise UserError(f"input {name!r} has shape {list(values.shape)}; give {shape}")
        if not self.temporal:
            return values
        n, steps = values.shape[:2]
        start = torch.arange(n) * steps
        return Steps(values.flatten(0, 1), start, torch.full((n,), steps, dtype=torch.int64))


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


@torch.no_grad()
def write(run: RunFolder, result: Result, folder: Path) -> None:
    """Write the recogniser of a finished run into a folder.

    Args:
        run: of stage 2; its training rows are read (TEST is not).
        result: its TEST result, which says beta.
        folder: exists and is empty.

    Raises:
        UserError: the run is not finished, or its weights are gone.
    """
    task, state = run.task, finished_state(run)
    store = FeatureStore(run.storage)
    data = StageData(store.open(task.benchmark), task, torch.device("cpu"))
    model = load_model(run, state, data)
    stage, info = STAGES[task.stage], data.info
    seen, unseen = (info.classes.ids(*roles) for roles in (stage.seen, stage.unseen))
    ids = torch.from_numpy(np.concatenate([seen, unseen])).long()
    rows = SeenRows(data, ids[: len(seen)])
    tensors = {f"weights.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors["table"] = model.candidates(data.class_text[ids], len(seen), rows)
    tensors |= {f"shift.{name}": tensor for name, tensor in data.scaling.shift.items()}
    tensors |= {f"scale.{name}": tensor for name, tensor in data.scaling.scale.items()}
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, folder / _TENSORS)
    record = {
        "task": task.model_dump(mode="json"),
        "run": task.id,
        "frozen": result.frozen,
        "benchmark": info.name,
        "digest": info.digest,
        "dims": dict(info.dims),
        "text_dim": data.class_text.shape[1],
        "temporal": info.temporal,
        "classes": [info.classes.names[i] for i in ids.tolist()],
        "class_ids": ids.tolist(),
        "seen": len(seen),
        "beta": result.scores[BOTH]["beta"],
        "scaling": data.scaling.rule,
        "absent": sorted(data.scaling.absent),
        "max_steps": data.evaluation_window.steps,
        "step_seconds": dict(info.step_seconds),
        "revision": result.revision,
    }
    (folder / _RECORD).write_text(canonical(record))
