"""Twice and ten times as much work as the replicas can do: what is served, who is turned away.

The first part is arithmetic in virtual time, on the admission that the gateway uses; how long a
refusal takes on a real machine is the bench's to say (``bench/gateway/overload.py``).
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest

from cloudlm.core.errors import Overloaded
from cloudlm.gateway.admission import Admission, Criticality, Ticket

CAPACITY = 32
SERVICE_S = 1.0
SECONDS = 120.0
KINDS = {Criticality.CRITICAL: 0.05, Criticality.DEFAULT: 0.65, Criticality.SHEDDABLE: 0.3}


@dataclass
class Day:
    """What became of an open loop of requests. ``took_s`` are the times of those that were served,
    waiting included; ``turned_away`` and ``came`` are by criticality."""

    took_s: list[float] = field(default_factory=list)
    came: Counter[Criticality] = field(default_factory=Counter)
    turned_away: Counter[Criticality] = field(default_factory=Counter)
    longest_queue: int = 0
    quickest_advice_s: float = float("inf")

    @property
    def goodput(self) -> float:
        """The share of what the replicas could have served."""
        return len(self.took_s) * SERVICE_S / (CAPACITY * SECONDS)

    def took(self, percent: float) -> float:
        return sorted(self.took_s)[int(percent / 100 * len(self.took_s))]


class OpenLoop:
    """Requests that come whether or not others were answered, as those of many clients do."""

    def __init__(self, times: float, max_queued: int, deadline_s: float) -> None:
        self.admission = Admission(10_000, max_queued)
        self.day = Day()
        self.draw = random.Random(4)
        self.rate = times * CAPACITY / SERVICE_S
        self.deadline_s = deadline_s
        self.running: list[tuple[float, int, Ticket]] = []
        self.waiting: list[tuple[float, int, Ticket]] = []
        self.came_at: dict[int, float] = {}

    def run(self) -> Day:
        now = 0.0
        while now < SECONDS:
            now += self.draw.expovariate(self.rate)
            self.end_before(now)
            self.come(now)
        return self.day

    def end_before(self, now: float) -> None:
        """Those whose service ends, and those whose deadline passes in the queue."""
        while True:
            ends = self.running[0][0] if self.running else float("inf")
            late = self.waiting[0][0] if self.waiting else float("inf")
            if min(ends, late) > now:
                return
            _, _, ticket = heapq.heappop(self.running if ends <= late else self.waiting)
            if ends <= late:
                self.day.took_s.append(ends - self.came_at[ticket.order])
            elif ticket.waits:
                self.day.turned_away[ticket.criticality] += 1
            else:
                continue
            self.begin(self.admission.leave(ticket, CAPACITY, min(ends, late)), min(ends, late))

    def come(self, now: float) -> None:
        (kind,) = self.draw.choices(list(KINDS), KINDS.values())
        ticket = Ticket("m", "t", criticality=kind, deadline=now + self.deadline_s)
        self.day.came[kind] += 1
        try:
            victim = self.admission.enter(ticket, CAPACITY, now)
        except Overloaded as refusal:
            self.day.turned_away[kind] += 1
            assert refusal.retry_after_s is not None
            self.day.quickest_advice_s = min(self.day.quickest_advice_s, refusal.retry_after_s)
            return
        if victim is not None:
            self.day.turned_away[victim.criticality] += 1
        self.came_at[ticket.order] = now
        if ticket.waits:
            heapq.heappush(self.waiting, (ticket.deadline, ticket.order, ticket))
        else:
            self.begin([ticket], now)
        self.day.longest_queue = max(self.day.longest_queue, self.admission.queued("m"))

    def begin(self, tickets: list[Ticket], now: float) -> None:
        for ticket in tickets:
            heapq.heappush(self.running, (now + SERVICE_S, ticket.order, ticket))


@pytest.mark.promise(9)
@pytest.mark.parametrize("times", [2.0, 10.0])
@pytest.mark.parametrize(
    ("max_queued", "deadline_s"),
    [(CAPACITY // 2, 1e9), (1024, SERVICE_S)],
    ids=["a short queue", "a deadline"],
)
def test_capacity_is_used_and_who_is_served_hardly_waits(
    times: float, max_queued: int, deadline_s: float
) -> None:
    day = OpenLoop(times, max_queued, deadline_s).run()
    assert day.goodput >= 0.95
    assert day.took(99) <= 2 * SERVICE_S
    assert day.longest_queue <= max_queued
    assert day.quickest_advice_s >= 1.0
    came = sum(day.came.values())
    assert came - day.turned_away.total() - len(day.took_s) <= CAPACITY + max_queued


@pytest.mark.promise(9)
def test_the_least_important_are_turned_away_first() -> None:
    """At ten times the load the critical ones alone are half of what the replicas can do."""
    day = OpenLoop(10.0, CAPACITY, 1e9).run()
    share = {kind: day.turned_away[kind] / day.came[kind] for kind in KINDS}
    assert share[Criticality.CRITICAL] == 0.0
    assert share[Criticality.SHEDDABLE] >= 0.99
    assert 0.8 < share[Criticality.DEFAULT] < share[Criticality.SHEDDABLE]


@pytest.mark.promise(9)
async def test_in_the_gateway_the_queue_is_bounded_and_the_rest_is_told_when_to_come(
    kit: Any,
) -> None:
    async with kit.open_rig(replica_capacity=4, max_queued_requests=4) as rig:
        (replica,) = rig.replicas
        replica.default = kit.Plan(pause_s=0.5)
        most = 0

        async def ask() -> Any:
            nonlocal most
            result = await rig.ask(kit.chat_body())
            most = max(most, replica.active)
            return result

        results = await asyncio.gather(*(ask() for _ in range(80)))
        statuses = Counter(result.status for result in results)
        assert set(statuses) == {200, 503}
        assert statuses[200] >= 8  # those in service and those in the queue, and who comes later
        assert most <= 4
        for result in results:
            if result.status == 503:
                assert result.json["error"]["code"] == "overloaded"
                assert int(result.headers["retry-after"]) >= 1
        assert len(replica.requests) == statuses[200] == len(await rig.rows())
        rig.assert_nothing_open()


@pytest.mark.promise(23)
def test_a_quiet_tenants_wait_hardly_grows_beside_a_noisy_one() -> None:
    """A hundred requests of the noisy one for each of the quiet one, which comes seldom."""

    def waits(noisy: bool) -> list[float]:
        admission, now, told = Admission(10_000, 200), 0.0, []
        running: list[tuple[float, int, Ticket]] = []
        asked: dict[int, float] = {}
        draw = random.Random(23)

        def begin(tickets: list[Ticket]) -> None:
            for one in tickets:
                if one.tenant == "quiet":
                    told.append(now - asked[one.order])
                heapq.heappush(running, (now + draw.uniform(0.5, 1.5), one.order, one))

        def come(tenant: str) -> None:
            ticket = Ticket("m", tenant, 10.0)
            try:
                admission.enter(ticket, 16, now)
            except Overloaded:
                assert tenant == "noisy"
                return
            asked[ticket.order] = now
            if ticket.admitted:
                begin([ticket])

        for step in range(8_000):
            at = step * 0.01
            while running and running[0][0] <= at:
                now, _, ended = heapq.heappop(running)
                begin(admission.leave(ended, 16, now))
            now = at
            if noisy:
                come("noisy")
            if step % 100 == 0:
                come("quiet")
        return sorted(told)

    alone, beside = waits(False), waits(True)
    assert len(beside) == len(alone) == 80
    # 1.5 times the time of an answer (1.5 s at most), waiting included.
    assert beside[int(0.99 * len(beside))] <= 0.75
