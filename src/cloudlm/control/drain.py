"""When a replica that is to stop may be stopped: once nobody can be sending to it any more.

Its endpoint is withdrawn first. Then gateways need a moment to notice, and running requests time
to end, but no longer than the time limit. Pure bookkeeping: gets facts and ``now``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

GATEWAYS_NOTICE_S = 1.0


@dataclass(frozen=True, slots=True)
class _Leaving:
    since: float
    was_serving: bool


class Drains:
    """The replicas of all deployments that are on their way out. Times are monotonic seconds."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._leaving: dict[str, _Leaving] = {}

    def note(
        self,
        among: Collection[str],
        leaving: Collection[str],
        serving: Collection[str],
        now: float,
    ) -> None:
        """Of the replicas ``among``, those ``leaving`` are to stop, the others are not (any more).
        ``serving`` had an endpoint until now."""
        for replica in among:
            if replica not in leaving:
                self._leaving.pop(replica, None)
            elif replica not in self._leaving:
                self._leaving[replica] = _Leaving(now, replica in serving)

    def done(
        self,
        replicas: Collection[str],
        busy: Mapping[str, int],
        now: float,
        *,
        patient: bool = False,
    ) -> bool:
        """Whether all of these may be stopped. ``busy`` counts requests at replicas that answer.
        ``patient``: as long as one says that it is at work, there is no time limit."""
        return all(self._is_done(one, busy.get(one), now, patient) for one in replicas)

    def keep_only(self, existing: Collection[str]) -> None:
        """Forget replicas that exist no longer."""
        for replica in [one for one in self._leaving if one not in existing]:
            del self._leaving[replica]

    def _is_done(self, replica: str, busy: int | None, now: float, patient: bool) -> bool:
        leaving = self._leaving.get(replica)
        if leaving is None:
            return False
        waited_s = now - leaving.since
        late = waited_s >= self._timeout_s and not (patient and busy)
        if not leaving.was_serving or late:
            return True
        return waited_s >= GATEWAYS_NOTICE_S and busy == 0
