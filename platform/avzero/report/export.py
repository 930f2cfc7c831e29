"""Leaderboards as CSV, LaTeX and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from avzero.canon import ID_LENGTH
from avzero.report.boards import Block, Board
from avzero.report.published import Reference
from avzero.report.records import SCORES
from avzero.report.rows import DISJOINT, Row

_SHOWN = (*SCORES, "AUSUC")
COLUMNS = (
    *("kind", "dataset", "feature_set", "benchmark", "digest", "simulated", "system", "variant"),
    *("text", "preset", "departures", "sweep", "seeds", "place"),
    *(f"{name}{end}" for name in (*_SHOWN, DISJOINT.replace(" ", "_")) for end in ("", "_std")),
    *("beta", "VAL_HM", "trials", "search_core_hours", "search_gpu_hours"),
    *("test_core_hours", "test_gpu_hours", "parameters", "revision", "runs", "source", "verdict"),
    "remarks",
)
"""Of the CSV. ``kind`` is ``ours`` or ``published``; scores are percent, means over ``seeds``;
``place`` holds within benchmark, digest, text, preset and departures."""


def table_rows(boards: Sequence[Board]) -> Iterator[dict[str, Any]]:
    """Yield the CSV's rows as dictionaries; numbers are numbers, None where there is none."""
    for board in boards:
        for block in board.blocks:
            places = block.standing("HM")
            for name, row in zip(block.names, block.rows, strict=True):
                yield _ours(row, places.place(name))
        for reference in board.published:
            yield _published(reference)


def _ours(row: Row, place: str) -> dict[str, Any]:
    """Return a row of ours."""
    first, cost = row.records[0], row.cost
    cells: dict[str, Any] = {
        "kind": "ours",
        **{k: getattr(row, k) for k in ("dataset", "feature_set", "benchmark", "digest")},
        **{k: getattr(row, k) for k in ("simulated", "text", "preset", "sweep", "beta")},
        "system": row.model,
        "departures": "; ".join(row.departures),
        "seeds": " ".join(map(str, row.seeds)),
        "place": place,
        "VAL_HM": row.val_hm,
        "trials": len(row.trials),
        "parameters": first["parameters"],
        "revision": " ".join(sorted({record["revision"] for record in row.records})),
        "runs": " ".join(record["run"] for record in row.records),
    }
    if cost:
        cells["search_core_hours"], cells["search_gpu_hours"] = (
            cost.search_core_hours,
            cost.search_gpu_hours,
        )
        cells["test_core_hours"], cells["test_gpu_hours"] = (
            cost.final_core_hours,
            cost.final_gpu_hours,
        )
    for name in (*_SHOWN, DISJOINT):
        if name in row.scores:
            key = name.replace(" ", "_")
            cells[key], cells[f"{key}_std"] = row.mean(name), row.std(name)
    return {name: _plain(cells.get(name)) for name in COLUMNS}


def _published(reference: Reference) -> dict[str, Any]:
    """Return a published row."""
    row, judged = reference.row, reference.judged
    cells = {
        "kind": "published",
        **{k: getattr(row, k) for k in ("dataset", "feature_set", "system", "variant")},
        **row.scores,
        "source": "; ".join(reference.sources),
        "verdict": judged.verdict,
        "remarks": judged.text(),
    }
    return {name: _plain(cells.get(name)) for name in COLUMNS}


def _plain(value: Any) -> Any:
    """Return a number as JSON and CSV can carry it: the spread of a single seed is none."""
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


def to_csv(boards: Sequence[Board]) -> str:
    """Return boards as one CSV, ours and published apart by the column ``kind``."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table_rows(boards))
    return out.getvalue()


def to_json(boards: Sequence[Board], notices: Sequence[str]) -> str:
    """Return boards with every seed's scores, and the notices."""
    data = {
        "unit": "percent",
        "rows": list(table_rows(boards)),
        "seeds": [
            _seed(record) for board in boards for row in board.rows for record in row.records
        ],
        "notices": list(notices),
    }
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)


def _seed(record: dict[str, Any]) -> dict[str, Any]:
    """Return one seed's result without its lists."""
    left_out = ("protocol", "config", "extra", "key", "mark")
    return {
        key: _plain(value)
        for key, value in record.items()
        if not isinstance(value, list) and key not in left_out
    } | {key: json.loads(record[key]) for key in left_out[:3]}


# -- LaTeX --------------------------------------------------------------------------------------

_SPECIAL = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "…": r"\dots{}",
    "\u2013": "--",
    "β": r"$\beta$",
    "†": r"$\dagger$",
}


def escaped(text: str) -> str:
    """Return text that LaTeX prints as it is; characters fonts lack become question marks."""
    out = "".join(_SPECIAL.get(c, c) for c in text)
    return re.sub(r"[^\x20-\x7e\u00a1-\u017f]", "?", out)


def to_latex(boards: Sequence[Board]) -> str:
    """Return a booktabs table per board; needs ``\\usepackage{booktabs}``.

    The best mean of a block is bold where it is told apart from all others; where it is not, it
    and all that cannot be told apart from it are underlined. Published rows stand below a rule.
    """
    parts = ["% avzero report --latex; needs \\usepackage{booktabs}"]
    parts += [_table(board) for board in boards]
    return "\n\n".join(parts) + "\n"


def _table(board: Board) -> str:
    """Return one board."""
    lines = [
        r"\begin{table}",
        r"\centering",
        f"\\caption{{{_caption(board)}}}",
        f"\\label{{tab:{re.sub(r'[^A-Za-z0-9-]', '-', board.anchor)}}}",
        r"\footnotesize",
        r"\setlength{\tabcolsep}{4pt}",
        r"\begin{tabular}{lp{2.3cm}rrrr}",
        r"\toprule",
        r"System & Source & S & U & HM & ZSL \\",
    ]
    for block in board.blocks:
        lines += [r"\midrule", f"\\multicolumn{{6}}{{l}}{{\\emph{{{escaped(block.title)}}}}} \\\\"]
        lines += [_our_line(block, place) for place in range(len(block.rows))]
    if board.published:
        lines += [r"\midrule", r"\multicolumn{6}{l}{\emph{published, single runs}} \\"]
        lines += [_published_line(reference) for reference in board.published]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"])


def _caption(board: Board) -> str:
    """Return what a table shows, and how to read it."""
    kind = " (simulated data)" if board.simulated else ""
    text = f"{board.title}{kind}: TEST, percent"
    if board.blocks:
        text += (
            f", mean ± sample standard deviation over seeds; content {board.digest[:ID_LENGTH]}. "
            "Bold: best, told apart from all others of its group (Welch's t-test over seeds, "
            "Holm's correction, 95 %); underlined: the best and those not told apart from it"
        )
    if any(p.judged.verdict == "cannot be right" for p in board.published):
        text += ". †: cannot be right as printed"
    return escaped(text + ".")


def _our_line(block: Block, place: int) -> str:
    """Return a row of ours."""
    row, name = block.rows[place], block.names[place]
    cells = [escaped(name), _seeds(row)]
    for score in SCORES:
        cell, mark = escaped(row.cell(score)), block.mark(place, score)
        command = {"best": "textbf", "tied": "underline"}.get(mark)
        cells.append(f"\\{command}{{{cell}}}" if command else cell)
    return " & ".join(cells) + r" \\"


def _seeds(row: Row) -> str:
    return f"{len(row.seeds)} seed{'s' * (len(row.seeds) != 1)}"


def _published_line(reference: Reference) -> str:
    """Return a published row."""
    row = reference.row
    name = row.name + ("†" if reference.judged.verdict == "cannot be right" else "")
    scores = ["" if row.scores[s] is None else f"{row.scores[s]:.2f}" for s in SCORES]
    return " & ".join([escaped(name), escaped(row.source), *scores]) + r" \\"
