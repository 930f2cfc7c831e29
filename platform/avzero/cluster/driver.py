"""What a submitted job runs on the cluster: look whether all is there, then ``avzero sweep``.

The job arrives in ``AVZERO_JOB``. Everything else a sweep continues from is in its store, so this
process may be killed at any time and started again anywhere.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import tempfile
from pathlib import Path

from avzero.errors import UserError


def main() -> None:
    """Check, then run the sweep; exit codes are the command line's."""
    # ``avzero stop`` and a node that is drained say SIGTERM: end as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    text = os.environ["AVZERO_JOB"]
    try:
        _check(text)
    except UserError as error:
        sys.stderr.write(f"avzero: on the cluster: {error}\n")
        sys.exit(2)
    from avzero import cli

    with tempfile.TemporaryDirectory(prefix="avzero-job-") as folder:
        path = Path(folder) / "job.yaml"
        path.write_text(text)  # JSON is YAML
        sys.argv = ["avzero", "sweep", str(path), "--address", "auto"]
        cli.main()


def _check(text: str) -> None:
    """Refuse before anything is written when the job cannot run here.

    Raises:
        UserError: a package, the store or the tracker is not as it must be.
    """
    from avzero.cluster.checks import check_environment, check_store, check_tracker, require
    from avzero.cluster.package import unmet

    require(list(check_environment(unmet())))
    from avzero.spec import Job

    job = Job.model_validate_json(text)
    require(list(itertools.chain(check_store(job.store), check_tracker(job.tracking.uri))))


if __name__ == "__main__":
    main()
