"""Hedging: at most 5 % extra, the loser aborted and booked once as such."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.core.deployment import DeploymentSpec
from cloudlm.core.errors import CloudlmError, RequestCancelled, UpstreamFailed
from cloudlm.core.routing import Policy, Routing
from cloudlm.core.tenant import Outcome
from cloudlm.gateway.hedge import quickest
from cloudlm.gateway.interrupt import Interrupt
from cloudlm.gateway.retry import HedgeBudget

HEDGED = Routing(Policy.ROUND_ROBIN, hedge_after_s=0.5)
SLOW_S = 1.0


@pytest.mark.promise(42)
@given(st.lists(st.integers(0, 5), max_size=400))
def test_hedges_are_never_more_than_a_twentieth(tries: list[int]) -> None:
    budget, hedges = HedgeBudget(), 0
    for requests, wanted in enumerate(tries, 1):
        budget.count_request()
        hedges += sum(budget.take() for _ in range(wanted))
        assert hedges <= 0.05 * requests


@given(st.integers(200, 5000))
def test_savings_are_bounded(requests: int) -> None:
    budget = HedgeBudget()
    for _ in range(requests):
        budget.count_request()
    assert sum(budget.take() for _ in range(100)) == 10


async def hedging(rig: Any, kit: Any, routing: Routing = HEDGED, *, earned: int = 20) -> None:
    spec = DeploymentSpec(kit.MODEL, "models:/m/1", routing=routing)
    await rig.state.put_deployment(spec, now=2.0)
    await rig.gateway.view.refresh()
    for _ in range(earned):
        assert (await rig.ask(kit.chat_body())).status == 200


async def new_rows(rig: Any, before: int) -> list[Any]:
    rows = sorted(await rig.rows(), key=lambda row: row.started_at)[before:]
    return sorted(rows, key=lambda row: row.attempt)


@pytest.mark.promise(42)
@pytest.mark.parametrize("stream", [False, True])
async def test_the_quicker_one_answers_and_the_loser_is_aborted(kit: Any, stream: bool) -> None:
    async with kit.open_rig(2) as rig:
        await hedging(rig, kit)
        slow, quick = rig.replicas
        slow.plans.append(kit.Plan(kind="silence"))
        result = await rig.ask(kit.chat_body(stream=stream))
        assert result.status == 200
        assert result.headers["x-cloudlm-replica"] == quick.name
        assert result.headers["x-cloudlm-attempts"] == "2"
        if stream:
            assert result.events[-1] == "[DONE]"
        await kit.until(lambda: not slow.active)  # the connection was closed
        lost, won = await new_rows(rig, 20)
        assert (lost.replica, lost.outcome, lost.status) == (slow.name, Outcome.CANCELLED, 499)
        assert (lost.prompt_tokens, lost.completion_tokens, lost.cost) == (0, 0, 0)
        assert (won.replica, won.outcome, won.completion_tokens) == (
            quick.name,
            Outcome.FINISHED,
            5,
        )
        assert lost.request_id == won.request_id
        assert rig.gateway.loads.of(slow.name).failures == 0  # slow is no fault
        assert b'cloudlm_gateway_hedges_total{model="tiny"} 1.0' in rig.gateway.meter.exposition()
        rig.assert_nothing_open()


async def test_the_first_may_still_win(kit: Any) -> None:
    async with kit.open_rig(2) as rig:
        await hedging(rig, kit)
        first, second = rig.replicas
        gate = asyncio.Event()
        first.plans.append(kit.Plan(gate=gate))
        second.plans.append(kit.Plan(kind="silence"))
        asking = asyncio.create_task(rig.ask(kit.chat_body()))
        await kit.until(lambda: second.active)
        gate.set()
        result = await asking
        assert result.headers["x-cloudlm-replica"] == first.name
        won, lost = await new_rows(rig, 20)
        assert (won.replica, won.outcome) == (first.name, Outcome.FINISHED)
        assert (lost.replica, lost.outcome) == (second.name, Outcome.CANCELLED)
        rig.assert_nothing_open()


@pytest.mark.promise(42)
async def test_no_hedge_without_budget_or_wish_or_a_trusted_replica(kit: Any) -> None:
    async with kit.open_rig(2) as rig:
        await hedging(rig, kit, earned=18)
        for mock in rig.replicas:
            mock.default = kit.Plan(pause_s=1.0)
        assert (await rig.ask(kit.chat_body())).headers["x-cloudlm-attempts"] == "1"  # the 19th
        rig.gateway.loads.failed(rig.replicas[0].name, rig.gateway.view._clock.monotonic())
        assert (await rig.ask(kit.chat_body())).headers["x-cloudlm-attempts"] == "1"
        rig.gateway.loads.answered(rig.replicas[0].name)
        await hedging(rig, kit, Routing(Policy.ROUND_ROBIN), earned=0)
        assert (await rig.ask(kit.chat_body())).headers["x-cloudlm-attempts"] == "1"
        await hedging(rig, kit, earned=0)
        assert (await rig.ask(kit.chat_body())).headers["x-cloudlm-attempts"] == "2"
        rig.assert_nothing_open()


async def test_a_first_that_fails_while_the_second_runs(kit: Any) -> None:
    async with kit.open_rig(2) as rig:
        await hedging(rig, kit)
        first, second = rig.replicas
        fails, answers = asyncio.Event(), asyncio.Event()
        first.plans.append(kit.Plan(gate=fails, body=b"no answer"))
        second.plans.append(kit.Plan(gate=answers))
        asking = asyncio.create_task(rig.ask(kit.chat_body()))
        await kit.until(lambda: second.active)
        fails.set()
        await kit.until(lambda: rig.gateway.loads.of(first.name).failures)
        answers.set()
        result = await asking
        assert result.status == 200
        assert result.headers["x-cloudlm-replica"] == second.name
        failed, won = await new_rows(rig, 20)
        assert (failed.outcome, won.outcome) == (Outcome.FAILED, Outcome.FINISHED)
        assert rig.gateway.loads.of(first.name).failures == 1
        rig.assert_nothing_open()


async def test_both_fail_and_a_third_answers(kit: Any) -> None:
    async with kit.open_rig(3) as rig:
        await hedging(rig, kit, earned=21)  # so that the first replica is next
        gate = asyncio.Event()
        for mock in rig.replicas[:2]:
            mock.plans.append(kit.Plan(gate=gate, body=b"no answer"))
        asking = asyncio.create_task(rig.ask(kit.chat_body()))
        await kit.until(lambda: all(mock.active for mock in rig.replicas[:2]))
        gate.set()
        result = await asking
        assert (result.status, result.headers["x-cloudlm-attempts"]) == (200, "3")
        assert [row.outcome for row in await new_rows(rig, 21)] == [
            Outcome.FAILED,
            Outcome.FAILED,
            Outcome.FINISHED,
        ]
        rig.assert_nothing_open()


@pytest.mark.promise(2, 42)
async def test_a_client_that_leaves_ends_both(kit: Any) -> None:
    async with kit.open_rig(2) as rig:
        await hedging(rig, kit)
        for mock in rig.replicas:
            mock.plans.append(kit.Plan(kind="silence"))
        request = rig.request(kit.chat_body(stream=True))
        task = asyncio.create_task(rig.gateway.handler.handle(request))
        await kit.until(lambda: all(mock.active for mock in rig.replicas))
        request.disconnected.set_result(None)
        assert (await task).status == 499
        await kit.until(lambda: not any(mock.active for mock in rig.replicas))
        rows = await new_rows(rig, 20)
        assert [row.outcome for row in rows] == [Outcome.CANCELLED] * 2
        rig.assert_nothing_open()


async def after(seconds: float, result: int | CloudlmError) -> int:
    await asyncio.sleep(seconds)
    if isinstance(result, CloudlmError):
        raise result
    return result


async def test_a_result_that_nobody_takes_is_discarded() -> None:
    """The answer came in the very moment in which the exchange was cut."""
    interrupt, discarded = Interrupt(), []

    async def discard(result: int) -> None:
        discarded.append(result)

    async def first() -> int:
        interrupt.cut(RequestCancelled("gone"))
        return 7

    with pytest.raises(RequestCancelled):
        await quickest(first(), lambda: None, 1.0, interrupt, discard)
    assert discarded == [7]


@given(
    st.sampled_from([None, 0.0, 0.002]),
    st.sampled_from([None, 0.0, 0.002]),
)
async def test_the_first_good_one_or_the_last_fault(
    first: float | None, second: float | None
) -> None:
    """None fails at once. Whoever is good answers, whatever the order."""
    fault = UpstreamFailed("broken")

    def run(delay: float | None, number: int) -> Any:
        return after(0.001, fault) if delay is None else after(delay, number)

    async def discard(_: int) -> None:
        """Both may be ready in one moment."""

    asked = quickest(run(first, 1), lambda: run(second, 2), 0.0, Interrupt(), discard)
    if first is None and second is None:
        with pytest.raises(UpstreamFailed):
            await asked
    else:
        found = await asked
        assert (first, second)[found - 1] is not None


async def test_of_two_that_end_in_the_same_turn_the_one_that_began_first_counts() -> None:
    """Whatever addresses their tasks have: a run of a seed is the same run."""
    told = []
    for fails in (False, True):
        for _ in range(20):
            both = asyncio.Event()

            async def says(name: str, both: asyncio.Event = both, fails: bool = fails) -> str:
                await both.wait()
                if fails:
                    raise UpstreamFailed(name)
                return name

            def second(both: asyncio.Event = both, says: Any = says) -> Any:
                asyncio.get_running_loop().call_soon(both.set)
                return says("second")

            try:
                told.append(await quickest(says("first"), second, 0.0, Interrupt(), _ignored))
            except UpstreamFailed as error:
                told.append(error.message)
    assert told == ["first"] * 20 + ["second"] * 20


async def _ignored(_: str) -> None:
    """Nobody takes what the loser says."""
