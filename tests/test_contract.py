"""What every system must do, whatever it is: found by scanning, one table of checks for all."""

from __future__ import annotations

import copy

import pytest
import torch

from avzero.data.benchmark import Benchmark
from avzero.data.store import FeatureStore
from avzero.errors import UserError
from avzero.models._contract import Batch, Context, Model, Shapes, trainable
from avzero.models._layers import Site
from avzero.models._registry import build, make_config, model_class, model_files
from avzero.protocol.counter import fold, site_keys
from avzero.spec import Preset, TrainConfig
from avzero.train.folder import RunFolder
from avzero.train.loop import Trainer
from avzero.tune.space import load_space
from tests.conftest import make_task

SYSTEMS = list(model_files())
every_system = pytest.mark.parametrize("system", SYSTEMS)
SHAPES = Shapes({"audio": 9, "video": 11}, 300)


def make(system: str, preset: Preset = Preset.PAPER, **values: object) -> Model:
    cls = model_class(system)
    torch.manual_seed(0)
    return cls(cls.Config.model_validate(make_config(system, values, preset, "test")), SHAPES)


def batch(rows: int = 12, classes: int = 4, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    table = torch.nn.functional.normalize(draw(classes, SHAPES.text), dim=1)
    anchor = torch.arange(rows) % classes
    label = torch.stack([anchor, (anchor + 1) % classes], 1)
    features = {m: draw(rows, 2, d).abs() for m, d in SHAPES.features.items()}
    return Batch(features, table[label], label, table)


def context(model: Model, step: int = 0) -> Context:
    sites = sum(isinstance(m, Site) for m in model.modules())
    return Context(site_keys(fold(step), 1, sites, torch.device("cpu"))[0])


def total(model: Model, data: Batch, ctx: Context) -> torch.Tensor:
    return torch.stack(list(model.loss(data, ctx).values())).sum()


@every_system
def test_terms_are_finite_scalars_and_gradients_reach_everything(system: str) -> None:
    model = make(system).float().train()
    data = batch()
    terms = model.loss(data, context(model))
    assert terms and all(term.dim() == 0 and torch.isfinite(term) for term in terms.values())
    total(model, data, context(model)).backward()
    learning = {name for name, _ in trainable(model)}
    assert learning | model.frozen() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        if name in learning:
            assert parameter.grad is not None, f"{name} has no gradient"
            assert torch.isfinite(parameter.grad).all(), name


@every_system
def test_embeddings_and_distances(system: str) -> None:
    model = make(system).float().eval()
    data = batch()
    features = {m: x[:, 0] for m, x in data.features.items()}
    z, t = model.embed(features), model.embed_classes(data.class_text)
    for squared in (False, True):
        distances = model.distances(z, t, squared)
        assert "both" in distances
        assert all(d.shape == (12, 4) for d in distances.values())
    plain = model.distances(z, t, False)["both"]
    torch.testing.assert_close(model.distances(z, t, True)["both"], plain.square())
    again = model.distances(model.embed(features), model.embed_classes(data.class_text), False)
    torch.testing.assert_close(again["both"], plain, rtol=0, atol=0)
    one = model.embed({m: x[:1] for m, x in features.items()})
    for key, value in one.items():
        torch.testing.assert_close(value, z[key][:1], rtol=1e-4, atol=1e-5)


@every_system
@pytest.mark.parametrize("preset", list(Preset))
def test_loss_falls(system: str, preset: Preset) -> None:
    model = make(system, preset).float().train()
    optimizer = torch.optim.Adam([p for _, p in trainable(model)], lr=1e-3)
    losses = []
    for step in range(40):
        data = batch(seed=step % 4)
        optimizer.zero_grad()
        loss = total(model, data, context(model, step))
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.settle(data, context(model, step))
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@every_system
def test_forward_writes_no_python_state(system: str) -> None:
    """Design rule 4: a step may change buffers, nothing else, or stacking would be wrong."""
    model = make(system).float().train()

    def plain_state() -> dict[str, str]:
        return {
            f"{name}.{key}": repr(value)
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if key not in ("_parameters", "_buffers", "_modules")
        }

    before = plain_state()
    total(model, batch(), context(model)).backward()
    assert plain_state() == before


@every_system
def test_stacks_under_vmap(system: str) -> None:
    """Two configurations in one stacked call give the losses each gives alone."""
    models = [make(system).float().train() for _ in range(2)]
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    data = batch()
    alone = [total(copy.deepcopy(m), data, context(m, i)) for i, m in enumerate(models)]
    params, buffers = torch.func.stack_module_state(models)  # type: ignore[arg-type]
    keys = torch.stack([context(m, i).keys for i, m in enumerate(models)])
    skeleton = copy.deepcopy(models[0])

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = skeleton

        def forward(self, keys: torch.Tensor) -> torch.Tensor:
            return total(self.model, data, Context(keys))

    def one(
        p: dict[str, torch.Tensor], b: dict[str, torch.Tensor], k: torch.Tensor
    ) -> torch.Tensor:
        named = {f"model.{key}": value for key, value in (p | b).items()}
        return torch.func.functional_call(Loss(), named, (k,))

    stacked = torch.vmap(one)(params, buffers, keys)
    torch.testing.assert_close(stacked, torch.stack(alone), rtol=1e-4, atol=1e-5)
    for key, value in buffers.items():
        if key.endswith("running_mean"):
            assert not torch.equal(value, torch.zeros_like(value)), f"{key} was not updated"


@every_system
def test_config_round_trip_and_refusals(system: str) -> None:
    cls = model_class(system)
    config = make_config(system, {}, Preset.PAPER, "test")
    assert cls.Config.model_validate_json(config.model_dump_json()) == config
    compat = make_config(system, {}, Preset.COMPAT, "test").model_dump()
    assert all(compat[key] == value for key, value in cls.compat.items())
    with pytest.raises(UserError, match=rf"here: {system}: unknown key 'nonsense'; known keys"):
        make_config(system, {"nonsense": 1}, Preset.PAPER, "here")


@every_system
def test_initial_weights_depend_on_seed_and_stage_only(system: str, benchmark: Benchmark) -> None:
    shapes = Shapes(dict(benchmark.info.dims), 300)
    task = make_task(benchmark, system)
    torch.manual_seed(99)
    first = build(task, shapes).state_dict()
    torch.manual_seed(100)
    second = build(task, shapes).state_dict()
    other = build(task.model_copy(update={"seed": 8}), shapes).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


@every_system
def test_search_space_covers_known_names(system: str) -> None:
    space = load_space(system)
    known = set(model_class(system).Config.model_fields) | set(TrainConfig.model_fields)
    assert set(space.space) | set(space.defaults) <= known
    for point in space.published:
        assert point.source
        assert set(point.values) <= known
        make_config(
            system,
            {k: v for k, v in point.values.items() if k in model_class(system).Config.model_fields},
            Preset.PAPER,
            point.source,
        )


@every_system
def test_trains_and_resumes_to_the_same_state(
    system: str, benchmark: Benchmark, store: FeatureStore
) -> None:
    """Cut off after one epoch and taken up again equals never having been cut off."""
    whole = make_task(benchmark, system, seed=1001)
    folder = RunFolder(store.storage, whole)
    records = list(Trainer(whole, benchmark, folder).epochs())
    reference = folder.best_weights(folder.load_state())  # type: ignore[arg-type]

    class Elsewhere(RunFolder):
        """The same task in another folder."""

    cut = Elsewhere(store.storage, whole)
    cut.prefix += "-cut"
    running = Trainer(whole, benchmark, cut).epochs()
    next(running)
    running.close()
    resumed = Elsewhere(store.storage, whole)
    resumed.prefix = cut.prefix
    again = list(Trainer(whole, benchmark, resumed).epochs())
    assert [e.replayed for e in again] == [True, False, False]
    assert [e.losses for e in again] == [e.losses for e in records]
    assert [e.val for e in again] == [e.val for e in records]
    weights = resumed.best_weights(resumed.load_state())  # type: ignore[arg-type]
    assert all(torch.equal(weights[k], reference[k]) for k in reference)
