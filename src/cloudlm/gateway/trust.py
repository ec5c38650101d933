"""What answers and failures say about replicas, told to ``loads``. Must not choose or retry."""

from __future__ import annotations

from collections.abc import Callable

from cloudlm.core.clock import Clock
from cloudlm.core.errors import CloudlmError, Retry
from cloudlm.gateway.account import Exchange
from cloudlm.gateway.loads import Loads
from cloudlm.gateway.upstream import Declined, ReplicaRefused, Unreachable

_ASKS_FOR_TIME = (429, 503)


class Trust:
    """``cooled`` is told which replica asked all to leave it alone, and for how many seconds."""

    def __init__(self, loads: Loads, clock: Clock, cooled: Callable[[str, float], None]) -> None:
        self._loads = loads
        self._clock = clock
        self._cooled = cooled

    def judge(self, replica: str, error: CloudlmError) -> None:
        """Remember what a failed attempt says about its replica. That it declined the request says
        something only once another answers: ``answered``."""
        now = self._clock.monotonic()
        if isinstance(error, ReplicaRefused):
            if error.retry_after_s:
                self._loads.cool(replica, now + error.retry_after_s)
                if error.answered_status in _ASKS_FOR_TIME:
                    self._cooled(replica, error.retry_after_s)
            elif error.answered_status >= 500 and error.elsewhere:
                self._loads.failed(replica, now)
        elif error.retry is Retry.ELSEWHERE and not isinstance(error, Declined):
            away = isinstance(error, Unreachable)
            self._loads.failed(replica, now, unreachable=away)

    def answered(self, exchange: Exchange) -> None:
        """The exchange's replica answers; whoever declined the request could have done so too."""
        loads, now = self._loads, self._clock.monotonic()
        loads.answered(exchange.replica)
        for replica in exchange.declined:
            loads.declined(replica, now)
        exchange.declined = ()
