"""Revisions, roll-outs and the ledger's latest rows in virtual time.

The rules are those of the memory state (``state.memory_releases``); what is added is when things
happened on the timeline, and that only so many rows are kept as control looks at. Must not decide.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from cloudlm.control.signals import LATEST
from cloudlm.core.deployment import Deployment, DeploymentSpec
from cloudlm.core.rollout import Outcome, Revision
from cloudlm.core.tenant import LedgerRow
from cloudlm.core.tenant import Outcome as End
from cloudlm.gateway.mirror import MIRROR_KEY
from cloudlm.sim.timeline import Timeline, at_once
from cloudlm.state.decide import changed_deployment
from cloudlm.state.memory_releases import MemoryReleases


@dataclass(slots=True)
class Tally:
    """The ledger's rows of one group in numbers. ``attempts`` are clients', ``failed`` those of
    them that failed or were refused."""

    attempts: int = 0
    failed: int = 0
    copies: int = 0


class SimRevisions(MemoryReleases):
    """The part of the state that roll-outs need, of one deployment."""

    def __init__(self, timeline: Timeline, name: str) -> None:
        super().__init__()
        self._timeline = timeline
        self._name = name
        self._version = 0
        self._ledger: dict[str, LedgerRow] = {}
        self._deployments: dict[str, Deployment] = {}
        self._latest: dict[str, list[tuple[float, str, LedgerRow]]] = {}
        self._seen: set[str] = set()
        self.decided_at: dict[int, float] = {}
        """When a revision's fate was decided, on the timeline."""
        self.tallies: dict[str, Tally] = {}
        """By group."""

    @property
    def deployment(self) -> Deployment:
        """What is asked for now."""
        return self._deployments[self._name]

    def deploy(self, spec: DeploymentSpec, now: float) -> Deployment:
        """Ask for this from now on, as ``put_deployment`` does."""
        found = changed_deployment(self._deployments.get(spec.name), spec, now, None)
        self._deployments[spec.name] = found
        self._note_revision(found, "")
        return found

    def revision(self, number: int) -> Revision | None:
        """What is remembered of a revision."""
        return self._revisions[self._name].get(number)

    def take(self, rows: Iterable[LedgerRow]) -> None:
        """Append ledger rows; one that came before is passed over."""
        for row in rows:
            if row.id in self._seen:
                continue
            self._seen.add(row.id)
            group = row.replica.rpartition("-")[0]
            self._count(group, row)
            latest = self._latest.setdefault(group, [])
            key = row.started_at, row.id, row
            if len(latest) < LATEST:
                heapq.heappush(latest, key)
            else:
                heapq.heappushpop(latest, key)

    def _count(self, group: str, row: LedgerRow) -> None:
        tally = self.tallies.setdefault(group, Tally())
        if row.key_id == MIRROR_KEY:
            tally.copies += 1
        else:
            tally.attempts += 1
            tally.failed += row.outcome in (End.FAILED, End.REFUSED)

    def score(self, number: int, good: bool) -> None:
        """One score, 0 or 1, for an answer of a revision."""
        at_once(self.add_scores(self._name, number, count=1, total=float(good)))

    # The port ------------------------------------------------------------------------------------

    async def latest_attempts(self, group: str, *, since: float, limit: int) -> list[LedgerRow]:
        found = [one for one in self._latest.get(group, ()) if one[0] >= since]
        return [row for _, _, row in sorted(found, reverse=True)[: max(limit, 0)]]

    async def end_revision(
        self, name: str, number: int, outcome: Outcome, *, reason: str, now: float
    ) -> None:
        self.decided_at[number] = self._timeline.now
        await super().end_revision(name, number, outcome, reason=reason, now=now)

    async def return_to(
        self,
        name: str,
        number: int,
        *,
        reason: str,
        now: float,
        expected_generation: int | None = None,
    ) -> Deployment:
        self.decided_at[self.deployment.revision] = self._timeline.now
        return await super().return_to(
            name, number, reason=reason, now=now, expected_generation=expected_generation
        )
