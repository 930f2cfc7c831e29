"""A run's folder in the store: checkpoints, history and result, resumable after any kill.

Below ``runs/<task id>/``::

    task.json                        what the run is
    weights-<epoch>-<attempt>.safetensors
    optimizer-<epoch>-<attempt>.safetensors
    state.json                       names the files that count; written last, after each epoch
    result-val.json, frozen.json     stage 1: scores on VAL, and all that is fixed for TEST
    result-test-<frozen>.json        stage 2: scores on TEST for one frozen trial
    portrait-….safetensors           beside each result, what pictures need besides

Weights and optimiser files carry the writer's attempt in their name, so a worker that was given
up for dead cannot overwrite what its replacement relies on; ``state.json`` carries their digests.
A worker that comes back and finds its run further on than itself leaves the state alone.
"""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from avzero.canon import ID_LENGTH, canonical, sha256_hex
from avzero.data.storage import Damaged, Storage
from avzero.spec import Task
from avzero.train.records import Epoch, Result
from avzero.train.schedule import Plateau

Tensors = dict[str, Tensor]

_ALONE_SECONDS = 3.0
"""Nobody is given up for dead, replaced and overtaken in less."""


@dataclass
class State:
    """Where a run stands after its last whole epoch."""

    history: list[Epoch] = field(default_factory=list)
    plateau: Plateau | None = None
    best_epoch: int = -1
    best_hm: float = float("-inf")
    files: dict[str, str] = field(default_factory=dict)
    """Role (``best``, ``last``, ``optimizer``) -> file name."""
    digests: dict[str, str] = field(default_factory=dict)
    """File name -> SHA-256."""
    finished: bool = False


class RunFolder:
    """Reads and writes one run's folder."""

    def __init__(self, storage: Storage, task: Task) -> None:
        self.storage = storage
        self.task = task
        self.prefix = f"runs/{task.id}"
        self._attempt = uuid.uuid4().hex[:8]
        self._published = time.monotonic()

    @property
    def url(self) -> str:
        """Where the folder is."""
        return f"{self.storage.url}/{self.prefix}"

    def _read_json(self, name: str) -> dict[str, Any] | None:
        try:
            return dict(json.loads(self.storage.read(f"{self.prefix}/{name}")))
        except KeyError:
            return None

    def _write_json(self, name: str, data: dict[str, Any]) -> None:
        self.storage.write(f"{self.prefix}/{name}", canonical(data).encode())

    def begin(self) -> None:
        """Write what the run is, for people who look into the folder."""
        text = canonical(self.task.model_dump(mode="json"))
        self.storage.create(f"{self.prefix}/task.json", text.encode())

    def load(self) -> tuple[State, Tensors, Tensors] | None:
        """Return the state after the last whole epoch, its weights and optimiser tensors.

        None when there is nothing to resume, or when a file it needs is missing or damaged: then
        the run starts again, which costs time and no correctness.
        """
        state = self.load_state()
        if state is None or not state.history:
            return None
        if state.finished:
            return state, {}, {}
        try:
            return state, self._tensors(state, "last"), self._tensors(state, "optimizer")
        except KeyError:
            return None

    def load_state(self) -> State | None:
        """Return the state without its tensors."""
        data = self._read_json("state.json")
        if data is None:
            return None
        return State(
            [Epoch.from_dict(row, replayed=True) for row in data["history"]],
            None if data["plateau"] is None else Plateau.from_dict(data["plateau"]),
            data["best_epoch"],
            float("-inf") if data["best_hm"] is None else data["best_hm"],
            data["files"],
            data["digests"],
            data["finished"],
        )

    def _tensors(self, state: State, role: str) -> Tensors:
        """Load a file named by the state. Raises ``KeyError`` when missing or damaged."""
        name = state.files[role]
        try:
            data = self.storage.read(f"{self.prefix}/{name}")
        except Damaged as error:
            raise KeyError(name) from error
        if sha256_hex(data) != state.digests[name]:
            raise KeyError(name)
        return load_tensors(data)

    def best_weights(self, state: State) -> Tensors:
        """Return the weights of the best epoch (stage 2: of the last).

        Raises:
            KeyError: they are missing or damaged.
        """
        return self._tensors(state, "best")

    def best_weights_key(self, state: State) -> str:
        """Return the storage key of the best weights."""
        return f"{self.prefix}/{state.files['best']}"

    def save(self, state: State, weights: Tensors, optimizer: Tensors) -> None:
        """Checkpoint an epoch: tensors first, then the state that names them, then clean up."""
        epoch = len(state.history) - 1
        old = set(state.files.values())
        last = self._put(state, f"weights-{epoch:04d}", weights)
        state.files["last"] = last
        state.files["optimizer"] = self._put(state, f"optimizer-{epoch:04d}", optimizer)
        if state.best_epoch == epoch:
            state.files["best"] = last
        self._publish(state, old)

    def finish(self, state: State) -> None:
        """Mark the run finished; only the best weights are kept."""
        old = set(state.files.values())
        state.finished = True
        state.files = {"best": state.files["best"]}
        self._publish(state, old)

    def adopt(self, epoch: int, weights: Tensors) -> None:
        """Keep weights that were trained elsewhere, as a finished run without a history."""
        state = State(best_epoch=epoch, finished=True)
        self.begin()
        state.files["best"] = self._put(state, "weights-published", weights)
        self._publish(state, set())

    def _put(self, state: State, stem: str, tensors: Tensors) -> str:
        name = f"{stem}-{self._attempt}.safetensors"
        data = save_tensors({key: t.detach().cpu().contiguous() for key, t in tensors.items()})
        state.digests[name] = sha256_hex(data)
        self.storage.write(f"{self.prefix}/{name}", data)
        return name

    def _publish(self, state: State, old: set[str]) -> None:
        """Write the state, then remove files it no longer names."""
        kept = set(state.files.values())
        ahead = self._ahead(state)
        if ahead is not None:  # the same run, so the same numbers: what counts is there already
            state.files, state.digests = ahead.files, ahead.digests
            for name in (old | kept) - set(ahead.files.values()):
                if self._attempt in name:
                    self.storage.delete(f"{self.prefix}/{name}")
            return
        state.digests = {name: d for name, d in state.digests.items() if name in kept}
        self._write_json(
            "state.json",
            {
                "history": [epoch.as_dict() for epoch in state.history],
                "plateau": None if state.plateau is None else state.plateau.as_dict(),
                "best_epoch": state.best_epoch,
                "best_hm": None if state.best_hm == float("-inf") else state.best_hm,
                "files": state.files,
                "digests": state.digests,
                "finished": state.finished,
            },
        )
        self._published = time.monotonic()
        for name in old - kept:
            self.storage.delete(f"{self.prefix}/{name}")

    def _ahead(self, state: State) -> State | None:
        """Return the stored state if a replacement of this worker has brought it further."""
        if time.monotonic() - self._published < _ALONE_SECONDS:
            return None
        stored = self.load_state()
        if stored is None:
            return None
        theirs, mine = (len(stored.history), stored.finished), (len(state.history), state.finished)
        return stored if theirs > mine else None

    def load_result(self, kind: str, frozen: str = "") -> Result | None:
        """Return the stored result, if there is one.

        Args:
            kind: ``val`` or ``test``.
            frozen: for ``test``, the digest of the frozen trial: the same stage-2 weights scored
                with another beta are another result.
        """
        data = self._read_json(_result_name(kind, frozen))
        return None if data is None else Result.from_dict(data)

    def save_result(self, result: Result) -> None:
        """Store a result."""
        self._write_json(_result_name(result.kind, result.frozen), result.as_dict())

    def load_portrait(self, kind: str, frozen: str = "") -> Tensors:
        """Return what ``save_portrait`` kept; nothing where an earlier version wrote the result."""
        try:
            return load_tensors(self.storage.read(f"{self.prefix}/{_portrait_name(kind, frozen)}"))
        except KeyError:
            return {}

    def save_portrait(self, result: Result, tensors: Tensors) -> None:
        """Store what pictures of a result need besides it (``train.outcome``)."""
        name = _portrait_name(result.kind, result.frozen)
        data = save_tensors({key: t.detach().cpu().contiguous() for key, t in tensors.items()})
        self.storage.write(f"{self.prefix}/{name}", data)

    def load_frozen(self) -> dict[str, Any] | None:
        """Return what a finished stage-1 run fixed for stage 2 and TEST."""
        return self._read_json("frozen.json")

    def save_frozen(self, frozen: dict[str, Any]) -> None:
        """Store what a finished stage-1 run fixed for stage 2 and TEST."""
        self._write_json("frozen.json", frozen)


def _result_name(kind: str, frozen: str) -> str:
    return f"result-{kind}-{frozen[:ID_LENGTH]}.json" if frozen else f"result-{kind}.json"


def _portrait_name(kind: str, frozen: str) -> str:
    return _result_name(kind, frozen).replace("result", "portrait").replace("json", "safetensors")
