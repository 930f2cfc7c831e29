"""Search spaces: ``search_spaces/<model>.yaml`` plus what a job replaces, as Optuna ranges.

Hyperparameters are one flat set of names: training settings (``spec.TrainConfig``) and the
system's own (its ``Config``). A name that neither knows is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from pydantic import Field

from avzero.canon import canonical
from avzero.data.benchmark import BenchmarkInfo
from avzero.errors import UserError
from avzero.models._contract import Shapes
from avzero.models._registry import extra_folders, make_config, model_class, outline
from avzero.spec import TRAIN_FIELDS, Job, Strict, Task, TrainConfig, load_yaml, validate
from avzero.train.data import require_features
from avzero.train.structure import structure
from avzero.tune.samplers import grid_points, make_sampler

Choice = str | bool | int | float


class Range(Strict):
    """One hyperparameter's range; exactly one key."""

    uniform: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    log: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    int_: Annotated[list[int], Field(min_length=2, max_length=2)] | None = Field(None, alias="int")
    choice: Annotated[list[Choice], Field(min_length=1)] | None = None

    def distribution(self, where: str) -> BaseDistribution:
        """Return the Optuna distribution.

        Raises:
            UserError: none or several keys, or bounds out of order.
        """
        given = [key for key in type(self).model_fields if getattr(self, key) is not None]
        if len(given) != 1:
            raise UserError(f"{where}: give exactly one of uniform, log, int, choice")
        try:
            if self.choice is not None:
                return CategoricalDistribution(self.choice)
            if self.int_ is not None:
                return IntDistribution(self.int_[0], self.int_[1])
            low, high = self.log or self.uniform or [0.0, 0.0]
            return FloatDistribution(low, high, log=self.log is not None)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error


class Point(Strict):
    """A published configuration and where it was published."""

    dataset: str
    features: str
    source: str
    values: dict[str, Any]


class SpaceFile(Strict):
    """A file of ``search_spaces/``."""

    model: str
    space: dict[str, Range]
    defaults: dict[str, Any] = Field(default_factory=dict)
    published: list[Point] = Field(default_factory=list)


class Group:
    """One benchmark and one system of a job: what varies, what is fixed, where to start."""

    def __init__(
        self, job: Job, benchmark: BenchmarkInfo, model: str, text: str | None = None
    ) -> None:
        self.job = job
        self.benchmark = benchmark
        self.model = model
        self.protocol = job.protocol.model_copy(update={"text": text or job.protocol.text})
        own_text = self.protocol.text != job.protocol.text
        self.title = f"{benchmark.name}+{text}" if own_text else benchmark.name
        self.key = f"{self.title}--{model}"
        require_features(model, benchmark, self.protocol)
        vectors = benchmark.class_vectors(self.protocol.text, self.protocol.text_alignment)
        self.shapes = Shapes(dict(benchmark.dims), vectors.shape[1], benchmark.temporal)
        self._structures: dict[str, str] = {}
        own = set(model_class(model).Config.model_fields)
        file = load_space(model)
        fixed = dict(job.train) | dict(job.fixed.get(model, {}))
        # What a preset decides is not searched, or trials would leave the preset; a job may ask.
        decided = model_class(model).compat.keys()
        own_ranges = {k: v for k, v in file.space.items() if k not in decided}
        ranges = own_ranges | _job_ranges(job)
        known = TRAIN_FIELDS | own
        for name in (*ranges, *fixed, *(k for point in job.search.points for k in point)):
            if name not in known:
                raise UserError(
                    f"job {job.name}: {model} has no hyperparameter {name!r}; "
                    f"it has {', '.join(sorted(known))}"
                )
        self.distributions = {
            name: range_.distribution(f"search space of {model}: {name}")
            for name, range_ in ranges.items()
            if name not in fixed
        }
        self.published = _published(file, benchmark)
        self._is_grid = job.search.sampler == "grid"
        if not self._is_grid:  # its values are those the job lists
            self._admit_published()
        self._base = file.defaults | (self.published.values if self.published else {}) | fixed
        self.start_points = self._start_points()
        """Configurations to try first; of a grid, all that are tried."""
        self.trials = job.search.trials
        """Number of trials; less than the job asks for where a grid has fewer points."""
        try:
            if self._is_grid:
                self.start_points = self._grid()
                self.trials = len(self.start_points)
            else:
                make_sampler(job.search, 0, self.distributions)
        except UserError as error:
            raise UserError(f"job {job.name}: {self.key}: {error}") from error
        self._check_values()

    def _admit_published(self) -> None:
        """Let a published value join the choices it is not among: only for its own dataset."""
        for name, value in (self.published.values if self.published else {}).items():
            known = self.distributions.get(name)
            if isinstance(known, CategoricalDistribution) and value not in known.choices:
                self.distributions[name] = CategoricalDistribution((*known.choices, value))

    def _start_points(self) -> list[dict[str, Any]]:
        """Return the configurations to try first: the published point, then the job's own.

        A published or default point outside a grid is left out.
        """
        preset, where = self.job.protocol.preset, f"job {self.job.name}: start point"
        model_defaults = make_config(self.model, {}, preset, where).model_dump()
        train = TrainConfig()
        defaults = {k: getattr(train, k) for k in TRAIN_FIELDS} | model_defaults | self._base
        first = {name: defaults[name] for name in self.distributions}
        points = [first]
        for number, point in enumerate(self.job.search.points, start=1):
            for name in point:
                if name not in self.distributions:
                    raise UserError(
                        f"{where} {number} of {self.key}: {name} is not searched; it is fixed, or "
                        "has no range. Remove it from the point, or give it a range"
                    )
            points.append(first | point)
        outside = [
            next((n for n, v in values.items() if not _contains(self.distributions[n], v)), None)
            for values in points
        ]
        for number, bad in enumerate(outside):
            if bad is not None and not (self._is_grid and number == 0):
                raise UserError(
                    f"{where} {number} of {self.key}: {bad} = {points[number][bad]!r} is outside "
                    f"its range; widen search.space.{bad}, fix it, or give another value"
                )
        return [point for point, bad in zip(points, outside, strict=True) if bad is None]

    def _grid(self) -> list[dict[str, Any]]:
        """Return the points of a grid that are tried: start points, then a fair sample."""
        most = self.job.search.trials
        sample = grid_points(self.distributions, self.job.search.seed, most)
        points = {tuple(p[n] for n in self.distributions): p for p in [*self.start_points, *sample]}
        return list(points.values())[:most]

    def _check_values(self) -> None:
        """Refuse now what would otherwise stop the sweep half-way: bounds and batch sizes."""
        workers = {self.job.resources.workers, self.job.test.workers}
        tasks = [self.task(p) for p in self.start_points[: 1 + len(self.job.search.points)]]
        for name, distribution in self.distributions.items():
            ends = getattr(distribution, "choices", None) or (distribution.low, distribution.high)  # type: ignore[attr-defined]
            tasks += [self.task({name: value}) for value in ends]
        for task in tasks:
            for count in workers:
                if task.train.batch_size % count:
                    raise UserError(
                        f"job {self.job.name}: batch_size {task.train.batch_size} cannot be split "
                        f"evenly over {count} workers; choose multiples of {count}"
                    )
        for config in {canonical(task.config): task.config for task in tasks}.values():
            self._check_system(config)

    def _check_system(self, config: dict[str, Any]) -> None:
        """Refuse a system that cannot be built for this benchmark, or scored as the job asks."""
        own = model_class(self.model).Config.model_validate(config)
        try:
            model = outline(self.model, own, self.shapes)
        except UserError as error:
            raise UserError(f"job {self.job.name}: {self.key}: {error}") from error
        if self.protocol.calibration == "scaled" and not model.lengths:
            raise UserError(
                f"job {self.job.name}: {self.model} compares logits or products, which calibration "
                "scaled has no unit for; use calibration: absolute"
            )

    def structure(self, task: Task) -> str:
        """Return what runs of the group must agree in to be trained stacked."""
        key = canonical([task.config, task.train.model_dump(mode="json")])
        if key not in self._structures:
            own = model_class(self.model).Config.model_validate(task.config)
            model = outline(self.model, own, self.shapes)
            self._structures[key] = structure(model, task, self.shapes, 0)
        return self._structures[key]

    def task(self, values: Mapping[str, Any]) -> Task:
        """Return the stage-1 run of a configuration (values of the searched names)."""
        merged = self._base | dict(values)
        where = f"job {self.job.name}"
        train = {k: v for k, v in merged.items() if k in TRAIN_FIELDS}
        own = {k: v for k, v in merged.items() if k not in TRAIN_FIELDS}
        config = make_config(self.model, own, self.job.protocol.preset, where)
        return Task(
            benchmark=self.benchmark.digest,
            model=self.model,
            config=config.model_dump(mode="json"),
            train=validate(TrainConfig, train, where),
            protocol=self.protocol,
            seed=self.job.seed,
        )


def _job_ranges(job: Job) -> dict[str, Range]:
    """Return the ranges a job replaces or adds."""
    return {
        name: validate(Range, value, f"job {job.name}: search.space.{name}")
        for name, value in job.search.space.items()
    }


def _published(file: SpaceFile, benchmark: BenchmarkInfo) -> Point | None:
    """Return the published point for a benchmark's dataset and feature set, if there is one.

    Papers name the backbones only (``cls``), whether averaged or, for temporal systems, not.
    """
    names = (benchmark.feature_set, benchmark.feature_set.removesuffix("_temporal"))
    for point in file.published:
        if point.dataset == benchmark.dataset and point.features in names:
            return point
    return None


def _contains(distribution: BaseDistribution, value: Any) -> bool:
    """Return whether a value lies in a distribution."""
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    if isinstance(distribution, FloatDistribution | IntDistribution):
        return isinstance(value, int | float) and distribution.low <= value <= distribution.high
    return False


def space_folders() -> list[Path]:
    """Return where search spaces are looked for: the project, the package, ``AVZERO_PATH``."""
    package = Path(__file__).resolve().parents[1]
    own = [package.parents[1] / "search_spaces", package / "_search_spaces"]
    return [*own, *(folder / "search_spaces" for folder in extra_folders())]


def load_space(model: str) -> SpaceFile:
    """Read a system's search space.

    Raises:
        UserError: there is none, or something in it is wrong.
    """
    for folder in space_folders():
        path = folder / f"{model}.yaml"
        if path.is_file():
            file: SpaceFile = validate(SpaceFile, load_yaml(path), str(path))
            if file.model != model:
                raise UserError(f"{path}: model is {file.model!r}; the file's name says {model!r}")
            return file
    raise UserError(
        f"no search space {model}.yaml in {', '.join(str(f) for f in space_folders())}; "
        "a system needs one"
    )
