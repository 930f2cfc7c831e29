"""Sequences from the store to a system: round trip, padding, windows, workers, refusals."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from avzero.data import columns, sequences
from avzero.data.avca import read_avca
from avzero.data.benchmark import AUDIO, MODALITIES, VIDEO, Benchmark, RawBenchmark
from avzero.data.cache import NodeCache
from avzero.data.columns import value_extents
from avzero.data.sequences import Sequences, bad_rows, differing_rows, starts_of, take, zeroed
from avzero.data.store import FeatureStore
from avzero.errors import UserError
from avzero.protocol.stages import STAGE_1
from avzero.spec import InputScaling, Job, Protocol, Task
from avzero.train.data import StageData
from avzero.train.folder import RunFolder
from avzero.train.loop import Trainer
from avzero.tune.space import Group
from tests import test_world
from tests.conftest import make_task
from tests.pickles import FOLDER
from tests.toys import taken

CPU = torch.device("cpu")

MODEL = '''
"""A system of masked means, for tests of temporal features."""
import torch
from torch import nn
from avzero.models._contract import Card, Model, ModelConfig


class Config(ModelConfig):
    weight: float = 1.0


class Means(Model):
    card = Card("Means", "nobody", 2026, "here", "none", features=("temporal",))
    Config = Config

    def __init__(self, config, shapes):
        super().__init__(config, shapes)
        assert shapes.temporal
        self.maps = nn.ModuleDict({m: nn.Linear(d, 32) for m, d in shapes.features.items()})
        self.text = nn.Linear(shapes.text, 32)

    def _mean(self, features):
        z = 0
        for m, layer in self.maps.items():
            x, length = features[m], features[m + "_length"]
            real = torch.arange(x.shape[-2], device=x.device) < length[..., None]
            mean = (x * real[..., None]).sum(-2) / length[..., None]
            z = z + layer(nn.functional.normalize(mean, dim=-1))
        return nn.functional.normalize(z, dim=-1)

    def loss(self, batch, context):
        z = self._mean(batch.features)[:, 0]
        classes = self.embed_classes(batch.class_text)
        return {"ce": nn.functional.cross_entropy(10 * z @ classes.T, batch.label[:, 0])}

    def embed(self, features):
        return {"both": self._mean(features)}

    def embed_classes(self, text):
        return nn.functional.normalize(self.text(text), dim=-1)

    def distances(self, samples, classes, squared):
        d = torch.cdist(samples["both"], classes)
        return {"both": d.square() if squared else d}
'''
SPACE = """
model: means
space: {lr: {log: [1.0e-4, 1.0e-1]}}
published: [{dataset: TINY, features: cls, source: test, values: {lr: 0.002}}]
"""


@pytest.fixture(scope="module")
def raw(releases: dict[str, Path]) -> RawBenchmark:
    return read_avca(releases["temporal"], FOLDER, "cls", name="steps")


@pytest.fixture
def fresh(raw: RawBenchmark, tmp_path: Path) -> FeatureStore:
    target = FeatureStore(str(tmp_path / "store"), NodeCache(tmp_path / "cache"))
    target.put(raw)
    return target


@pytest.fixture(scope="module")
def place(raw: RawBenchmark, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    target = FeatureStore(str(tmp_path_factory.mktemp("temporal") / "store"))
    target.put(raw)
    return target


@pytest.fixture(scope="module")
def steps(place: FeatureStore) -> Benchmark:
    return place.open("steps")


@pytest.fixture(autouse=True)
def means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that takes sequences only."""
    for name, text in (("models/means.py", MODEL), ("search_spaces/means.yaml", SPACE)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("AVZERO_PATH", str(tmp_path))


def sequence(benchmark: Benchmark, modality: str, row: int) -> Any:
    table = benchmark.part.features[modality]
    assert isinstance(table, Sequences)
    return table.values[table.starts[row] : table.starts[row + 1]]


def blob(store: FeatureStore) -> Path:
    return Path(store.storage.url, store.manifest("steps")["parts"]["open"]["blob"])


# -- in memory ------------------------------------------------------------------------------------


def some(*lengths: int, width: int = 3, seed: int = 0) -> Sequences:
    values = np.random.default_rng(seed).standard_normal((sum(lengths), width), np.float32)
    return Sequences(values, starts_of(np.array(lengths)))


def rows_of(table: Sequences) -> list[Any]:
    return [part.tolist() for part in np.split(table.values, table.starts[1:-1])]


def test_rows_are_taken_in_any_order() -> None:
    table = some(2, 0, 3, 1)
    assert len(table) == 4 and table.shape == (4, 3) and table.nbytes == 6 * 3 * 4
    for order in ([3, 0, 2, 1], [1], [2, 2], []):
        taken = table.take(np.array(order, np.int64))
        want = [rows_of(table)[i] for i in order]
        assert rows_of(taken)[: len(order)] == want
    with pytest.raises(ValueError, match="do not end"):
        Sequences(table.values, starts_of(np.array([2, 2])))


def test_bad_zeroed_and_differing_rows() -> None:
    table = some(2, 0, 3, 1)
    table.values[3, 1] = np.nan
    bad = bad_rows(table)
    assert bad.tolist() == [False, True, True, False]
    fixed = zeroed(table, bad)
    assert isinstance(fixed, Sequences)
    assert rows_of(fixed) == [rows_of(table)[0], [[0, 0, 0]], [[0, 0, 0]], rows_of(table)[3]]
    assert not zeroed(table, np.ones(4, np.bool_)).values.any()  # type: ignore[union-attr]
    assert not differing_rows(table, table.take(np.arange(4))).any(), "NaN equals NaN"
    other = table.take(np.arange(4))
    other.values[5] += 1
    assert differing_rows(table, other).tolist() == [False, False, False, True]
    assert differing_rows(table, some(2, 1, 3, 1)).tolist() == [False, True, False, False]
    assert differing_rows(table, np.zeros((4, 3), np.float32)).all()


def test_large_arrays_lie_in_scratch_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AVZERO_CACHE", str(tmp_path / "cache"))
    table = some(2, 0, 3, 1)
    want = rows_of(table.take(np.array([2, 0])))
    monkeypatch.setattr(sequences, "SPILL_BYTES", 8)
    taken = table.take(np.array([2, 0]))
    assert isinstance(taken.values, np.memmap) and rows_of(taken) == want
    assert list((tmp_path / "cache").iterdir()) == [], "the scratch file has no name to leave"


# -- store and cache ------------------------------------------------------------------------------


def test_what_goes_in_comes_out(raw: RawBenchmark, fresh: FeatureStore) -> None:
    benchmark = fresh.open("steps")
    info = benchmark.info
    assert info.digest == raw.digest() and info.temporal
    assert info.dims == raw.dims and info.step_seconds == {AUDIO: 0.96, VIDEO: 0.64}
    for modality in MODALITIES:
        mine, theirs = benchmark.part.features[modality], raw.open.features[modality]
        assert isinstance(mine, Sequences) and isinstance(mine.values, np.memmap)
        assert not differing_rows(mine, theirs).any()
    assert fresh.put(raw)[1] is False and fresh.verify("steps") == []


def test_digest_knows_lengths_and_seconds(raw: RawBenchmark) -> None:
    table = raw.open.features[VIDEO]
    assert isinstance(table, Sequences)
    starts = table.starts.copy()
    starts[1] -= 1  # the same values, cut elsewhere
    moved = replace(
        raw.open, features=dict(raw.open.features) | {VIDEO: Sequences(table.values, starts)}
    )
    digests = {
        raw.digest(),
        replace(raw, open=moved).digest(),
        replace(raw, step_seconds={AUDIO: 1.0, VIDEO: 1.0}).digest(),
    }
    assert len(digests) == 3


def test_columns_are_lists_of_vectors(fresh: FeatureStore, raw: RawBenchmark) -> None:
    table = pq.read_table(blob(fresh))
    kind = "list<element: fixed_size_list<element: float>[48]>"
    assert str(table.schema.field("video").type) == kind
    features = raw.open.features[VIDEO]
    assert table["video_length"].to_pylist() == features.lengths.tolist()  # type: ignore[union-attr]
    frame = pq.read_table(blob(fresh), columns=["sample_id", "video"]).to_pandas()
    np.testing.assert_array_equal(np.stack(frame["video"][3]), take(features, np.array([3])).values)  # type: ignore[union-attr]


@pytest.mark.parametrize("group_bytes", [1, 5_000, 32 << 20])
def test_fast_path_and_decoder_agree(
    group_bytes: int, raw: RawBenchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "ROW_GROUP_BYTES", group_bytes)
    path = tmp_path / "part.parquet"
    columns.write_part(path, raw.open, lambda done, total: None)
    if group_bytes < 32 << 20:
        assert pq.read_metadata(path).num_row_groups > 50
    for modality, width in raw.dims.items():
        want = raw.open.features[modality].values.tobytes()  # type: ignore[union-attr]
        assert b"".join(bytes(c) for c in columns._decoded_chunks(path, modality)) == want
        extents = value_extents(path, modality, width)
        assert extents is not None
        data = path.read_bytes()
        assert b"".join(data[e.offset : e.offset + e.size] for e in extents) == want


def test_files_of_other_writers_are_read(fresh: FeatureStore, raw: RawBenchmark) -> None:
    """The blob rewritten with other settings has no raw ranges; the content decides."""
    path = blob(fresh)
    pq.write_table(pq.read_table(path), path, compression="zstd", row_group_size=50)
    mine = fresh.open("steps").part.features[VIDEO]
    assert not differing_rows(mine, raw.open.features[VIDEO]).any()


def test_damage_is_found_on_read(fresh: FeatureStore) -> None:
    path = blob(fresh)
    whole = path.read_bytes()
    extents = value_extents(path, VIDEO, 48)
    assert extents is not None
    at = extents[0].offset + 1234
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(UserError, match="column video does not have the content"):
        fresh.open("steps")
    assert len(fresh.verify("steps")) == 1
    table = pq.ParquetFile(path).read()
    lengths = table["video_length"].to_numpy().copy()
    lengths[:2] += [1, -1]
    path.write_bytes(whole)
    table = pq.ParquetFile(path).read()
    at = table.schema.get_field_index("video_length")
    pq.write_table(table.set_column(at, "video_length", [lengths]), path)
    with pytest.raises(UserError, match="column video_length does not have the content"):
        fresh.open("steps")
    assert not list(fresh._cache.root.glob("*/*.npy"))


def test_cut_off_cache_entries_are_filled_again(fresh: FeatureStore) -> None:
    fresh.open("steps")
    for name in ("video_starts", "audio"):
        (entry,) = fresh._cache.root.glob(f"*/{name}.npy")
        entry.write_bytes(entry.read_bytes()[:-40])
        fresh.open("steps")
        np.load(entry)


# -- batches --------------------------------------------------------------------------------------


def stage_data(steps: Benchmark, **changes: Any) -> StageData:
    return StageData(steps, make_task(steps, "means", **changes), CPU)


def test_batches_are_padded_with_zeros(steps: Benchmark) -> None:
    data = stage_data(steps)
    assert data.shapes.temporal and data.shapes.features == {AUDIO: 32, VIDEO: 48}
    draws = data.sampler.epoch(7, 1, 0, 3, 16)
    for step in range(3):
        batch = taken(data, draws, step, 0, 1)
        for modality in MODALITIES:
            x, length = batch.features[modality], batch.features[f"{modality}_length"]
            assert length.dtype == torch.int64 and length.shape == (16, 2)
            longest = max(len(sequence(steps, modality, int(r))) for r in data.training_rows()[1])
            assert x.shape == (16, 2, longest, data.shapes.features[modality])
            for i, rows in enumerate(draws.row[step].tolist()):
                for member, row in enumerate(rows):
                    want = sequence(steps, modality, row)
                    n = int(length[i, member])
                    np.testing.assert_array_equal(x[i, member, :n], want)
                    assert not x[i, member, n:].any()


@pytest.mark.parametrize("max_steps", [None, 5])
def test_workers_agree_on_the_length(steps: Benchmark, max_steps: int | None) -> None:
    data = stage_data(steps, protocol=Protocol(max_steps=max_steps))
    draws = data.sampler.epoch(7, 1, 0, 30, 4)
    uneven = 0
    for step in range(30):
        whole = taken(data, draws, step, 0, 1).features
        halves = [taken(data, draws, step, rank, 2).features for rank in range(2)]
        for name, value in whole.items():
            assert torch.equal(torch.cat([half[name] for half in halves]), value)
        uneven += int(halves[0]["video_length"].max()) != int(halves[1]["video_length"].max())
    assert uneven or max_steps, "no batch would have told the workers apart"


def test_evaluation_in_chunks(steps: Benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    data = stage_data(steps)
    val = data.evaluation(steps, STAGE_1)
    ((whole, target),) = val.chunks(data.scaling)
    monkeypatch.setattr("avzero.train.steps._VALUES", 12 * 48 * 10)
    chunks = list(val.chunks(data.scaling))
    assert len(chunks) == -(-len(val.rows) // 10)
    assert torch.equal(torch.cat([t for _, t in chunks]), target)
    at = 0
    for features, t in chunks:
        for modality in MODALITIES:
            rows = slice(at, at + len(t))
            longest = features[modality].shape[1]
            assert torch.equal(features[modality], whole[modality][rows, :longest])
            assert not whole[modality][rows, longest:].any()
            assert torch.equal(features[f"{modality}_length"], whole[f"{modality}_length"][rows])
        at += len(t)
    blocks = list(data.blocks(data.training_rows()[1]))
    assert len(blocks) == 20 and sum(len(index) for _, index in blocks) == 192


@pytest.mark.parametrize("rule", ["standard", "minmax", "l2"])
def test_scaling_uses_real_steps_only(steps: Benchmark, rule: InputScaling) -> None:
    data = stage_data(steps, protocol=Protocol(input_scaling=rule))
    rows = data.training_rows()[1]
    every = np.concatenate([sequence(steps, VIDEO, row) for row in rows]).astype(np.float64)
    if rule == "standard":
        mean, deviation = every.mean(0), every.std(0)
        np.testing.assert_allclose(data.scaling.shift[VIDEO], mean, rtol=1e-5)
        np.testing.assert_allclose(data.scaling.scale[VIDEO], deviation, rtol=1e-5)
    (block, index), *_ = data.blocks(rows)
    x, length = block[VIDEO], block[f"{VIDEO}_length"]
    raw_row = torch.from_numpy(np.array(sequence(steps, VIDEO, int(index[0]))))
    assert torch.equal(x[0, : length[0]], data.scaling.apply(VIDEO, raw_row))
    real = torch.arange(x.shape[1]) < length[:, None]
    assert not x[~real].any(), "padding stays zero under every rule"


def test_withheld_modality_is_one_step_of_zeros(steps: Benchmark) -> None:
    data = stage_data(steps)
    val = data.evaluation(steps, STAGE_1)
    (features, _), *_ = val.chunks(data.scaling.without(AUDIO))
    assert features[AUDIO].shape == (len(val.rows), 1, 32) and not features[AUDIO].any()
    assert (features["audio_length"] == 1).all() and features[VIDEO].shape[1] > 1
    only = stage_data(steps, protocol=Protocol(modality="audio"))
    batch = taken(only, only.sampler.epoch(7, 1, 0, 1, 8), 0, 0, 1)
    assert batch.features[VIDEO].shape == (8, 2, 1, 48) and not batch.features[VIDEO].any()


# -- windows --------------------------------------------------------------------------------------


def test_windows_in_evaluation_are_central(steps: Benchmark) -> None:
    data = stage_data(steps, protocol=Protocol(max_steps=6))
    val = data.evaluation(steps, STAGE_1)
    ((features, _),) = val.chunks(data.scaling)
    assert features[VIDEO].shape[1] == 6 and features[AUDIO].shape[1] == 4
    for i, row in enumerate(val.rows.tolist()):
        audio, video = (sequence(steps, m, row) for m in (AUDIO, VIDEO))
        start = max(0, len(video) - 6) // 2
        np.testing.assert_array_equal(
            features[VIDEO][i, : features["video_length"][i]], video[start : start + 6]
        )
        at = round(start * 0.64 / 0.96)
        want = audio[at : at + round(6 * 0.64 / 0.96)] if len(video) > 6 else audio
        np.testing.assert_array_equal(features[AUDIO][i, : features["audio_length"][i]], want)


def test_windows_in_training_start_anywhere(steps: Benchmark) -> None:
    data = stage_data(steps, protocol=Protocol(max_steps=4))
    starts: dict[int, set[int]] = {}
    for epoch in range(6):
        draws = data.sampler.epoch(7, 1, epoch, 10, 32)
        for step in range(10):
            features = taken(data, draws, step, 0, 1).features
            again = taken(data, draws, step, 0, 1).features
            assert all(torch.equal(again[name], value) for name, value in features.items())
            assert int(features["audio_length"].min()) >= 1
            assert (features["video_length"] == 4).all()
            for i, row in enumerate(draws.row[step, :, 0].tolist()):
                video = sequence(steps, VIDEO, row)
                got = features[VIDEO][i, 0].numpy()
                places = [k for k in range(len(video) - 3) if np.array_equal(video[k : k + 4], got)]
                starts.setdefault(len(video), set()).update(places)
    assert starts[4] == {0} and starts[12] == set(range(9)), "every start occurs, no other does"


def test_short_sequences_and_no_window_change_nothing(steps: Benchmark) -> None:
    whole, wide = (stage_data(steps, protocol=Protocol(max_steps=n)) for n in (None, 12))
    draws = whole.sampler.epoch(7, 1, 0, 1, 64)
    one, two = (taken(data, draws, 0, 0, 1).features for data in (whole, wide))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_no_window_leaves_identities_as_they_were() -> None:
    """Runs made before ``max_steps`` existed keep their id, so they are found and resumed."""
    assert "max_steps" not in Protocol().model_dump(mode="json")
    assert Protocol(max_steps=3).model_dump(mode="json")["max_steps"] == 3
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        Protocol(max_steps=0)


# -- systems --------------------------------------------------------------------------------------


def test_systems_of_vectors_are_refused(steps: Benchmark, benchmark: Benchmark) -> None:
    """Before anything starts: when a job is read, and again where data meets the system."""
    job = {"name": "x", "benchmarks": ["steps"], "models": ["avca"]}
    cases = (("avca", steps, "has temporal features"), ("means", benchmark, "one vector per video"))
    for model, place, why in cases:
        with pytest.raises(UserError, match=rf"{model} takes .*{why}; choose another") as caught:
            Group(Job.model_validate(job), place.info, model)
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match=why):
            StageData(place, make_task(place, model), CPU)


def test_published_points_name_the_backbones(steps: Benchmark) -> None:
    job = Job.model_validate({"name": "x", "benchmarks": ["steps"], "models": ["means"]})
    group = Group(job, steps.info, "means")
    assert group.published is not None and group.start_points[0]["lr"] == 0.002


def run(steps: Benchmark, place: FeatureStore, task: Task) -> list[Any]:
    return list(Trainer(task, steps, RunFolder(place.storage, task)).epochs())


def test_zero_shot_is_learnable(steps: Benchmark, place: FeatureStore) -> None:
    task = make_task(
        steps,
        "means",
        train={"lr": 3e-3, "epochs": 4, "batches_per_epoch": 60, "batch_size": 64},
        protocol=Protocol(max_steps=8),
    )
    records = run(steps, place, task)
    assert records[-1].loss < records[0].loss
    # 8 unseen of 32 classes: chance is 12.5 % ZSL and a harmonic mean of about 3 %.
    assert records[-1].val["ZSL"] > 0.3 and records[-1].val["HM"] > 0.15, records[-1].val


def run_here(rank: int, *arguments: Any) -> None:
    """Train in a new process, which starts without the folder of the test's own system."""
    os.environ["AVZERO_PATH"] = str(Path(arguments[-1]).parent)
    test_world.run(rank, *arguments)


def test_two_workers_give_the_losses_of_one(
    steps: Benchmark, place: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_world, "run", run_here)
    train = {"epochs": 4, "batches_per_epoch": 1, "batch_size": 8, "precision": "float64"}
    task = make_task(steps, "means", train=train, protocol=Protocol(max_steps=9), seed=4)
    (one, _), (two, _), (other, _) = test_world.both(task, place, tmp_path)
    assert two == other
    for (losses, val, _), (losses_2, val_2, _) in zip(one, two, strict=True):
        assert losses_2 == pytest.approx(losses, rel=1e-9) and val_2 == pytest.approx(val)


def test_whole_way_to_test(steps: Benchmark, place: FeatureStore) -> None:
    """VAL freezes the run, stage 2 trains, TEST is opened and scored, modalities are withheld."""
    from avzero.train.outcome import conclude_stage_1, score_test

    train = {"lr": 3e-3, "epochs": 2, "batches_per_epoch": 20, "batch_size": 32}
    task = make_task(steps, "means", train=train, seed=9)
    run(steps, place, task)
    result, frozen = conclude_stage_1(RunFolder(place.storage, task), steps)
    assert {"missing_audio", "missing_video"} <= set(result.scores)
    stage_2 = frozen.stage_2_task(9)
    run(steps, place, stage_2)
    final = score_test(place, RunFolder(place.storage, stage_2), frozen, "sweep")
    assert 0 <= final.scores["both"]["HM"] <= 1 and len(place.openings("steps")) == 1
