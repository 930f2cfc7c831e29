"""Links into MLflow's pages, where a tracking server was named; without one there are none."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from urllib.error import HTTPError
from urllib.parse import quote, urlencode
from urllib.request import urlopen

from avzero.report.records import Records

_HTTP = ("http://", "https://")
_PATIENCE = 3.0
"""Seconds a server has to answer; a report does not wait longer for a link."""


@dataclass(frozen=True)
class Links:
    """Makes addresses of runs.

    Records do not know MLflow's own numbers of runs, but every run carries its identity as the tag
    ``avzero.run``: a link is a search for that tag.
    """

    uri: str = ""
    """Of the server; empty: no links."""
    experiments: Mapping[str, str] = field(default_factory=dict)
    """Benchmark -> number of its experiment, where the server has said it."""

    def run(self, benchmark: str, identity: str) -> str:
        """Return the address of one run; empty without a server."""
        return self._search(benchmark, f"tags.`avzero.run` = '{identity}'")

    def sweep(self, benchmark: str, sweep: str, group: str) -> str:
        """Return the address of a sweep's own run in a group."""
        return self.run(benchmark, f"sweep-{sweep}-{group}")

    def _search(self, benchmark: str, condition: str) -> str:
        if not self.uri:
            return ""
        number = self.experiments.get(benchmark)
        if number is None:  # the list of experiments, narrowed to this one
            query = urlencode({"experimentSearchFilter": benchmark})
            return f"{self.uri}/#/experiments?{query}"
        query = urlencode({"searchFilter": condition})
        return f"{self.uri}/#/experiments/{quote(number)}/runs?{query}"


def links(records: Records, tracking: str | None) -> Links:
    """Return links to the server named on the command line, or in every sweep's job.

    Sweeps that name different servers have no links unless one is named on the command line.
    """
    named = {uri for s in records.sweeps if (uri := s.job["tracking"]["uri"]).startswith(_HTTP)}
    uri = (tracking or (named.pop() if len(named) == 1 else "")).rstrip("/")
    if not uri.startswith(_HTTP):
        return Links()
    names = sorted(set(records.results["benchmark"].to_pylist()))
    return Links(uri, dict(_experiments(uri, names)))


def _experiments(uri: str, names: Iterable[str]) -> Iterable[tuple[str, str]]:
    """Yield (benchmark, number of its experiment), as far as the server says."""
    for name in names:
        query = urlencode({"experiment_name": name})
        address = f"{uri}/api/2.0/mlflow/experiments/get-by-name?{query}"
        try:
            with urlopen(address, timeout=_PATIENCE) as answer:  # noqa: S310 - http(s), see links
                yield name, str(json.load(answer)["experiment"]["experiment_id"])
        except (HTTPError, ValueError, KeyError, TypeError):
            continue  # it has no such experiment, or is no MLflow
        except OSError:
            return  # it is away: no use asking for the others
