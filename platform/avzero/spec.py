"""What a user writes in YAML, as strict models: unknown keys and impossible values are refused.

``load_job`` turns a file into a ``Job`` or into one clear line. Everything that decides a result
(protocol, training settings, hyperparameters, seed) has a canonical JSON form and through it an
identity (``avzero.canon``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from avzero import DEFAULT_STORE
from avzero.canon import identity
from avzero.errors import UserError

Probability = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


PLAIN_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
PLAIN_NAME_RULE = "use 1 to 63 of a-z, 0-9, '.', '_' and '-', starting with a-z or 0-9"
"""Names of benchmarks and jobs become keys in a store, so they are kept plain."""


class Strict(BaseModel):
    """Base of everything a user may write: no unknown keys, no later changes, no NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TextAlignment(StrEnum):
    """How class text vectors are found (protocol.md P-01).

    ``BY_CLASS`` joins through the name map. ``LEGACY_SORTED`` indexes the vectors, sorted by text
    key, with the class id: what every public loader does, and wrong for most classes. It exists
    to evaluate published checkpoints, which were trained against those vectors.
    """

    BY_CLASS = "by_class"
    LEGACY_SORTED = "legacy_sorted"


class Preset(StrEnum):
    """A bundle of P-nn options: as the papers describe, or as the released code behaves."""

    PAPER = "paper"
    COMPAT = "compat"


class BetaGrid(Strict):
    """Calibration values tried on VAL: ``count`` values from ``start`` to ``stop`` inclusive."""

    start: float = 0.0
    stop: float = 3.0
    count: int = Field(16, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> BetaGrid:
        if self.stop < self.start or (self.count > 1 and self.stop == self.start):
            raise ValueError("stop must be larger than start")
        return self

    def values(self) -> list[float]:
        """Return the grid in ascending order."""
        if self.count == 1:
            return [self.start]
        step = (self.stop - self.start) / (self.count - 1)
        return [self.start + step * i for i in range(self.count)]


InputScaling = Literal["none", "standard", "l2", "minmax"]
"""Raw features; per-dimension z-scores fitted on the training rows; unit row norm; per-dimension
0 … 1 fitted on the training rows (values outside are clipped)."""

Modality = Literal["both", "audio", "video"]

Matmul = Literal["full", "tf32", "bf16"]


class Protocol(Strict):
    """The two-stage protocol and its options; ids P-nn refer to protocol.md section 6."""

    preset: Preset = Preset.PAPER
    text: str = "w2v"
    """Text set of class vectors."""
    text_alignment: TextAlignment = TextAlignment.BY_CLASS
    """P-01."""
    stage2_lr: Literal["replay", "plateau_on_val"] = "replay"
    """P-02: replay stage 1's learning rates, or step on VAL, which stage 2 trains on."""
    calibration: Literal["absolute", "scaled"] = "absolute"
    """P-03: carry beta as a distance, or in units of the seen-unseen class distance."""
    beta_reduction: Literal["mean3", "per_modality"] = "mean3"
    """P-04: one beta, the mean over audio, video and both; or each modality its own."""
    beta_grid: BetaGrid | None = None
    """P-06; None: the system's own, 0 to 3 in 16 values for most."""
    distance: Literal["l2", "squared_l2"] = "l2"
    """P-18: one rule, used everywhere."""
    input_scaling: InputScaling = "none"
    """P-17; a system's own ``input_scaling`` goes before."""
    modality: Modality = "both"
    """Ablation: train and test with one modality only; the other is given as zeros."""
    max_steps: Count | None = Field(None, exclude_if=lambda value: value is None)
    """Temporal features: at most this many video steps and the audio of the same seconds, from a
    random start in training, from the centre in evaluation. None: whole sequences."""
    max_steps_eval: Count | None = Field(None, exclude_if=lambda value: value is None)
    """The same in evaluation, where it differs (TCaF on ActivityNet: 60 and 300)."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("preset") == Preset.COMPAT:
            return {"text_alignment": "legacy_sorted", "stage2_lr": "plateau_on_val"} | values
        return values


class TrainConfig(Strict):
    """Optimisation settings (protocol.md section 3). All can be searched or fixed in a job."""

    lr: Positive = 1e-3
    weight_decay: NonNegative = 0.0
    """L2, added to the gradient (not decoupled)."""
    beta1: Probability = 0.9
    beta2: Probability = 0.999
    batch_size: int = Field(256, ge=2)
    """Global batch: the sum over all workers."""
    epochs: Count = 50
    batches_per_epoch: Count = 500
    evaluate_every: Count = Field(1, exclude_if=lambda value: value == 1)
    """Epochs from one look at VAL to the next; the last epoch always has one. For systems whose
    evaluation trains classifiers."""
    schedule: Literal["plateau", "constant"] = "plateau"
    patience: int = Field(3, ge=0)
    factor: float = Field(0.1, gt=0, lt=1)
    precision: Literal["float32", "float64"] = "float32"
    """Of weights and arithmetic; float64 is for checking, twice to four times slower."""
    matmul: Matmul = Field("full", exclude_if=lambda value: value == "full")
    """Of float32 matrix products: exact, or tf32 (CUDA) or bf16 inside; less exact, and faster
    where the hardware has it. Another choice is another run."""

    @model_validator(mode="after")
    def _float32_products(self) -> TrainConfig:
        if self.precision == "float64" and self.matmul != "full":
            raise ValueError(
                f"matmul {self.matmul} does nothing to precision float64; remove one of them"
            )
        return self


TRAIN_FIELDS = frozenset(TrainConfig.model_fields)


class Search(Strict):
    """How hyperparameters are searched on VAL."""

    trials: Count = 16
    """Per benchmark and model, the published (or default) point included."""
    sampler: Literal["tpe", "random", "grid", "cmaes"] = "tpe"
    """TPE; uniform; every combination of listed values in a shuffled order, or the first
    ``trials`` of them; CMA-ES over the numeric ranges (extra ``cmaes``)."""
    seed: int = 0
    objectives: list[Literal["hm", "zsl"]] = Field(
        ["hm"], min_length=1, exclude_if=lambda value: value == ["hm"]
    )
    """VAL scores to raise; the first decides early stopping and the winner."""
    pruner: Literal["halving", "median", "none"] = "halving"
    """Early stopping on VAL HM: asynchronous successive halving, below the median, or off."""
    min_epochs: Count = 4
    """No trial is stopped before this many epochs."""
    reduction: int = Field(3, ge=2)
    """Successive halving keeps one in this many at every rung."""
    seats: int = Field(0, ge=0, exclude_if=lambda value: value == 0)
    """Trials side by side, on a clock that counts epochs: the same number gives the same sweep on
    any machines. 0: as many as there are slots when a group begins."""
    cohort: int = Field(0, ge=0, exclude_if=lambda value: value == 0)
    """Trials in a row that share sizes, batch size and whatever else shapes a stack, so that they
    are trained together; 1: each has its own. 0: as many as there are seats, but an eighth of the
    trials at most."""
    space: dict[str, Any] = Field(default_factory=dict)
    """Ranges that replace or extend those of ``search_spaces/<model>.yaml``."""
    points: list[dict[str, Any]] = Field(default_factory=list)
    """Configurations tried right after trial 0."""

    @field_validator("objectives")
    @classmethod
    def _different(cls, value: list[str]) -> list[str]:
        if len(set(value)) != len(value):
            raise ValueError("an entry is listed twice")
        return value

    @model_validator(mode="after")
    def _one_for_cmaes(self) -> Search:
        if self.sampler == "cmaes" and len(self.objectives) > 1:
            raise ValueError("sampler cmaes takes one objective; use tpe, or remove one")
        return self


class Resources(Strict):
    """What one trial needs, and how many run at once."""

    workers: Count = 1
    """Ray Train workers of one trial; above 1 the batch is split over them."""
    min_workers: Count | None = Field(None, exclude_if=lambda value: value is None)
    """Go on with as few when nodes are lost, and grow again when they return; None: always all."""
    cpus: NonNegative = 1.0
    """Per worker."""
    gpus: NonNegative = 0.0
    """Per worker; fractions share a GPU."""
    execution: Literal["array", "trial"] = "array"
    """``array``: a worker trains several trials at once, stacked; ``trial``: one Ray Tune trial
    per configuration. The results are the same."""
    slots: int = Field(0, ge=0)
    """Trials one array trains at once; 0 = 4 on CPUs, 32 on a GPU."""
    concurrent: int = Field(0, ge=0)
    """Arrays (or single trials) at once; 0 = as many as the cluster holds."""
    max_failures: int = Field(2, ge=0)
    """Restarts of a trial whose worker died; a wrong configuration is not tried again."""

    @model_validator(mode="after")
    def _whole_gpus(self) -> Resources:
        if self.workers > 1 and self.gpus != int(self.gpus):
            raise ValueError("gpus must be whole with several workers: NCCL allows one per GPU")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError("gpus above 1 must be whole: a share is of one GPU")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError("min_workers must not exceed workers")
        if self.workers > 1 and self.slots > 1:
            raise ValueError(
                "slots must be 1 with several workers: a run is stacked with others, or split"
            )
        return self

    @property
    def worker_range(self) -> int | tuple[int, int]:
        """Workers of one trial: a number, or (fewest, most)."""
        least = self.min_workers or self.workers
        return self.workers if least == self.workers else (least, self.workers)

    @property
    def width(self) -> int:
        """Trials one Ray Tune trial trains at once."""
        if self.execution == "trial" or self.workers > 1:
            return 1
        return self.slots or (32 if self.gpus else 4)


class TestPlan(Strict):
    """Stage 2 and the one look at TEST."""

    __test__ = False  # the name is the protocol's; pytest must not collect it

    seeds: Count = 1
    """Stage-2 runs of the winner, with seeds seed, seed + 1, …"""
    reseed: Literal["stage2", "pipeline"] = "stage2"
    """Further seeds repeat stage 2 only, or stage 1 (best epoch, beta, learning rates) as well."""
    workers: Count = 1
    """Ray Train workers of a stage-2 run; 1 runs it in this process."""


class Tracking(Strict):
    """Where runs are logged for comparison; results are also kept in the store without MLflow."""

    uri: str = "sqlite:///mlflow.db"
    """Any MLflow tracking URI, or ``off``."""
    checkpoints: Literal["all", "winner", "none"] = "all"
    """Which runs carry their weights as an MLflow artifact."""


class Job(Strict):
    """One experiment file of ``jobs/``: any number of benchmarks times models."""

    name: str
    store: str = DEFAULT_STORE
    benchmarks: list[str] = Field(min_length=1)
    """``name``, ``name@digest``, and with ``:text`` behind a text set of its own."""
    models: list[str] = Field(min_length=1)
    protocol: Protocol = Protocol()
    train: dict[str, Any] = Field(default_factory=dict)
    """Training settings fixed for every trial; they win over published points and ranges."""
    fixed: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Per model: hyperparameters fixed for every trial."""
    search: Search = Search()
    seed: int = Field(42, ge=0)
    resources: Resources = Resources()
    test: TestPlan = TestPlan()
    tracking: Tracking = Tracking()

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not PLAIN_NAME.fullmatch(value):
            raise ValueError(PLAIN_NAME_RULE)
        return value

    @field_validator("benchmarks", "models")
    @classmethod
    def _no_repeats(cls, value: list[str]) -> list[str]:
        if len(set(value)) != len(value):
            raise ValueError("an entry is listed twice")
        return value

    @field_validator("benchmarks")
    @classmethod
    def _whole_references(cls, value: list[str]) -> list[str]:
        for entry in value:
            if not re.fullmatch(r"[^@:]+(@[0-9a-f]+)?(:[^@:]+)?", entry):
                raise ValueError(f"{entry!r}: write name, name@digest, name:text or both")
        return value

    @field_validator("train")
    @classmethod
    def _known_settings(cls, value: dict[str, Any]) -> dict[str, Any]:
        validated = TrainConfig.model_validate(value)
        return {key: getattr(validated, key) for key in value}

    @model_validator(mode="after")
    def _fixed_of_listed(self) -> Job:
        for model in self.fixed:
            if model not in self.models:
                raise ValueError(f"fixed: model {model!r} is not in models")
        return self

    def text_of(self, reference: str) -> tuple[str, str]:
        """Return (benchmark reference, text set) of an entry of ``benchmarks``."""
        name, _, text = reference.partition(":")
        return name, text or self.protocol.text

    def frozen_part(self) -> dict[str, Any]:
        """Return what may not change once the sweep has trials; the rest may be extended."""
        data = self.model_dump(mode="json")
        search = {k: v for k, v in data["search"].items() if k not in ("trials", "points")}
        return {key: data[key] for key in ("protocol", "train", "seed")} | {"search": search}


class Task(Strict):
    """One training run, completely described: same task, same result, same identity."""

    benchmark: str
    """Digest of the benchmark's content."""
    model: str
    config: dict[str, Any]
    """The model's hyperparameters, every one."""
    train: TrainConfig
    protocol: Protocol
    seed: int
    stage: Literal[1, 2] = 1
    lr_plan: tuple[float, ...] | None = None
    """Stage 2 with ``replay``: the learning rate of every epoch."""
    weights: str | None = Field(None, exclude_if=lambda value: value is None)
    """SHA-256 of the published checkpoint that stands for the training; None: trained here."""

    @cached_property
    def id(self) -> str:
        """The identity shared by Optuna trial, Ray trial, MLflow run and storage folder."""
        return identity(self.model_dump(mode="json"))

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with some fields changed, which has an identity of its own."""
        copied = super().model_copy(update=update, deep=deep)
        copied.__dict__.pop("id", None)
        return copied


def load_yaml(path: Path) -> Any:
    """Read a YAML file with the safe loader.

    Raises:
        UserError: the file is missing, not YAML, or repeats a key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    return read_yaml(text, str(path))


def read_yaml(text: str, where: str) -> Any:
    """Read YAML text with the safe loader; errors start ``where``, with the line if it has several.

    Raises:
        UserError: it is not YAML, repeats a key, or is nested too deeply.
    """
    try:
        return yaml.load(text, Loader=_UniqueKeys)  # noqa: S506 - a subclass of SafeLoader
    except RecursionError as error:
        raise UserError(f"{where}: not valid YAML (nested too deeply)") from error
    except (yaml.YAMLError, ValueError, ArithmeticError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None and "\n" in text else ""
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise UserError(f"{where}{line}: not valid YAML ({problem})") from error


class _UniqueKeys(yaml.SafeLoader):
    """A safe loader that refuses a key written twice instead of keeping the last.

    Values its base class stumbles over, such as the date 2001-13-45, become YAML errors.
    """

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"{str(node.value)[:40]!r} is no {kind}", node.start_mark
            ) from error

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        pairs = node.value if isinstance(node, yaml.MappingNode) else []  # the base refuses others
        for key_node, _ in pairs:
            key = self.construct_object(key_node, deep=deep)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is written twice", key_node.start_mark
                )
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 reads 1e-3 as text; people who write learning rates mean a number.
_UniqueKeys.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def validate(model: type[Strict], data: Any, where: str) -> Any:
    """Return ``data`` as ``model``; the first problem becomes one line that starts ``where``.

    Raises:
        UserError: unknown key, wrong type, or value out of range.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{where}: {describe(error, model)}") from error


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """Return the first problem of a validation error as ``field: what, what to do``."""
    # A misspelt key shows up twice, as unknown and as missing; the first says more.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    path = ".".join(str(part).removesuffix("_") for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, first["loc"][:-1])
        hint = f"; known keys: {', '.join(known)}" if known else ""
        return f"unknown key {path!r}{hint}"
    if first["type"] == "missing":
        return f"key {path!r} is missing; add it"
    given = first["input"]
    shown = f" (got {given!r})" if isinstance(given, str | int | float | bool | None) else ""
    message = first["msg"].removeprefix("Value error, ")
    return f"{path + ': ' if path else ''}{message[0].lower() + message[1:]}{shown}"


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Return the field names of the nested model at ``location``, or nothing."""
    current: Any = model
    for part in location:
        field = current.model_fields.get(part) if isinstance(part, str) else None
        current = getattr(field, "annotation", None)
        if not (isinstance(current, type) and issubclass(current, BaseModel)):
            return []
    return sorted(field.alias or name for name, field in current.model_fields.items())


def load_job(path: Path) -> Job:
    """Read a job file.

    Raises:
        UserError: anything wrong in it, named by file and key.
    """
    data = load_yaml(path)
    if not isinstance(data, Mapping):
        raise UserError(f"{path}: expected keys like name, benchmarks and models")
    return validate(Job, data, str(path))  # type: ignore[no-any-return]
