"""Sends a request to an endpoint, whoever serves there: one of our workers, or another's service.

The two clients share no connection, certificate or key. Must not choose or retry.
"""

from __future__ import annotations

from cloudlm.core.deployment import Endpoint
from cloudlm.gateway.foreign import Foreign
from cloudlm.gateway.upstream import Answer, Upstream


class Sender:
    """``own`` speaks to workers, ``foreign`` to all others."""

    def __init__(self, own: Upstream, foreign: Foreign) -> None:
        self._own = own
        self._foreign = foreign

    async def open(self) -> None:
        """Make the connection pools; call inside the event loop."""
        await self._own.open()
        await self._foreign.open()

    async def close(self) -> None:
        """Close all connections."""
        await self._own.close()
        await self._foreign.close()

    async def send(
        self,
        endpoint: Endpoint,
        path: str,
        body: bytes,
        headers: dict[str, str],
        *,
        timeout_s: float,
        now: float,
    ) -> Answer:
        """Post ``body`` to ``path`` of ``endpoint`` and wait for a good answer's head. ``headers``
        are for our workers alone. Raises as ``Upstream.send`` does, and NotSupported."""
        if endpoint.is_external:
            return await self._foreign.send(endpoint, path, body, timeout_s=timeout_s, now=now)
        return await self._own.send(
            endpoint.url + path,
            body,
            headers,
            replica=endpoint.replica,
            timeout_s=timeout_s,
            now=now,
        )
