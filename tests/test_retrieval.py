"""Retrieval: the vectorised precision against its definition, its edges, and where it is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from avzero.data.benchmark import Benchmark
from avzero.data.store import FeatureStore
from avzero.models._contract import Batch, Card, Context, Model, ModelConfig, Shapes
from avzero.protocol import retrieval
from avzero.protocol.retrieval import Gallery, average_precision
from avzero.protocol.stages import STAGE_1
from avzero.spec import Protocol
from avzero.train.data import StageData, nearest
from avzero.train.folder import RunFolder
from avzero.train.loop import Trainer
from avzero.train.outcome import conclude_stage_1, score_test
from avzero.train.records import Result
from tests.conftest import make_task

NAN = float("nan")


def brute_force(distances: list[float], relevant: list[bool]) -> float:
    """Mean over relevant items of the precision among all items at most as far away."""
    if not any(relevant):
        return NAN
    precisions = []
    for d, r in zip(distances, relevant, strict=True):
        if r:
            inside = [x for e, x in zip(distances, relevant, strict=True) if e <= d]
            precisions.append(sum(inside) / len(inside))
    return sum(precisions) / len(precisions)


def step_area(distances: list[float], relevant: list[bool]) -> float:
    """The usual formula: sum over thresholds of (R_n - R_(n-1)) P_n, as scikit-learn has it."""
    if not any(relevant):
        return NAN
    area = before = 0.0
    for threshold in sorted(set(distances)):
        inside = [r for d, r in zip(distances, relevant, strict=True) if d <= threshold]
        recall, precision = sum(inside) / sum(relevant), sum(inside) / len(inside)
        area += (recall - before) * precision
        before = recall
    return area


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Distances with many ties, queries without a relevant item, classes with one item."""
    n, q = draw(st.integers(1, 14)), draw(st.integers(1, 5))
    cells = st.sampled_from([0.0, 1.0, 1.5, 2.0, 3.0, math.inf])
    distances = draw(
        st.lists(st.lists(cells, min_size=n, max_size=n), min_size=q, max_size=q),
    )
    labels = st.integers(0, 4)
    queries = draw(st.lists(labels, min_size=q, max_size=q))
    items = draw(st.lists(labels, min_size=n, max_size=n))
    return torch.tensor(distances), torch.tensor(queries), torch.tensor(items)


@settings(max_examples=400, deadline=None)
@given(problems(), st.sampled_from([1, 7, 1 << 20]))
def test_agrees_with_both_definitions(problem: tuple[Tensor, Tensor, Tensor], cells: int) -> None:
    distances, queries, items = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "CELLS", cells)
        got = average_precision(distances, queries, items)
    assert got.dtype == torch.float64
    for row, query, value in zip(distances.tolist(), queries.tolist(), got.tolist(), strict=True):
        relevant = [c == query for c in items.tolist()]
        for definition in (brute_force, step_area):
            assert value == pytest.approx(definition(row, relevant), abs=1e-12, nan_ok=True)


@settings(max_examples=100, deadline=None)
@given(problems(), st.randoms(use_true_random=False))
def test_depends_on_no_order_and_no_scale(
    problem: tuple[Tensor, Tensor, Tensor], random: Any
) -> None:
    distances, queries, items = problem
    order = list(range(len(items)))
    random.shuffle(order)
    want = average_precision(distances, queries, items)
    got = average_precision(2 * distances[:, order] + 3, queries, items[order])
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_edges() -> None:
    one = torch.tensor([[3.0, 1.0, 2.0]])
    items = torch.tensor([5, 6, 6])
    # One relevant item, ranked last of three; none; all tied; perfect.
    assert average_precision(one, torch.tensor([5]), items).tolist() == [1 / 3]
    assert math.isnan(average_precision(one, torch.tensor([7]), items).item())
    assert average_precision(torch.zeros(1, 3), torch.tensor([6]), items).tolist() == [2 / 3]
    assert average_precision(one, torch.tensor([6]), items).tolist() == [1.0]
    with pytest.raises(FloatingPointError, match="NaN"):
        average_precision(torch.tensor([[NAN, 1.0, 2.0]]), torch.tensor([6]), items)


def gallery(
    embeddings: Mapping[str, Tensor], distances: Mapping[str, Tensor], target: Tensor
) -> Gallery:
    """A gallery that got its samples in two blocks."""
    kept = Gallery()
    for part in (slice(0, 3), slice(3, None)):
        kept.add(
            {k: v[part] for k, v in embeddings.items()},
            {k: v[part] for k, v in distances.items()},
            target[part],
        )
    return kept


def integers(*shape: int, seed: int = 0) -> Tensor:
    """Integer coordinates, whose distances are exact in any formula."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 4, shape, generator=generator).float()


SEEN, UNSEEN = torch.tensor([2, 7]), torch.tensor([3, 9])
TARGET = torch.tensor([2, 7, 3, 9, 2, 2, 7, 3, 3, 9, 2])


def by_hand(distances: Tensor, query_class: Tensor, target: Tensor) -> dict[str, float]:
    """Class means, then group means, of the brute force."""
    per_class: dict[int, list[float]] = {}
    for row, query in zip(distances.tolist(), query_class.tolist(), strict=True):
        value = brute_force(row, [c == query for c in target.tolist()])
        per_class.setdefault(query, []).append(value)
    means = {c: sum(v) / len(v) for c, v in per_class.items()}
    seen, unseen = (sum(means[c] for c in g.tolist()) / len(g) for g in (SEEN, UNSEEN))
    return {"seen": seen, "unseen": unseen, "hm": 2 * seen * unseen / (seen + unseen)}


def test_scores_by_hand() -> None:
    audio, video = integers(11, 3), integers(11, 3, seed=1)
    distances = {m: integers(11, 4, seed=s) for s, m in enumerate(("audio", "video", "both"), 2)}
    got = gallery({"audio": audio, "video": video}, distances, TARGET).scores(SEEN, UNSEEN)
    classes = torch.cat([SEEN, UNSEEN])
    want = {f"text_{m}": by_hand(d.T, classes, TARGET) for m, d in distances.items()}
    want["audio_video"] = by_hand(torch.cdist(audio, video), TARGET, TARGET)
    want["video_audio"] = by_hand(torch.cdist(video, audio), TARGET, TARGET)
    flat = {f"mAP_{task}_{g}": v for task, groups in want.items() for g, v in groups.items()}
    assert got == pytest.approx(flat) and len(got) == 15


def test_only_what_the_outputs_allow() -> None:
    both = {"both": integers(11, 4)}
    equal = {"audio": integers(11, 3), "video": integers(11, 3)}

    def tasks(kept: Gallery, absent: tuple[str, ...] = ()) -> set[str]:
        found = kept.scores(SEEN, UNSEEN, absent)
        return {key.removeprefix("mAP_").rpartition("_")[0] for key in found}

    assert tasks(gallery({"theta": integers(11, 3)}, both, TARGET)) == {"text_both"}
    other = {"audio": integers(11, 3), "video": integers(11, 5)}
    assert tasks(gallery(other, both, TARGET)) == {"text_both"}
    assert tasks(gallery(equal, both, TARGET)) == {"text_both", "audio_video", "video_audio"}
    three = {m: integers(11, 4) for m in ("audio", "video", "both")}
    assert tasks(gallery(equal, three, TARGET), ("video",)) == {"text_both", "text_audio"}
    # Nothing else is computed from the audio embedding of such a system: it may overflow.
    broken = equal | {"audio": torch.full((11, 3), math.inf)}
    assert tasks(gallery(broken, both, TARGET)) == {"text_both"}
    only_seen = torch.where(torch.isin(TARGET, UNSEEN), 2, TARGET)
    assert tasks(gallery(equal, both, only_seen)) == set()


class Logits(Model):
    """A system with a fitted classifier: negative logits, and a second classifier for ZSL."""

    card: ClassVar[Card] = Card("Logits", "nobody", 2026, "here", "")
    Config: ClassVar[type[ModelConfig]] = ModelConfig

    def __init__(self, config: ModelConfig, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        self.map = nn.Linear(sum(shapes.features.values()), shapes.text)

    def loss(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        return {"nothing": self.map.weight.sum() * 0}

    def embed(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"joint": self.map(torch.cat([features["audio"], features["video"]], 1))}

    def embed_classes(self, text: Tensor) -> Tensor:
        return text

    def candidates(self, text: Tensor, seen: int, rows: object) -> Tensor:
        return torch.cat([text, -text[seen:]])

    def distances(
        self, samples: Mapping[str, Tensor], classes: Tensor, squared: bool
    ) -> dict[str, Tensor]:
        return {"both": -samples["joint"] @ classes.T}


def test_logits_and_a_second_classifier(benchmark: Benchmark) -> None:
    """Retrieval ranks by the first classifier; withheld modalities do not enter it."""
    torch.manual_seed(0)
    task = make_task(benchmark)
    data = StageData(benchmark, task, torch.device("cpu"))
    model = Logits(ModelConfig(), data.shapes).eval()
    rows = data.evaluation(benchmark, STAGE_1)
    kept = Gallery()
    nearest(model, data, rows, Protocol(), every=True, keep=kept)
    got = kept.scores(rows.seen_ids, rows.unseen_ids)
    features, target = next(rows.chunks(data.scaling))
    classes = torch.cat([rows.seen_ids, rows.unseen_ids])
    with torch.no_grad():
        scores = model.embed(features)["joint"] @ data.class_text[classes].T
    values = average_precision(-scores.T, classes, target)
    seen = values[: len(rows.seen_ids)].mean().item()
    unseen = values[len(rows.seen_ids) :].mean().item()
    assert got == pytest.approx(
        {
            "mAP_text_both_seen": seen,
            "mAP_text_both_unseen": unseen,
            "mAP_text_both_hm": 2 * seen * unseen / (seen + unseen),
        }
    )


def test_kept_with_val_and_test_results(benchmark: Benchmark, store: FeatureStore) -> None:
    """AVCA compares the video branch only, and has audio and video embeddings of one width."""
    folder = RunFolder(store.storage, make_task(benchmark, seed=2101))
    list(Trainer(folder.task, benchmark, folder).epochs())
    val, frozen = conclude_stage_1(folder, benchmark)
    stage_2 = RunFolder(store.storage, frozen.stage_2_task(2101))
    list(Trainer(stage_2.task, benchmark, stage_2).epochs())
    test = score_test(store, stage_2, frozen, "retrieval")
    keys = {
        f"mAP_{task}_{group}"
        for task in ("text_both", "audio_video", "video_audio")
        for group in ("seen", "unseen", "hm")
    }
    for result in (val, test):
        assert keys == {key for key in result.extra if key.startswith("mAP_")}
        assert all(0 < result.extra[key] <= 1 for key in keys)
        assert Result.from_dict(result.as_dict()) == result
    assert folder.load_result("val") == val


@pytest.mark.parametrize("kind", ["val", "test"])
def test_logged_without_crowding_the_charts(
    kind: str, store: FeatureStore, benchmark: Benchmark
) -> None:
    """MLflow gets the harmonic means of TEST as metrics, and every number as a file."""
    from avzero.track.files import result_files
    from avzero.track.payload import result_metrics

    extra = {"mAP_text_both_seen": 0.25, "mAP_text_both_hm": 0.125, "S_source_disjoint": 0.5}
    scores = {"both": {"S": 0.1, "U": 0.1, "HM": 0.1, "ZSL": 0.2, "beta": 1.0}}
    table: dict[str, Any] = {"class_id": [0], "recall": [0.1], "zsl": [None], "count": [3]}
    curve = {"beta": [0.0, 1.0], "S": [0.2, 0.1], "U": [0.0, 0.1]}
    result = Result("t", 1, kind, 0, scores, 0.1, {}, False, table, curve, 1, 1.0, "r", "", extra)
    metrics = result_metrics(result)
    assert metrics.get("S_source_disjoint") == (50 if kind == "test" else None)
    retrieval_metrics = {k: v for k, v in metrics.items() if "mAP" in k}
    assert retrieval_metrics == ({"retrieval/mAP_text_both_hm": 12.5} if kind == "test" else {})
    folder = RunFolder(store.storage, make_task(benchmark, "devise", seed=99))
    files = result_files(result, folder, benchmark.info, "t")
    assert b"mAP_text_both_seen,25.0" in files["retrieval.csv"]
