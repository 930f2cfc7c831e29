"""Published rows: all of them, sourced, and what their arithmetic says about them."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avzero.errors import UserError
from avzero.models._registry import model_class, model_files
from avzero.report.published import (
    SCORES,
    Published,
    agree,
    hm_range,
    judge,
    judged_rows,
    mixed_sources,
    published_for,
    published_rows,
    read_rows,
    references,
)

MFT = "MFT table 2"
FIFTEEN = {
    "main": ["DeViSE", "ALE", "SJE", "f-VAEGAN-D2", "APN"],
    "cls": ["TCAF", "AVFS", "KDA", "STFT"],
    "clipclap": ["CJME", "AVGZSLNet", "AVCA", "Hyper-multiple", "ClipClap-GZSL", "MFT"],
}
"""The systems of the published table, by the features their numbers belong to."""
percents = st.integers(0, 10_000).map(lambda cents: cents / 100)


def row(
    seen: float | None, unseen: float | None, hm: float, zsl: float | None, **changes: object
) -> Published:
    """A row that nobody published."""
    values: dict[str, object] = {
        "system": "X", "model": "", "variant": "", "venue": "", "year": None, "dataset": "UCF",
        "feature_set": "cls", "claimed": "cls", "source": "here", "two_classifiers": False,
        "verified": True, "flags": "", "note": "",
        "scores": dict(zip(SCORES, (seen, unseen, hm, zsl), strict=True)),
    }  # fmt: skip
    return Published(**(values | changes))  # type: ignore[arg-type]


def kinds(published: Published, *others: Published) -> list[str]:
    return [finding.kind for finding in judge(published, others)]


def test_all_rows_are_the_measured_ones(shared: Path) -> None:
    facts = json.loads((shared / "specs/published_results.json").read_text())["results"]
    names = ("system", "dataset", "feature_set", "verified", "year")
    assert len(published_rows()) == len(facts) == 153
    for ours, fact in zip(published_rows(), facts, strict=True):
        assert [getattr(ours, name) for name in names] == [fact[name] for name in names]
        assert ours.variant == (fact["variant"] or "") and ours.venue in (fact["venue"] or "")
        assert ours.claimed == fact["feature_set_claimed"]
        assert dict(ours.scores) == {name: fact[name] for name in SCORES}
        assert fact["source"].startswith(ours.source.partition(" (")[0].partition(",")[0])
        assert bool(ours.flags) == bool(fact["flags"]) and bool(ours.note) == bool(fact["note"])


def test_every_row_is_sourced() -> None:
    assert len(published_rows()) == 153
    assert all(one.source and one.dataset and one.scores["HM"] for one in published_rows())
    assert Counter(one.verified for one in published_rows()) == {True: 144, False: 9}


def test_the_fifteen_systems_with_their_features_told_apart() -> None:
    table = [one for one in published_rows() if one.source == MFT]
    assert mixed_sources() == {MFT: FIFTEEN}
    assert len(table) == 45 and len({one.model for one in table}) == 15
    assert {one.model for one in table} == set(model_files())
    for features, systems in FIFTEEN.items():
        for system in systems:
            rows = [one for one in table if one.system == system]
            assert {one.dataset for one in rows} == {"UCF", "VGGSound", "ActivityNet"}
            assert {one.feature_set for one in rows} == {features}
            assert all(one.verified and None not in one.scores.values() for one in rows)
    # Those printed under other features than theirs say so, with the table that shows it.
    moved = [one for one in judged_rows() if one.row.mixed]
    assert [one.row.system for one in moved] == [s for s in FIFTEEN["main"] for _ in range(3)]
    for one in moved:
        assert "yet its numbers are those of main in AVCA-GZSL README" in one.text("mixed")
    # And a leaderboard of one benchmark never sees the others.
    assert {one.row.feature_set for one in published_for("ucf", "cls_temporal")} == {"cls"}


def test_systems_are_found_by_the_titles_of_their_cards() -> None:
    titles = {model_class(name).card.title.casefold(): name for name in model_files()}
    for one in published_rows():
        assert one.model == titles.get(one.system.casefold(), "")
    named = {one.system for one in published_rows() if not one.model}
    assert named == {"Attention fusion", "Perceiver", "MSTR"}


def test_rows_that_cannot_be_right() -> None:
    wrong = {
        (one.row.name, one.row.dataset): one.text("hm", "zsl")
        for one in judged_rows()
        if one.verdict == "cannot be right"
    }
    assert wrong == {
        ("KDA", "UCF"): "HM 54.84 does not follow from S and U, which give 54.87",
        ("KDA", "ActivityNet"): "HM 17.95 does not follow from S and U, which give 16.10",
        ("MFT audio only", "UCF"): "HM 42.25 does not follow from S and U, which give 42.17",
        ("STFT", "VGGSound"): "ZSL 8.79 is below U 8.83, impossible for one model",
        ("STFT", "ActivityNet"): "ZSL 9.46 is below U 9.83, impossible for one model",
    }
    # The arithmetic finds what readers of the sources noticed, and nothing else.
    flagged = [bool(one.row.flags) for one in judged_rows()]
    assert flagged == [one.verdict == "cannot be right" for one in judged_rows()]
    verdicts = Counter(one.verdict for one in judged_rows())
    assert verdicts == {"not checkable": 84, "holds": 64, "cannot be right": 5}


def test_a_result_printed_by_several_sources_is_one_reference() -> None:
    refs = references()
    assert sum(len(ref.sources) for ref in refs) == 153
    about = [(r.row.system, r.row.variant, r.row.dataset, r.row.feature_set) for r in refs]
    assert len(set(about)) == len(refs)  # no two sources contradict each other
    (avca,) = [r for r in refs if about[refs.index(r)] == ("AVCA", "", "UCF", "main")]
    assert avca.sources == ("AVCA paper, from memory", "AVCA-GZSL README (main)")
    assert avca.judged.text("unverified") == "S and U are quoted from memory"


@settings(deadline=None)
@given(percents, percents)
def test_hm_of_any_numbers_that_round_to_the_printed_ones_is_accepted(
    seen: float, unseen: float
) -> None:
    low, high = hm_range(seen, unseen)
    assert 0 <= low <= high <= 100
    middle = (low + high) / 2
    assert "hm" not in kinds(row(seen, unseen, round(float(middle), 2), None))
    # One hundredth beyond what rounding can hide is refused, on both sides.
    above = Fraction(int((high + Fraction(1, 200)) * 100) + 1, 100)
    assert "hm" in kinds(row(seen, unseen, float(above), None))


@pytest.mark.parametrize(
    ("published", "expected"),
    [
        (row(50.0, 50.0, 50.0, 50.0), ["saturated"]),
        (row(50.0, 50.0, 50.01, 50.0), ["saturated"]),  # 50.0049 and 50.005: the edge
        (row(50.0, 50.0, 50.02, 50.0), ["hm", "saturated"]),
        (row(60.0, 30.0, 40.0, 29.99), []),  # 29.995 and 29.995
        (row(60.0, 30.0, 40.0, 29.98), ["zsl"]),
        (row(60.0, 30.0, 40.0, 10.0, two_classifiers=True), []),
        (row(60.0, 30.0, 40.0, None), []),
        (row(None, None, 66.67, 50.0), []),  # S = 100, U = ZSL
        (row(None, None, 66.70, 50.0), ["hm"]),
        (row(0.0, 0.0, 0.0, 0.0), ["saturated"]),
        (row(None, None, 40.0, None, verified=False), ["unverified"]),
    ],
)
def test_arithmetic(published: Published, expected: list[str]) -> None:
    assert kinds(published) == expected


def test_other_sources() -> None:
    mine = row(60.0, 30.0, 40.0, 35.0)
    assert kinds(mine, row(None, None, 40.0, 35.0, source="there")) == ["repeated"]
    assert kinds(mine, row(None, None, 41.0, 35.0, source="there")) == ["contradicted"]
    assert kinds(mine, row(None, None, 41.0, 35.0, source="there", dataset="VGGSound")) == []
    assert agree(mine, row(None, None, 40.0, None)) and not agree(mine, row(60.1, None, 40.0, None))
    moved = row(60.0, 30.0, 40.0, 35.0, claimed="main", note="our note")
    (finding,) = judge(moved, [mine])
    assert finding.text == "printed under main; cls is our attribution: our note"
    twin = row(60.0, 30.0, 40.0, 35.0, source="there")
    assert "yet its numbers are those of cls in there" in judge(moved, [twin])[0].text


def test_a_damaged_file_names_its_line() -> None:
    head = "system,model,variant,venue,year,dataset,feature_set,claimed,S,U,HM,ZSL,source,"
    head += "two_classifiers,verified,flags,note\n"
    good = "X,x,,V,2020,UCF,cls,cls,1.00,2.00,1.33,2.00,here,no,yes,,\n"
    assert read_rows(head + good)[0].scores["HM"] == 1.33
    for bad in (good.replace("1.33", "1.3"), good.replace("no,yes", "no,?"), "X,x\n"):
        with pytest.raises(UserError, match=r"published.csv, line 3: "):
            read_rows(head + good + bad)
