"""Writes refused access into the audit log, in the background and within bounds.

A flood of bad requests must neither fill the log nor wait for the database: what is too much is
counted and said in the next record. Must not decide who is refused.
"""

from __future__ import annotations

from cloudlm.core.audit import AuditEvent, AuditOutcome, kept
from cloudlm.core.clock import Clock
from cloudlm.core.errors import AuthenticationFailed, CloudlmError, PermissionDenied
from cloudlm.gateway.account import Exchange, status_of
from cloudlm.gateway.exchange import GatewayRequest
from cloudlm.gateway.view import HiddenModel
from cloudlm.security.audit import Flood, flood_note
from cloudlm.security.keys import without_keys
from cloudlm.state.base import State
from cloudlm.telemetry.logs import get_logger

FLUSH_INTERVAL_S = 1.0
MAX_WAITING = 500
_log = get_logger(__name__)


class Refusals:
    """Refusals that wait to be written."""

    def __init__(self, state: State, clock: Clock) -> None:
        self._state = state
        self._clock = clock
        self._flood = Flood()
        self._waiting: list[AuditEvent] = []

    def note(self, request: GatewayRequest, exchange: Exchange, error: CloudlmError) -> None:
        """Take note of a request that was refused for who sent it; others are no business here."""
        if not isinstance(error, AuthenticationFailed | PermissionDenied | HiddenModel):
            return
        passed_over = self._flood.take(self._clock.monotonic())
        if passed_over is None:
            return
        key = exchange.key
        self._waiting.append(
            AuditEvent(
                at=self._clock.now(),
                server="gateway",
                actor=key.principal if key is not None else "",
                key_id=key.id if key is not None else "",
                tenant=key.tenant if key is not None else "",
                action="use inference",
                target=kept(without_keys(f"{request.method} {request.path}")),
                source=kept(request.peer),
                outcome=AuditOutcome.DENIED,
                status=status_of(error),
                request_id=exchange.request_id,
                detail=kept(error.code or "") + flood_note(passed_over),
            )
        )
        del self._waiting[:-MAX_WAITING]

    async def flush(self) -> None:
        """Write what waits; it goes on waiting if the state cannot be reached."""
        batch, self._waiting = self._waiting, []
        if not batch:
            return
        try:
            await self._state.append_audit(batch)
        except (CloudlmError, OSError) as error:
            self._waiting = [*batch, *self._waiting][-MAX_WAITING:]
            _log.warning("refusals_not_recorded", extra={"fields": {"reason": repr(error)}})

    async def run(self) -> None:
        """Flush until cancelled."""
        while True:
            await self._clock.sleep(FLUSH_INTERVAL_S)
            await self.flush()
