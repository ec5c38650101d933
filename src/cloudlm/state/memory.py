"""State in this process's memory: the twin of ``sql`` for tests and for trying things.

Nothing survives the process and no other process sees it. One event loop only: no method awaits
anything between reading and writing, so every write is whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from cloudlm.core.deployment import (
    Demand,
    Deployment,
    DeploymentSpec,
    DeploymentStatus,
    Endpoint,
    Residence,
)
from cloudlm.core.job import Job
from cloudlm.core.lease import Lease
from cloudlm.core.pace import Pace
from cloudlm.core.tenant import LedgerRow
from cloudlm.core.usage import UsageQuery, UsageRow
from cloudlm.state.base import State
from cloudlm.state.decide import (
    changed_deployment,
    check_job_change,
    deleting_deployment,
)
from cloudlm.state.documents import (
    check_endpoints,
    dump_spec,
    load_spec,
    plain_job,
)
from cloudlm.state.memory_access import MemoryAccess
from cloudlm.state.memory_audit import MemoryAudit
from cloudlm.state.memory_leases import FencedMemory, MemoryLeases
from cloudlm.state.memory_releases import MemoryReleases
from cloudlm.state.usage import summed


class MemoryState(MemoryReleases, MemoryLeases, MemoryAccess, MemoryAudit):
    """See ``state.base.State``."""

    def __init__(self) -> None:
        super().__init__()
        self._deployments: dict[str, Deployment] = {}
        self._statuses: dict[str, DeploymentStatus] = {}
        self._endpoints: dict[str, list[Endpoint]] = {}
        self._demand: dict[tuple[str, str], Demand] = {}
        self._paces: dict[tuple[str, str], Pace] = {}
        self._jobs: dict[str, Job] = {}

    # Desired and observed deployments -----------------------------------------------------------

    async def put_deployment(
        self,
        spec: DeploymentSpec,
        *,
        now: float,
        expected_generation: int | None = None,
        by: str = "",
    ) -> Deployment:
        spec = load_spec(dump_spec(spec))
        current = self._deployments.get(spec.name)
        kept = self._keep(current, changed_deployment(current, spec, now, expected_generation))
        self._note_revision(kept, by)
        return kept

    async def get_deployment(self, name: str) -> Deployment | None:
        return self._deployments.get(name)

    async def list_deployments(self) -> list[Deployment]:
        return [self._deployments[name] for name in sorted(self._deployments)]

    async def mark_deleting(self, name: str, *, now: float) -> Deployment | None:
        current = self._deployments.get(name)
        if current is None:
            return None
        return self._keep(current, deleting_deployment(current, now))

    async def remove_deployment(self, name: str, *, generation: int) -> bool:
        current = self._deployments.get(name)
        if current is None or not current.deleting or current.generation != generation:
            return False
        del self._deployments[name]
        self._statuses.pop(name, None)
        self._endpoints.pop(name, None)
        self._forget_releases(name)
        self._paces = {k: pace for k, pace in self._paces.items() if k[0] != name}
        self._version += 1
        return True

    async def put_status(self, status: DeploymentStatus) -> None:
        """A status of a deployment that does not exist (any more) is not kept."""
        if status.name in self._deployments:
            before = self._statuses.get(status.name)
            self._statuses[status.name] = status
            if (before.residence if before is not None else Residence.NONE) != status.residence:
                self._version += 1

    async def get_status(self, name: str) -> DeploymentStatus | None:
        return self._statuses.get(name)

    async def list_statuses(self) -> list[DeploymentStatus]:
        """Sorted by name."""
        return [self._statuses[name] for name in sorted(self._statuses)]

    # Endpoints and demand -----------------------------------------------------------------------

    async def put_endpoints(self, model: str, endpoints: Sequence[Endpoint]) -> None:
        wanted = check_endpoints(model, endpoints)
        if wanted != self._endpoints.get(model, []):
            self._endpoints[model] = wanted
            self._version += 1

    async def list_endpoints(self) -> list[Endpoint]:
        return [
            endpoint for model in sorted(self._endpoints) for endpoint in self._endpoints[model]
        ]

    async def version(self) -> int:
        return self._version

    async def put_demand(self, demand: Sequence[Demand]) -> None:
        self._demand.update({(one.model, one.gateway): one for one in demand})

    async def list_demand(self, *, since: float) -> list[Demand]:
        """Sorted by model, then gateway."""
        return [
            self._demand[k] for k in sorted(self._demand) if self._demand[k].measured_at >= since
        ]

    async def drop_demand(self, demand: Sequence[Demand]) -> None:
        for one in demand:
            stored = self._demand.get((one.model, one.gateway))
            if stored is not None and stored.measured_at == one.measured_at:
                del self._demand[one.model, one.gateway]

    async def demand_mark(self) -> float:
        return max((one.measured_at for one in self._demand.values()), default=0.0)

    async def put_pace(self, pace: Pace) -> None:
        self._paces[pace.deployment, pace.model] = pace

    async def list_paces(self) -> list[Pace]:
        return [self._paces[key] for key in sorted(self._paces)]

    # Jobs ---------------------------------------------------------------------------------------

    async def put_job(self, job: Job) -> None:
        job = plain_job(job)
        if check_job_change(self._jobs.get(job.id), job):
            self._jobs[job.id] = job

    async def get_job(self, job_id: str) -> Job | None:
        job = self._jobs.get(job_id)
        return None if job is None else plain_job(job)

    async def list_jobs(self, *, limit: int = 100) -> list[Job]:
        newest_first = sorted(
            self._jobs.values(), key=lambda job: (job.created_at, job.id), reverse=True
        )
        return [plain_job(job) for job in newest_first[: max(limit, 0)]]

    async def list_unfinished_jobs(self, *, limit: int = 100) -> list[Job]:
        unfinished = [job for job in self._jobs.values() if not job.state.ended]
        unfinished.sort(key=lambda job: (job.created_at, job.id))
        return [plain_job(job) for job in unfinished[: max(limit, 0)]]

    # Ledger -------------------------------------------------------------------------------------

    async def append_ledger(self, rows: Sequence[LedgerRow]) -> None:
        for row in rows:
            self._ledger.setdefault(row.id, row)

    async def list_ledger(
        self, *, since: float = 0.0, request_id: str | None = None, limit: int = 1000
    ) -> list[LedgerRow]:
        found = [
            row
            for row in self._ledger.values()
            if row.started_at >= since and request_id in (None, row.request_id)
        ]
        found.sort(key=lambda row: (row.started_at, row.id))
        return found[: max(limit, 0)]

    async def usage(self, query: UsageQuery) -> list[UsageRow]:
        return summed(query, self._ledger.values())

    def fenced(self, lease: Lease) -> State:
        return cast("State", FencedMemory(self, self._leases, lease))

    async def close(self) -> None:
        """Nothing to close; the facts stay readable."""

    def _keep(self, current: Deployment | None, wanted: Deployment) -> Deployment:
        if wanted is not current:
            self._deployments[wanted.spec.name] = wanted
            self._version += 1
        return wanted
