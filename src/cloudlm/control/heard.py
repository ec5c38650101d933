"""Who reported what, and how long ago by control's own clock.

Gateways date their reports by clocks of theirs, which may be behind, ahead, or jump. So nothing is
asked of a date but whether it is another: a report is fresh for a while after it was seen to
change, and one that has not changed for long is of a gateway that is gone. Must not decide what is
done about demand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cloudlm.core.clock import Clock
from cloudlm.core.deployment import Demand
from cloudlm.core.errors import CloudlmError, Superseded
from cloudlm.state.base import State
from cloudlm.telemetry.logs import get_logger

FRESH_S = 10.0
GONE_S = 600.0
"""Reports that did not change for so long are dropped: gateways tell once a second."""
_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Heard:
    """A report, and when it was seen to change last (monotonic seconds). ``dated``: that is known;
    else it stood there before anybody looked, and may be of any age."""

    report: Demand
    at: float
    dated: bool = True

    def fresh(self, now: float) -> bool:
        return self.dated and now - self.at <= FRESH_S


Known = Mapping[tuple[str, str], Heard]


def noticed(known: Known | None, reports: Sequence[Demand], now: float, wall_s: float) -> Known:
    """What is known after a look at ``now`` (monotonic), ``wall_s`` being the date.

    ``known`` is None at the first look. Then a report whose date is near, on either side, is taken
    to be as old as it says, and no younger than now; another one counts once it changes. Later a
    report that is new or not the same was written since the last look.
    """
    found: dict[tuple[str, str], Heard] = {}
    for one in reports:
        key = one.model, one.gateway
        before = None if known is None else known.get(key)
        if before is not None and before.report == one:
            found[key] = before
        elif known is None:
            age_s = wall_s - one.measured_at
            near = abs(age_s) <= FRESH_S
            found[key] = Heard(one, now - max(age_s, 0.0) if near else now, near)
        else:
            found[key] = Heard(one, now)
    return found


class Ear:
    """All that gateways report, as one control heard it; lost with the process."""

    def __init__(self, state: State, clock: Clock) -> None:
        self._state = state
        self._clock = clock
        self._known: Known | None = None
        self.mark = 0.0
        """The state's ``demand_mark`` at the last look."""

    async def fresh(self) -> list[Demand]:
        """Read the reports; those that changed within the last ``FRESH_S``. Raises CloudlmError."""
        reports = await self._state.list_demand(since=0.0)
        now = self._clock.monotonic()
        self._known = known = noticed(self._known, reports, now, self._clock.now())
        self.mark = max((one.measured_at for one in reports), default=0.0)
        await self._drop([one.report for one in known.values() if now - one.at > GONE_S])
        return [one.report for one in known.values() if one.fresh(now)]

    async def _drop(self, gone: Sequence[Demand]) -> None:
        if not gone:
            return
        try:
            await self._state.drop_demand(gone)
        except Superseded:
            raise
        except CloudlmError as error:  # the next look tries again
            _log.warning("demand_not_dropped", extra={"fields": {"reason": error.message}})
