"""The shared state in virtual time: what gateways report and control writes, and messages that go
astray on the way. What roll-outs need of it is in ``revisions``.

Keeps the rules of the port ``state.base.State`` that matter here: a report replaces what the same
gateway said before, whenever it was measured; while the store is down nothing is read or written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from cloudlm.core.deployment import Demand, Endpoint
from cloudlm.core.errors import StorageFailed
from cloudlm.core.pace import Pace
from cloudlm.core.tenant import LedgerRow
from cloudlm.gateway.ledger import RETRY_INTERVAL_S
from cloudlm.gateway.view import READ_TIMEOUT_S
from cloudlm.sim.revisions import SimRevisions
from cloudlm.sim.timeline import Timeline

Follower = Callable[[tuple[Endpoint, ...]], None]
"""A gateway that looks at the endpoints."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """What happens to messages on their way: shares from 0 to 1, and how late the late ones are."""

    lost: float = 0.0
    late: float = 0.0
    doubled: float = 0.0
    delay_s: float = 5.0


NO_TROUBLE = Trouble()


def worst_of(troubles: Sequence[Trouble]) -> Trouble:
    """The worst of each kind; one that delays nothing says nothing of how late."""
    delays = [one.delay_s for one in troubles if one.late or one.doubled]
    return Trouble(
        max(one.lost for one in troubles),
        max(one.late for one in troubles),
        max(one.doubled for one in troubles),
        max(delays, default=NO_TROUBLE.delay_s),
    )


class SimState:
    """``down`` while the store cannot be reached, for as long as one of ``outages`` lasts;
    ``troubles`` are all that befall messages now. ``wanted`` is what the last control recorded in
    the deployment's status."""

    def __init__(self, timeline: Timeline, chance: Random, revisions: SimRevisions) -> None:
        self._timeline = timeline
        self.revisions = revisions
        self.keeps_ledger = False
        """Whether anybody looks at the ledger: control does for the sake of roll-outs."""
        self._chance = chance
        self._demand: dict[tuple[str, str], Demand] = {}
        self._followers: list[Follower] = []
        self._news: list[Callable[[], None]] = []
        self.endpoints: tuple[Endpoint, ...] = ()
        self.wanted = 0
        self.paces: dict[tuple[str, str], Pace] = {}
        self.outages = 0
        self.troubles: list[Trouble] = []

    @property
    def down(self) -> bool:
        """Whether nothing is read or written."""
        return self.outages > 0

    @property
    def trouble(self) -> Trouble:
        """What happens to messages now: of several troubles the worst of each kind counts."""
        return worst_of(self.troubles) if self.troubles else NO_TROUBLE

    def follow(self, follower: Follower) -> None:
        """Have somebody told of new endpoints, as gateways notice them (``gateway.view``)."""
        self._followers.append(follower)

    def tell_of_writes(self, news: Callable[[], None]) -> None:
        """Have somebody told of each write of endpoints, as ``state.news`` does: to look again."""
        self._news.append(news)

    def put_endpoints(self, endpoints: tuple[Endpoint, ...], notice_s: float) -> None:
        """Write the endpoints; who follows reads them ``notice_s`` later."""
        self.endpoints = endpoints
        for follower in self._followers:
            self._timeline.after(notice_s, self._tell, follower)
        for news in self._news:
            news()

    def tell_again(self) -> None:
        """The store is back: who follows reads what it missed."""
        for follower in self._followers:
            self._tell(follower)

    def put_demand(self, rows: Sequence[Demand]) -> None:
        """Reports of one gateway, unless they go astray."""
        trouble, chance = self.trouble, self._chance
        if trouble.lost and chance.random() < trouble.lost:
            return
        if trouble.late and chance.random() < trouble.late:
            self._timeline.after(trouble.delay_s, self._take, rows)
            return
        self._take(rows)
        if trouble.doubled and chance.random() < trouble.doubled:
            self._timeline.after(trouble.delay_s, self._take, rows)

    def append_ledger(self, row: LedgerRow) -> None:
        """A row of a gateway, which keeps it in its journal until it is written for certain: late
        at worst, or written twice."""
        if not self.keeps_ledger:
            return
        trouble, chance = self.trouble, self._chance
        astray = trouble.lost + trouble.late
        if astray and chance.random() < astray:
            self._timeline.after(trouble.delay_s, self._note, row)
            return
        self._note(row)
        if trouble.doubled and chance.random() < trouble.doubled:
            self._timeline.after(trouble.delay_s, self._note, row)

    def _note(self, row: LedgerRow) -> None:
        if self.down:
            self._timeline.after(RETRY_INTERVAL_S, self._note, row)
        else:
            self.revisions.take((row,))

    def score(self, revision: int, good: bool) -> None:
        """A client tells how good an answer was, if there is somebody to tell."""
        if not self.down:
            self.revisions.score(revision, good)

    def list_demand(self) -> list[Demand]:
        """What every gateway reported last."""
        return list(self._demand.values())

    def drop_demand(self, demand: Sequence[Demand]) -> None:
        """Forget reports, unless they were replaced."""
        for one in demand:
            key = one.model, one.gateway
            if self._demand.get(key) == one:
                del self._demand[key]

    def check(self) -> None:
        """Raises StorageFailed while the store is down."""
        if self.down:
            raise StorageFailed("the simulated state store is down")

    def _take(self, rows: Sequence[Demand]) -> None:
        if not self.down:
            self._demand.update({(one.model, one.gateway): one for one in rows})

    def _tell(self, follower: Follower) -> None:
        """Have one gateway look; one whose answer is lost, or late, looks again."""
        if self.down:
            return
        astray = self.trouble.lost + self.trouble.late
        if astray and self._chance.random() < astray:
            self._timeline.after(READ_TIMEOUT_S, self._tell, follower)
        else:
            follower(self.endpoints)


class ScalerState:
    """What ``control.scaler`` asks of the port ``state.base.State``."""

    def __init__(self, state: SimState) -> None:
        self._state = state

    async def list_demand(self, *, since: float) -> list[Demand]:
        self._state.check()
        return [one for one in self._state.list_demand() if one.measured_at >= since]

    async def drop_demand(self, demand: Sequence[Demand]) -> None:
        self._state.check()
        self._state.drop_demand(demand)

    async def demand_mark(self) -> float:
        self._state.check()
        return max((one.measured_at for one in self._state.list_demand()), default=0.0)

    async def list_endpoints(self) -> list[Endpoint]:
        self._state.check()
        return list(self._state.endpoints)

    async def put_pace(self, pace: Pace) -> None:
        self._state.check()
        self._state.paces[pace.deployment, pace.model] = pace

    async def list_paces(self) -> list[Pace]:
        self._state.check()
        return [self._state.paces[key] for key in sorted(self._state.paces)]
