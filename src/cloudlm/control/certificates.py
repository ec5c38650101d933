"""Certificates for the replicas that control starts (``worker.tls: mutual``): made before the first
one starts, renewed long before they end; workers and gateways follow the files by themselves.

Must not start anything.
"""

from __future__ import annotations

import asyncio

from cloudlm.core.clock import Clock
from cloudlm.core.errors import CloudlmError
from cloudlm.core.settings import WorkerSettings, environment_name
from cloudlm.security.authority import Authority, Purpose
from cloudlm.state.home import Home
from cloudlm.telemetry.logs import get_logger

RENEW_INTERVAL_S = 3600.0
_log = get_logger(__name__)


class Certificates:
    """The installation's own. Without ``mutual`` there is nothing to do."""

    def __init__(self, settings: WorkerSettings, home: Home, clock: Clock) -> None:
        self._settings = settings
        self._authority = Authority(home.tls)
        self._clock = clock
        self.wanted = settings.tls == "mutual"

    def ensure(self) -> dict[str, str]:
        """Make what is missing or ends soon; the environment that has workers use it. What the
        settings name for workers goes before. Blocks. Raises StorageFailed."""
        if not self.wanted:
            return {}
        now = self._clock.now()
        self._authority.ensure(Purpose.GATEWAY, (), now)
        if self._settings.tls_cert:
            return {}
        identity = self._authority.ensure(Purpose.WORKER, (), now)
        given = {
            "worker.tls_cert": str(identity),
            "worker.tls_key": "",
            "worker.tls_client_ca": str(self._authority.certificate),
        }
        return {environment_name(name): value for name, value in given.items()}

    async def run(self) -> None:
        """Renew until cancelled."""
        while True:
            await self._clock.sleep(RENEW_INTERVAL_S)
            try:
                await asyncio.to_thread(self.ensure)
            except CloudlmError as error:
                fields = {"reason": error.message}
                _log.error("certificates_not_renewed", extra={"fields": fields})
