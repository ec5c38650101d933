"""One look at an external endpoint, and what looks add up to.

Asks ``GET /models`` with the endpoint's key, which every such service offers for nothing. The
judging is pure (``Record``); ``Looker`` does the asking, within a time limit, over a connection to
an address that was looked at, following no redirect. Must not ask for tokens: they cost money.
"""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from cloudlm import __version__
from cloudlm.core.errors import CloudlmError
from cloudlm.core.external import ExternalEndpoint
from cloudlm.core.health import MISSES_TO_FAIL
from cloudlm.security.credentials import Credentials
from cloudlm.security.outside import Forbidden, Outside

LOOK_TIMEOUT_S = 10.0
FAILING_INTERVAL_S = 5.0
"""Pause between looks at an endpoint that fails: whoever mends it should not wait long."""
_MAX_LIST_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Look:
    """What one look saw. ``reason``: why no requests should be sent there, empty if they may;
    ``passing``: it may be over in a moment. ``note``: what the operator should know."""

    reason: str = ""
    passing: bool = False
    note: str = ""


WELL = Look()


@dataclass(frozen=True, slots=True)
class Record:
    """What is remembered of an endpoint between looks. ``looked_at`` is monotonic seconds, None
    before the first; ``since`` is when it became well, Unix seconds (0: it is not)."""

    looked_at: float | None = None
    reason: str = ""
    misses: int = 0
    since: float = 0.0

    @property
    def is_new(self) -> bool:
        """Whether it was never looked at."""
        return self.looked_at is None

    def is_due(self, now: float, interval_s: float) -> bool:
        """Whether it should be looked at again; ``now`` is monotonic seconds."""
        if self.looked_at is None:
            return True
        pause_s = min(FAILING_INTERVAL_S, interval_s) if self.misses else interval_s
        return now - self.looked_at >= pause_s

    def after(self, look: Look, now: float, wall: float) -> Record:
        """The record after one more look. One that was well stays so over a single miss that may
        pass; everything else counts at once."""
        if not look.reason:
            return Record(now, since=self.since or wall)
        misses = self.misses + 1
        if look.passing and misses < MISSES_TO_FAIL and self.since:
            return replace(self, looked_at=now, misses=misses)
        return Record(now, look.reason, misses)


class Looks(Protocol):
    """Looks at one endpoint."""

    async def look(self, endpoint: ExternalEndpoint) -> Look:
        """Never raises."""
        ...


class Looker:
    """Looks over HTTP. ``tls`` is spoken to https addresses."""

    def __init__(
        self,
        credentials: Credentials,
        outside: Outside,
        tls: ssl.SSLContext,
        timeout_s: float = LOOK_TIMEOUT_S,
    ) -> None:
        self._credentials = credentials
        self._outside = outside
        self._tls = tls
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)

    async def look(self, endpoint: ExternalEndpoint) -> Look:
        try:
            status, body = await self._ask(endpoint)
        except (CloudlmError, Forbidden) as error:
            return Look(str(getattr(error, "message", error)))
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            return Look(_fault(error), passing=True)
        return judged(status, body, endpoint.model)

    async def _ask(self, endpoint: ExternalEndpoint) -> tuple[int, bytes]:
        parts = urlsplit(endpoint.url)
        tls = parts.scheme == "https"
        host, port = parts.hostname or "", parts.port or (443 if tls else 80)
        headers = {"user-agent": f"cloudlm/{__version__}"}
        if endpoint.secret:
            key = self._credentials.key_for(endpoint.secret, endpoint.url)
            headers["authorization"] = f"Bearer {key}"
        found = await self._outside.addresses(host, port, tls=tls)
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=self._tls, resolver=_Pinned(found)),
                timeout=self._timeout,
                trust_env=False,
            ) as session,
            session.get(f"{endpoint.url}/models", headers=headers, allow_redirects=False) as answer,
        ):
            return answer.status, await answer.content.read(_MAX_LIST_BYTES)


def _fault(error: Exception) -> str:
    """What hindered a look, in few words; never what the service said."""
    if isinstance(error, aiohttp.ClientSSLError | ssl.SSLError):
        cause = getattr(error, "certificate_error", None) or getattr(error, "os_error", error)
        why = getattr(cause, "verify_message", "") or getattr(cause, "reason", "")
        return f"no trusted TLS: {why or type(cause).__name__}"
    if isinstance(getattr(error, "os_error", error), ConnectionRefusedError):
        return "cannot be reached: nothing listens there (connection refused)"
    if isinstance(error, TimeoutError):
        return "cannot be reached: no answer in time"
    return f"cannot be reached: {type(error).__name__}"


def judged(status: int, body: bytes, model: str) -> Look:
    """What an answer to ``GET /models`` says. A service that has no such list, or is asked too
    often, is there all the same."""
    if status in (401, 403):
        return Look(f"it does not accept the key ({status})")
    if status == 402:
        return Look("it wants to be paid first (402)")
    if 300 <= status < 400:
        return Look(f"it answers with a redirect ({status}), which is never followed")
    if status >= 500 and status != 501:
        return Look(f"it answers with status {status}", passing=True)
    listed = _listed(body) if status == 200 else None
    if listed and model not in listed:
        return Look(note=f"it does not list the model {model!r}")
    return WELL


def _listed(body: bytes) -> set[str]:
    """The ids of a list of models, empty if it is none."""
    try:
        data: Any = json.loads(body)["data"]
        return {str(one["id"]) for one in data}
    except (ValueError, KeyError, TypeError, RecursionError):
        return set()


class _Pinned(AbstractResolver):
    """Finds nothing but the addresses that were judged."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in self._addresses
        ]

    async def close(self) -> None:
        """Nothing to let go of."""
