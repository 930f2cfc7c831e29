"""Connecting to Ray with every choice that depends on the machine made explicitly."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from avzero.errors import UserError

_QUIET = {
    # Unset, Ray's behaviour depends on whether a token file lies in the home folder.
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_PASSED_ON = (
    "AVZERO_PATH",
    "AVZERO_CACHE",
    # Without them workers would look for a lab's own bucket at AWS. Credentials are not passed on.
    "AWS_ENDPOINT_URL_S3",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_DEFAULT_REGION",
)


@contextmanager
def ray_cluster(address: str | None = None) -> Iterator[None]:
    """Connect to ``address``, or start a cluster on this machine's loopback; leave it at the end.

    Does nothing when this process is connected already.

    Raises:
        UserError: nothing answers at ``address``.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    # A worker that dies is Tune's to replace; its traceback says nothing a user could act on.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:  # a submitted job has its own
        common["runtime_env"] = {"env_vars": passed_on | {"OMP_NUM_THREADS": "1"}}
    try:
        if address:
            ray.init(address=address, **common)
        else:
            # "local": a cluster of our own even where RAY_ADDRESS is set or another one runs.
            ray.init("local", include_dashboard=False, _node_ip_address="127.0.0.1", **common)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"Ray at {address or 'this machine'}: cannot connect ({error}); check the address, "
            "that the cluster runs, and RAY_AUTH_MODE"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()
