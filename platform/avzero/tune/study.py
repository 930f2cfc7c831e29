"""One Optuna study per group: the truth about a sweep's trials, kept in a journal file.

The journal is written before anything acts on it, so after any kill the same command finds every
trial with its values, its reported epochs and its state, hands out unfinished ones first (they
resume from their checkpoints) and asks the sampler only for what is still missing.
"""

from __future__ import annotations

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from avzero.canon import identity
from avzero.data.cache import cache_root
from avzero.data.storage import Storage
from avzero.protocol.counter import fold
from avzero.train.folder import RunFolder
from avzero.train.records import Epoch
from avzero.tune.listener import TrialView
from avzero.tune.space import Group, make_pruner, make_sampler

optuna.logging.set_verbosity(optuna.logging.WARNING)

_STATE_NAMES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


class Journal:
    """The journal file of a sweep; for object storage a local copy that is mirrored.

    One driver owns a sweep at a time; the mirror is replaced whole after every change.
    """

    def __init__(self, storage: Storage, sweep: str) -> None:
        self._storage = storage
        self._key = f"sweeps/{sweep}/study.journal"
        own = storage.local_path(self._key)
        self._mirrored = own is None
        self.path = own or cache_root() / "sweeps" / identity([storage.url, sweep]) / "journal"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._mirrored:
            try:
                storage.download(self._key, self.path)
            except KeyError:
                self.path.unlink(missing_ok=True)
        # A driver killed while it held the lock leaves the lock file behind; this process is the
        # sweep's only driver now.
        for stale in self.path.parent.glob(f"{self.path.name}*.lock"):
            stale.unlink(missing_ok=True)
        self.optuna_storage = JournalStorage(JournalFileBackend(str(self.path)))

    def publish(self) -> None:
        """Copy the journal to object storage."""
        if self._mirrored and self.path.exists():
            self._storage.upload(self._key, self.path)


class GroupStudy:
    """The trials of one group."""

    def __init__(self, group: Group, journal: Journal, storage: Storage) -> None:
        self.group = group
        self._journal = journal
        self._storage = storage
        self._study = optuna.create_study(
            study_name=group.key,
            storage=journal.optuna_storage,
            direction="maximize",
            load_if_exists=True,
            pruner=make_pruner(group.job),
        )
        known = self._study.get_trials(deepcopy=False)
        for point in group.start_points():
            self._study.enqueue_trial(point, skip_if_exists=True)
        self._unfinished = [t for t in known if t.state is TrialState.RUNNING]
        self._handed_out = len([t for t in known if t.state.is_finished()])
        self._live: dict[int, optuna.trial.Trial] = {}

    def done(self) -> list[TrialView]:
        """Return the trials that ended in earlier calls."""
        return [
            self._view(trial.number, trial.params, _STATE_NAMES[trial.state])
            for trial in self._study.get_trials(deepcopy=False)
            if trial.state.is_finished()
        ]

    @property
    def remaining(self) -> int:
        """Number of trials this call still has to hand out."""
        return max(0, self.group.job.search.trials - self._handed_out)

    def next(self) -> TrialView | None:
        """Return the next trial to run: an unfinished one, a start point, or a proposal."""
        if not self.remaining:
            return None
        self._handed_out += 1
        if self._unfinished:
            # Optuna offers no public way to take up a running trial by its number.
            known = self._unfinished.pop(0)
            trial = optuna.trial.Trial(self._study, known._trial_id)
        else:
            # A sampler per trial, seeded by the trial's number: what is proposed depends on the
            # history alone, not on when the sweep was stopped and resumed.
            search = self.group.job.search
            number = len(self._study.get_trials(deepcopy=False))
            self._study.sampler = make_sampler(search.sampler, fold(search.seed, number) >> 33)
            trial = self._study.ask(self.group.distributions)
        view = self._view(trial.number, trial.params, "running")
        trial.set_user_attr("task", view.task.id)
        self._live[trial.number] = trial
        self._journal.publish()
        return view

    def report(self, view: TrialView, epoch: Epoch) -> bool:
        """Record an epoch; return whether the trial should be stopped early."""
        view.epochs.append(epoch)
        trial = self._live[view.number]
        step = epoch.epoch + 1
        known = self._study.get_trials(deepcopy=False)[view.number].intermediate_values
        if step not in known:
            trial.report(view.hm, step)
        if step >= view.task.train.epochs:
            return False
        return bool(trial.should_prune())

    def close(self, view: TrialView) -> None:
        """Tell the study how a trial ended."""
        trial = self._live.pop(view.number)
        if view.state == "complete":
            self._study.tell(trial, view.hm)
        elif view.state == "pruned":
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            self._study.tell(trial, state=TrialState.FAIL)
        self._journal.publish()

    def winner(self) -> TrialView | None:
        """Return the complete trial with the highest VAL HM; the earliest of equals."""
        complete = [
            t
            for t in self._study.get_trials(deepcopy=False)
            if t.state is TrialState.COMPLETE and t.value is not None
        ]
        if not complete:
            return None
        best = max(complete, key=lambda t: (t.value or 0.0, -t.number))
        return self._view(best.number, best.params, "complete")

    def _view(self, number: int, values: dict[str, object], state: str) -> TrialView:
        task = self.group.task(values)
        folder = RunFolder(self._storage, task)
        view = TrialView(self.group, number, task, dict(values), folder, state)
        if state != "running":
            stored = folder.load_state()
            view.epochs = stored.history if stored else []
            view.result = folder.load_result("val")
        return view


def journal_exists(storage: Storage, sweep: str) -> bool:
    """Return whether a sweep has been started."""
    return storage.exists(f"sweeps/{sweep}/study.journal")
