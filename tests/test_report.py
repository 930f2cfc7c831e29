"""Reports from records: what is read, kept, averaged, told apart, exported, and refused."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from avzero import report
from avzero.data.storage import LocalStorage, open_storage
from avzero.errors import UserError
from avzero.report import records as kept
from avzero.report.boards import boards, notices
from avzero.report.compare import comparison, find
from avzero.report.export import escaped, to_csv, to_latex
from avzero.report.records import Records, load
from avzero.report.rows import leaderboard, rows_of
from tests.conftest import Run
from tests.records import Sweep, put

UCF = {"ucf-main": ("UCF", "main"), "ucf-main:clip": ("UCF", "main")}
SIM = {"ucf-main-sim": ("UCF", "main"), "ucf-cls-sim": ("UCF", "cls")}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sweeps, one on what is called real data; do not change it."""
    store = tmp_path_factory.mktemp("records")
    search, test = {"trials": 6}, {"seeds": 3}
    Sweep(store, "sim", SIM, ["avca", "kda"], search=search, test=test).run().test()
    real = Sweep(store, "real", UCF, ["avca", "kda"], search=search, test=test, simulated=False)
    real.run().test()
    return store


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of ``made`` to change."""
    shutil.copytree(made, tmp_path / "store")
    yield tmp_path / "store"


def read(store: Path, *sweeps: str) -> Records:
    return load(LocalStorage(store), sweeps)


# -- records ------------------------------------------------------------------------------------


def test_records_become_tables_and_parquet(store: Path) -> None:
    records = read(store)
    assert (len(records.trials), len(records.results), records.problems) == (48, 24, ())
    for name in ("trials", "results"):
        files = [store / f"sweeps/{s}/records/{name}.parquet" for s in ("real", "sim")]
        assert sum(pq.read_table(f).num_rows for f in files) == len(getattr(records, name))
    first = records.trials.slice(0, 1).to_pylist()[0]
    line = json.loads((store / first["key"]).read_text())
    assert first["HM"] == 100 * line["val"]["HM"] and first["run"] == line["task"]
    assert json.loads(first["values"]) == line["values"]
    assert set(records.trials["text"].to_pylist()) == {"w2v", "clip"}
    result = records.results.slice(0, 1).to_pylist()[0]
    assert result["mlflow"] == f"{result['run']}-{result['frozen'][:16]}-test"
    assert len(result["recall"]) == 12 and len(result["curve_S"]) == 400


def test_parquet_is_never_believed_over_the_records(store: Path) -> None:
    before = read(store, "sim").trials
    place = store / "sweeps/sim/records/trials.parquet"
    good = place.read_bytes()
    trial = store / before["key"][0].as_py()
    line = json.loads(trial.read_text())
    put(store, before["key"][0].as_py(), line | {"seconds": 99.5})
    (store / before["key"][1].as_py()).unlink()
    after = read(store, "sim").trials
    assert len(after) == len(before) - 1 and after["seconds"][0].as_py() == 99.5
    # What a kill, another version or a careless copy leaves behind costs time only.
    for damage in (good, good[:-9], b"", b"no parquet"):
        place.write_bytes(damage)
        assert read(store, "sim").trials.equals(after)
        assert pq.read_table(place).equals(after)
    place.unlink()
    assert read(store, "sim").trials.equals(after)


def test_only_what_is_new_is_read(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read(store, "sim")
    asked: list[str] = []
    original = LocalStorage.read

    def count(self: LocalStorage, key: str) -> bytes:
        asked.append(key)
        return original(self, key)

    monkeypatch.setattr(LocalStorage, "read", count)
    trial = store / "sweeps/sim/trials/ucf-main-sim--avca/00000.json"
    shutil.copy(trial, trial.with_name("00006.json"))
    read(store, "sim")
    trials = [key for key in asked if "/trials/" in key]
    assert trials == ["sweeps/sim/trials/ucf-main-sim--avca/00006.json"]
    assert not [key for key in asked if "/final/" in key or key.startswith("runs/")]


def test_a_store_that_cannot_be_written_is_read(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: LocalStorage, key: str, data: bytes) -> None:
        raise PermissionError(key)

    monkeypatch.setattr(LocalStorage, "write", refuse)
    assert len(read(store).trials) == 48


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_marks_change_with_content(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    place = f"{request.getfixturevalue('s3')}/marks" if kind == "s3" else str(tmp_path / "objects")
    storage = open_storage(place)
    assert storage.marks("nothing/") == {}
    for key in ("a/bc/d", "a/b", "c"):
        storage.write(key, b"two")
    before = storage.marks("")
    assert list(before) == storage.keys("") == ["a/b", "a/bc/d", "c"]
    assert list(storage.marks("a/b")) == ["a/b", "a/bc/d"]
    storage.write("a/b", b"six")
    changed = {key for key, mark in storage.marks("").items() if before[key] != mark}
    assert changed == {"a/b"}, "as long as before"


def test_records_on_s3(s3: str, store: Path) -> None:
    local, remote = LocalStorage(store), open_storage(f"{s3}/report")
    for key in local.keys(""):
        if not key.endswith(".parquet"):
            remote.write(key, local.read(key))
    for _ in range(2):  # from the records, then from Parquet
        there = load(remote)
        assert there.trials.drop_columns(["mark"]).equals(load(local).trials.drop_columns(["mark"]))
        assert len(there.results) == 24 and there.problems == ()
    assert remote.size("sweeps/sim/records/trials.parquet")


@pytest.mark.parametrize("damage", ["{", "[]", '{"number": 1}', "null"])
def test_damaged_records_are_named_and_left_out(store: Path, damage: str) -> None:
    key = "sweeps/sim/trials/ucf-main-sim--avca/00000.json"
    (store / key).write_text(damage)
    records = read(store)
    assert len(records.trials) == 47
    assert any(key in line and "left out" in line for line in notices(records))
    (store / "sweeps/sim/job.json").write_text(damage)
    records = read(store)
    assert [s.name for s in records.sweeps] == ["real"]
    assert any("sweeps/sim/job.json" in line for line in notices(records))


def test_a_value_of_another_type_spoils_its_own_row_only(store: Path) -> None:
    key = "sweeps/sim/trials/ucf-main-sim--avca/00003.json"
    line = json.loads((store / key).read_text())
    put(store, key, line | {"epochs": "many"})
    records = read(store)
    assert len(records.trials) == 47 and key in " ".join(records.problems)


def test_notebook_functions(store: Path) -> None:
    place = str(store)
    assert report.trials(store=place).num_rows == 48
    table = report.results("real", store=place)
    assert table.num_rows == 12 and all(table["current"].to_pylist())
    assert report.recalls("real", store=place).num_rows == 12 * 12
    unseen = report.recalls("real", store=place).filter(
        report.recalls("real", store=place)["unseen"]
    )
    assert set(unseen["class"].to_pylist()) == {f"class {i:02d}" for i in range(8, 12)}
    assert set(report.published_results()["dataset"].to_pylist()) == {
        "UCF",
        "VGGSound",
        "ActivityNet",
    }
    with pytest.raises(UserError, match="no sweep 'x'; there is real, sim"):
        report.trials("x", store=place)


# -- what may be compared -----------------------------------------------------------------------


def test_means_are_over_seeds_of_one_winner_only(store: Path) -> None:
    row = next(r for r in leaderboard(LocalStorage(store), ["sim"]) if r.model == "avca")
    values = [r["HM"] for r in row.records]
    assert row.mean("HM") == pytest.approx(sum(values) / 3) and len(set(values)) == 3
    assert row.cost is not None and row.cost.measured and row.cost.shared
    costs = [r.cost for r in leaderboard(LocalStorage(store), ["sim"]) if r.cost]
    assert sum(c.search_core_hours for c in costs) == pytest.approx(0.5)
    # More trials change the winner: its predecessor's results leave the board, not the store.
    key = f"sweeps/sim/frozen/{row.group}.json"
    put(store, key, {"trial": "f" * 16, "digest": "e" * 64, "number": 5})
    records = read(store, "sim")
    assert len(rows_of(records)) == 3 and len(records.results) == 12
    told = " ".join(notices(records))
    assert "TEST has not been scored" in told and "an earlier winner" in told
    assert report.results("sim", store=str(store))["current"].to_pylist().count(False) == 3


def test_contents_protocols_and_sweeps_are_kept_apart(store: Path) -> None:
    test = {"test": {"seeds": 2}, "search": {"trials": 4}, "simulated": False}
    one = {"ucf-main": ("UCF", "main")}
    legacy = {"preset": "compat"}
    Sweep(store, "again", one, ["avca"], **test).run().test()
    Sweep(store, "legacy", one, ["avca"], **test, protocol=legacy).run().test()
    Sweep(store, "squared", one, ["avca"], **test, protocol={"distance": "squared_l2"}).run().test()
    rows = rows_of(read(store))
    real = next(b for b in boards(rows) if b.benchmark == "ucf-main")
    titles = [block.title for block in real.blocks]
    assert titles == [
        "text clip, preset paper",
        "text w2v, preset paper",
        "text w2v, preset paper, distance squared_l2",
        "text w2v, preset compat",
    ]
    assert [len(block.rows) for block in real.blocks] == [2, 3, 1, 1]
    assert set(real.blocks[1].names) == {"avca (real)", "avca (again)", "kda"}
    # Another content under the same name is another board, and said to be.
    for key in (store / "sweeps/again/final").rglob("*.json"):
        line = json.loads(key.read_text())
        key.write_text(json.dumps(line | {"digest": "0" * 64}))
    records = read(store)
    same = [b for b in boards(rows_of(records)) if b.benchmark == "ucf-main"]
    assert len(same) == 2
    assert any("ucf-main stands for 2 contents" in line for line in notices(records))


def test_unfinished_sweeps_are_named(store: Path) -> None:
    Sweep(store, "half", SIM, ["avca"], search={"trials": 6}).run(4)
    Sweep(store, "untested", SIM, ["avca"], search={"trials": 4}).run()
    Sweep(store, "one-seed", SIM, ["avca"], search={"trials": 4}, test={"seeds": 3}).run().test(1)
    Sweep(store, "empty", SIM, ["avca", "kda", "mft"])
    told = notices(read(store))
    assert [line for line in told if "half-finished, 4 of 6 trials" in line and "half" in line]
    assert [line for line in told if line.startswith("Sweep untested") and "avzero test" in line]
    assert [line for line in told if "TEST of 1 of 3 seeds is scored" in line]
    assert [line for line in told if "0 of 16 trials" in line and "and 2 more" in line]
    assert {row.sweep for row in leaderboard(LocalStorage(store), [])} == {
        "real",
        "sim",
        "one-seed",
    }


def test_published_rows_stand_beside_real_data_only(store: Path) -> None:
    tables = boards(rows_of(read(store)))
    real = next(b for b in tables if b.benchmark == "ucf-main")
    assert {p.row.dataset for p in real.published} == {"UCF"}
    assert {p.row.feature_set for p in real.published} == {"main"}
    assert not [b for b in tables if b.simulated and b.published]
    systems = {p.row.system for b in tables for p in b.published}
    assert len(systems) >= 15
    places = [(b.dataset, b.feature_set) for b in tables if b.published]
    assert len(places) == len(set(places)) == 9


# -- exports ------------------------------------------------------------------------------------


def test_csv(store: Path) -> None:
    text = to_csv(boards(rows_of(read(store))))
    rows = list(csv.DictReader(text.splitlines()))
    ours = [r for r in rows if r["kind"] == "ours"]
    assert len(ours) == 8 and {r["kind"] for r in rows} == {"ours", "published"}
    row = next(r for r in ours if r["benchmark"] == "ucf-main" and r["text"] == "w2v")
    first = next(r for r in leaderboard(LocalStorage(store), ["real"]) if r.text == "w2v")
    assert float(row["HM"]) == pytest.approx(first.mean("HM"), abs=1e-5)
    assert float(row["HM_std"]) == pytest.approx(first.std("HM"), abs=1e-5)
    assert row["seeds"] == "42 43 44" and len(row["runs"].split()) == 3
    wrong = [r for r in rows if r["verdict"] == "cannot be right"]
    assert {(r["system"], r["dataset"]) for r in wrong} >= {("KDA", "ActivityNet")}


def test_latex(store: Path) -> None:
    tables = boards(rows_of(read(store)))
    text = to_latex(tables)
    assert text.count(r"\begin{tabular}") == text.count(r"\end{table}") == len(tables)
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == len(tables)
    for line in text.splitlines():
        if line.endswith(r"\\") and r"\multicolumn" not in line:
            assert line.replace(r"\&", "").count("&") == 5, line
    assert "published, single runs" in text
    for board in tables:
        for block in board.blocks:
            marks = [block.mark(place, "HM") for place in range(len(block.rows))]
            assert marks[0] == ("best" if marks.count("") == len(marks) - 1 else "tied")
            cell = escaped(block.rows[0].cell("HM"))
            assert (f"\\textbf{{{cell}}}" in text) == (marks[0] == "best")
            assert (f"\\underline{{{cell}}}" in text) == (marks[0] == "tied")


def test_one_seed_is_never_marked(tmp_path: Path) -> None:
    Sweep(tmp_path, "one", SIM, ["avca", "kda"], search={"trials": 4}).run().test()
    tables = boards(rows_of(read(tmp_path)), ())
    assert {b.mark(i, "HM") for t in tables for b in t.blocks for i in range(2)} == {""}
    assert "textbf" not in to_latex(tables) and "underline{" not in to_latex(tables)


def test_latex_escapes_everything() -> None:
    assert escaped("a_b & 5 % of #1 {x} \\ ~ ^") == (
        r"a\_b \& 5 \% of \#1 \{x\} \textbackslash{} \textasciitilde{} \textasciicircum{}"
    )
    assert escaped("±\u0007\u4e2d") == r"$\pm$??"


# -- commands -----------------------------------------------------------------------------------


def test_report_command(avzero: Run, store: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("r.csv", "r.tex", "r.html")]
    options = [x for pair in zip(("--csv", "--latex", "--html"), files, strict=True) for x in pair]
    code, out, err = avzero("report", "--store", store, *options)
    assert code == 0, err
    assert "place" in out and "separated from" in out and "r.html: written" in out
    assert all(file.stat().st_size > 1000 for file in files)
    code, out, _ = avzero("report", "sim", "--store", store, "--json")
    data = json.loads(out)
    assert code == 0 and len(data["seeds"]) == 12 and data["unit"] == "percent"


def test_same_records_same_bytes(avzero: Run, store: Path, tmp_path: Path) -> None:
    pages = []
    for number in range(2):
        if number:  # tables made again, files touched: nothing of that is in the page
            shutil.rmtree(store / "sweeps/sim/records")
            for file in store.rglob("*.json"):
                os.utime(file, (1, 1))
        assert avzero("report", "--store", store, "--html", tmp_path / "r.html")[0] == 0
        pages.append((tmp_path / "r.html").read_bytes())
    assert pages[0] == pages[1]


def test_reports_refuse_in_one_line(avzero: Run, store: Path, tmp_path: Path) -> None:
    Sweep(tmp_path / "other", "half", SIM, ["avca"], search={"trials": 6}).run(4)
    for arguments, message in (
        (["report", "nope", "--store", store], "no sweep 'nope'; there is real, sim"),
        (["report", "--store", tmp_path / "none"], "no TEST results yet; run avzero sweep"),
        (["report", "--store", tmp_path / "other"], "4 of 6 trials have ended"),
        (["report", "--store", store, "--csv", tmp_path], "is a folder; name a file in it"),
        (["report", "--store", store, "--html", tmp_path / "a/b.html"], "there is no folder"),
        (["compare", "sim/avca", "--store", store], "name two runs or more"),
        (["compare", "sim/nix", "x", "--store", store], "no such run"),
        (["compare", "sim/avca", "x", "--store", store], "fits 2 runs"),
    ):
        code, _, err = avzero(*arguments)
        assert code == 2 and message in err and err.count("\n") == 1, err
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_page_of_an_unfinished_sweep(avzero: Run, tmp_path: Path) -> None:
    Sweep(tmp_path / "store", "half", SIM, ["avca"], search={"trials": 6}).run(4)
    page = tmp_path / "r.html"
    assert avzero("report", "--store", tmp_path / "store", "--html", page)[0] == 0
    assert "half-finished, 4 of 6 trials have ended" in page.read_text()


# -- compare ------------------------------------------------------------------------------------


def test_compare(avzero: Run, store: Path) -> None:
    code, out, err = avzero(
        "compare", "real/avca/ucf-main:w2v", "real/ucf-main--kda", "--store", store
    )
    assert code == 0, err
    for part in ("Settings that differ", "lr", "B - A", "recalls that differ most", "class 0"):
        assert part in out
    assert "has the highest" in out or "cannot be separated" in out
    run = rows_of(read(store, "sim"))[0].records[0]["run"]
    code, out, _ = avzero("compare", run[:10], "sim/ucf-cls-sim--avca/2", "--store", store)
    assert code == 0 and "scores of VAL beside scores of TEST" in out and "B - A" not in out


def test_sides_on_other_ground_have_no_difference(store: Path) -> None:
    storage, records = LocalStorage(store), read(store)
    sides = [find(storage, records, s) for s in ("sim/avca/ucf-main-sim", "sim/avca/ucf-cls-sim")]
    shown = [part for part in comparison(sides) if isinstance(part, str)]
    assert any("different benchmarks" in line for line in shown)
    sides = [find(storage, records, f"real/ucf-main{t}--avca") for t in ("", "+clip")]
    shown = [part for part in comparison(sides) if isinstance(part, str)]
    assert any("the protocols differ" in line for line in shown)


def test_schema_change_rebuilds(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read(store, "sim")
    newer = kept.TRIALS.with_metadata({"unit": "percent", "version": "2"})
    monkeypatch.setattr(kept, "TRIALS", newer)
    read(store, "sim")
    stored = pq.read_schema(store / "sweeps/sim/records/trials.parquet")
    assert stored.metadata[b"version"] == b"2"
