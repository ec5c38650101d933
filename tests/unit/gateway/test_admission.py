"""Admission: bounded, fair in tokens, quick to refuse; and what waiting is like in the gateway."""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudlm.core.access import Limits
from cloudlm.core.errors import InvalidRequest, Overloaded
from cloudlm.core.tenant import Role
from cloudlm.gateway.admission import Admission, Criticality, Ticket
from cloudlm.gateway.gate import read_deadline_s, read_priority
from cloudlm.security.keys import mint

CRITICAL, DEFAULT, SHEDDABLE = Criticality


def test_counts() -> None:
    admission = Admission(4, 4)
    first, second = Ticket("a", "t"), Ticket("a", "t")
    admission.enter(first, 1, 0.0)
    admission.enter(second, 1, 0.0)
    admission.enter(Ticket("b", "t"), 1, 0.0)
    assert (first.admitted, second.admitted, second.waits) == (True, False, True)
    assert (admission.total, admission.ongoing("a"), admission.queued("a")) == (3, 2, 1)
    assert admission.leave(first, 1, 1.0) == [second]
    assert admission.leave(first, 1, 1.0) == []  # once
    assert (admission.ongoing("a"), admission.queued("a")) == (1, 0)
    assert admission.leave(second, 1, 2.0) == []
    assert (admission.total, admission.ongoing("a"), admission.ongoing("b")) == (1, 0, 1)


@pytest.mark.promise(9)
def test_the_last_to_be_served_makes_room() -> None:
    admission = Admission(9, 2)
    admission.enter(Ticket("m", "noisy"), 1, 0.0)
    waiting = [Ticket("m", "noisy"), Ticket("m", "noisy")]
    for ticket in waiting:
        admission.enter(ticket, 1, 0.0)
    with pytest.raises(Overloaded):
        admission.enter(Ticket("m", "noisy"), 1, 0.0)
    quiet = Ticket("m", "quiet")
    assert admission.enter(quiet, 1, 0.0) is waiting[1]
    with pytest.raises(Overloaded):
        admission.enter(Ticket("m", "noisy", criticality=SHEDDABLE), 1, 0.0)
    critical = Ticket("m", "noisy", criticality=CRITICAL)
    assert admission.enter(critical, 1, 0.0) is waiting[0]
    assert admission.pump("m", 3) == [critical, quiet]
    assert admission.total == 3


@pytest.mark.promise(9)
def test_what_cannot_begin_in_time_is_refused_at_once() -> None:
    admission = Admission(99, 99)
    tickets = [Ticket("m", "t") for _ in range(30)]
    for ticket in tickets:
        admission.enter(ticket, 1, 0.0)
    now = 0.0
    for ticket in tickets[:20]:  # one each second
        now += 1.0
        admission.leave(ticket, 1, now)
    with pytest.raises(Overloaded, match="deadline") as refused:
        admission.enter(Ticket("m", "t", deadline=now + 2.0), 1, now)
    assert 5.0 < refused.value.retry_after_s < 15.0  # type: ignore[operator]
    admission.enter(Ticket("m", "t", deadline=now + 60.0), 1, now)
    admission.enter(Ticket("m", "t", deadline=now + 2.0, criticality=CRITICAL), 1, now)


@pytest.mark.promise(23)
@pytest.mark.parametrize(("weight", "share"), [(1.0, 0.5), (3.0, 0.75)])
def test_noisy_and_quiet_share_tokens_by_weight(weight: float, share: float) -> None:
    """A hundred times as many requests do not buy more tokens; nor do small or large ones."""
    admission, now = Admission(10_000, 200), 0.0
    running: list[tuple[float, int, Ticket]] = []
    served: Counter[str] = Counter()

    def come(tenant: str, cost: float, weight: float) -> None:
        ticket = Ticket("m", tenant, cost, weight)
        try:
            admission.enter(ticket, 8, now)
        except Overloaded:
            return
        if ticket.admitted:
            heapq.heappush(running, (now + cost, ticket.order, ticket))

    for step in range(20_000):
        now = step * 1.0
        for _ in range(3):
            come("noisy", 10.0, 1.0)
        if step % 30 == 0:
            for _ in range(5):
                come("quiet", 40.0, weight)
        while running and running[0][0] <= now:
            _, _, ticket = heapq.heappop(running)
            if now > 1000:
                served[ticket.tenant] += int(ticket.cost)
            for other in admission.leave(ticket, 8, now):
                heapq.heappush(running, (now + other.cost, other.order, other))
    assert served["quiet"] / served.total() == pytest.approx(share, abs=0.1)


@pytest.mark.promise(9)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.sampled_from(list(Criticality)),
            st.integers(1, 50),
            st.integers(0, 3),
        ),
        max_size=120,
    )
)
@settings(deadline=None)
def test_bounds_hold_and_nobody_is_lost(events: list[tuple[str, Criticality, int, int]]) -> None:
    admission, tickets = Admission(9, 5), []
    for now, (tenant, criticality, cost, leaving) in enumerate(events):
        ticket = Ticket("m", tenant, float(cost), criticality=criticality)
        try:
            victim = admission.enter(ticket, 3, float(now))
        except Overloaded:
            assert admission.queued("m") == 5
        else:
            tickets.append(ticket)
            if victim is not None:
                assert ticket < victim
                tickets.remove(victim)
        for _ in range(min(leaving, len(tickets))):
            admission.leave(tickets.pop(cost % len(tickets)), 3, float(now))
        inside = [one for one in tickets if one.admitted]
        waiting = [one for one in tickets if one.waits]
        assert len(inside) == min(3, len(tickets))
        assert len(waiting) == admission.queued("m") <= 5
        assert admission.total == len(tickets)
    while tickets:
        admission.leave(tickets.pop(), 3, 1e6)
    assert (admission.total, admission._lines) == (0, {})


@pytest.mark.parametrize("text", ["", "0", "-5", "1.5", "abc", "1" * 20, "１２"])
def test_bad_deadlines(text: str) -> None:
    with pytest.raises(InvalidRequest, match="milliseconds"):
        read_deadline_s({"x-cloudlm-deadline-ms": text}, 1.0)


def test_headers() -> None:
    assert read_deadline_s({"x-cloudlm-deadline-ms": "250"}, 1.0) == 0.25
    assert read_deadline_s({}, 1.0) == 1.0
    assert read_priority({"x-request-priority": "Critical"}) is CRITICAL
    assert read_priority({}) is DEFAULT
    with pytest.raises(InvalidRequest, match="sheddable"):
        read_priority({"x-request-priority": "vip"})


# In the gateway ----------------------------------------------------------------------------------


@pytest.mark.promise(9)
async def test_the_queue_holds_and_lets_in(kit: Any) -> None:
    async with kit.open_rig(replica_capacity=1, max_queued_requests=2) as rig:
        gate = asyncio.Event()
        rig.replicas[0].plans.append(kit.Plan(gate=gate))
        asked = [asyncio.create_task(rig.ask(kit.chat_body())) for _ in range(3)]
        await kit.until(lambda: rig.gateway.gate.waiting == 2)
        refused = await rig.ask(kit.chat_body())  # at once: all the others still wait
        assert not any(one.done() for one in asked)
        gate.set()
        assert (refused.status, refused.json["error"]["code"]) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert [(await one).status for one in asked] == [200] * 3
        assert len(rig.replicas[0].requests) == 3
        rig.assert_nothing_open()


@pytest.mark.promise(9)
async def test_a_deadline_that_passes_in_the_queue(kit: Any) -> None:
    async with kit.open_rig(replica_capacity=1) as rig:
        gate = asyncio.Event()
        rig.replicas[0].plans.append(kit.Plan(gate=gate))
        first = asyncio.create_task(rig.ask(kit.chat_body()))
        await kit.until(lambda: rig.gateway.admission.total)
        began = time.monotonic()
        headers = {**rig.headers, "x-cloudlm-deadline-ms": "50"}
        late = await rig.ask(kit.chat_body(), headers=headers)
        assert time.monotonic() - began > 0.04
        assert not first.done()
        gate.set()
        assert (late.status, rig.gateway.gate.waiting) == (503, 0)
        bad = await rig.ask(kit.chat_body(), headers={**rig.headers, "x-request-priority": "vip"})
        assert bad.status == 400
        assert (await first).status == 200
        rig.assert_nothing_open()


@pytest.mark.promise(2)
async def test_who_goes_away_while_waiting_frees_limit_and_place(kit: Any) -> None:
    async with kit.open_rig(replica_capacity=1) as rig:
        minted = mint("one", Role.USER, kit.PEPPER, 1.0, limits=Limits(concurrent_streams=1))
        await rig.state.put_key(minted.record)
        await rig.gateway.view.refresh()
        headers = {"authorization": f"Bearer {minted.text}"}
        gate = asyncio.Event()
        rig.replicas[0].plans.append(kit.Plan(gate=gate))
        first = asyncio.create_task(rig.ask(kit.chat_body()))
        await kit.until(lambda: rig.gateway.admission.total)
        request = rig.request(kit.chat_body(), headers=headers)
        waiting = asyncio.create_task(rig.gateway.handler.handle(request))
        await kit.until(lambda: rig.gateway.gate.waiting)
        assert (await rig.ask(kit.chat_body(), headers=headers)).status == 429
        request.disconnected.set_result(None)
        assert (await waiting).status == 499
        assert rig.gateway.gate.waiting == 0
        gate.set()
        assert (await first).status == 200
        assert (await rig.ask(kit.chat_body(), headers=headers)).status == 200
        rig.assert_nothing_open()


@pytest.mark.promise(9)
async def test_only_who_may_lead_is_critical(kit: Any) -> None:
    async with kit.open_rig(replica_capacity=1, max_queued_requests=1) as rig:
        owner = mint("owner", Role.OWNER, kit.PEPPER, 1.0, scope="*")
        await rig.state.put_key(owner.record)
        await rig.gateway.view.refresh()
        gate = asyncio.Event()
        rig.replicas[0].plans.append(kit.Plan(gate=gate))
        first = asyncio.create_task(rig.ask(kit.chat_body()))
        await kit.until(lambda: rig.gateway.admission.total)
        second = asyncio.create_task(rig.ask(kit.chat_body()))
        await kit.until(lambda: rig.gateway.gate.waiting)
        critical = {"x-request-priority": "critical"}
        third = await rig.ask(kit.chat_body(), headers={**rig.headers, **critical})
        assert third.status == 503
        key = {"authorization": f"Bearer {owner.text}"}
        fourth = asyncio.create_task(rig.ask(kit.chat_body(), headers={**key, **critical}))
        assert (await second).status == 503  # made room
        gate.set()
        assert [(await first).status, (await fourth).status] == [200, 200]


@pytest.mark.promise(19)
@pytest.mark.known_failure("knative#9888", "kserve#806")
async def test_a_new_replica_lets_in_who_waits(kit: Any) -> None:
    async with kit.open_rig(replicas=2, replica_capacity=1) as rig:
        endpoints = await rig.state.list_endpoints()
        await rig.state.put_endpoints(kit.MODEL, endpoints[:1])
        await rig.gateway.view.refresh()
        gate = asyncio.Event()
        rig.replicas[0].default = kit.Plan(gate=gate)
        first = asyncio.create_task(rig.ask(kit.chat_body()))
        await kit.until(lambda: rig.gateway.admission.total)
        second = asyncio.create_task(rig.ask(kit.chat_body()))
        await kit.until(lambda: rig.gateway.gate.waiting)
        rig.replicas[1].default = kit.Plan()
        await rig.state.put_endpoints(kit.MODEL, endpoints)
        await rig.gateway.view.refresh()
        assert (await second).status == 200
        assert not first.done()
        gate.set()
        await first


def test_those_held_for_a_start_keep_nobody_else_out() -> None:
    admission = Admission(2, 8)
    held = [Ticket("cold", "t") for _ in range(5)]
    for ticket in held:
        admission.enter(ticket, 0, 0.0)
    other = Ticket("warm", "t")
    admission.enter(other, 1, 0.0)
    assert (other.admitted, admission.total) == (True, 1)
    assert admission.leave(held.pop(), 0, 0.0) == []
    assert admission.total == 1
    assert len(admission.pump("cold", 3)) == 3
    assert admission.total == 4
    for ticket in (*held, other):
        admission.leave(ticket, 3, 1.0)
    assert (admission.total, admission.ongoing("cold")) == (0, 0)
