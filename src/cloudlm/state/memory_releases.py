"""Revisions and roll-outs in this process's memory; see ``state.releases.ReleaseState``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from cloudlm.core.deployment import Deployment
from cloudlm.core.rollout import Outcome, Revision, Rollout
from cloudlm.core.tenant import LedgerRow
from cloudlm.state import releases


class MemoryReleases:
    """The revisions and roll-outs of ``MemoryState``."""

    _version: int
    _ledger: dict[str, LedgerRow]
    _deployments: dict[str, Deployment]

    def __init__(self) -> None:
        super().__init__()
        self._revisions: dict[str, dict[int, Revision]] = {}
        self._rollouts: dict[str, Rollout] = {}

    async def list_revisions(self, name: str) -> list[Revision]:
        known = self._revisions.get(name, {})
        return [known[number] for number in sorted(known, reverse=True)]

    async def fix_revision(
        self, name: str, number: int, *, model: str, adapters: Mapping[str, str]
    ) -> None:
        known = self._revisions.get(name, {})
        if number in known:
            known[number] = releases.fixed(known[number], model, adapters)

    async def end_revision(
        self, name: str, number: int, outcome: Outcome, *, reason: str, now: float
    ) -> None:
        known = self._revisions.get(name, {})
        if number in known:
            known[number] = releases.ended(known[number], outcome, reason, now)

    async def return_to(
        self,
        name: str,
        number: int,
        *,
        reason: str,
        now: float,
        expected_generation: int | None = None,
    ) -> Deployment:
        current = self._deployments.get(name)
        wanted, changed = releases.returning(
            name,
            current,
            await self.list_revisions(name),
            number,
            reason,
            now,
            expected_generation,
        )
        if wanted is not current:
            self._revisions[name] |= {one.number: one for one in changed}
            self._deployments[name] = wanted
            self._version += 1
        return wanted

    async def add_scores(
        self, name: str, number: int, *, count: int, total: float
    ) -> Revision | None:
        known = self._revisions.get(name, {})
        if number not in known:
            return None
        known[number] = releases.scored(known[number], count, total)
        return known[number]

    async def get_rollout(self, name: str) -> Rollout | None:
        return self._rollouts.get(name)

    async def list_rollouts(self) -> list[Rollout]:
        return [self._rollouts[name] for name in sorted(self._rollouts)]

    async def put_rollout(self, wanted: Rollout, *, replaces: Rollout | None) -> None:
        if wanted.name not in self._deployments:
            raise releases.no_deployment(wanted.name)
        releases.check_rollout_replaced(self._rollouts.get(wanted.name), replaces, wanted.name)
        self._rollouts[wanted.name] = wanted

    async def latest_attempts(self, group: str, *, since: float, limit: int) -> list[LedgerRow]:
        found = [
            row
            for row in self._ledger.values()
            if row.started_at >= since and releases.in_group(group, row.replica)
        ]
        found.sort(key=lambda row: (row.started_at, row.id), reverse=True)
        return found[: max(limit, 0)]

    def _note_revision(self, deployment: Deployment, by: str) -> None:
        """Remember a revision that is new, and of one that is not how it is asked for now."""
        known = self._revisions.setdefault(deployment.spec.name, {})
        if deployment.revision in known:
            noted = known[deployment.revision]
            known[deployment.revision] = replace(noted, spec=deployment.spec)
            return
        known[deployment.revision] = releases.first_note(deployment, by)
        rollout = self._rollouts.get(deployment.spec.name)
        needed = {deployment.revision, 0 if rollout is None else rollout.stable}
        for number in releases.forgotten(known, needed):
            del known[number]

    def _forget_releases(self, name: str) -> None:
        self._revisions.pop(name, None)
        self._rollouts.pop(name, None)
