"""The parity board, and what is wrong with the published tables, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from avzero.report.parity import DEFAULT, Ours, Parity, Rule, Verdict
from avzero.report.published import SCORES, Judged, judged_rows, mixed_sources
from avzero.report.statistics import Interval

_STYLE: dict[Verdict, str] = {
    "reproduced": "green",
    "not reproduced": "red",
    "undecided": "yellow",
    "not comparable": "dim",
    "not run": "dim",
}
_WIDE = 120


def parity_view(
    lines: Sequence[Parity],
    width: int,
    unmatched: Sequence[Ours] = (),
    everything: bool = False,
    rule: Rule = DEFAULT,
) -> list[RenderableType]:
    """Return the board for a terminal: table, reasons, what is left out, and the rule.

    Args:
        lines: from ``parity.board``.
        width: of the terminal, in columns.
        unmatched: results no published row exists for.
        everything: also list published results of which there is nothing here.
        rule: the one the verdicts follow.
    """
    shown = [line for line in lines if everything or line.ours is not None]
    reasons = list(dict.fromkeys(line.reason for line in shown))
    wide = width >= _WIDE
    table = _table("Published and here: HM on TEST, percent")
    for name in ("system", "benchmark"):
        table.add_column(name, overflow="fold")
    for name in ("published", "here", *(("from",) if wide else ()), "difference"):
        left = name == "from"
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    for line in shown:
        table.add_row(*_cells(line, reasons.index(line.reason) + 1, wide))
    parts: list[RenderableType] = [table] if shown else [Text("Nothing here to compare.")]
    parts += [Text(f"({i}) {reason}") for i, reason in enumerate(reasons, start=1)]
    return [*parts, *map(Text, _left_out(lines, shown, unmatched)), Text(rule.text, style="dim")]


def _table(title: str) -> Table:
    """Return a table that wastes no columns of a narrow terminal."""
    return Table(
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )


def _cells(line: Parity, reason: int, wide: bool) -> list[str | Text]:
    """Return a line's cells."""
    row, ours = line.published.row, line.ours
    printed = row.scores["HM"]
    cells: list[str | Text] = [
        row.name,
        row.benchmark,
        "" if printed is None else f"{printed:.2f}",
        "" if ours is None else ours.cell("HM"),
    ]
    if wide:
        cells.append("" if ours is None else f"{ours.what} {ours.sweep}".strip())
    style = _STYLE[line.verdict]
    difference = signed(line.differences["HM"]) if "HM" in line.differences else ""
    # A difference between things that cannot be compared is shown, but not as a finding.
    cells.append(Text(difference, style=style if style == "dim" else ""))
    return [*cells, Text(f"{line.verdict} ({reason})", style=style)]


def signed(interval: Interval) -> str:
    """Return a difference with its sign, and the interval where there is one."""
    text = f"{interval.estimate:+.2f}"
    if interval.low is None or interval.high is None:
        return text
    return f"{text} [{interval.low:+.2f}, {interval.high:+.2f}]"


def _left_out(
    lines: Sequence[Parity], shown: Sequence[Parity], unmatched: Sequence[Ours]
) -> list[str]:
    """Return sentences on what the table does not list."""
    notes = []
    hidden = len(lines) - len(shown)
    if hidden:
        notes.append(f"Of {hidden} further published results there is nothing here.")
    names = sorted({f"{ours.model} on {ours.benchmark}" for ours in unmatched})
    if names:
        head = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        notes.append(f"Nothing is published for {head}.")
    return notes


def doubts_view(width: int, judged: Sequence[Judged] | None = None) -> list[RenderableType]:
    """Return what is wrong with published tables: rows that cannot be right, mixed features.

    Args:
        width: of the terminal, in columns.
        judged: default: all published rows.
    """
    rows = judged_rows() if judged is None else judged
    wrong = [one for one in rows if one.verdict == "cannot be right"]
    table = _table(f"{len(wrong)} of {len(rows)} published rows cannot be right as printed")
    scores = SCORES if width >= _WIDE else ()
    for name in ("system", "benchmark", *scores, "why", "source"):
        table.add_column(name, justify="right" if name in scores else "left", overflow="fold")
    for one in wrong:
        values = [one.row.scores[name] for name in scores]
        cells = ["" if v is None else f"{v:.2f}" for v in values]
        why = one.text("hm", "zsl")
        table.add_row(one.row.name, one.row.benchmark, *cells, why, one.row.source)
    parts: list[RenderableType] = [table]
    for source, sets in mixed_sources([one.row for one in rows]).items():
        parts.append(Text(f"{source} ranks different feature sets in one table:"))
        parts += [Text(f"  {name}: {', '.join(systems)}") for name, systems in sets.items()]
    return parts
