"""What control has told the world through the state: endpoints and statuses.

Remembers what it wrote, so that an unchanged world is not written again, and what it cannot know to
be written because an answer was lost. Begins with what the control before it has written. Must not
decide what is true.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from cloudlm.control.external import as_external
from cloudlm.control.metrics import ControlMetrics
from cloudlm.control.observe import Seen, SeenGroup
from cloudlm.control.plan import Plan
from cloudlm.control.releases import split_of
from cloudlm.control.rollout import Decision
from cloudlm.core.deployment import DeploymentStatus, Endpoint
from cloudlm.state.base import State
from cloudlm.telemetry.logs import get_logger

_log = get_logger(__name__)


class Published:
    """Endpoints by model and statuses by deployment, as they stand in the state."""

    def __init__(self, state: State, metrics: ControlMetrics) -> None:
        self._state = state
        self._metrics = metrics
        self.endpoints: dict[str, tuple[Endpoint, ...]] | None = None
        self.statuses: dict[str, DeploymentStatus] | None = None
        self._unsure: set[str] = set()

    async def recall(self) -> bool:
        """At the first pass: what the control before us has written. Whether anything was read."""
        if self.endpoints is None:
            found: dict[str, tuple[Endpoint, ...]] = {}
            for endpoint in await self._state.list_endpoints():
                found[endpoint.model] = (*found.get(endpoint.model, ()), endpoint)
            self.endpoints = found
        if self.statuses is not None:
            return False
        self.statuses = {one.name: one for one in await self._state.list_statuses()}
        return True

    def endpoints_of(self, model: str) -> tuple[Endpoint, ...]:
        """Those that a model or adapter has."""
        return (self.endpoints or {}).get(model, ())

    async def status_of(self, name: str) -> DeploymentStatus | None:
        """The status that a deployment has."""
        return (self.statuses or {}).get(name) or await self._state.get_status(name)

    def wanted_of(self, name: str) -> int:
        """The replicas that were last said to be wanted, 0 if nothing was said."""
        status = (self.statuses or {}).get(name)
        return 0 if status is None else status.wanted_replicas

    async def put_endpoints(
        self, name: str, endpoints: tuple[Endpoint, ...], carriers: Mapping[str, Collection[str]]
    ) -> None:
        """Write a deployment's endpoints, and those of its adapters: the replicas that carry
        each."""
        await self._put_endpoints(name, endpoints)
        for adapter, carrying in carriers.items():
            found = [replace(one, model=adapter) for one in endpoints if one.replica in carrying]
            await self._put_endpoints(adapter, tuple(found))

    async def _put_endpoints(self, model: str, endpoints: tuple[Endpoint, ...]) -> None:
        assert self.endpoints is not None
        if model in self._unsure or self.endpoints.get(model, ()) != endpoints:
            self._unsure.add(model)  # a write may be done though its answer was lost
            await self._state.put_endpoints(model, endpoints)
            self._unsure.discard(model)
            self.endpoints[model] = endpoints

    async def put_status(self, status: DeploymentStatus) -> None:
        """Write a deployment's status, unless it says what it said."""
        assert self.statuses is not None
        self._metrics.deployment(
            status.name, status.wanted_replicas, status.ready_replicas, status.memory_bytes
        )
        before = self.statuses.get(status.name)
        if before is not None and replace(before, updated_at=status.updated_at) == status:
            return
        self.statuses.pop(status.name, None)  # nobody knows, if its answer is lost
        await self._state.put_status(status)
        self.statuses[status.name] = status
        if before is None or before.phase is not status.phase:
            fields = {"deployment": status.name, "phase": status.phase.value}
            _log.info("phase", extra={"fields": {**fields, "reason": status.message}})

    def forget(self, name: str) -> None:
        """The deployment is gone."""
        if self.statuses is not None:
            self.statuses.pop(name, None)
        self.forget_endpoints(name)

    def forget_endpoints(self, name: str) -> None:
        """Nobody answers under this name any more."""
        if self.endpoints is not None:
            self.endpoints.pop(name, None)


def endpoints_for(
    name: str,
    groups: Sequence[SeenGroup],
    step: Plan,
    seen: Seen,
    before: Collection[Endpoint],
    decision: Decision | None,
    *,
    asleep: bool = False,
) -> tuple[Endpoint, ...]:
    """The endpoints of a deployment: replicas that are to stay and answer, and with weight 0 those
    that sleep, or fall asleep now (``asleep``). ``decision`` says how requests are split between
    revisions; ``before`` are those that it has."""
    revisions = [g.observation.spec.revision for g in groups if g.observation.spec]
    shares, mirrors = split_of(decision, before, revisions)
    return tuple(
        as_external(
            Endpoint(
                name,
                replica.id,
                replica.url,
                group.observation.spec.revision,
                0.0 if asleep or replica.id in seen.sleeping else 1.0,
                shares.get(group.observation.spec.revision),
                mirrors.get(group.observation.spec.revision, 0.0),
            ),
            group.observation,
        )
        for group in groups
        if group.observation.spec is not None
        for replica in group.observation.replicas
        if replica.id in seen.ready | seen.sleeping
        and replica.id not in step.leaving
        and replica.url
    )


def carriers_of(adapters: Collection[str], groups: Sequence[SeenGroup]) -> dict[str, set[str]]:
    """By adapter the replicas that carry it."""
    return {
        adapter: {
            replica.id
            for group in groups
            if group.observation.spec and adapter in group.observation.spec.adapters
            for replica in group.observation.replicas
        }
        for adapter in adapters
    }
