"""Limits: never exceeded however requests come, given back when unused, told in headers."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from msgspec import structs

from cloudlm.core.access import (
    FIRST_IDENTITIES,
    Grant,
    Limits,
    Principal,
    PrincipalKind,
    Project,
    Tenant,
)
from cloudlm.core.chat import Usage
from cloudlm.core.errors import BadSetting
from cloudlm.core.price import NANO, Price, price_of, read_prices
from cloudlm.core.tenant import KeyRecord, Role
from cloudlm.gateway.app import Gateway
from cloudlm.gateway.limiter import bounds_of, span
from cloudlm.gateway.limits import LEASE_S, Tally
from cloudlm.gateway.verdicts import Bound, Kind, Lease, Verdict
from cloudlm.security.access import Directory
from cloudlm.security.keys import mint

MONTH = 24_000


def take(
    tally: Tally, *limits: Limits, tokens: int = 0, spend: int = 0, now: float = 0.0, name: str = ""
) -> Verdict:
    bounds = [Bound(f"scope:{number}", one) for number, one in enumerate(limits)]
    name = name or f"lease-{time.perf_counter_ns()}"
    return tally.reserve(name, bounds, tokens=tokens, spend=spend, now=now, month=MONTH)


def give(tally: Tally, verdict: Verdict, tokens: int = 0, spend: int = 0, **how: Any) -> None:
    assert verdict.lease is not None
    settled = {"counts": True, "now": 0.0, "month": MONTH, **how}
    tally.settle(verdict.lease, tokens=tokens, spend=spend, **settled)


def test_requests_per_minute_and_when_to_come_back():
    tally, limits = Tally(), Limits(requests_per_minute=2)
    first = take(tally, limits, now=1.0)
    assert first.requests is not None
    assert (first.requests.limit, first.requests.remaining) == (2, 1)
    take(tally, limits, now=31.0)
    third = take(tally, limits, now=32.0)
    assert third.refusal is not None
    assert (third.refusal.kind, third.refusal.used) == (Kind.REQUESTS, 2)
    assert third.refusal.retry_after_s == 65.0 - 32.0
    assert take(tally, limits, now=64.9).lease is None
    assert take(tally, limits, now=65.0).lease is not None


def test_settle_returns_what_was_not_used():
    tally, limits = Tally(), Limits(tokens_per_minute=100)
    first = take(tally, limits, tokens=90)
    assert take(tally, limits, tokens=20).lease is None
    give(tally, first, tokens=30)
    left = take(tally, limits, tokens=20)
    assert left.tokens is not None
    assert left.tokens.remaining == 50


def test_settle_takes_what_was_used_beyond_the_estimate():
    tally, limits = Tally(), Limits(tokens_per_minute=100)
    give(tally, take(tally, limits, tokens=10), tokens=95)
    assert take(tally, limits, tokens=10).lease is None


def test_what_can_never_pass_is_not_told_to_come_back():
    refusal = take(Tally(), Limits(tokens_per_minute=100), tokens=101).refusal
    assert refusal is not None
    assert refusal.retry_after_s is None


def test_a_request_that_was_never_sent_does_not_count():
    tally, limits = Tally(), Limits(requests_per_minute=1)
    give(tally, take(tally, limits), counts=False)
    assert take(tally, limits).lease is not None


@pytest.mark.promise(22)
def test_leases_expire_unless_renewed():
    tally, limits = Tally(), Limits(concurrent_streams=2, spend_per_month=1.0)
    take(tally, limits, name="kept", spend=NANO // 2)
    take(tally, limits, name="lost", spend=NANO // 2)
    assert take(tally, limits, now=LEASE_S / 2).lease is None
    tally.renew(["kept"], LEASE_S / 2)
    found = take(tally, limits, now=LEASE_S, spend=NANO // 2)
    assert found.lease is not None  # the lost one's place and money
    assert take(tally, limits, now=LEASE_S).lease is None
    assert tally.ongoing("scope:0") == 2


def test_what_comes_after_expiry_is_counted_all_the_same():
    tally, limits = Tally(), Limits(concurrent_streams=1, spend_per_month=1.0)
    late = take(tally, limits, spend=NANO)
    assert take(tally, limits, now=LEASE_S, name="next").lease is not None
    give(tally, late, spend=NANO, now=LEASE_S + 1)
    assert tally.ongoing("scope:0") == 1  # the next one's place is its own
    refusal = take(tally, limits, now=LEASE_S + 2).refusal
    assert refusal is not None
    assert (refusal.kind, refusal.retry_after_s) == (Kind.SPEND, None)


def test_budget_begins_anew_with_the_month():
    tally, bound = Tally(), [Bound("key:a", Limits(spend_per_month=1.0))]
    tally.raise_spent("key:a", NANO, MONTH)
    how: dict[str, Any] = {"tokens": 0, "spend": 1, "now": 0.0}
    assert tally.reserve("a", bound, month=MONTH, **how).lease is None
    assert tally.reserve("b", bound, month=MONTH + 1, **how).lease is not None


def test_all_bounds_or_none():
    tally = Tally()
    wide, narrow = Limits(requests_per_minute=10), Limits(requests_per_minute=1)
    assert take(tally, wide, narrow).lease is not None
    second = take(tally, wide, narrow)
    assert second.refusal is not None
    assert second.refusal.scope == "scope:1"
    assert take(tally, wide).requests.remaining == 8  # type: ignore[union-attr]


_STEP = st.one_of(
    st.tuples(st.just("ask"), st.just(0)),
    st.tuples(st.sampled_from(["renew", "end"]), st.integers(0, 30)),
    st.tuples(st.just("wait"), st.sampled_from([0, 1, 7, 29, 30, 31])),
)


@pytest.mark.promise(22)
@given(st.lists(_STEP, max_size=40))
def test_what_is_held_is_what_has_not_expired(steps: list[tuple[str, int]]) -> None:
    """At every request, whatever came before: not one place is held a moment too long, none is
    given back too early. ``Tally`` does not look each time; that must not show."""
    tally, now, live = Tally(30.0), 0.0, dict[str, float]()
    bounds = [Bound("scope", Limits(concurrent_streams=1000))]
    leases: list[Lease] = []
    for what, number in steps:
        live = {name: until for name, until in live.items() if until > now}
        if what == "wait":
            now += number
        elif what == "ask":
            name = f"lease-{len(leases)}"
            verdict = tally.reserve(name, bounds, tokens=0, spend=0, now=now, month=MONTH)
            assert verdict.lease is not None
            leases.append(verdict.lease)
            live[name] = now + 30.0
            assert tally.ongoing("scope") == len(live)
        elif number < len(leases):
            lease = leases[number]
            if what == "renew" and lease.id in live:  # a lost one is renewed by nobody
                tally.renew([lease.id], now)
                live[lease.id] = now + 30.0
            elif what == "end":
                tally.settle(lease, tokens=0, spend=0, counts=True, now=now, month=MONTH)
                live.pop(lease.id, None)


class Machine(RuleBasedStateMachine):
    """Requests come, end, are renewed and lost in any order; no limit is ever exceeded."""

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.tally = Tally()
        self.now = 0.0
        self.count = 0
        self.limits = (
            Limits(requests_per_minute=5, tokens_per_minute=500, concurrent_streams=3),
            Limits(tokens_per_minute=700, spend_per_month=2.0),
        )
        self.accepted: list[float] = []
        self.used: dict[str, tuple[float, int]] = {}
        self.live: dict[str, float] = {}
        self.spent = 0
        self.held: dict[str, int] = {}

    @rule(seconds=st.sampled_from([0.0, 0.1, 1.0, 4.9, 5.0, 13.0, 31.0, 61.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.live = {k: end for k, end in self.live.items() if end > self.now}

    @rule(target=leases, tokens=st.integers(0, 600), spend=st.integers(0, NANO))
    def ask(self, tokens: int, spend: int) -> Lease | None:
        self.count += 1
        name = f"lease-{self.count}"
        bounds = [Bound("key:a", self.limits[0]), Bound("tenant:a", self.limits[1])]
        verdict = self.tally.reserve(
            name, bounds, tokens=tokens, spend=spend, now=self.now, month=MONTH
        )
        assert (verdict.lease is None) != (verdict.refusal is None)
        if verdict.lease is not None:
            self.accepted.append(self.now)
            self.used[name] = self.now, tokens
            self.live[name] = self.now + LEASE_S
            self.held[name] = spend
        return verdict.lease

    @rule(lease=consumes(leases), share=st.floats(0, 1))
    def end(self, lease: Lease | None, share: float) -> None:
        if lease is None:
            return
        if lease.id in self.live:  # one that was lost spends what nobody holds for it
            self.spent += int(lease.spend * share)
            tokens, spend = int(lease.tokens * share), int(lease.spend * share)
        else:
            tokens, spend = 0, 0
        self.used[lease.id] = self.used[lease.id][0], tokens
        self.live.pop(lease.id, None)
        self.tally.settle(lease, tokens=tokens, spend=spend, counts=True, now=self.now, month=MONTH)

    @rule(lease=leases)
    def renew(self, lease: Lease | None) -> None:
        if lease is not None:
            self.tally.renew([lease.id], self.now)
            if lease.id in self.live:
                self.live[lease.id] = self.now + LEASE_S

    @invariant()
    def nothing_beyond_its_limit(self) -> None:
        since = self.now - 60.0
        assert sum(1 for at in self.accepted if at > since) <= 5
        assert sum(tokens for at, tokens in self.used.values() if at > since) <= 500
        assert len(self.live) <= 3
        assert self.spent + sum(self.held[name] for name in self.live) <= 2 * NANO


TestMachine = Machine.TestCase


# Prices ------------------------------------------------------------------------------------------


def test_prices():
    prices = read_prices("tiny=0.5/0.1/1.5, *=1/1/2")
    assert price_of(prices, "tiny") == Price(500, 100, 1500)
    assert price_of(prices, "other") == Price(1000, 1000, 2000)
    assert price_of({}, "other").cost(Usage(1000, 1000)) == 0
    cost = price_of(prices, "tiny").cost(Usage(1_000_000, 2_000_000, 400_000))
    assert cost == round((0.6 * 0.5 + 0.4 * 0.1 + 2 * 1.5) * NANO)


def test_what_was_agreed_with_a_tenant_goes_before_what_holds_for_all():
    prices = read_prices("tiny@acme=1/1/1, *@acme=2/2/2, tiny=3/3/3, *=4/4/4")
    own = Price(9, 9, 9)
    assert price_of(prices, "tiny", "acme", own) == Price(1000, 1000, 1000)
    assert price_of(prices, "big", "acme", own) == Price(2000, 2000, 2000)
    assert price_of(prices, "tiny", "other", own) == own
    assert price_of(prices, "tiny", "other") == Price(3000, 3000, 3000)
    assert price_of(prices, "big", "other") == Price(4000, 4000, 4000)
    assert price_of({}, "tiny", "acme", own) == own
    assert price_of(read_prices("tiny@acme=1/1/1"), "tiny", "other").prompt == 0


@pytest.mark.parametrize(
    "text",
    [
        "tiny",
        "tiny@=1/1/1",
        "@acme=1/1/1",
        "a@b@c=1/1/1",
        "a=1/1/1, a=2/2/2",
        "tiny=1",
        "tiny=1/2/x",
        "=1/1/1",
        "a=-1/0/0",
        "a=nan/1/1",
        "a=0.00001/0/0",
    ],
)
def test_bad_prices(text: str):
    with pytest.raises(BadSetting, match="per million"):
        read_prices(text)


@given(st.integers(0, 10**5), st.integers(0, 10**5), st.integers(0, 10**5))
def test_no_usage_costs_more_than_what_is_reserved_for_it(prompt: int, cached: int, answer: int):
    price = Price(500, 100, 1500)
    assert price.cost(Usage(prompt, answer, cached)) <= price.most(prompt, answer)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.0171, "17ms"), (1.25, "1.25s"), (60, "1m0s"), (61.5, "1m1.5s")],
)
def test_span(seconds: float, text: str):
    assert span(seconds) == text


@given(st.floats(0, 7200))
def test_span_says_milliseconds_and_no_more(seconds: float):
    text, minutes = span(seconds), 0.0
    if text.endswith("ms"):
        told = float(text[:-2]) / 1000
    else:
        whole, mark, rest = text[:-1].rpartition("m")
        minutes = float(whole) if mark else 0.0
        assert str(float(rest)).removesuffix(".0") == rest
        told = minutes * 60 + float(rest)
        assert told >= 1 and float(rest) < 60
    assert told == pytest.approx(round(seconds * 1000) / 1000, abs=1e-9)


# In the gateway ----------------------------------------------------------------------------------


async def limited(rig: Any, kit: Any, **limits: Any) -> dict[str, str]:
    """The headers of a new key with these limits."""
    minted = mint("limited", Role.USER, kit.PEPPER, 1.0, limits=Limits(**limits))
    await rig.state.put_key(minted.record)
    await rig.gateway.view.refresh()
    return {"authorization": f"Bearer {minted.text}"}


async def test_headers_and_refusal(rig: Any, kit: Any) -> None:
    headers = await limited(rig, kit, requests_per_minute=2, tokens_per_minute=5000)
    first = await rig.ask(kit.chat_body(max_tokens=100), headers=headers)
    assert first.status == 200
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-reset-requests"].startswith(("1m", "5", "6"))
    assert first.headers["x-ratelimit-limit-tokens"] == "5000"
    assert 4800 < int(first.headers["x-ratelimit-remaining-tokens"]) < 4900
    second = await rig.ask(kit.chat_body(stream=True, max_tokens=100), headers=headers)
    assert second.status == 200
    assert int(second.headers["x-ratelimit-remaining-tokens"]) > 4820  # 12 used, not 100
    third = await rig.ask(kit.chat_body(), headers=headers)
    assert third.status == 429
    assert third.json["error"]["code"] == "rate_limit_exceeded"
    assert "2 requests per minute" in third.json["error"]["message"]
    assert 50 <= int(third.headers["retry-after"]) <= 65
    assert third.headers["x-ratelimit-remaining-requests"] == "0"
    assert len(rig.replicas[0].requests) == 2
    rig.assert_nothing_open()


async def test_no_limits_no_headers(rig: Any, kit: Any) -> None:
    result = await rig.ask(kit.chat_body())
    assert not [name for name in result.headers if name.startswith("x-ratelimit")]


async def test_too_many_tokens_at_once_can_never_pass(rig: Any, kit: Any) -> None:
    headers = await limited(rig, kit, tokens_per_minute=50)
    result = await rig.ask(kit.chat_body(max_tokens=60), headers=headers)
    assert result.status == 429
    assert "max_tokens" in result.json["error"]["message"]
    assert "retry-after" not in result.headers


@pytest.mark.promise(22)
async def test_sixty_four_at_once_for_the_last_unit(rig: Any, kit: Any) -> None:
    headers = await limited(rig, kit, requests_per_minute=1)
    asked = [rig.ask(kit.chat_body(), headers=headers) for _ in range(64)]
    statuses = [result.status for result in await asyncio.gather(*asked)]
    assert (statuses.count(200), statuses.count(429)) == (1, 63)


@pytest.mark.promise(2)
@pytest.mark.known_failure("litellm#27955")
async def test_a_client_that_goes_away_gives_its_place_back(rig: Any, kit: Any) -> None:
    headers = await limited(rig, kit, concurrent_streams=1)
    rig.replicas[0].plans.append(kit.Plan(tokens=50, stall_at=3))
    request = rig.request(kit.chat_body(stream=True), headers=headers)
    response = await rig.gateway.handler.handle(request)
    refused = await rig.ask(kit.chat_body(), headers=headers)
    assert refused.status == 429
    assert "1 requests at once" in refused.json["error"]["message"]
    began = time.monotonic()
    request.disconnected.set_result(None)
    await response.body.aclose()
    assert (await rig.ask(kit.chat_body(), headers=headers)).status == 200
    assert time.monotonic() - began < 5.0


@pytest.mark.promise(22)
async def test_a_budget_stops(kit: Any) -> None:
    async with kit.open_rig(prices="tiny=1000/100/10000") as rig:
        headers = await limited(rig, kit, spend_per_month=0.8)
        body = kit.chat_body(max_tokens=5)
        # 7 tokens of prompt, 2 of them cached, and 5 of the answer: 0.0552
        statuses = [(await rig.ask(body, headers=headers)).status for _ in range(20)]
        paid = statuses.count(200)
        assert statuses == [200] * paid + [429] * (20 - paid)
        assert 5 <= paid <= 14
        last = await rig.ask(body, headers=headers)
        assert last.json["error"]["code"] == "insufficient_quota"
        assert last.json["error"]["type"] == "insufficient_quota"
        assert "retry-after" not in last.headers


async def test_a_tenants_limit_holds_for_all_its_keys(rig: Any, kit: Any) -> None:
    (tenant,) = (await rig.state.list_identities()).tenants
    wanted = replace(tenant, limits=Limits(requests_per_minute=1))
    await rig.state.put_identity(wanted, replaces=tenant)
    other = await limited(rig, kit)
    assert (await rig.ask(kit.chat_body())).status == 200
    result = await rig.ask(kit.chat_body(), headers=other)
    assert result.status == 429
    assert "this tenant" in result.json["error"]["message"]


async def test_a_budget_outlives_the_gateway(kit: Any, tmp_path: Any) -> None:
    """What the ledger holds of this month is spent, whoever spent it."""
    async with kit.open_rig(home=tmp_path, prices="*=1000/100/10000") as rig:
        assert (await rig.ask(kit.chat_body(max_tokens=5))).status == 200
        (row,) = await rig.rows()
        assert row.cost == round((5 * 0.001 + 2 * 0.0001 + 5 * 0.01) * NANO)
        (tenant,) = (await rig.state.list_identities()).tenants
        wanted = replace(tenant, limits=Limits(spend_per_month=0.5))
        await rig.state.put_identity(wanted, replaces=tenant)
        spent = structs.replace(row, id="other", key_id="gone", cost=NANO // 2)
        await rig.state.append_ledger([spent])
        await rig.gateway.view.refresh()
        settings = rig.gateway.settings
        other = Gateway(settings, rig.state, home=tmp_path, pepper=kit.PEPPER, worker_token=None)
        async with other.running():
            response = await other.handler.handle(rig.request(kit.chat_body(max_tokens=5)))
            assert b"insufficient_quota" in response.body
            assert b"0.5552 of 0.5" in response.body


async def test_a_budget_of_the_day_stops_beside_that_of_the_month(kit: Any, tmp_path: Any) -> None:
    """Each holds by itself; what the ledger knows of today is spent, of yesterday is not."""
    async with kit.open_rig(home=tmp_path, prices="*=1000/100/10000") as rig:
        assert (await rig.ask(kit.chat_body(max_tokens=5))).status == 200
        (row,) = await rig.rows()
        (tenant,) = (await rig.state.list_identities()).tenants
        limits = Limits(spend_per_day=0.5, spend_per_month=5.0)
        await rig.state.put_identity(replace(tenant, limits=limits), replaces=tenant)
        day_before = row.started_at - 86_400
        yesterday = structs.replace(row, id="y", key_id="gone", cost=NANO, started_at=day_before)
        today = structs.replace(row, id="t", key_id="gone", cost=NANO // 2)
        for known, status in ((yesterday, 200), (today, 429)):
            await rig.state.append_ledger([known])
            await rig.gateway.view.refresh()
            other = Gateway(
                rig.gateway.settings, rig.state, home=tmp_path, pepper=kit.PEPPER, worker_token=None
            )
            async with other.running():
                response = await other.handler.handle(rig.request(kit.chat_body(max_tokens=5)))
                assert response.status == status
        assert b"this day (UTC)" in response.body
        assert b"spend_per_day" in response.body


def test_a_day_is_counted_anew() -> None:
    """A budget of the day is a scope of its own for each day."""
    first, second = (bounds_of(LIMITED, DIRECTORY, day * 86_400.0) for day in (20_000, 20_001))
    assert [bound.scope for bound in first] == ["key:k", "key:k|day 20000"]
    assert [bound.scope for bound in second] == ["key:k", "key:k|day 20001"]
    assert first[1].limits == Limits(spend_per_month=2.0)
    tally = Tally()
    how: dict[str, Any] = {"tokens": 0, "spend": 2 * NANO, "now": 0.0, "month": MONTH}
    taken = tally.reserve("a", first, **how)
    give(tally, taken, spend=2 * NANO)
    assert tally.reserve("b", first, **how).lease is None
    next_day = tally.reserve("c", second, **how)
    assert next_day.lease is not None
    give(tally, next_day, spend=2 * NANO)
    third = bounds_of(LIMITED, DIRECTORY, 20_002 * 86_400.0)
    refusal = tally.reserve("d", third, **how).refusal  # the month's five are nearly gone
    assert refusal is not None
    assert refusal.scope == "key:k"


LIMITED = KeyRecord("k", "k", "user", "", "", limits=Limits(spend_per_day=2.0, spend_per_month=5.0))
DIRECTORY = Directory(FIRST_IDENTITIES, [LIMITED])


async def test_the_price_of_a_deployment_beats_the_table(kit: Any, tmp_path: Any) -> None:
    async with kit.open_rig(home=tmp_path, prices="*=1000/100/10000") as rig:
        (deployed,) = await rig.state.list_deployments()
        spec = replace(deployed.spec, prices=Price(prompt=2000, cached=0, completion=1000))
        await rig.state.put_deployment(spec, now=2.0)
        await rig.gateway.view.refresh()
        assert (await rig.ask(kit.chat_body(max_tokens=5))).status == 200
        (row,) = await rig.rows()
        assert row.cost == 5 * 2000 + 5 * 1000


async def test_a_tenants_price_is_on_its_bill_and_in_its_budget(kit: Any, tmp_path: Any) -> None:
    prices = f"{kit.MODEL}@default=0/0/2000, {kit.MODEL}=0/0/1000"
    async with kit.open_rig(home=tmp_path, prices=prices) as rig:
        await _tenant_with_root(rig, "acme")
        limits = Limits(spend_per_month=0.009)
        for tenant, principal in (("default", "root"), ("acme", "p-acme")):
            key = mint(
                f"k-{tenant}",
                Role.USER,
                kit.PEPPER,
                1.0,
                tenant=tenant,
                principal=principal,
                limits=limits,
            )
            await rig.state.put_key(key.record)
            await rig.gateway.view.refresh()
            headers = {"authorization": f"Bearer {key.text}"}
            status = (await rig.ask(kit.chat_body(max_tokens=5), headers=headers)).status
            assert status == (429 if tenant == "default" else 200)  # five tokens: 0.01, 0.005
        assert (await rig.ask(kit.chat_body(max_tokens=5))).status == 200
        assert [row.cost for row in await rig.rows()] == [5 * 1_000_000, 5 * 2_000_000]


async def _tenant_with_root(rig: Any, name: str) -> None:
    for fact in (Tenant(name), Project(name, "default"), replace(ROOT_OF_ACME, id="p-acme")):
        await rig.state.put_identity(fact)


async def test_a_tenants_model_is_nobody_elses(kit: Any, rig: Any) -> None:
    """Not listed, not there, whatever the role; and cut when it is given away."""
    (deployed,) = await rig.state.list_deployments()
    for fact in (Tenant("acme"), Project("acme", "default")):
        await rig.state.put_identity(fact)
    owner = mint("o", Role.OWNER, kit.PEPPER, 1.0, scope="*")
    await rig.state.put_key(owner.record)
    headers = {"authorization": f"Bearer {owner.text}"}
    rig.replicas[0].default = kit.Plan(tokens=200, pause_s=0.02)
    running = await rig.gateway.handler.handle(
        rig.request(kit.chat_body(stream=True), headers=headers)
    )
    await rig.state.put_deployment(replace(deployed.spec, tenant="acme"), now=2.0)
    assert (await rig.finish(running)).error is not None
    rig.replicas[0].default = kit.Plan()
    refused = await rig.ask(kit.chat_body(), headers=headers)
    assert refused.status == 404
    listed = await rig.ask(None, method="GET", path="/v1/models", headers=headers)
    assert listed.json["data"] == []
    principal = replace(ROOT_OF_ACME, id="p-acme")
    await rig.state.put_identity(principal)
    mine = mint("m", Role.USER, kit.PEPPER, 1.0, tenant="acme", principal="p-acme")
    await rig.state.put_key(mine.record)
    headers = {"authorization": f"Bearer {mine.text}"}
    assert (await rig.ask(kit.chat_body(), headers=headers)).status == 200


ROOT_OF_ACME = Principal("p", "p", PrincipalKind.SERVICE, "acme", grants=(Grant("user", "acme"),))
