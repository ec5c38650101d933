"""What clients ask for, told to control once a second, in requests and in tokens per model.

Control scales by it, also from nothing: a request for a model without a replica counts. Prompts are
counted when they come, by their bytes; how many tokens those are, and how many of them replicas
need not compute, is learnt from attempts that end. Failing to tell is no fault of a request; the
next second tells again. Must not decide about replicas.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from cloudlm.core.clock import Clock
from cloudlm.core.deployment import Demand
from cloudlm.core.errors import CloudlmError
from cloudlm.core.tenant import LedgerRow, Outcome
from cloudlm.gateway.admission import Admission
from cloudlm.gateway.loads import Loads
from cloudlm.gateway.view import ServedModel, View
from cloudlm.state.base import State
from cloudlm.telemetry.logs import get_logger

INTERVAL_S = 1.0
_WRITE_TIMEOUT_S = 2.0
_TOKENS_PER_BYTE = 0.25
_RATIO_MEMORY = 0.95
_WHOLE_SHARE = 0.001
_FINISHED = Outcome.FINISHED

_log = get_logger(__name__)


@dataclass(slots=True)
class _Work:
    """What one model was asked for and gave since the last report, and what its requests are like.

    ``mean_bytes`` is a request's usual size, ``computed_per_byte`` the tokens that a replica has to
    compute for each byte of it; both follow what comes.
    """

    arrived: int = 0
    arrived_bytes: int = 0
    ended: int = 0
    output_tokens: int = 0
    computed_tokens: int = 0
    timed: int = 0
    ttft_s: float = 0.0
    decode_s: float = 0.0
    decoded: int = 0
    mean_bytes: float = 0.0
    computed_per_byte: float = _TOKENS_PER_BYTE

    def arrive(self, size_bytes: int) -> None:
        self.arrived += 1
        self.arrived_bytes += size_bytes
        if not size_bytes:
            return  # nothing is known of it
        share = 1.0 - _RATIO_MEMORY if self.mean_bytes else 1.0
        self.mean_bytes += (size_bytes - self.mean_bytes) * share

    def end(self, row: LedgerRow) -> None:
        """An attempt ended well."""
        computed = max(row.prompt_tokens - row.cached_tokens, 0)
        self.ended += 1
        self.output_tokens += row.completion_tokens
        self.computed_tokens += computed
        first_s = row.first_token_s
        if first_s is not None and row.duration_s - first_s > _WHOLE_SHARE * row.duration_s:
            self.timed += 1
            self.ttft_s += first_s
            self.decode_s += row.duration_s - first_s
            self.decoded += max(row.completion_tokens - 1, 0)
        elif row.completion_tokens:  # in one piece: when its first token was there is not known
            self.decode_s += row.duration_s
            self.decoded += row.completion_tokens
        if self.mean_bytes:
            ratio = computed / self.mean_bytes
            self.computed_per_byte += (ratio - self.computed_per_byte) * (1.0 - _RATIO_MEMORY)

    def fresh(self) -> _Work:
        """The next interval's, which knows what requests are like."""
        return _Work(mean_bytes=self.mean_bytes, computed_per_byte=self.computed_per_byte)


class DemandReporter:
    """Counts arrivals and ends, and writes one ``Demand`` per model and second."""

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
        self._work: dict[str, _Work] = {}
        self._since = clock.monotonic()

    def count(self, model: str, size_bytes: int = 0) -> None:
        """Count one request of that size for a known model, admitted or not."""
        work = self._work.get(model)
        if work is None:
            work = self._work[model] = _Work()
        work.arrive(size_bytes)

    def ended(self, row: LedgerRow) -> None:
        """Take from an attempt's row what it says of the work; one that failed or that no replica
        answered says nothing, and copies (attempt 0) are nobody's requests."""
        work = self._work.get(row.model)
        if work is not None and row.attempt and row.outcome is _FINISHED and row.replica:
            work.end(row)

    def measure(self) -> list[Demand]:
        """The demand since the last measurement, for every known model.

        ``ongoing`` are requests inside the gateway; ``queued`` those of them not at a replica. What
        came in less than a second counts as a second's.
        """
        if not self._view.ready:
            return []
        now = self._clock.monotonic()
        elapsed_s = max(now - self._since, INTERVAL_S)
        self._since = now
        models = self._view.snapshot().models
        found = {name: self._work.get(name) or _Work() for name in models}
        self._work = {name: work.fresh() for name, work in found.items()}
        return [self._row(models[name], work, elapsed_s) for name, work in found.items()]

    def _row(self, model: ServedModel, work: _Work, elapsed_s: float) -> Demand:
        ongoing = self._admission.ongoing(model.name)
        served = self._loads.total(one.replica for one in (*model.endpoints, *model.beside))
        queued = max(ongoing - served, 0)
        return Demand(
            model=model.name,
            gateway=self._gateway,
            ongoing=ongoing,
            queued=queued,
            requests_per_s=work.arrived / elapsed_s,
            measured_at=self._clock.now(),
            prompt_tokens_per_s=work.arrived_bytes * work.computed_per_byte / elapsed_s,
            waiting_prompt_tokens=queued * work.mean_bytes * work.computed_per_byte,
            finished_per_s=work.ended / elapsed_s,
            output_tokens_per_s=work.output_tokens / elapsed_s,
            computed_tokens_per_s=work.computed_tokens / elapsed_s,
            ttft_s=work.ttft_s / work.timed if work.timed else 0.0,
            tpot_s=work.decode_s / work.decoded if work.decoded else 0.0,
        )

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
