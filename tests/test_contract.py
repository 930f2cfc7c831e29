"""What every system must do, whatever it is: found by scanning, one table of checks for all."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

from avzero.data.benchmark import Benchmark
from avzero.data.store import FeatureStore
from avzero.errors import UserError
from avzero.models._basic import BatchNorm
from avzero.models._contract import Batch, Context, Model, Shapes, trainable
from avzero.models._layers import Site, number_sites
from avzero.models._registry import build, make_config, model_class, model_files
from avzero.protocol.counter import fold, site_keys
from avzero.spec import Preset, Task, TrainConfig
from avzero.train.folder import RunFolder
from avzero.train.loop import Trainer
from avzero.tune.space import load_space
from tests.conftest import SMALL, make_task

SYSTEMS = list(model_files())
every_system = pytest.mark.parametrize("system", SYSTEMS)
CLASSES, SEEN = 4, 3
CANCELS = {"D.2.bias", "netD.fc2.bias", "netD2.fc2.bias", "margin_generator.b"}
"""A critic's last bias cancels between real and generated rows; KDA's shifts all scores alike."""
SETS = {
    "averaged": Shapes({"audio": 9, "video": 11}, 300),
    "clipclap": Shapes({"audio": 1024, "video": 512}, 1536),
    "temporal": Shapes({"audio": 9, "video": 11}, 300, temporal=True),
}
SHAPES = SETS["averaged"]


def sets() -> list[tuple[str, str]]:
    """Return every (system, feature set it says it can use)."""
    return [(s, kind) for s in SYSTEMS for kind in model_class(s).card.features]


def make(
    system: str, preset: Preset = Preset.PAPER, shapes: Shapes = SHAPES, **values: object
) -> Model:
    cls = model_class(system)
    torch.manual_seed(0)
    chosen = SMALL.get(system, {}) | values
    model = cls(cls.Config.model_validate(make_config(system, chosen, preset, "test")), shapes)
    number_sites(model)
    return model.float().train()


def batch(rows: int = 12, seed: int = 0, shapes: Shapes = SHAPES) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    table = torch.nn.functional.normalize(draw(CLASSES, shapes.text), dim=1)
    anchor = torch.arange(rows) % CLASSES
    label = torch.stack([anchor, (anchor + 1) % CLASSES], 1)
    if not shapes.temporal:
        features = {m: draw(rows, 2, d).abs() for m, d in shapes.features.items()}
        return Batch(features, table[label], label, table)
    features = {}
    for (m, d), steps in zip(shapes.features.items(), (5, 3), strict=True):
        length = torch.randint(1, steps + 1, (rows, 2), generator=generator)
        length[0] = steps
        real = torch.arange(steps) < length[..., None]
        features[m] = draw(rows, 2, steps, d).abs() * real[..., None]
        features[f"{m}_length"] = length
    return Batch(features, table[label], label, table)


def anchors(data: Batch) -> dict[str, torch.Tensor]:
    return {m: x[:, 0] for m, x in data.features.items()}


class Rows:
    """Training rows of the seen classes of a batch."""

    seed = 3

    def __init__(self, data: Batch) -> None:
        keep = data.label[:, 0] < SEEN
        self._features = {m: x[keep] for m, x in anchors(data).items()}
        self.label = data.label[:, 0][keep]

    def blocks(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        yield self._features, self.label


def context(model: Model, step: int = 0) -> Context:
    sites = sum(isinstance(m, Site) for m in model.modules())
    return Context(site_keys(fold(step), 1, sites, torch.device("cpu"))[0])


def parts(model: Model) -> list[str]:
    """Return the names of a system's passes."""
    return list(dict.fromkeys(part for step in range(12) for part in model.passes(step)))


def terms(model: Model, data: Batch, ctx: Context) -> dict[str, torch.Tensor]:
    """Return the loss terms of all passes."""
    found = {}
    for part in parts(model):
        for name, term in model.loss(data, ctx._replace(part=part)).items():
            found[f"{part}/{name}"] = term
    return found


def total(model: Model, data: Batch, ctx: Context) -> torch.Tensor:
    return torch.stack(list(terms(model, data, ctx).values())).sum()


def normalised(model: Model) -> set[str]:
    """Return the biases that a BatchNorm right behind them takes away again."""
    found = set()
    for name, layer in model.named_modules():
        before, _, at = name.rpartition(".")
        if isinstance(layer, BatchNorm) and at.isdigit() and at != "0":
            found.add(f"{before}.{int(at) - 1}.bias")
    return found


@pytest.mark.parametrize(("system", "kind"), sets())
@pytest.mark.parametrize("preset", list(Preset))
def test_terms_are_finite_scalars_and_gradients_reach_everything(
    system: str, kind: str, preset: Preset
) -> None:
    model = make(system, preset, SETS[kind])
    data = batch(shapes=SETS[kind])
    found = terms(model, data, context(model))
    assert found and all(term.dim() == 0 and torch.isfinite(term) for term in found.values())
    torch.stack(list(found.values())).sum().backward()
    learning = {name for name, _ in trainable(model)}
    assert learning | model.frozen() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        if name in learning:
            assert parameter.grad is not None, f"{name} has no gradient"
            assert torch.isfinite(parameter.grad).all(), name
            cancels = CANCELS | normalised(model)
            assert parameter.grad.any() or name in cancels, f"{name} has a gradient of zeros"


@pytest.mark.parametrize(("system", "kind"), sets())
def test_embeddings_and_distances(system: str, kind: str) -> None:
    model = make(system, shapes=SETS[kind]).eval()
    data = batch(shapes=SETS[kind])
    with torch.no_grad():
        z, t = model.embed(anchors(data)), model.candidates(data.class_text, SEEN, Rows(data))
        assert model.embed_classes(data.class_text).shape[0] == CLASSES
        plain, squared = (model.distances(z, t, flag) for flag in (False, True))
        again = model.candidates(data.class_text, SEEN, Rows(data))
        one = model.embed({m: x[:1] for m, x in anchors(data).items()})
        repeated = model.distances(model.embed(anchors(data)), again, False)
    assert "both" in plain and plain.keys() == squared.keys()
    assert len(t) in (CLASSES, 2 * CLASSES - SEEN)
    assert all(d.shape == (12, len(t)) and torch.isfinite(d).all() for d in plain.values())
    for name in plain.keys() - ({"both"} if len(plain) > 1 else set()):
        if not torch.equal(squared[name], plain[name]):  # minus logits have no square
            torch.testing.assert_close(squared[name], plain[name].square())
    torch.testing.assert_close(repeated["both"], plain["both"], rtol=0, atol=0)
    for key, value in one.items():
        torch.testing.assert_close(value, z[key][:1], rtol=1e-3, atol=1e-4)


@every_system
@pytest.mark.parametrize("missing", ["audio", "video"])
def test_a_missing_modality_is_no_catastrophe(system: str, missing: str) -> None:
    """Zeros for one modality, in training and at test: everything stays finite."""
    model = make(system)
    data = batch()
    data.features[missing] = torch.zeros_like(data.features[missing])
    found = terms(model, data, context(model))
    torch.stack(list(found.values())).sum().backward()
    assert all(torch.isfinite(term) for term in found.values())
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        table = model.candidates(data.class_text, SEEN, Rows(data))
        distances = model.distances(model.embed(anchors(data)), table, False)
    assert all(torch.isfinite(d).all() for d in distances.values())


@every_system
@pytest.mark.parametrize("preset", list(Preset))
def test_loss_falls(system: str, preset: Preset) -> None:
    """By a tenth within 200 steps; of several passes (adversaries) in one at least."""
    model = make(system, preset)
    optimizer = torch.optim.Adam([p for _, p in trainable(model)], lr=1e-3)
    history: dict[str, list[float]] = {}
    fell: list[bool] = []
    for step in range(200):
        data = batch(seed=step % 4)
        for part in parts(model):
            optimizer.zero_grad(set_to_none=True)
            ctx = context(model, step)._replace(part=part)
            loss = torch.stack(list(model.loss(data, ctx).values())).sum()
            loss.backward()
            optimizer.step()
            history.setdefault(part, []).append(loss.item())
        with torch.no_grad():
            model.settle(data, context(model, step))
        fell = [sum(x[-5:]) < 0.9 * sum(x[:5]) for x in history.values()]
        if step > 5 and (all(fell) or (len(fell) > 1 and any(fell))):
            return
    pytest.fail(f"{history}")


@every_system
def test_forward_writes_no_python_state(system: str) -> None:
    """Design rule 4: a step may change buffers, nothing else, or stacking would be wrong."""
    model = make(system)

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
    models = [make(system) for _ in range(2)]
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


def test_a_changed_task_has_an_identity_of_its_own(benchmark: Benchmark) -> None:
    """The identity is worked out once; a copy with other fields must not inherit it."""
    task = make_task(benchmark)
    before = task.id
    assert task.model_copy().id == before == Task.model_validate(task.model_dump()).id
    other = task.model_copy(update={"seed": task.seed + 1})
    assert other.id != before and other.model_copy(update={"seed": task.seed}).id == before
    assert task == task.model_copy() and "id" not in task.model_dump()
