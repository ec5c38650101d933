"""What the routes work with, handed in by the assembly; and what all of them do alike."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import ClientDisconnect, Request

from cloudlm.control.api.caller import Callers
from cloudlm.control.audit import Auditor
from cloudlm.control.budget import MemoryBudget
from cloudlm.control.drivers import Drivers
from cloudlm.control.jobs import Jobs
from cloudlm.control.leading import Leadership
from cloudlm.control.metrics import ControlMetrics
from cloudlm.control.reconcile import Reconciler
from cloudlm.control.registry import ModelRegistry
from cloudlm.control.terms import Terms
from cloudlm.core.clock import Clock
from cloudlm.core.errors import InvalidRequest, RequestCancelled
from cloudlm.core.requests import decode_body
from cloudlm.core.settings import OidcSettings
from cloudlm.security.credentials import Credentials
from cloudlm.security.hosts import HostGuard
from cloudlm.state.base import State

BODY_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Services:
    """Everything behind the API."""

    state: State
    registry: ModelRegistry
    drivers: Drivers
    reconciler: Reconciler | Terms
    jobs: Jobs
    metrics: ControlMetrics
    pepper: bytes
    clock: Clock
    callers: Callers
    auditor: Auditor
    oidc: OidcSettings = field(default_factory=OidcSettings)
    credentials: Credentials | None = None
    """The keys of external endpoints; without them none is known here."""
    guard: HostGuard = field(default_factory=lambda: HostGuard("0.0.0.0"))  # noqa: S104
    leadership: Leadership | None = None
    memory: MemoryBudget | None = None


async def read_object(request: Request) -> dict[str, Any]:
    """The request's JSON object. Raises InvalidRequest, PayloadTooLarge, RequestCancelled."""
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return decode_body(await request.body())
    except TimeoutError:
        raise InvalidRequest(f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s") from None
    except ClientDisconnect:
        raise RequestCancelled("the client went away") from None


def body_of(schema: dict[str, Any]) -> dict[str, Any]:
    """The OpenAPI fragment for a JSON body, which the routes read and check themselves."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
