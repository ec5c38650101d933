"""A server's certificate while it runs: which one it shows, when that ends, and its renewal.

A changed file is taken for the next handshake; one that cannot serve is logged and the last good
one goes on. Must not know requests.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from cloudlm.core.clock import Clock
from cloudlm.core.errors import CloudlmError
from cloudlm.security.hosts import is_loopback
from cloudlm.security.tls import LiveContext
from cloudlm.security.transport import Spoken, own_context, own_pair
from cloudlm.telemetry.logs import get_logger

_REMAKE_INTERVAL_S = 3600.0

_log = get_logger(__name__)


class Door:
    """TLS on the address of ``server`` (``gateway`` or ``control``); ``context`` is None where it
    speaks plain HTTP. Raises BadSetting and StorageFailed."""

    def __init__(self, server: str, settings: Spoken, folder: Path, clock: Clock) -> None:
        self._server = server
        self._settings = settings
        self._folder = folder
        self._clock = clock
        self._pair = own_pair(server, settings, folder, clock.now())
        self.context: LiveContext | None = None
        self.expires_at = 0.0
        """When the certificate ends, Unix seconds; 0 without one."""
        if self._pair is not None:
            self.context = own_context(settings, self._pair)
            self.context.on_renewal.append(self._read_end)
            self._read_end()
        elif not is_loopback(settings.host):
            fields = {"host": settings.host, "remedy": f"{server}.tls_cert, or a proxy with TLS"}
            _log.warning(f"{server}_without_tls", extra={"fields": fields})

    def _read_end(self) -> None:
        from cloudlm.security.authority import expires_at

        assert self._pair is not None
        self.expires_at = 0.0
        with contextlib.suppress(ValueError, CloudlmError):
            self.expires_at = expires_at(self._pair.files[0])
        left_days = (self.expires_at - self._clock.now()) / 86_400
        if left_days < 0:
            _log.error("certificate_expired", extra={"fields": {"days_ago": round(-left_days, 1)}})

    async def run(self) -> None:
        """Follow the files, and make a self-signed certificate anew in time, until cancelled."""
        if self.context is None:
            await asyncio.Event().wait()
            return
        following = asyncio.create_task(self.context.follow())
        try:
            while True:
                await self._clock.sleep(_REMAKE_INTERVAL_S)
                try:
                    await asyncio.to_thread(self._remake)
                except CloudlmError as error:
                    _log.error("certificate_not_made", extra={"fields": {"reason": error.message}})
        finally:
            following.cancel()

    def _remake(self) -> None:
        own_pair(self._server, self._settings, self._folder, self._clock.now())
