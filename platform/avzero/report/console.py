"""Progress in the terminal: a live table where there is one, plain lines where there is not."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.console import Group as Stack
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from avzero.protocol.calibration import BOTH
from avzero.report.units import duration
from avzero.spec import Job
from avzero.train.records import Epoch, Result
from avzero.tune.listener import FinalView, Listener, TrialView
from avzero.tune.space import Group

_ROWS = 12
_SCORES = ("HM", "S", "U", "ZSL")
_STYLE = {"running": "cyan", "complete": "green", "pruned": "yellow", "failed": "red"}


class ConsoleProgress(Listener):
    """Shows a sweep and its final runs to a person.

    Args:
        console: where to write.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live: Live | None = None
        self._trials: dict[str, TrialView] = {}
        self._wanted = 0
        self._started = time.monotonic()
        self._before = 0

    def sweep_started(self, job: Job, groups: Sequence[Group], done: Sequence[TrialView]) -> None:
        """Say what is there already and what will run."""
        self._trials = {f"{t.group.key}/{t.number}": t for t in done}
        self._wanted = max(job.search.trials * len(groups), len(done))
        self._started = time.monotonic()
        self._before = len(done)
        missing = self._wanted - len(done)
        if done and missing:
            self.console.print(
                f"Sweep {job.name} resumes: {len(done)} of {self._wanted} trials are done."
            )
        elif done:
            self.console.print(
                f"Sweep {job.name} is complete: {len(done)} trials are done, nothing to run."
            )
        else:
            self.console.print(
                f"Sweep {job.name}: {self._wanted} trials over {len(groups)} "
                f"benchmark-system pair{'s' if len(groups) > 1 else ''}."
            )
        if missing and self.console.is_terminal:
            self._live = Live(self._picture(), console=self.console, refresh_per_second=4)
            self._live.start()

    def trial_started(self, trial: TrialView) -> None:
        """Add a row."""
        self._trials[f"{trial.group.key}/{trial.number}"] = trial
        self._refresh()

    def epoch_ended(self, trial: TrialView, epoch: Epoch) -> None:
        """Update a row."""
        self._refresh()

    def trial_ended(self, trial: TrialView) -> None:
        """Update a row; without a live table print a line."""
        self._trials[f"{trial.group.key}/{trial.number}"] = trial
        if self._live:
            self._refresh()
            return
        ended = sum(t.state != "running" for t in self._trials.values())
        left = self._time_left()
        twin = "" if trial.twin_of is None else f" (same configuration as trial {trial.twin_of})"
        self.console.print(
            f"[{ended}/{self._wanted}] {trial.group.key} trial {trial.number}: {trial.state}"
            f"{', HM ' + format(100 * trial.hm, '.2f') if trial.best else ''}"
            f" after {len(trial.epochs)} epochs"
            f"{': ' + trial.reason if trial.reason else ''}"
            f"{twin}"
            f"{', about ' + duration(left) + ' left' if left and ended < self._wanted else ''}"
        )

    def sweep_ended(self, trials: Sequence[TrialView], interrupted: bool) -> None:
        """Stop the live table and name the best trial of every group."""
        if self._live:
            self._live.update(self._picture())
            self._live.stop()
            self._live = None
        if interrupted:
            self.console.print("Interrupted. Run the same command again to go on.")
        best: dict[str, TrialView] = {}
        for trial in trials:
            known = best.get(trial.group.key)
            if trial.state == "complete" and (known is None or trial.hm > known.hm):
                best[trial.group.key] = trial
        for key, trial in best.items():
            scores = (
                ", ".join(f"{k} {100 * trial.best.val[k]:.2f}" for k in ("S", "U", "ZSL"))
                if trial.best
                else ""
            )
            self.console.print(
                f"Best on VAL, {key}: trial {trial.number}, HM {100 * trial.hm:.2f} ({scores})"
            )

    def final_started(self, final: FinalView) -> None:
        """Say that a final run begins."""
        if final.stored:
            return
        what = "TRAIN + VAL, everything frozen" if final.task.stage == 2 else "TRAIN, another seed"
        self.console.print(
            f"Stage {final.task.stage}, {final.group.key}, seed {final.task.seed}: "
            f"{final.task.train.epochs} epochs on {what}"
        )

    def final_epoch_ended(self, final: FinalView, epoch: Epoch) -> None:
        """Print a line per epoch, with the time left."""
        if epoch.replayed:
            return
        done, total = epoch.epoch + 1, final.task.train.epochs
        if done == 1:  # starting the workers is not part of the pace
            self._started = time.monotonic() - epoch.seconds
        left = (time.monotonic() - self._started) / done * (total - done)
        if done % max(1, total // 5) == 0 or done == total:
            self.console.print(
                f"  epoch {done}/{total}, loss {epoch.loss:.3f}, "
                f"{epoch.samples_per_second:,.0f} samples/s"
                f"{', about ' + duration(left) + ' left' if done < total else ''}",
                highlight=False,
            )

    def test_scored(self, final: FinalView, result: Result) -> None:
        """Print the four numbers."""
        scores = result.scores[BOTH]
        text = "  ".join(f"{k} {100 * scores[k]:.2f}" for k in ("S", "U", "HM", "ZSL"))
        self.console.print(
            f"TEST, {final.group.key}, seed {final.task.seed}: {text}  "
            f"(beta {scores['beta']:.3g} carried from VAL)"
            f"{'; stored result, TEST was not opened again' if final.stored else ''}"
        )

    # -- the live table -------------------------------------------------------------------------

    def _refresh(self) -> None:
        if self._live:
            self._live.update(self._picture())

    def _progress(self) -> float:
        """Return the finished share of this call, counting running trials by their epochs."""
        total = self._wanted - self._before
        share = 0.0
        for trial in list(self._trials.values()):
            share += (
                len(trial.epochs) / trial.task.train.epochs if trial.state == "running" else 1.0
            )
        return (share - self._before) / total if total else 1.0

    def _time_left(self) -> float:
        """Return the expected seconds left, from the pace so far."""
        done = self._progress()
        elapsed = time.monotonic() - self._started
        return elapsed * (1 - done) / done if done > 0.02 else 0.0

    def _picture(self) -> RenderableType:
        """Return the table of running and best trials, and the progress line."""
        trials = list(self._trials.values())
        running = [t for t in trials if t.state == "running"]
        ended = sorted((t for t in trials if t.state != "running"), key=lambda t: -t.hm)
        table = Table(expand=True, pad_edge=False, box=SIMPLE_HEAD)
        table.add_column("benchmark--system", no_wrap=True, ratio=3, min_width=12)
        for name, width in (("trial", 5), ("state", 8), ("epoch", 7), *((k, 5) for k in _SCORES)):
            table.add_column(name, justify="right", no_wrap=True, min_width=width)
        table.add_column("settings", no_wrap=True, ratio=4)
        for trial in (running + ended)[:_ROWS]:
            table.add_row(*self._cells(trial))
        counts = {s: sum(t.state == s for t in trials) for s in _STYLE}
        left = self._time_left()
        line = Text(
            f"{sum(counts.values()) - counts['running']}/{self._wanted} trials: "
            + ", ".join(f"{n} {s}" for s, n in counts.items() if n)
            + f"; {duration(time.monotonic() - self._started)} gone"
            + (f", about {duration(left)} left" if left else "")
        )
        hidden = len(trials) - _ROWS
        note = Text(f"({hidden} more trials not shown)", style="dim") if hidden > 0 else Text("")
        bar = ProgressBar(total=1.0, completed=self._progress(), width=60)
        return Stack(table, note, Columns([bar]), line)

    def _cells(self, trial: TrialView) -> list[Any]:
        """Return one row."""
        best = trial.best
        scores = [f"{100 * best.val[k]:.2f}" if best else "-" for k in _SCORES]
        values = " ".join(
            f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}"
            for k, v in sorted(trial.values.items())
        )
        return [
            trial.group.key,
            str(trial.number),
            Text(trial.state, style=_STYLE[trial.state]),
            f"{len(trial.epochs)}/{trial.task.train.epochs}",
            *scores,
            values,
        ]
