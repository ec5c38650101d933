"""The state contract: facts that gateway and control share.

Control writes desired and observed deployments and endpoints; the gateway follows endpoints and
keys and writes demand and ledger rows. Every write is one transaction. Reads see whole writes.
Implementations: ``memory`` (one process, tests) and ``sql`` (SQLite by default, PostgreSQL).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from cloudlm.core.deployment import Demand, Deployment, DeploymentSpec, DeploymentStatus, Endpoint
from cloudlm.core.job import Job
from cloudlm.core.lease import Lease
from cloudlm.core.pace import Pace
from cloudlm.core.tenant import LedgerRow
from cloudlm.core.usage import UsageQuery, UsageRow
from cloudlm.state.access import AccessState
from cloudlm.state.audit import AuditState
from cloudlm.state.leases import LeaseState
from cloudlm.state.releases import ReleaseState


class State(AccessState, AuditState, ReleaseState, LeaseState, Protocol):
    """Identities and keys (``state.access``), the audit log (``state.audit``), revisions and
    roll-outs (``state.releases``), who leads (``state.leases``), and what follows.

    All methods raise ``Unavailable`` when the store cannot be reached and ``StorageFailed`` when it
    cannot write (full disk).
    """

    # Desired and observed deployments -----------------------------------------------------------

    async def put_deployment(
        self,
        spec: DeploymentSpec,
        *,
        now: float,
        expected_generation: int | None = None,
        by: str = "",
    ) -> Deployment:
        """Create or change a deployment by ``Deployment.changed``; an equal spec changes nothing.
        ``by`` is who asks, for the history of its revisions.

        ``expected_generation`` 0 means it must not exist, n that it must be at n; else Conflict.
        """
        ...

    async def get_deployment(self, name: str) -> Deployment | None: ...

    async def list_deployments(self) -> list[Deployment]:
        """Sorted by name, those being deleted included."""
        ...

    async def mark_deleting(self, name: str, *, now: float) -> Deployment | None:
        """Ask for deletion (generation + 1 unless already asked); None if there is none."""
        ...

    async def remove_deployment(self, name: str, *, generation: int) -> bool:
        """Forget a deployment and all that is known of it, if it is still being deleted at this
        generation."""
        ...

    async def put_status(self, status: DeploymentStatus) -> None:
        """Keep it. Of what it says only another ``residence`` makes a new version: gateways go by
        it."""
        ...

    async def get_status(self, name: str) -> DeploymentStatus | None: ...

    async def list_statuses(self) -> list[DeploymentStatus]: ...

    # Endpoints and demand -----------------------------------------------------------------------

    async def put_endpoints(self, model: str, endpoints: Sequence[Endpoint]) -> None:
        """Replace the endpoints of one model. Unchanged endpoints change no version."""
        ...

    async def list_endpoints(self) -> list[Endpoint]:
        """Sorted by model, then replica."""
        ...

    async def version(self) -> int:
        """Grows with each change that a gateway must see (endpoints, deployments' names, keys).
        Cheap: the gateway asks several times a second."""
        ...

    async def put_demand(self, demand: Sequence[Demand]) -> None:
        """Replace what (gateway, model) pairs reported before."""
        ...

    async def list_demand(self, *, since: float) -> list[Demand]:
        """Reports dated ``since`` (wall time of their gateways, which nobody checks) or later."""
        ...

    async def drop_demand(self, demand: Sequence[Demand]) -> None:
        """Forget reports, unless their gateways replaced them meanwhile."""
        ...

    async def demand_mark(self) -> float:
        """The highest date of a report, 0 without any; another one says that somebody reported.
        Cheap: control asks many times a second, so that a request for a model without a replica is
        noticed at once."""
        ...

    async def put_pace(self, pace: Pace) -> None:
        """Create or replace what was measured of a version under a deployment; it is forgotten with
        the deployment."""
        ...

    async def list_paces(self) -> list[Pace]:
        """Sorted by deployment, then model."""
        ...

    # Jobs ---------------------------------------------------------------------------------------

    async def put_job(self, job: Job) -> None:
        """Create or replace; a job that has ended is never changed again (Conflict)."""
        ...

    async def get_job(self, job_id: str) -> Job | None: ...

    async def list_jobs(self, *, limit: int = 100) -> list[Job]:
        """Newest first."""
        ...

    async def list_unfinished_jobs(self, *, limit: int = 100) -> list[Job]:
        """Oldest first: those that have not ended, however many newer ones have."""
        ...

    # Ledger -------------------------------------------------------------------------------------

    async def append_ledger(self, rows: Sequence[LedgerRow]) -> None:
        """Append; a row whose id exists already is ignored, so that a retry doubles nothing."""
        ...

    async def list_ledger(
        self, *, since: float = 0.0, request_id: str | None = None, limit: int = 1000
    ) -> list[LedgerRow]:
        """Oldest first, by start time."""
        ...

    async def usage(self, query: UsageQuery) -> list[UsageRow]:
        """Sums of ledger rows, sorted by the names that they are grouped by."""
        ...

    def fenced(self, lease: Lease) -> State:
        """The same state for whoever holds ``lease``: each write looks in its own transaction
        whether the lease is still held with this token, and raises Superseded if not."""
        ...

    async def close(self) -> None: ...
