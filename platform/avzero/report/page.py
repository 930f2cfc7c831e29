"""The report as one page: everything is in it, it asks for nothing, same records give same bytes.

``page.html.j2`` holds the words, ``page.css`` and ``page.js`` the rest; both are put into the page.
Leaderboards, charts and details are plain HTML and SVG, so they are there without a script; the
script filters, sorts, draws recalls per class, and lists the trials, whose data it finds as JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from typing import Any

from avzero.canon import ID_LENGTH
from avzero.report.boards import Block, Board
from avzero.report.charts import Chart, Line, best_of_k, seen_unseen
from avzero.report.mlflow_links import Links
from avzero.report.parity import DEFAULT, Parity
from avzero.report.parity_view import signed
from avzero.report.published import SCORES, Reference, judged_rows, mixed_sources
from avzero.report.records import Records, class_names
from avzero.report.rows import Row
from avzero.report.standing import ranking_lines
from avzero.report.statistics import (
    Interval,
    Ranking,
    Recalls,
    over_classes,
    over_datasets,
    over_seeds,
)
from avzero.report.trials_data import trials_data
from avzero.report.units import duration

_STYLES = 16
"""Line styles the page has; further systems share them."""
_BAR = 96
"""Width of the small chart of HM per seed, in pixels."""


@dataclass(frozen=True)
class Cell:
    """A score in the leaderboard."""

    name: str
    value: float | None
    mean: str = ""
    std: str = ""
    best: str = ""
    """``best``: told apart from all others; ``tied``: it is not told apart from the best."""


@dataclass(frozen=True)
class RowView:
    """A row of the leaderboard as the template needs it."""

    row: Row
    id: str
    style: int
    place: str
    cells: tuple[Cell, ...]
    cost: str
    cost_value: float
    dots: tuple[float, ...]
    mean_dot: float
    intervals: tuple[Interval, ...]
    detail: Mapping[str, Any]


@dataclass(frozen=True)
class BlockView:
    """Rows that may be ranked, with their charts."""

    block: Block
    rows: tuple[RowView, ...]
    sentence: str
    charts: tuple[Chart, ...]


@dataclass(frozen=True)
class PublishedView:
    """A published row."""

    reference: Reference
    cells: tuple[Cell, ...]
    dot: float | None
    remarks: tuple[str, ...]
    wrong: bool


@dataclass(frozen=True)
class BoardView:
    """One benchmark."""

    board: Board
    blocks: tuple[BlockView, ...]
    published: tuple[PublishedView, ...]


@dataclass(frozen=True)
class RankingView:
    """Average ranks over benchmarks."""

    title: str
    rows: tuple[tuple[str, str], ...]
    datasets: tuple[str, ...]
    notes: tuple[str, ...]


def page(
    records: Records,
    tables: Sequence[Board],
    told: Sequence[str],
    parity: Sequence[Parity],
    links: Links,
) -> str:
    """Return the page.

    Args:
        records: where the trials come from.
        tables: the leaderboards.
        told: what a reader must know.
        parity: lines of the parity board.
        links: where MLflow is, if a server was named.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    maker = _Maker(records, tables, links)
    views = [maker.board(board) for board in tables]
    environment = Environment(
        loader=PackageLoader("avzero.report", ""),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("page.html.j2").render(
        boards=views,
        parity=[_parity(line) for line in parity if line.ours is not None],
        parity_left=sum(line.ours is None for line in parity),
        rule=DEFAULT.text,
        doubts=_doubts(),
        mixed=mixed_sources(),
        rankings=list(_rankings(tables)),
        notices=told,
        summary=_summary(records, tables),
        filters=_filters(views),
        data=_json(maker.data()),
        style=_file("page.css"),
        script=_file("page.js"),
        short=ID_LENGTH,
    )
    return re.sub(r"\n\s*\n+", "\n", text)


class _Maker:
    """Makes views of boards; knows what all of them share."""

    def __init__(self, records: Records, tables: Sequence[Board], links: Links) -> None:
        self._records = records
        self._links = links
        models = {row.model for board in tables for row in board.rows}
        self._styles = {model: i % _STYLES for i, model in enumerate(sorted(models))}
        self._recalls: dict[str, list[Any]] = {}
        self._classes: dict[str, list[Any]] = {}

    def data(self) -> dict[str, Any]:
        """Return what the script needs."""
        return {
            "trials": trials_data(self._records),
            "classes": self._classes,
            "recalls": self._recalls,
        }

    def board(self, board: Board) -> BoardView:
        """Return a benchmark's view."""
        ours = [value for row in board.rows for value in row.scores["HM"]]
        theirs = [p.row.scores["HM"] or 0.0 for p in board.published]
        scale = max([*ours, *theirs, 1.0])
        return BoardView(
            board,
            tuple(self._block(block, scale) for block in board.blocks),
            tuple(_published(reference, scale) for reference in board.published),
        )

    def _block(self, block: Block, scale: float) -> BlockView:
        rows = tuple(self._row(block, place, scale) for place in range(len(block.rows)))
        charts = [seen_unseen(lines) for lines in [list(_curves(rows))] if lines]
        charts += [best_of_k(lines) for lines in [list(_progress(rows))] if lines]
        sentence = block.standing("HM").sentence
        return BlockView(block, rows, sentence, tuple(charts))

    def _row(self, block: Block, at: int, scale: float) -> RowView:
        row = block.rows[at]
        id_ = re.sub(r"\s", "_", f"{row.sweep}/{row.group}")
        cells = [
            Cell(score, row.mean(score), *_parts(row, score), block.mark(at, score))
            for score in SCORES
        ]
        cost, value = _cost(row)
        self._keep_recalls(id_, row)

        return RowView(
            row,
            id_,
            self._styles[row.model],
            block.standing("HM").place(block.names[at]).replace("-", "\u2013"),
            (*cells, Cell("AUSUC", row.mean("AUSUC"), *_parts(row, "AUSUC"))),
            cost,
            value,
            tuple(round(_BAR * v / scale, 1) for v in row.scores["HM"]),
            round(_BAR * row.mean("HM") / scale, 1),
            _intervals(row),
            self._detail(row),
        )

    def _detail(self, row: Row) -> dict[str, Any]:
        """Return what a row's panel says."""
        first = row.records[0]
        config = json.loads(first["config"])
        searched = {t["run"]: json.loads(t["values"]) for t in row.trials}.get(first["winner"], {})
        return {
            "seeds": [
                {
                    "record": record,
                    "run": self._links.run(row.benchmark, record["mlflow"]),
                    "took": _took(record["seconds"]),
                }
                for record in row.records
            ],
            "sweep": self._links.sweep(row.benchmark, row.sweep, row.group),
            "config": sorted((k, _value(v), k in searched) for k, v in config.items()),
            "protocol": sorted((k, _value(v)) for k, v in row.protocol.items() if v is not None),
            "states": _states(row),
            "alone": [
                (name, first[f"{name}_HM"], first[f"{name}_ZSL"])
                for name in ("audio", "video")
                if first[f"{name}_HM"] is not None
            ],
        }

    def _keep_recalls(self, id_: str, row: Row) -> None:
        """Keep the mean recall of every class over seeds, in tenths of a percent."""
        recorded = [record for record in row.records if record["recall"]]
        if not recorded:
            return
        first = recorded[0]
        names = class_names(self._records, row.digest)
        key = row.digest[:ID_LENGTH]
        self._classes.setdefault(
            key,
            [
                [names.get(i, f"class {i}"), int(z is not None), n]
                for i, z, n in zip(first["class_id"], first["zsl"], first["count"], strict=True)
            ],
        )
        columns = zip(*(record["recall"] for record in recorded), strict=True)
        means = [round(10 * sum(v or 0.0 for v in values) / len(values)) for values in columns]
        self._recalls[id_] = [key, means]


def _parts(row: Row, score: str) -> tuple[str, str]:
    """Return mean and deviation as text."""
    std = f"{row.std(score):.2f}" if len(row.seeds) > 1 else ""
    return f"{row.mean(score):.2f}", std


def _cost(row: Row) -> tuple[str, float]:
    """Return core- or GPU-hours of search and stage 2 together, as text and as a number."""
    if row.cost is None:
        return "", 0.0
    cost = row.cost
    hours, unit = cost.search_gpu_hours + cost.final_gpu_hours, "GPU"
    if not hours:
        hours, unit = cost.search_core_hours + cost.final_core_hours, "core"
    return (f"{hours:.2f} {unit}-h" if hours >= 0.1 else f"{60 * hours:.2f} {unit}-min"), hours


def _took(seconds: float) -> str:
    """Return a time that may be short."""
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)


def _intervals(row: Row) -> tuple[Interval, ...]:
    """Return the intervals of HM over classes (where recalls were kept) and over seeds."""
    found = [over_seeds(row.scores["HM"])]
    if all(record["recall"] for record in row.records):
        tables = {
            record["seed"]: {
                "class_id": record["class_id"],
                "recall": [None if v is None else v / 100 for v in record["recall"]],
                "zsl": [None if v is None else v / 100 for v in record["zsl"]],
            }
            for record in row.records
        }
        with suppress(ValueError):  # seeds were scored on different classes
            found.insert(0, over_classes(Recalls.of(tables)))
    return tuple(interval for interval in found if interval.low is not None)


def _states(row: Row) -> str:
    """Return how the trials of a row's search ended."""
    counts: dict[str, int] = {}
    for trial in row.trials:
        counts[trial["state"]] = counts.get(trial["state"], 0) + 1
    return ", ".join(f"{n} {state}" for state, n in sorted(counts.items()))


def _curves(rows: Sequence[RowView]) -> Iterator[Line]:
    """Yield the seen-unseen curve of every row's first seed, the chosen beta marked."""
    for view in rows:
        first = view.row.records[0]
        if first["curve_S"]:
            points = list(zip(first["curve_S"], first["curve_U"], strict=True))
            yield Line(
                view.id,
                view.row.model,
                view.style,
                points,
                (first["S"], first["U"]),
                f"{view.row.model}, seed {first['seed']}: beta {first['beta']:.3g}, "
                f"S {first['S']:.2f}, U {first['U']:.2f}, HM {first['HM']:.2f}",
            )


def _progress(rows: Sequence[RowView]) -> Iterator[Line]:
    """Yield the best VAL HM after every trial of a row's search."""
    for view in rows:
        points, best = [], None
        for count, trial in enumerate(view.row.trials, start=1):
            if trial["HM"] is not None:
                best = trial["HM"] if best is None else max(best, trial["HM"])
            if best is not None:
                points.append((float(count), best))
        if points:
            yield Line(view.id, view.row.model, view.style, points)


def _published(reference: Reference, scale: float) -> PublishedView:
    """Return a published row's view."""
    row, judged = reference.row, reference.judged
    scores = row.scores
    cells = [Cell(s, v, "" if v is None else f"{v:.2f}") for s, v in scores.items()]
    hm = scores["HM"]
    kinds = ("hm", "zsl", "mixed", "contradicted", "unverified", "saturated")
    remarks = tuple(f.text for f in judged.findings if f.kind in kinds)
    order = {score: i for i, score in enumerate(SCORES)}
    return PublishedView(
        reference,
        tuple(sorted(cells, key=lambda cell: order[cell.name])),
        None if hm is None else round(_BAR * hm / scale, 1),
        remarks,
        judged.verdict == "cannot be right",
    )


def _parity(line: Parity) -> dict[str, Any]:
    """Return a line of the parity board."""
    row, ours = line.published.row, line.ours
    assert ours is not None  # noqa: S101 - the caller has left the others out
    scores = [
        (
            score,
            row.scores[score],
            ours.cell(score) if score in ours.scores else "",
            signed(line.differences[score]) if score in line.differences else "",
        )
        for score in ("HM", "ZSL")
    ]
    return {"line": line, "row": row, "ours": ours, "scores": scores}


def _doubts() -> list[dict[str, Any]]:
    """Return published rows that cannot be right."""
    return [
        {"row": one.row, "why": one.text("hm", "zsl")}
        for one in judged_rows()
        if one.verdict == "cannot be right"
    ]


def _rankings(tables: Sequence[Board]) -> Iterator[RankingView]:
    """Yield average ranks over the benchmarks of one kind of data and one protocol."""
    grounds: dict[tuple[bool, str], dict[str, dict[str, Row]]] = {}
    for board in tables:
        for block in board.blocks:
            protocol = json.dumps({**block.rows[0].protocol, "text": ""}, sort_keys=True)
            rows = grounds.setdefault((board.simulated, protocol), {})
            for row in block.rows:
                # Of two sweeps of one system on one ground the one better on VAL stands.
                place = rows.setdefault(row.model, {})
                key = f"{board.title}, text {block.text}"
                if key not in place or row.val_hm > place[key].val_hm:
                    place[key] = row
    for (simulated, _), rows in sorted(grounds.items()):
        scores = {
            model: {key: row.mean("HM") for key, row in place.items()}
            for model, place in rows.items()
        }
        if len(scores) > 1 and len({key for place in scores.values() for key in place}) > 1:
            ranking = over_datasets(scores)
            yield RankingView(
                "Simulated data" if simulated else "Real data",
                tuple((s, f"{ranking.average_rank[s]:.2f}") for s in ranking.systems),
                ranking.datasets,
                _about(ranking),
            )


def _about(ranking: Ranking) -> tuple[str, ...]:
    """Return what a ranking says beside its table, which is the first of its sentences."""
    lines = ranking_lines(ranking)[1:]
    if len({name.partition(", text ")[0] for name in ranking.datasets}) < len(ranking.datasets):
        lines.append("Text sets of one benchmark share its samples: they are no independent tests.")
    return tuple(lines)


def _summary(records: Records, tables: Sequence[Board]) -> dict[str, Any]:
    """Return the numbers of the page's head; its only time is that of the newest record."""
    rows = [row for board in tables for row in board.rows]
    times = [line["time"] for lines in records.openings.values() for line in lines]
    newest = max(times, default="")
    return {
        "sweeps": len(records.sweeps),
        "rows": len(rows),
        "seeds": sum(len(row.seeds) for row in rows),
        "trials": len(records.trials),
        "published": sum(len(board.published) for board in tables),
        "as_of": newest.replace("T", " ").replace("+00:00", " UTC"),
        "names": [sweep.name for sweep in records.sweeps],
    }


def _filters(views: Sequence[BoardView]) -> dict[str, list[str]]:
    """Return the values each filter offers."""
    rows = [row.row for view in views for block in view.blocks for row in block.rows]
    return {
        "dataset": sorted({view.board.dataset for view in views}),
        "features": sorted({view.board.feature_set for view in views}),
        "model": sorted(
            {row.model for row in rows}
            | {
                p.reference.row.model
                for view in views
                for p in view.published
                if p.reference.row.model
            }
        ),
        "preset": sorted({row.preset for row in rows}),
        "text": sorted({row.text for row in rows}),
    }


def _value(value: Any) -> str:
    """Return a setting as people write it."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def _json(data: Any) -> str:
    """Return JSON that may stand in a page: nothing in it can end the script element."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _file(name: str) -> str:
    return resources.files("avzero.report").joinpath(name).read_text(encoding="utf-8")
