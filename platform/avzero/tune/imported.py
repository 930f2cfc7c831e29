"""Published checkpoints: taken into a system, calibrated on VAL, scored on TEST through the seal.

An imported checkpoint is a run like any other, only its task names the file's digest instead of a
training: so its folder, its frozen record and its TEST result have an identity of their own, and
the same file with the same settings is never opened twice.
"""

from __future__ import annotations

import math
import pickle
import re
import struct
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from avzero.canon import canonical, sha256_file
from avzero.data.audit import wrong_if_positional
from avzero.data.benchmark import Benchmark
from avzero.data.ledger import IMPORTS
from avzero.data.store import FeatureStore
from avzero.errors import UserError
from avzero.models._contract import Model
from avzero.models._registry import build, model_class, model_files
from avzero.protocol.seal import Frozen
from avzero.spec import Job, Task, TextAlignment, read_yaml, validate
from avzero.train.data import StageData
from avzero.train.folder import RunFolder
from avzero.train.outcome import conclude_stage_1, score_test
from avzero.train.records import Result
from avzero.tune.space import Group

SWEEP = IMPORTS
"""What stands in the ledger where other openings have their sweep's name."""
_UNREADABLE = (
    pickle.UnpicklingError,
    SafetensorError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    ImportError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    struct.error,
)
"""Everything torch.load and safetensors raise on files that are something else, or damaged."""
_PLAIN = frozenset(
    {
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.bool,
    }
)
"""What entries of a checkpoint may be; what is a weight must be floating (``load_strictly``)."""
_LONG, _HEAD = 120, 60
"""Characters of a file's text that are shown as they are; and of what is longer, or worse."""
_LISTED = 6
_MOST_EPOCHS = 10**6
"""A larger epoch is nonsense, and treated as not stated."""
_PROBE = 256
"""Training rows a checkpoint must turn into numbers before TEST may be opened for it."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file as released (data_formats.md section 2.9)."""

    path: Path
    sha256: str
    state: Mapping[str, Tensor]
    epoch: int
    """0-based, -1 where the file does not say."""
    metric: str
    """What its epoch was chosen by, as the file says; or empty."""

    def line(self) -> str:
        """Return what it is, for people."""
        epoch = f"epoch {self.epoch + 1}" if self.epoch >= 0 else "epoch not stated"
        metric = f", chosen by {self.metric}" if self.metric else ""
        tensors = f"{len(self.state)} tensors"
        return f"{shown(self.path.name)}: {tensors}, {epoch}{metric}, {self.sha256[:16]}"


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint without running code from it.

    Takes the reference's dict (``model``, 1-based ``epoch``, ``metric``), a plain state dict, or a
    ``.safetensors`` file.

    Raises:
        UserError: no such file, none of these, a tensor that is no plain array, or weights that
            are NaN or infinite.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    data = _load(path)
    whole = data if isinstance(data, Mapping) else {}
    state = whole.get("model", whole)
    if not isinstance(state, Mapping) or not state or not all(_named(*i) for i in state.items()):
        keys = (shown(key) if isinstance(key, str) else type(key).__name__ for key in whole)
        has = ", ".join(islice(keys, _LISTED)) or type(data).__name__
        raise UserError(
            f"{path}: no state dict: expected named tensors, or an entry 'model' with them; it "
            f"has {has}"
        )
    for key, value in state.items():
        if shown(key) != key:
            raise UserError(f"{path}: {shown(key)} is no name of a weight")
        odd = _oddity(value)
        if odd:
            raise UserError(f"{path}: {key} is {odd}; save it as a plain float32 tensor on the CPU")
        if not torch.isfinite(value).all():
            raise UserError(f"{path}: {key} is not finite; the file's training diverged")
    epoch, metric = whole.get("epoch"), whole.get("metric")
    return Checkpoint(
        path,
        sha256_file(path),
        dict(state),
        epoch - 1 if type(epoch) is int and 0 < epoch <= _MOST_EPOCHS else -1,
        shown(metric) if isinstance(metric, str) else "",
    )


def _load(path: Path) -> Any:
    """Return what a file holds, whatever that is.

    Raises:
        UserError: it cannot be read without running code from it.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    except _UNREADABLE as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        why = f" (it asks for {shown(asked[1])})" if asked else ""
        raise UserError(
            f"{path}: not a checkpoint that can be read without running code from it{why}; give "
            "a .pt file with a 'model' state dict, a plain state dict, or a .safetensors file"
        ) from error


def _named(key: object, value: object) -> bool:
    """Return whether an entry is a tensor with a name."""
    return isinstance(key, str) and isinstance(value, Tensor)


def _oddity(value: Tensor) -> str:
    """Return why a tensor is no plain array of numbers held by the file; empty where it is one.

    Sparse, quantised and meta tensors have no numbers to look at. One element can pretend to be
    any number of them: the file is small, the copy is not.
    """
    if value.layout is not torch.strided or value.is_nested:
        return f"a {'nested' if value.is_nested else _kind(value.layout)} tensor"
    if value.device.type != "cpu":
        return f"a tensor on {value.device}, without values"
    if value.dtype not in _PLAIN:
        return f"of type {_kind(value.dtype)}"
    held = value.untyped_storage().nbytes()
    if math.prod(value.shape) * value.element_size() > held:
        return f"{list(value.shape)}, more than the {held} bytes stored for it"
    return ""


def _kind(value: torch.layout | torch.dtype) -> str:
    """Return the name of a layout or type without the library's."""
    return str(value).removeprefix("torch.")


def shown(text: str) -> str:
    """Return text of a file as people may see it: no escape codes, no further lines, not long."""
    if text.isprintable() and len(text) <= _LONG:
        return text
    return repr(text[:_HEAD])


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Return hyperparameters written as ``key=value``.

    Raises:
        UserError: an entry is no such pair, or a name is given twice.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        key, sep, text = pair.partition("=")
        if not sep or not key:
            raise UserError(f"--set {pair}: write key=value")
        if key in values:
            raise UserError(f"--set {pair}: {key} is given twice")
        values[key] = read_yaml(text, f"--set {shown(pair)}")
    return values


class Import:
    """One checkpoint with its settings, checked and ready to score; nothing is written yet.

    Args:
        store: holds the benchmark and takes the runs.
        file: the checkpoint whose TEST scores are wanted.
        model: the system it is a checkpoint of.
        benchmark: name of the benchmark.
        stage_1: the checkpoint of its stage 1, from which beta comes; None: from ``file``.
        values: hyperparameters instead of the published point's.
        protocol: protocol settings beside the preset ``compat``.
        seed: of systems that draw random numbers when scored.

    Raises:
        UserError: a file is no checkpoint of the system for this benchmark, or a setting is wrong.
    """

    def __init__(
        self,
        store: FeatureStore,
        file: Path,
        model: str,
        benchmark: str,
        stage_1: Path | None = None,
        values: Mapping[str, Any] | None = None,
        protocol: Mapping[str, Any] | None = None,
        seed: int = 42,
    ) -> None:
        model_class(model)
        self.store = store
        self.info = store.info(benchmark)
        self.values = dict(values or {})
        self._job = {
            "name": SWEEP,
            "benchmarks": [benchmark],
            "protocol": {"preset": "compat"} | dict(protocol or {}),
            "seed": seed,
        }
        self.group = self._group(model)
        self.checkpoint = read_checkpoint(file)
        self.stage_1 = None if stage_1 is None else read_checkpoint(stage_1)
        self._benchmark: Benchmark = store.open(self.info.digest)
        self._models = {
            stage: self._fit(checkpoint, self._task(checkpoint, stage))
            for checkpoint, stage in ((self.stage_1 or self.checkpoint, 1), (self.checkpoint, 2))
        }

    def _group(self, model: str) -> Group:
        fixed = {model: self.values} if self.values else {}
        job = validate(Job, self._job | {"models": [model], "fixed": fixed}, SWEEP)
        return Group(job, self.info, model)

    def _task(self, checkpoint: Checkpoint, stage: int) -> Task:
        """Return the run a checkpoint stands for."""
        update = {"stage": stage, "weights": checkpoint.sha256}
        return self.group.task({}).model_copy(update=update)

    # -- does it fit ----------------------------------------------------------------------------

    def _fit(self, checkpoint: Checkpoint, task: Task) -> Model:
        """Return the system with a checkpoint's weights, tried on a few training rows."""
        data = StageData(self._benchmark, task, torch.device("cpu"))
        model = build(task, data.shapes)
        try:
            model.load_reference(checkpoint.state)
        except UserError as error:
            widths = ", ".join(f"{m} {d}" for m, d in self.info.dims.items())
            raise UserError(
                f"{checkpoint.path}: {error}. Benchmark {self.info.name} has {widths}, text "
                f"{data.shapes.text}{self._other_names(checkpoint, data)}"
            ) from error
        _, rows = data.training_rows()
        features, _ = next(data.blocks(rows[:_PROBE]))
        with torch.no_grad():
            out = [*model.eval().embed(features).values(), model.embed_classes(data.train_text)]
        if not all(torch.isfinite(z).all() for z in out):
            raise UserError(
                f"{checkpoint.path}: embeddings of {self.info.name} are not finite with these "
                "weights; the features are scaled differently from those it was trained on"
            )
        return model

    def _other_names(self, checkpoint: Checkpoint, data: StageData) -> str:
        """Return whose checkpoint it seems to be: by its weights, else by its file name."""
        fits = []
        for name in model_files():
            try:
                group = Group(self.group.job, self.info, name)
                build(group.task({}), data.shapes).load_reference(checkpoint.state)
                fits.append(name)
            except (UserError, RuntimeError, ValueError, LookupError):
                continue  # not this one
        if fits:
            return f". The weights are those of {' or '.join(fits)}: give --model {fits[0]}"
        named = _named_system(checkpoint.path)
        if named and named != self.group.model:
            return f". The file's name says {named}: give --model {named}"
        return ""

    # -- what a reader of the scores must know --------------------------------------------------

    def notes(self) -> list[str]:
        """Return what was taken, from where, and what the scores are worth; a line each."""
        cls, name = model_class(self.group.model), self.group.model
        lines = [f"{cls.card.title} on {self.info.name}. {self.checkpoint.line()}"]
        point = self.group.published
        where = f"{self.info.dataset} {self.info.feature_set}"
        lines.append(
            f"Hyperparameters: published point of {where}: {point.source}"
            if point
            else f"Hyperparameters: defaults of {name}; no point is published for {where}"
        )
        if self.values:
            lines[-1] += "; set: " + ", ".join(f"{k}={v}" for k, v in self.values.items())
        lines.append(self._text_note())
        named = _named_system(self.checkpoint.path)
        if named and named != name:
            lines.append(f"The file's name says {named}; the weights fit {name} as well.")
        if self.stage_1 is not None:
            lines.append(f"Beta comes from VAL with stage 1. {self.stage_1.line()}")
        else:
            lines.append(
                "Warning: beta comes from VAL scored with this file's own weights. A stage-2 "
                "checkpoint saw VAL in training, so its VAL scores and its beta are optimistic; "
                "give the stage-1 checkpoint with --stage1."
            )
        return lines

    def _text_note(self) -> str:
        """Return the sentence on how class texts are found, and how to switch it (P-01)."""
        protocol = self.group.protocol
        if protocol.text_alignment is TextAlignment.BY_CLASS:
            return (
                "text_alignment by_class: every class has its own vector; published checkpoints "
                "were trained with --alignment legacy_sorted."
            )
        wrong = wrong_if_positional(self.info.classes, self.info.text[protocol.text])
        counts = ", ".join(f"{group} {count}" for group, count in wrong.items())
        return (
            "text_alignment legacy_sorted, because published checkpoints were trained against "
            f"those vectors. It gives another class's vector to: {counts} classes. --alignment "
            "by_class gives every class its own."
        )

    # -- scoring --------------------------------------------------------------------------------

    def val(self) -> tuple[Result, Frozen]:
        """Return the VAL result and what is frozen for TEST; stored ones where there are."""
        folder = self._folder(self.stage_1 or self.checkpoint, 1)
        stored, frozen = folder.load_result("val"), folder.load_frozen()
        if stored is not None and frozen is not None:
            return stored, Frozen.from_dict(frozen)
        try:
            return conclude_stage_1(folder, self._benchmark)
        except FloatingPointError as error:
            raise UserError(
                f"{self.checkpoint.path}: {error} on VAL of {self.info.name}; the checkpoint does "
                "not belong to these features"
            ) from error

    def test(self, frozen: Frozen) -> tuple[Result, bool]:
        """Return the TEST result, and whether it was stored so that TEST stayed shut."""
        folder = self._folder(self.checkpoint, 2)
        stored = folder.load_result("test", frozen.digest) is not None
        return score_test(self.store, folder, frozen, SWEEP), stored

    def _folder(self, checkpoint: Checkpoint, stage: int) -> RunFolder:
        """Return the run's folder with the checkpoint's weights in it."""
        folder = RunFolder(self.store.storage, self._task(checkpoint, stage))
        state = folder.load_state()
        if state is None or not state.finished:
            record = {
                "file": shown(checkpoint.path.name),
                "sha256": checkpoint.sha256,
                "epoch": checkpoint.epoch,
                "metric": checkpoint.metric,
            }
            key = f"{folder.prefix}/checkpoint.json"
            folder.storage.write(key, canonical(record).encode())
            folder.adopt(checkpoint.epoch, dict(self._models[stage].state_dict()))
        return folder


def _named_system(path: Path) -> str:
    """Return the system a released file's name begins with (``AVCA_score_ckpt_3.pt``), or none.

    The reference names files after classes; the one of its ranking systems ends in ``Model``.
    """
    head = re.split(r"[^A-Za-z0-9]", path.stem)[0].casefold().removesuffix("model")
    for name in model_files():
        title = model_class(name).card.title
        if head in (re.sub(r"\W|_", "", name), re.sub(r"\W|_", "", title).casefold()):
            return name
    return ""
