"""The desk between Ray Tune and the studies: Tune's search and scheduling interfaces."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from avzero.errors import UserError
from avzero.train.records import Epoch
from avzero.tune.listener import Listener, TrialView
from avzero.tune.study import GroupStudy

METRIC = "hm"


class TrialDesk:
    """Hands trials to Ray Tune and takes their results; lives in the driver.

    Whatever goes wrong in here must not be lost in Tune's event loop: the first trouble is kept,
    no more trials are handed out, running ones are stopped after their epoch (the next call takes
    them up), and ``raise_trouble`` speaks up once Tune has returned.
    """

    def __init__(
        self,
        studies: Mapping[str, GroupStudy],
        record: Callable[[TrialView], None],
        listeners: Sequence[Listener],
    ) -> None:
        self._studies = studies
        self._record = record
        self._listeners = listeners
        self._trouble: BaseException | None = None
        self._errors: dict[str, str] = {}
        self.open_trials: dict[str, TrialView] = {}

    def raise_trouble(self) -> None:
        """Raise the first thing that went wrong, if anything did."""
        if self._trouble is not None:
            raise self._trouble

    def hand_out(self, tune_id: str) -> dict[str, Any] | None:
        """Return the configuration of the next trial, from the groups in turn."""
        while self._trouble is None:
            waiting = [study for study in self._studies.values() if study.remaining]
            if not waiting:
                return None
            study = max(waiting, key=lambda s: s.remaining / s.group.job.search.trials)
            try:
                view = study.next()
                self._note_twins(study)
                if view is None:
                    continue
                self.open_trials[tune_id] = view
                for listener in self._listeners:
                    listener.trial_started(view)
            except Exception as error:  # noqa: BLE001 - kept, and raised after Tune returns
                self._trouble = error
                return None
            return {"task": view.task.model_dump_json(), "id": view.task.id}
        return None

    def take(self, tune_id: str, result: dict[str, Any]) -> bool:
        """Take an epoch; return whether the trial should be stopped."""
        view = self.open_trials[tune_id]
        epoch = Epoch.from_dict(json.loads(result["record"]), replayed=result["replayed"])
        if any(known.epoch == epoch.epoch for known in view.epochs):
            return self._trouble is not None  # a restarted worker replays what was taken already
        try:
            if self._studies[view.group.key].report(view, epoch):
                view.state = "pruned"
            for listener in self._listeners:
                listener.epoch_ended(view, epoch)
        except Exception as error:  # noqa: BLE001 - kept, and raised after Tune returns
            self._trouble = self._trouble or error
        return view.state == "pruned" or self._trouble is not None

    def note_error(self, tune_id: str, error: object) -> None:
        """Keep why a worker failed; Tune tells it apart from the end of the trial."""
        lines = [line for line in str(error).splitlines() if line.strip()]
        self._errors[tune_id] = lines[-1].strip() if lines else "its worker died"

    def close(self, tune_id: str, result: dict[str, Any], error: bool) -> None:
        """Record how a trial ended, from its last result."""
        view = self.open_trials.pop(tune_id)
        study = self._studies[view.group.key]
        if "trouble" in result and not error:
            self._trouble = self._trouble or UserError(result["trouble"])
        elif error:
            view.state = "failed"
            view.reason = self._errors.pop(tune_id, "its worker died")
        elif "failed" in result:
            view.state, view.reason = "failed", result["failed"]
        elif view.state == "running" and result.get("finished"):
            view.state = "complete"
            view.result = view.folder.load_result("val")
        try:
            if view.state == "running":  # stopped by trouble or Ctrl-C, not by itself
                study.release(view)
                return
            study.close(view)
            self._record(view)
            for listener in self._listeners:
                listener.trial_ended(view)
            self._note_twins(study)
        except Exception as problem:  # noqa: BLE001 - kept, and raised after Tune returns
            self._trouble = self._trouble or problem

    def _note_twins(self, study: GroupStudy) -> None:
        """Record trials that took over another's outcome."""
        for twin in study.take_twins():
            self._record(twin)
            for listener in self._listeners:
                listener.trial_ended(twin)


class _AtDesk:
    """Ray Tune pickles searcher and scheduler for a restore we never do: leave the desk out."""

    _desk: TrialDesk

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_desk"}


class StudySearcher(_AtDesk, Searcher):
    """Ray Tune's view of the studies: what to run next, and what has ended."""

    def __init__(self, desk: TrialDesk) -> None:
        super().__init__(metric=METRIC, mode="max")
        self._desk = desk

    def suggest(self, trial_id: str) -> Any:
        """Return the next configuration, or that there is none."""
        return self._desk.hand_out(trial_id) or Searcher.FINISHED

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Record the end of a trial."""
        self._desk.close(trial_id, result or {}, error)

    def save(self, checkpoint_path: str) -> None:
        """Keep nothing: the studies are the truth."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing: a sweep continues from its studies."""


class StudyScheduler(_AtDesk, FIFOScheduler):
    """Passes epochs to the studies and stops what they prune."""

    def __init__(self, desk: TrialDesk) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._desk = desk

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Take one epoch of one trial."""
        stop = self._desk.take(trial.trial_id, result)
        return str(TrialScheduler.STOP if stop else TrialScheduler.CONTINUE)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Keep the error for the trial's record."""
        self._desk.note_error(trial.trial_id, trial.get_error())
