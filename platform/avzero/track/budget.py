"""Five MLflow requests per run: which trial may report before its end.

A trial needs three (made, logged, closed), or four with its weights. What the trials of a sweep
leave of five each goes to those that outlive a rung, whoever comes first: trials stopped early pay
for the long ones, which people watch. The first few may report at every rung, for a small sweep is
watched, too; the others make up for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PER_RUN = 5
_OWN = 24
"""Kept for the sweep's own run: summary, figures and tables at its end."""
_WATCHED = 4


class Counted:
    """An ``MlflowClient`` that counts the requests that were answered."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.requests = 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)

        def call(*arguments: Any, **named: Any) -> Any:
            answer = method(*arguments, **named)
            self.requests += 1
            return answer

        return call


class Budget:
    """What a sweep's trials have cost, and what they will.

    Args:
        spent: counts requests.
        uploads: whether complete trials upload their weights.
    """

    def __init__(self, spent: Counted, uploads: bool) -> None:
        self._spent = spent
        self._need = 3 + uploads
        self._seen: set[str] = set()
        self._made: set[str] = set()
        self._closed: set[str] = set()

    def allows(self, trial: str) -> bool:
        """Return whether a trial may send what it has before its end."""
        self._seen.add(trial)
        made, closed = len(self._made), len(self._closed)
        still = self._need * (len(self._seen) - closed) - (made - closed)
        room = PER_RUN * len(self._seen) - self._spent.requests - _OWN - still
        if room < 1 and len(self._seen) > _WATCHED:
            return False
        self._made.add(trial)
        return True

    def closed(self, trial: str) -> None:
        """Take note of a trial that has sent everything."""
        for known in (self._seen, self._made, self._closed):
            known.add(trial)
