"""What clients ask for, told to control once a second: requests ongoing and arriving per model.

Control scales by it, also from nothing: a request for a model without a replica counts. Failing to
tell is no fault of a request; the next second tells again. Must not decide about replicas.
"""

from __future__ import annotations

import asyncio
from collections import Counter

from cloudlm.core.clock import Clock
from cloudlm.core.deployment import Demand
from cloudlm.core.errors import CloudlmError
from cloudlm.gateway.admission import Admission
from cloudlm.gateway.loads import Loads
from cloudlm.gateway.view import View
from cloudlm.state.base import State
from cloudlm.telemetry.logs import get_logger

INTERVAL_S = 1.0
_WRITE_TIMEOUT_S = 2.0

_log = get_logger(__name__)


class DemandReporter:
    """Counts arrivals and writes one ``Demand`` per model and second."""

    def __init__(
        self,
        gateway: str,
        state: State,
        view: View,
        admission: Admission,
        loads: Loads,
        clock: Clock,
    ) -> None:
        self._gateway = gateway
        self._state = state
        self._view = view
        self._admission = admission
        self._loads = loads
        self._clock = clock
        self._arrived: Counter[str] = Counter()
        self._since = clock.monotonic()

    def count(self, model: str) -> None:
        """Count one request for a known model, admitted or not."""
        self._arrived[model] += 1

    def measure(self) -> list[Demand]:
        """The demand since the last measurement, for every known model.

        ``ongoing`` are requests inside the gateway; ``queued`` those of them not at a replica.
        """
        now = self._clock.monotonic()
        elapsed_s = max(now - self._since, 1e-3)
        arrived, self._arrived, self._since = self._arrived, Counter(), now
        if not self._view.ready:
            return []
        rows: list[Demand] = []
        for model in self._view.snapshot().models.values():
            ongoing = self._admission.ongoing(model.name)
            replicas = (one.replica for one in (*model.endpoints, *model.beside))
            served = self._loads.total(replicas)
            rows.append(
                Demand(
                    model=model.name,
                    gateway=self._gateway,
                    ongoing=ongoing,
                    queued=max(ongoing - served, 0),
                    requests_per_s=arrived[model.name] / elapsed_s,
                    measured_at=self._clock.now(),
                )
            )
        return rows

    async def report(self) -> bool:
        """Measure and write once; False if the state did not take it."""
        rows = self.measure()
        if not rows:
            return True
        try:
            async with asyncio.timeout(_WRITE_TIMEOUT_S):
                await self._state.put_demand(rows)
        except (CloudlmError, OSError) as error:
            _log.debug("demand_not_written", extra={"fields": {"reason": repr(error)}})
            return False
        return True

    async def run(self) -> None:
        """Report until cancelled."""
        while True:
            try:
                await self.report()
            except Exception:
                _log.exception("demand_report_failed")
            await self._clock.sleep(INTERVAL_S)
