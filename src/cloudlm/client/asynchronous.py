"""``AsyncClient``: the SDK for asyncio code. What is asked is in ``calls``; this carries it out."""

from __future__ import annotations

import builtins
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import httpx2

from cloudlm.client import access_calls, calls
from cloudlm.client.access_calls import Place, Whoami
from cloudlm.client.asynchronous_access import (
    AsyncKeys,
    AsyncPrincipals,
    AsyncProjects,
    AsyncRoles,
    AsyncTenants,
)
from cloudlm.client.asynchronous_rollouts import AsyncRollouts
from cloudlm.client.calls import Call, Pause, Program
from cloudlm.client.connection import FOLLOW_TIMEOUT, TIMEOUT, Connection
from cloudlm.core.clock import Clock, SystemClock
from cloudlm.core.deployment import DeploymentSpec, DeploymentStatus
from cloudlm.core.errors import CloudlmError
from cloudlm.core.job import Job
from cloudlm.core.lease import Leader
from cloudlm.core.model import Manifest
from cloudlm.core.usage import UsageRow
from cloudlm.core.wire import DeploymentView, DriverEntry, ModelEntry

if TYPE_CHECKING:
    from openai import AsyncOpenAI

T = TypeVar("T")


class AsyncClient:
    """The control API of one installation. Close it, or use it in an ``async with`` statement.

    ``api_key`` is CLOUDLM_API_KEY if not given (or OPENAI_API_KEY, if that is a key of cloudlm);
    ``control_url`` CLOUDLM_CONTROL_URL, ``gateway_url`` CLOUDLM_GATEWAY_URL, else this machine.
    ``ca`` (CLOUDLM_CA) is a PEM file of authorities to trust besides the usual ones.
    ``transport`` replaces the network. Every method raises ``core.errors``: Unavailable if nothing
    answers, else what the server said. Raises BadSetting for an address or key that cannot be.
    """

    def __init__(
        self,
        api_key: str | None = None,
        control_url: str | None = None,
        gateway_url: str | None = None,
        *,
        ca: str | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.connection = Connection.read(api_key, control_url, gateway_url, ca=ca)
        self._http = httpx2.AsyncClient(transport=transport, **self.connection.http_options)
        self._clock = clock or SystemClock()
        self.models = AsyncModels(self)
        self.deployments = AsyncDeployments(self)
        self.rollouts = AsyncRollouts(self)
        self.tenants = AsyncTenants(self)
        self.projects = AsyncProjects(self)
        self.principals = AsyncPrincipals(self)
        self.roles = AsyncRoles(self)
        self.keys = AsyncKeys(self)
        self.jobs = AsyncJobs(self)
        self.drivers = AsyncDrivers(self)

    async def usage(
        self,
        group_by: Sequence[str] = ("day",),
        *,
        since: str | None = None,
        until: str | None = None,
        tenant: str | None = None,
        project: str | None = None,
    ) -> builtins.list[UsageRow]:
        """Sums of tokens and costs, grouped by ``day``, ``tenant``, ``project``, ``key`` and
        ``model``, between two UTC dates (2026-01-31, the last included); else the last 30 days."""
        given = {"since": since, "until": until, "tenant": tenant, "project": project}
        return await self.send(calls.usage({"group_by": ",".join(group_by), **given}))

    async def signin_place(self) -> Place:
        """Where people sign in; needs no key. Raises NotFound if nobody does here."""
        return await self.send(access_calls.signin_place())

    async def leader(self) -> Leader:
        """Which of several controls on one state leads, as the one that is asked knows it."""
        return await self.send(access_calls.leader())

    async def whoami(self) -> Whoami:
        """The key in use and the principal that it speaks for."""
        return await self.send(access_calls.whoami())

    async def audit(
        self, *, after: int = 0, limit: int = 100, tenant: str | None = None
    ) -> list[dict[str, Any]]:
        """Records of the audit log after a number, in order."""
        return await self.send(access_calls.list_audit(after, limit, tenant))

    def openai(self, **options: Any) -> AsyncOpenAI:
        """The official client, pointed at the gateway with the same key; ``options`` are its own.

        Close it, or use it in an ``async with`` statement.
        """
        from openai import AsyncOpenAI, DefaultAsyncHttpx2Client

        settings = self.connection.openai_options(options)
        if self.connection.gateway_is_local:
            how = self.connection.local_options
            settings.setdefault("http_client", DefaultAsyncHttpx2Client(**how))
        return AsyncOpenAI(**settings)

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def send(self, call: Call[T]) -> T:
        """Carry out one call."""
        try:
            response = await self._http.request(**self.connection.request_options(call))
        except httpx2.HTTPError as error:
            raise self.connection.failure(error) from error
        return self.connection.result(call, response)

    async def run(self, program: Program[T]) -> T:
        """Carry out a program of calls and pauses."""
        try:
            step = next(program)
            while True:
                try:
                    result = await self._perform(step)
                except CloudlmError as error:
                    step = program.throw(error)
                else:
                    step = program.send(result)
        except StopIteration as end:
            value: T = end.value
            return value

    async def lines(self, call: Call[None], *, follow: bool) -> AsyncIterator[str]:
        """The lines of a text answer as they come."""
        options = self.connection.request_options(call)
        options["timeout"] = FOLLOW_TIMEOUT if follow else TIMEOUT
        try:
            async with self._http.stream(**options) as response:
                if not response.is_success:
                    await response.aread()
                self.connection.check(response)
                async for line in response.aiter_lines():
                    yield line
        except httpx2.HTTPError as error:
            raise self.connection.failure(error) from error

    async def _perform(self, step: Call[Any] | Pause) -> Any:
        if isinstance(step, Call):
            return await self.send(step)
        await self._clock.sleep(step.seconds)
        return self._clock.monotonic()


class AsyncModels:
    """Models of the registry: versions and aliases."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self) -> builtins.list[ModelEntry]:
        return await self._client.send(calls.list_models())

    async def get(self, name: str) -> ModelEntry:
        return await self._client.send(calls.get_model(name))

    async def version(self, name: str, version: int) -> Manifest:
        return await self._client.send(calls.get_version(name, version))

    async def pull(self, source: str, *, name: str | None = None, alias: str | None = None) -> Job:
        """Start to import a folder, a hub id or an object store's address; see ``jobs.wait``."""
        return await self._client.send(calls.pull_model(source, name, alias))

    async def remove(self, name: str, version: int) -> None:
        await self._client.send(calls.remove_version(name, version))

    async def set_alias(self, name: str, alias: str, version: int) -> None:
        await self._client.send(calls.set_alias(name, alias, version))

    async def remove_alias(self, name: str, alias: str) -> None:
        await self._client.send(calls.remove_alias(name, alias))


class AsyncDeployments:
    """What is asked to run, and what runs."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self) -> builtins.list[DeploymentView]:
        return await self._client.send(calls.list_deployments())

    async def memory_budget(self) -> int:
        """Bytes that the models of control's machine may take together; 0: no budget."""
        return await self._client.send(calls.memory_budget())

    async def get(self, name: str) -> DeploymentView:
        return await self._client.send(calls.get_deployment(name))

    async def create(self, spec: DeploymentSpec) -> DeploymentView:
        """Ask for a new deployment. Raises Conflict if the name is taken."""
        return await self._client.send(calls.create_deployment(spec))

    async def apply(
        self, spec: DeploymentSpec, *, expected_generation: int | None = None
    ) -> DeploymentView:
        """Create or replace. Raises Conflict if it is not at ``expected_generation``."""
        return await self._client.send(calls.apply_deployment(spec, expected_generation))

    async def scale(self, name: str, min_replicas: int, max_replicas: int) -> DeploymentView:
        return await self._client.send(calls.scale_deployment(name, min_replicas, max_replicas))

    async def sleep(self, name: str) -> DeploymentView:
        """Have its replicas give their memory back; see ``wait_ready``."""
        return await self._client.send(calls.turn_deployment(name, asleep=True))

    async def wake(self, name: str) -> DeploymentView:
        """Have its replicas load the model again; see ``wait_ready``."""
        return await self._client.send(calls.turn_deployment(name, asleep=False))

    async def delete(self, name: str) -> None:
        """Ask for its end; see ``wait_gone``."""
        await self._client.send(calls.delete_deployment(name))

    def logs(
        self, name: str, *, tail: int = 100, follow: bool = False, replica: str | None = None
    ) -> AsyncIterator[str]:
        """The last ``tail`` lines, then with ``follow`` those that come."""
        call = calls.deployment_logs(name, tail, follow, replica)
        return self._client.lines(call, follow=follow)

    async def wait_ready(
        self,
        name: str,
        timeout_s: float = 600.0,
        *,
        on_status: Callable[[DeploymentStatus], None] | None = None,
    ) -> DeploymentView:
        """Wait until the newest generation is ready. Raises Unavailable or UpstreamTimeout."""
        return await self._client.run(calls.wait_ready(name, timeout_s, on_status))

    async def wait_gone(self, name: str, timeout_s: float = 600.0) -> None:
        """Wait until it does not exist. Raises UpstreamTimeout."""
        await self._client.run(calls.wait_gone(name, timeout_s))


class AsyncJobs:
    """Long work."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self) -> builtins.list[Job]:
        """Newest first."""
        return await self._client.send(calls.list_jobs())

    async def get(self, job_id: str) -> Job:
        return await self._client.send(calls.get_job(job_id))

    async def start(self, kind: str, arguments: Mapping[str, Any]) -> Job:
        return await self._client.send(calls.start_job(kind, arguments))

    async def cancel(self, job_id: str) -> Job:
        """Ask for its end; a job that has ended stays as it is."""
        return await self._client.send(calls.cancel_job(job_id))

    async def wait(
        self,
        job_id: str,
        timeout_s: float = 86_400.0,
        *,
        on_progress: Callable[[Job], None] | None = None,
    ) -> Job:
        """Wait until it has ended; look at ``state`` for how. Raises UpstreamTimeout."""
        return await self._client.run(calls.wait_job(job_id, timeout_s, on_progress))


class AsyncDrivers:
    """What deployments can run on."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self) -> builtins.list[DriverEntry]:
        return await self._client.send(calls.list_drivers())
