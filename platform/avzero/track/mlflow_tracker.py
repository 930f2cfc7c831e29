"""The MLflow run tree: one experiment per benchmark, one parent run per sweep, trials nested.

Runs are found by the tag ``avzero.run`` (the task's identity), so running a command again updates
runs instead of adding copies, and a deleted tracking database is filled again from the store.
Scores are logged in percent, as the field prints them; the store keeps fractions.

Hooks only note what happened. One thread sends it, so no trial ever waits for MLflow: nothing
before a trial's first rung, then at most one ``log_batch`` per rung, and at its end everything
that is left. A trial costs three requests (make, log, close), four with its weights; a rung that it
outlives by more than ten seconds adds one, as long as the sweep keeps to five per run (``Budget``).
A server that does not answer is asked again. Finished runs wait on disk then (``Spool``) and are
sent by the next call, if not by this one; what was lost with a killed driver, the next call of the
same command fills in from the store.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence

from avzero.errors import UserError
from avzero.spec import Job
from avzero.track.outbox import Outbox
from avzero.track.payload import (
    BEST_TRIAL,
    COMPLETE_TRIALS,
    STATUS,
    Draft,
    final_draft,
    final_identity,
    parent_draft,
    stage_2_outcome,
    sweep_outcome,
    test_outcome,
    trial_draft,
    trial_outcome,
)
from avzero.track.run_tree import RunTree
from avzero.track.spool import Spool, Ticket
from avzero.train.records import Epoch, Result
from avzero.tune.listener import FinalView, Listener, TrialView
from avzero.tune.rungs import rung_epochs
from avzero.tune.space import Group

LINGER = 10.0
"""Seconds from a rung to its request: a trial that ends soon after it is sent once, not twice."""
_REFUSALS = (400, 404, 409, 413)
"""HTTP statuses that concern one run, not the server."""


class MlflowTracker(Listener):
    """Logs a sweep and its final runs.

    Args:
        uri: MLflow tracking URI.
        job: the job; its ``tracking.checkpoints`` says which runs carry weights.

    Raises:
        UserError: nothing answers at the URI.
    """

    def __init__(self, uri: str, job: Job) -> None:
        # Explicit: the default depends on the environment, and usage data stays here.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("DO_NOT_TRACK", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
        # Trying again is the outbox's business: a run made twice by a repeated request inside the
        # client would go unnoticed.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        # Closing a run would ask for it again, to print where it is.
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        for name in ("alembic", "mlflow.pyfunc"):
            logging.getLogger(name).setLevel(logging.ERROR)
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        _remember_databricks()
        self._job = job
        try:
            client = MlflowClient(tracking_uri=uri)
            client.search_experiments(max_results=1)
        except (MlflowException, SQLAlchemyError, OSError) as error:
            raise UserError(
                f"MLflow at {uri}: does not answer ({str(error).splitlines()[0]}); start it, "
                "correct tracking.uri, or set it to off"
            ) from error
        self._tree = RunTree(client, uri, job)
        self._spool = Spool(uri, job.store, job.name)
        self.outbox: Outbox[Draft | Ticket] = Outbox(
            self._deliver,
            (MlflowException, SQLAlchemyError, Boto3Error, BotoCoreError, ClientError, OSError),
            _is_refusal,
            f"MLflow at {uri}",
            keep=self._spool.keep,
        )
        self._replayed: set[str] = set()
        self._parents: dict[str, Draft] = {}
        """By group: one draft for all that happens to a sweep's own run, so that its beginning
        can never come after its end."""
        self._open: dict[str, Draft] = {}
        self._closed: set[str] = set()
        self._rungs: dict[int, frozenset[int]] = {}

    def _deliver(self, item: Draft | Ticket) -> None:
        """Send a draft, or one that waits on disk; in the outbox's thread."""
        if isinstance(item, Ticket):
            self._tree.deliver(item.draft())
            item.done()
        else:
            self._tree.deliver(item)

    def _replay(self, group: Group) -> None:
        """Have sent, before anything new, what earlier calls could not send."""
        if group.key not in self._replayed:
            self._replayed.add(group.key)
            for ticket in self._spool.left(group):
                self.outbox.put(ticket.identity, ticket, last=True, behind=ticket.kind == "sweep")

    # -- trials ---------------------------------------------------------------------------------

    def sweep_started(self, job: Job, groups: Sequence[Group], done: Sequence[TrialView]) -> None:
        """Make experiments and parent runs; fill in trials an earlier tracker did not see."""
        for group in groups:
            self._replay(group)
        self._parents = {group.key: parent_draft(job, group) for group in groups}
        for parent in self._parents.values():
            self.outbox.put(parent.identity, parent)
        for view in done:
            self._fill_in(view)

    def _fill_in(self, view: TrialView) -> None:
        """Have an ended trial sent, unless it is in MLflow already."""
        if view.twin_of is None and view.task.id not in self._closed:
            draft = self._draft(view)
            del self._open[view.task.id]
            draft.only_missing = True
            for epoch in view.epochs[len(draft.epochs) :]:
                draft.add(epoch)
            self._end(draft, view)

    def _end(self, draft: Draft, view: TrialView) -> None:
        draft.close(STATUS[view.state], lambda run: trial_outcome(self._job, view))
        self._closed.add(draft.identity)
        self.outbox.put(draft.identity, draft, last=True)

    def trial_started(self, trial: TrialView) -> None:
        """Note when a trial began."""
        self._draft(trial)

    def _draft(self, trial: TrialView) -> Draft:
        if trial.task.id not in self._open:
            draft = self._open[trial.task.id] = trial_draft(trial)
            draft.parent = self._parents.get(trial.group.key)
        return self._open[trial.task.id]

    def epoch_ended(self, trial: TrialView, epoch: Epoch) -> None:
        """Keep an epoch; have the kept ones sent at a rung."""
        draft = self._draft(trial)
        draft.add(epoch)
        self._send_at_rung(draft, epoch, trial.task.train.epochs)

    def _send_at_rung(self, draft: Draft, epoch: Epoch, epochs: int) -> None:
        if epochs not in self._rungs:
            search = self._job.search
            rungs = rung_epochs(search.min_epochs, search.reduction, epochs)
            self._rungs[epochs] = frozenset(rungs)
        if epoch.epoch + 1 in self._rungs[epochs]:
            self.outbox.put(draft.identity, draft, LINGER)

    def trial_ended(self, trial: TrialView) -> None:
        """Have all that is left sent: epochs, the result and its table, how it ended."""
        if trial.twin_of is None:
            self._draft(trial)
            self._end(self._open.pop(trial.task.id), trial)

    def sweep_ended(self, trials: Sequence[TrialView], interrupted: bool) -> None:
        """Fill in what was missed, write the best trial onto its parent, wait until all is sent.

        The runs of interrupted trials stay open: the next call takes them up.
        """
        for view in trials:
            self._fill_in(view)
        for draft in self._open.values():
            if draft.epochs:
                self.outbox.put(draft.identity, draft, last=True)
        for parent in self._parents.values():
            mine = [trial for trial in trials if trial.group.key == parent.group.key]
            self._close_parent(parent, mine, "KILLED" if interrupted else "FINISHED")
        self._open.clear()
        self._closed.clear()
        self._parents.clear()
        self.outbox.drain()

    def _close_parent(self, parent: Draft, trials: Sequence[TrialView], status: str) -> None:
        """Have a sweep's own run closed, after its trials: the best of them gets pictures."""
        complete = [trial for trial in trials if trial.state == "complete"]
        best = max(complete, key=lambda trial: (trial.hm, -trial.number), default=None)
        if best is None:
            parent.close(status)
        else:
            parent.marks = {BEST_TRIAL: str(best.number), COMPLETE_TRIALS: str(len(complete))}
            parent.close(status, functools.partial(sweep_outcome, best, trials))
        self.outbox.put(parent.identity, parent, last=True, behind=True)

    # -- final runs -----------------------------------------------------------------------------

    def final_started(self, final: FinalView) -> None:
        """Note when a final run began; a stage 1 before it is over."""
        for identity in [name for name in self._open if name.endswith("-stage1")]:
            self._finish(self._open.pop(identity))
        self._replay(final.group)
        if final.group.key not in self._parents:
            # The sweep was tracked by an earlier call, or by none.
            parent = self._parents[final.group.key] = parent_draft(self._job, final.group)
            parent.only_missing = True
            self._finish(parent)
        for kind in ("stage2", "test") if final.task.stage == 2 else ("stage1",):
            draft = final_draft(final, kind)
            draft.parent = self._parents[final.group.key]
            self._open[draft.identity] = draft

    def final_epoch_ended(self, final: FinalView, epoch: Epoch) -> None:
        """Keep an epoch of a final run; have the kept ones sent at a rung."""
        draft = self._open.get(final_identity(final, f"stage{final.task.stage}"))
        if draft is not None:
            draft.add(epoch)
            self._send_at_rung(draft, epoch, final.task.train.epochs)

    def test_scored(self, final: FinalView, result: Result) -> None:
        """Close the stage-2 run and the TEST run, and wait until they are sent."""
        stage_2, test = (self._open.pop(final_identity(final, k), None) for k in ("stage2", "test"))
        if stage_2 is None or test is None:
            return
        epochs = [epoch for _, epoch in stage_2.epochs]
        stage_2.close("FINISHED", lambda run: stage_2_outcome(self._job, final, epochs, result))
        test.close("FINISHED", lambda run: test_outcome(final, epochs, result))
        for draft in (stage_2, test):
            self.outbox.put(draft.identity, draft, last=True)
        # No hook follows the last TEST, so each of them sees its run through.
        self.outbox.drain()

    def _finish(self, draft: Draft) -> None:
        draft.close("FINISHED")
        self.outbox.put(draft.identity, draft, last=True)


def _remember_databricks() -> None:
    """Have MLflow's client find out once whether it runs in Databricks.

    It asks at every request, by ten imports that fail: half of a request's CPU time.
    """
    try:
        from mlflow.tracking.request_header import databricks_request_header_provider as headers

        provider = headers.DatabricksRequestHeaderProvider
    except (ImportError, AttributeError):
        return  # it has moved: then it asks
    if not hasattr(provider.in_context, "cache_info"):
        provider.in_context = functools.cache(provider.in_context)  # type: ignore[method-assign]


def _is_refusal(error: Exception) -> bool:
    """Return whether MLflow understood a request and will never take it."""
    status = getattr(error, "get_http_status_code", None)
    return status is not None and status() in _REFUSALS
