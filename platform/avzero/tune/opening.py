"""A job from its file or, by name, from the store of its sweep."""

from __future__ import annotations

import json
from pathlib import Path

from avzero import DEFAULT_STORE
from avzero.data.storage import open_storage
from avzero.errors import UserError
from avzero.spec import PLAIN_NAME, Job, load_job, validate


def open_job(sweep: str, store: str | None, tracking: str | None) -> Job:
    """Read a job and apply the command line's options.

    Args:
        sweep: a job file, or a sweep's name.
        store: instead of the job's.
        tracking: MLflow URI instead of the job's.

    Raises:
        UserError: there is none, or something in it is wrong.
    """
    if Path(sweep).suffix in (".yaml", ".yml") or Path(sweep).is_file():
        job = load_job(Path(sweep))
    else:
        if not PLAIN_NAME.fullmatch(sweep):
            raise UserError(f"{sweep!r} is neither a job file nor a sweep's name")
        place = open_storage(store or DEFAULT_STORE)
        try:
            stored = json.loads(place.read(f"sweeps/{sweep}/job.json"))
        except KeyError as error:
            raise UserError(
                f"{place.url}: no sweep {sweep!r}; give a job file, or the --store it ran in"
            ) from error
        job = validate(Job, stored["job"], f"sweep {sweep}")
    updates: dict[str, object] = {}
    if store:
        updates["store"] = store
    if tracking:
        updates["tracking"] = job.tracking.model_copy(update={"uri": tracking})
    return job.model_copy(update=updates)
