"""The parity board: its rule case by case, its records, and how it reads."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from avzero.canon import canonical
from avzero.data.store import FeatureStore
from avzero.errors import UserError
from avzero.models._registry import build
from avzero.report.parity import DEFAULT, Ours, board, compare, unmatched
from avzero.report.parity_records import ours_in
from avzero.report.parity_view import doubts_view, parity_view
from avzero.report.published import Reference, references
from avzero.spec import Protocol
from avzero.train.data import StageData
from avzero.tune.final import final_record
from avzero.tune.imported import Import
from tests.conftest import SMALL, Run, make_task

COMPAT = Protocol.model_validate({"preset": "compat"}).model_dump(mode="json")
PAPER = Protocol().model_dump(mode="json")


def ours(hm: list[float], **changes: Any) -> Ours:
    """Results of AVCA on UCF main, published with HM 27.15."""
    values: dict[str, Any] = {
        "model": "avca", "benchmark": "ucf-main", "dataset": "UCF", "feature_set": "main",
        "simulated": False, "protocol": COMPAT, "origin": "retrained", "sweep": "again",
        "seeds": tuple(range(42, 42 + len(hm))),
        "scores": {"HM": tuple(hm), "ZSL": tuple(hm)},
    }  # fmt: skip
    return Ours(**(values | changes))


def published(system: str, dataset: str, features: str, variant: str = "") -> Reference:
    wanted = (system, dataset, features, variant)
    (found,) = [
        ref
        for ref in references()
        if (ref.row.system, ref.row.dataset, ref.row.feature_set, ref.row.variant) == wanted
    ]
    return found


AVCA = published("AVCA", "UCF", "main")
ORIGIN: dict[str, Any] = {"origin": "checkpoint", "sweep": "AVCA.pt"}


@pytest.mark.parametrize(
    ("mine", "verdict", "reason"),
    [
        (ours([27.0, 26.5, 27.5]), "reproduced", r"differs by 0.15, within 2.71; .* ± 1.24"),
        (ours([25.0, 25.1, 25.2]), "reproduced", "differs by 2.05, within 2.71"),
        (ours([20.0, 20.5, 19.5]), "not reproduced", r"differs by 7.15: more than 2.71, .* ± 2.48"),
        (ours([34.0, 34.1, 34.2]), "not reproduced", "differs by 6.95"),
        (ours([24.0, 27.0, 30.0]), "undecided", r"our mean is known to ± 7.45"),
        (ours([20.0, 23.0, 26.0]), "undecided", r"4.15 \(tolerance 2.71\), .* run .*14.9"),
        (ours([27.2, 27.1]), "not comparable", "2 seeds, a verdict needs 3"),
        (ours([27.2], **ORIGIN), "reproduced", "differs by 0.05, within 0.2 points"),
        (ours([26.9], **ORIGIN), "not reproduced", "differs by 0.25, more than 0.2 points"),
        (ours([27.2], **ORIGIN, remarks=("a remark",)), "not comparable", "a remark"),
        (ours([27.0] * 3, simulated=True), "not comparable", "simulated data"),
        (ours([27.0] * 3, feature_set="cls"), "not comparable", "features cls, published on main"),
        (ours([27.0] * 3, protocol=PAPER), "not comparable", "preset paper, published compat; text "
         "alignment by_class, published legacy_sorted; stage2 lr replay"),
        (ours([27.0] * 3, protocol=COMPAT | {"text": "lsa"}), "not comparable", "text lsa, publi"),
        (ours([27.0] * 3, protocol=COMPAT | {"calibration": "scaled"}), "not comparable", "calibr"),
        (ours([27.0] * 3, protocol=COMPAT | {"max_steps": 60}), "reproduced", "within"),
        (ours([27.0] * 3, feature_set="main_temporal"), "reproduced", "within"),
        (ours([27.0], simulated=True), "not comparable", "simulated data; 1 seed, a verdict"),
        (ours([27.0] * 3, scores={"ZSL": (20.0,)}), "not comparable", "no HM on one of the sides"),
    ],
)  # fmt: skip
def test_rule(mine: Ours, verdict: str, reason: str) -> None:
    line = compare(AVCA, mine)
    assert line.verdict == verdict
    assert re.search(reason, line.reason), line.reason


def test_a_row_that_cannot_be_right_is_compared_with_nothing() -> None:
    kda = published("KDA", "ActivityNet", "cls")
    line = compare(kda, ours([16.1] * 3, model="kda", dataset="ActivityNet", feature_set="cls"))
    assert line.verdict == "not comparable"
    assert line.reason == (
        "published row cannot be right: HM 17.95 does not follow from S and U, which give 16.10"
    )


def test_differences() -> None:
    line = compare(AVCA, ours([27.0, 26.0, 28.0]))
    assert set(line.differences) == {"HM", "ZSL"}  # no S and U of ours
    hm = line.differences["HM"]
    assert hm.estimate == pytest.approx(-0.15) and hm.half == pytest.approx(4.97, abs=0.01)
    alone = compare(AVCA, ours([27.0], **ORIGIN)).differences["HM"]
    assert alone.low is None and alone.text == "the same weights: no interval over seeds"


@settings(deadline=None)
@given(st.lists(st.floats(0, 100), min_size=3, max_size=5))
def test_the_verdict_follows_from_the_intervals(hm: list[float]) -> None:
    line = compare(AVCA, ours(hm))
    interval, band = line.differences["HM"], DEFAULT.band(27.15)
    assert interval.low is not None and interval.high is not None
    if line.verdict == "not reproduced":  # 0 lies outside, and far outside the tolerance
        assert not interval.low <= 0 <= interval.high and abs(interval.estimate) > band
    if line.verdict == "reproduced":
        assert abs(interval.estimate) <= band
    backwards = compare(AVCA, ours(hm[::-1]))
    assert backwards.verdict == line.verdict


def test_every_published_result_has_a_line() -> None:
    assert [line.published for line in board([])] == references()
    reasons = {line.published.row.name: line.reason for line in board([])}
    assert reasons["MSTR"] == "not implemented here"
    assert reasons["MFT w/o KL loss"] == "an ablation, not run here"
    assert reasons["CJME"].startswith("no result on activitynet-")
    assert reasons["STFT"].endswith("ZSL 9.46 is below U 9.83, impossible for one model")


def test_who_stands_beside_whom() -> None:
    results = [
        ours([27.0] * 3),
        ours([27.2], **ORIGIN),
        ours([50.0] * 3, model="mft", feature_set="cls"),  # published on clipclap only
        ours([42.0] * 3, model="mft", feature_set="clipclap",
             protocol=COMPAT | {"text": "clipclap", "modality": "audio"}),
        ours([20.0] * 3, dataset="YT8M", benchmark="yt8m-main"),
        ours([30.0] * 3, protocol=COMPAT | {"modality": "video"}),
    ]  # fmt: skip
    lines = [line for line in board(results) if line.ours]
    said = [(line.published.row.name, line.published.row.benchmark, line.verdict) for line in lines]
    assert sorted(said) == [
        ("AVCA", "ucf-main", "reproduced"),
        ("AVCA", "ucf-main", "reproduced"),
        ("MFT", "ucf-clipclap", "not comparable"),
        ("MFT audio only", "ucf-clipclap", "not comparable"),
    ]
    avca = [line.ours for line in lines if line.published.row.system == "AVCA"]
    assert [one.origin for one in avca if one] == ["checkpoint", "retrained"]
    (audio,) = [line for line in lines if line.published.row.variant]
    assert audio.reason.startswith("published row cannot be right") and "text" not in audio.reason
    assert [one.benchmark for one in unmatched(results)] == ["ucf-main", "yt8m-main"]
    assert board(results[::-1]) == board(results)


# -- records ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imported(place: Path) -> Import:
    """A checkpoint of an untrained AVCA, scored on the tiny benchmark."""
    store = FeatureStore(str(place / "store"))
    benchmark, path = store.open("tiny"), place / "AVCA_untrained.pt"
    task = make_task(benchmark, "avca")
    model = build(task, StageData(benchmark, task, torch.device("cpu")).shapes)
    torch.save(model.state_dict(), path)
    run = Import(store, path, "avca", "tiny", values=SMALL["avca"])
    run.test(run.val()[1])
    return run


def test_store(place: Path, imported: Import) -> None:
    storage = imported.store.storage
    frozen = imported.val()[1]
    result = imported.test(frozen)[0]
    for seed in (44, 43):
        view: Any = SimpleNamespace(
            group=imported.group, frozen=frozen, task=frozen.stage_2_task(seed)
        )
        record = final_record(view, "w1", result)
        storage.write(f"sweeps/s/final/tiny--avca/w1/{seed}.json", canonical(record).encode())
        old = record | {"winner": "w0"}
        storage.write(f"sweeps/s/final/tiny--avca/w0/{seed}.json", canonical(old).encode())
    storage.write("sweeps/s/frozen/tiny--avca.json", b'{"trial":"w1"}')
    storage.write("sweeps/s/job.json", b"{}")
    (mine, again), problems = ours_in(storage)
    assert problems == []
    hm = 100 * result.scores["both"]["HM"]
    assert mine.origin == "checkpoint" and mine.sweep == "AVCA_untrained.pt"
    assert mine.scores["HM"] == (hm,) and mine.protocol == COMPAT and mine.runs == (result.task,)
    assert mine.remarks == (
        "beta from VAL scored with its own weights, which may have been trained on VAL",
    )
    assert (mine.dataset, mine.feature_set, mine.simulated) == ("TINY", "tiny", True)
    assert again.seeds == (43, 44) and again.scores["HM"] == (hm, hm) and again.sweep == "s"
    assert unmatched([mine, again]) == [mine, again]
    line = compare(AVCA, dataclasses.replace(again, dataset="UCF", feature_set="main"))
    assert line.reason.startswith("simulated data") and "2 seeds, a verdict" in line.reason
    # What is missing or damaged is named, and the rest still counts.
    storage.write("sweeps/s/final/tiny--avca/w1/45.json", b"{")
    storage.write("sweeps/s/final/tiny--avca/w1/46.json", b'{"winner":"w1"}')
    storage.delete(f"runs/{result.task}/checkpoint.json")
    rest, problems = ours_in(storage, ["s"])
    assert [one.seeds for one in rest] == [(43, 44)]
    assert problems == [
        f"runs/{result.task}/checkpoint.json: missing; left out",
        "sweeps/s/final/tiny--avca/w1/45.json: not a JSON object; left out",
        "a record of sweep s: lacks 'digest'; left out",
    ]
    with pytest.raises(UserError, match="no sweep 't'; there is s"):
        ours_in(storage, ["t"])


# -- how it reads -------------------------------------------------------------------------------


def shown(width: int, parts: list[Any]) -> str:
    console = Console(width=width, highlight=False, markup=False, color_system=None)
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    return capture.get()


@pytest.mark.parametrize("width", [80, 160])
def test_view(width: int) -> None:
    results = [ours([27.0, 26.5, 27.5]), ours([27.2], **ORIGIN), ours([20.0] * 3, simulated=True),
               ours([20.0], dataset="YT8M", benchmark="yt8m-main")]  # fmt: skip
    text = shown(width, parity_view(board(results), width, unmatched(results)))
    assert all(cell_len(line.rstrip()) <= width for line in text.splitlines())
    for part in (
        "27.00 ± 0.50",
        "reproduced (1)",
        "not comparable (2)",
        "(2) simulated data",
        "Nothing is published for avca on yt8m-main.",
        "published results there is",
    ):
        assert part in text, text  # fmt: skip
    assert ("checkpoint AVCA.pt" in text) == (width > 100)
    everything = shown(width, parity_view(board(results), width, everything=True))
    assert "not run" in everything and "Perceiver" in everything
    assert "Nothing here to compare." in shown(width, parity_view(board([]), width))


@pytest.mark.parametrize("width", [80, 160])
def test_doubts(width: int) -> None:
    text = shown(width, doubts_view(width))
    assert "5 of 153 published rows cannot be right as printed" in text
    assert "  cls: TCAF, AVFS, KDA, STFT" in text
    assert ("75.88" in text) == (width > 100)
    assert all(cell_len(line.rstrip()) <= width for line in text.splitlines())


def test_command(place: Path, imported: Import, avzero: Run) -> None:
    store = place / "store"
    code, out, err = avzero("report", "--parity", "--store", store)
    assert code == 0 and not err
    assert "further published results" in out and "cannot be right as printed" in out
    code, out, err = avzero("report", "--parity", "--json", "--store", store)
    assert code == 2 and err.count("\n") == 1 and "--parity prints to the terminal alone" in err
    code, out, err = avzero("report", "nowhere", "--parity", "--store", store)
    assert code == 2 and err.count("\n") == 1 and "no sweep 'nowhere'" in err
