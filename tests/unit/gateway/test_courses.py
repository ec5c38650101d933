"""Routes over several models, through the whole gateway."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from cloudlm.core.access import Limits
from cloudlm.core.deployment import DeploymentSpec, Endpoint
from cloudlm.core.errors import BadSetting
from cloudlm.core.settings import GatewaySettings
from cloudlm.core.tenant import Outcome, Role
from cloudlm.gateway.app import Gateway
from cloudlm.security.keys import mint
from cloudlm.state.memory import MemoryState

PRICES = "small=1/1/1, large=10/10/10"
TOO_LONG = {"error": {"message": "too long", "code": "context_length_exceeded", "type": "x"}}
VLLM_TOO_LONG = {"error": {"message": "This model's maximum context length is 8 tokens."}}


@contextlib.asynccontextmanager
async def routed(kit: Any, routes: str, **settings: Any) -> AsyncIterator[Any]:
    """A gateway whose replicas are those of the models ``small`` and ``large``."""
    async with kit.open_rig(2, routes=routes, prices=PRICES, **settings) as rig:
        for name, mock in zip(("small", "large"), rig.replicas, strict=True):
            await rig.state.put_deployment(DeploymentSpec(name, "models:/m/1"), now=3.0)
            await rig.state.put_endpoints(name, [Endpoint(name, mock.name, mock.url, 1)])
        await rig.gateway.view.refresh()
        yield rig
        rig.assert_nothing_open()


async def rows_of(rig: Any) -> list[tuple[str, Outcome]]:
    rows = sorted(await rig.rows(), key=lambda row: (row.started_at, row.attempt))
    return [(row.model, row.outcome) for row in rows]


async def test_a_route_answers_as_the_model_that_answered(kit: Any) -> None:
    async with routed(kit, "chat = large") as rig:
        for stream in (False, True):
            result = await rig.ask(kit.chat_body(model="chat", stream=stream))
            assert result.status == 200
            said = result.events[0]["model"] if stream else result.json["model"]
            assert said == result.headers["x-cloudlm-model"] == "large"
            assert result.headers["x-cloudlm-route"].endswith("; via=chat")
        assert [body["model"] for body in rig.replicas[1].requests] == ["large"] * 2
        rows = await rig.rows()
        assert {row.model for row in rows} == {"large"}
        assert {row.cost for row in rows} == {(7 + 5) * 10_000}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", {"max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/responses", {"input": "hi"}),
        ("/api/chat", {"messages": [{"role": "user", "content": "hi"}], "stream": False}),
    ],
)
async def test_other_dialects_name_it_too(kit: Any, path: str, body: dict[str, Any]) -> None:
    async with routed(kit, "chat = large") as rig:
        headers = {**rig.headers, "anthropic-version": "2023-06-01"}
        result = await rig.ask({**body, "model": "chat"}, path=path, headers=headers)
        assert (result.status, result.json["model"]) == (200, "large")


async def test_shares_and_sessions(kit: Any) -> None:
    async with routed(kit, "chat = small:1 + large:1") as rig:
        answered = Counter()
        for _ in range(60):  # all alike once in 10**17 runs
            result = await rig.ask(kit.chat_body(model="chat"))
            answered[result.headers["x-cloudlm-model"]] += 1
        assert set(answered) == {"small", "large"}
        for number in range(5):
            mine = {
                (await rig.ask(kit.chat_body(model="chat", user=f"u{number}"))).json["model"]
                for _ in range(6)
            }
            assert len(mine) == 1


@pytest.mark.promise(4)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_model_that_fails_is_replaced(kit: Any, stream: bool) -> None:
    async with routed(kit, "chat = small > large") as rig:
        rig.replicas[0].default = kit.Plan(kind="status", status=500)
        result = await rig.ask(kit.chat_body(model="chat", stream=stream))
        assert result.status == 200
        assert result.headers["x-cloudlm-model"] == "large"
        assert result.headers["x-cloudlm-attempts"] == "2"
        assert await rows_of(rig) == [("small", Outcome.FAILED), ("large", Outcome.FINISHED)]
        costs = {row.model: row.cost for row in await rig.rows()}
        assert costs == {"small": 0, "large": 120_000}
        # While its only replica is ejected, nobody asks the first model in vain.
        assert (await rig.ask(kit.chat_body(model="chat"))).headers["x-cloudlm-attempts"] == "1"
        shown = rig.gateway.meter.exposition()
        assert b'cloudlm_gateway_fallbacks_total{model="small"} 1.0' in shown
        assert b'cloudlm_gateway_requests_ongoing{model="small"} 0.0' in shown


@pytest.mark.promise(28)
@pytest.mark.parametrize("status", [429, 503])
async def test_an_overloaded_model_is_replaced(kit: Any, status: int) -> None:
    async with routed(kit, "chat = small > large") as rig:
        plan = kit.Plan(kind="status", status=status, headers={"retry-after": "30"})
        rig.replicas[0].default = plan
        for attempts in ("2", "1", "1"):
            result = await rig.ask(kit.chat_body(model="chat"))
            assert (result.status, result.headers["x-cloudlm-attempts"]) == (200, attempts)
        assert len(rig.replicas[0].requests) == 1  # it got the time that it asked for


@pytest.mark.promise(9)
async def test_a_full_line_or_a_missing_replica_is_no_end(kit: Any) -> None:
    async with routed(
        kit, "chat = small > large", replica_capacity=1, max_queued_requests=0
    ) as rig:
        rig.replicas[0].default = kit.Plan(pause_s=0.5)
        first = asyncio.create_task(rig.ask(kit.chat_body(model="chat")))
        await kit.until(lambda: rig.replicas[0].active)
        assert (await rig.ask(kit.chat_body(model="chat"))).json["model"] == "large"
        assert (await rig.ask(kit.chat_body(model="small"))).status == 503  # by its own name
        assert (await first).json["model"] == "small"
        await rig.state.put_endpoints("small", [])
        await rig.gateway.view.refresh()
        rig.gateway.demand.measure()
        assert (await rig.ask(kit.chat_body(model="chat"))).json["model"] == "large"
        wanted = {row.model: row.requests_per_s for row in rig.gateway.demand.measure()}
        assert wanted["small"] > 0  # so that control starts one


@pytest.mark.parametrize("told", [TOO_LONG, VLLM_TOO_LONG])
async def test_a_long_prompt_goes_to_the_larger_window(kit: Any, told: dict[str, Any]) -> None:
    async with routed(kit, "chat = small ^ large") as rig:
        rig.replicas[0].default = kit.Plan(
            kind="status", status=400, error=told, body=json.dumps(told).encode()
        )
        result = await rig.ask(kit.chat_body(model="chat", stream=True))
        assert (result.status, result.headers["x-cloudlm-model"]) == (200, "large")
        assert await rows_of(rig) == [("small", Outcome.REFUSED), ("large", Outcome.FINISHED)]
        assert rig.gateway.loads.of(rig.replicas[0].name).failures == 0
        rig.replicas[1].default = rig.replicas[0].default
        assert (await rig.ask(kit.chat_body(model="chat"))).status == 400


async def test_other_faults_go_to_no_larger_window_and_bad_requests_nowhere(kit: Any) -> None:
    async with routed(kit, "chat = small ^ large; other = small > large") as rig:
        rig.replicas[0].default = kit.Plan(kind="status", status=500)
        assert (await rig.ask(kit.chat_body(model="chat"))).status == 500
        rig.gateway.loads.answered(rig.replicas[0].name)
        rig.replicas[0].default = kit.Plan(kind="status", status=400)
        assert (await rig.ask(kit.chat_body(model="other"))).status == 400
        assert not rig.replicas[1].requests


@pytest.mark.promise(8)
async def test_a_total_outage_does_not_multiply_attempts(kit: Any) -> None:
    """For chains of models too."""
    async with routed(kit, "chat = small > large") as rig:
        for mock in rig.replicas:
            mock.default = kit.Plan(kind="status", status=500)
        for _ in range(60):
            assert (await rig.ask(kit.chat_body(model="chat"))).status == 500
        assert len(await rig.rows()) <= 1.2 * 60 + 1


async def test_a_key_gets_only_its_own_models_out_of_a_route(kit: Any) -> None:
    async with routed(kit, "chat = small:1 + large:99 > large; big = large") as rig:
        both = mint("a", Role.USER, kit.PEPPER, 1.0, models=("chat", "big", "small"))
        none = mint("b", Role.USER, kit.PEPPER, 1.0, models=("chat",))
        direct = mint("c", Role.USER, kit.PEPPER, 1.0, models=("small", "large"))
        for minted in (both, none, direct):
            await rig.state.put_key(minted.record)
        await rig.gateway.view.refresh()

        def by(minted: Any) -> dict[str, str]:
            return {"authorization": f"Bearer {minted.text}"}

        for _ in range(10):
            result = await rig.ask(kit.chat_body(model="chat"), headers=by(both))
            assert (result.status, result.json["model"]) == (200, "small")
        rig.replicas[0].plans.append(kit.Plan(kind="status", status=500))
        assert (await rig.ask(kit.chat_body(model="chat"), headers=by(both))).status == 500
        for model, minted in (("big", both), ("chat", none), ("chat", direct)):
            refused = await rig.ask(kit.chat_body(model=model), headers=by(minted))
            assert (refused.status, refused.json["error"]["code"]) == (404, "model_not_found")
        assert not rig.replicas[1].requests
        listed = await rig.ask(None, method="GET", path="/v1/models", headers=by(both))
        assert [one["id"] for one in listed.json["data"]] == ["chat", "small"]
        listed = await rig.ask(None, method="GET", path="/v1/models", headers=by(none))
        assert listed.json["data"] == []


async def test_a_route_may_stand_before_a_deployment_of_its_name(kit: Any) -> None:
    async with routed(kit, "small = small > large") as rig:
        assert (await rig.ask(kit.chat_body(model="small"))).json["model"] == "small"
        rig.replicas[0].default = kit.Plan(kind="close")
        assert (await rig.ask(kit.chat_body(model="small"))).json["model"] == "large"


async def test_a_route_over_nothing_is_no_model(kit: Any) -> None:
    async with routed(kit, "ghost = absent > absent-too") as rig:
        assert (await rig.ask(kit.chat_body(model="ghost"))).status == 404
        await rig.state.put_deployment(DeploymentSpec("absent", "models:/m/1"), now=3.0)
        assert (await rig.ask(kit.chat_body(model="ghost"))).status == 503  # seen at once


async def test_budgets_reserve_for_the_dearest_model(kit: Any) -> None:
    async with routed(kit, "chat = small > large") as rig:
        limiter, seen = rig.gateway.limiter, []
        reserve = limiter._counters.reserve

        async def spy(*args: Any, **how: Any) -> Any:
            seen.append(how["spend"])
            return await reserve(*args, **how)

        limiter._counters.reserve = spy
        minted = mint("a", Role.USER, kit.PEPPER, 1.0, limits=Limits(spend_per_month=100.0))
        await rig.state.put_key(minted.record)
        await rig.gateway.view.refresh()
        headers = {"authorization": f"Bearer {minted.text}"}
        for model in ("chat", "large", "small"):
            assert (await rig.ask(kit.chat_body(model=model), headers=headers)).status == 200
        routed_spend, large, small = seen
        assert routed_spend >= large - 10 * 10_000 > small  # the names differ in length


async def test_equal_questions_do_not_wait_for_a_model_that_was_left(kit: Any) -> None:
    async with routed(kit, "chat = small > large", cache_models="small, large") as rig:
        rig.replicas[0].plans.extend([kit.Plan(kind="close", pause_s=0.0)] * 1)
        body = kit.chat_body(model="chat", temperature=0)
        results = await asyncio.gather(*(rig.ask(body) for _ in range(3)))
        assert {one.status for one in results} == {200}
        assert not rig.gateway.handler.recall.flights
        again = await rig.ask(kit.chat_body(model="large", temperature=0))
        assert again.headers["x-cloudlm-cache"] in ("hit", "miss")
        assert again.json["model"] == "large"


def test_a_bad_route_refuses_to_start(kit: Any, tmp_path: Path) -> None:
    settings = GatewaySettings(routes="chat")
    with pytest.raises(BadSetting, match=r"gateway\.routes"):
        Gateway(settings, MemoryState(), home=tmp_path, pepper=kit.PEPPER, worker_token=None)


async def test_falling_back_leaves_no_guardrail_behind(kit: Any, tmp_path: Path) -> None:
    one, other = {"models": ["small"], "pii": {"in": "redact"}}, {"models": ["large"]}
    hidden = {
        "blocklists": [{"name": "words", "words": ["secret"], "on": ["out"], "mode": "redact"}]
    }
    policies = {"policies": {"one": one, "other": {**other, **hidden}}}
    (tmp_path / "guardrails.yaml").write_text(json.dumps(policies))
    async with routed(kit, "chat = small > large", guardrails="guardrails.yaml", home=tmp_path) as (
        rig
    ):
        rig.replicas[0].default = kit.Plan(kind="status", status=500)
        message = {"role": "user", "content": "mail ann@example.com"}
        choice = {"index": 0, "message": {"role": "assistant", "content": "secret <EMAIL_1>"}}
        body = {"choices": [{**choice, "finish_reason": "stop"}], "model": "large"}
        rig.replicas[1].default = kit.Plan(body=json.dumps(body).encode())
        result = await rig.ask(kit.chat_body(model="chat", messages=[message]))
        assert result.json["model"] == "large"
        for replica in rig.replicas:
            assert replica.requests[0]["messages"][0]["content"] == "mail <EMAIL_1>"
        said = result.json["choices"][0]["message"]["content"]
        assert "ann@example.com" in said
        assert "secret" not in said


async def test_a_cached_answer_after_a_failure_names_no_replica(kit: Any) -> None:
    async with routed(kit, "chat = small > large", cache_models="large") as rig:
        ask = {"temperature": 0, "seed": 1}
        await rig.ask(kit.chat_body(model="large", **ask))
        rig.replicas[0].default = kit.Plan(kind="status", status=500)
        result = await rig.ask(kit.chat_body(model="chat", **ask))
        assert (result.status, result.headers["x-cloudlm-cache"]) == (200, "hit")
        assert "x-cloudlm-replica" not in result.headers
        rows = {row.outcome: row.replica for row in await rig.rows() if row.attempt == 2}
        assert rows == {Outcome.CACHED: ""}


async def test_a_larger_window_is_no_reason_not_to_wait_for_the_first_replica(kit: Any) -> None:
    async with routed(kit, "chat = cold ^ large") as rig:
        spec = DeploymentSpec("cold", "models:/m/1", min_replicas=0)
        await rig.state.put_deployment(spec, now=1.0)
        await rig.gateway.view.refresh()
        asking = asyncio.create_task(rig.ask(kit.chat_body(model="chat")))
        await kit.until(lambda: rig.gateway.admission.queued("cold") == 1)
        mock = rig.replicas[0]
        await rig.state.put_endpoints("cold", [Endpoint("cold", mock.name, mock.url, 1)])
        result = await asking
        assert (result.status, result.json["model"]) == (200, "cold")


async def test_one_that_is_put_to_sleep_before_it_came_says_so(kit: Any) -> None:
    async with routed(kit, "chat = small") as rig:
        spec = DeploymentSpec("dozing", "models:/m/1", asleep=True)
        await rig.state.put_deployment(spec, now=1.0)
        await rig.gateway.view.refresh()
        result = await rig.ask(kit.chat_body(model="dozing"))
        assert "is asleep" in result.json["error"]["message"]
