"""The semantic cache in the handler: who gets whose answer, what it says and costs, and who never
does."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cloudlm.core.access import Grant, Principal, PrincipalKind, Project, Tenant
from cloudlm.core.deployment import DeploymentSpec, Endpoint
from cloudlm.core.errors import BadSetting
from cloudlm.core.settings import GatewaySettings
from cloudlm.core.tenant import Outcome, Role
from cloudlm.gateway.account import Exchange
from cloudlm.gateway.app import Gateway
from cloudlm.gateway.dialects.openai import Call, Operation
from cloudlm.gateway.semantic import calibration
from cloudlm.gateway.semantic.calibration import Calibration
from cloudlm.security.keys import mint
from cloudlm.state.memory import MemoryState

HEADER = "x-cloudlm-cache"
ASK = "How do I reset my password?"
SAME = "how can I reset my password"
EMBEDDER = "embedder"
KNOWN = Calibration(
    "built-in", 0.8, True, 0.01, 3, 1000, 0.003, 0.0006, 0.0087, 60, 100, 50, calibration.rules()
)


def _body(kit: Any, text: Any = ASK, **more: Any) -> dict[str, Any]:
    system = {"role": "system", "content": "Be brief."}
    messages = more.pop("messages", [system, {"role": "user", "content": text}])
    return {"model": kit.MODEL, "messages": messages, "temperature": 0, **more}


@contextlib.asynccontextmanager
async def _rig(kit: Any, home: Path, known: Calibration = KNOWN, **settings: Any) -> Any:
    calibration.write(known, home)
    settings = {"semantic_models": kit.MODEL, **settings}
    async with kit.open_rig(home=home, **settings) as rig:
        yield rig


@pytest.fixture
async def semantic(kit: Any, tmp_path: Path) -> AsyncIterator[Any]:
    async with _rig(kit, tmp_path, prices=f"{kit.MODEL}=1000/1/5000") as rig:
        yield rig


def _metric(rig: Any, name: str) -> float:
    lines = rig.gateway.meter.exposition().decode().splitlines()
    (line,) = [line for line in lines if line.startswith(name + " ")]
    return float(line.rpartition(" ")[2])


@pytest.mark.parametrize("stream", [False, True])
async def test_a_question_that_means_the_same(semantic: Any, kit: Any, stream: bool) -> None:
    first = await semantic.ask(_body(kit, stream=stream))
    second = await semantic.ask(_body(kit, SAME, stream=stream))
    assert (first.headers[HEADER], second.headers[HEADER]) == ("miss", "semantic")
    assert second.body == first.body
    assert second.headers["content-type"] == first.headers["content-type"]
    assert second.headers["cache-control"] == "no-store" and "etag" not in second.headers
    assert len(semantic.replicas[0].requests) == 1
    rows = [(r.outcome, r.status, r.replica == "", r.cost) for r in await semantic.rows()]
    assert rows[1] == (Outcome.SEMANTIC, 200, True, 12_000)
    assert (await semantic.ask(_body(kit, stream=stream))).headers[HEADER] == "hit"
    assert _metric(semantic, 'cloudlm_gateway_semantic_lookups_total{result="hit"}') == 1
    semantic.assert_nothing_open()


async def test_no_condition_holds_for_another_question(semantic: Any, kit: Any) -> None:
    tag = (await semantic.ask(_body(kit))).headers["etag"]
    headers = {**semantic.headers, "if-none-match": tag}
    answer = await semantic.ask(_body(kit, SAME), headers=headers)
    assert (answer.status, answer.headers[HEADER]) == (200, "semantic")


@pytest.mark.parametrize(
    "text",
    [
        "How do I not reset my password?",
        "How do I reset my 2 passwords?",
        "How do I reset my PIN?",
        "When do I reset my password?",
        "Wie setze ich mein Passwort zurück?",
        "How do I reset my admin password?",
        "What is the weather?",
    ],
)
async def test_another_question_is_asked(semantic: Any, kit: Any, text: str) -> None:
    await semantic.ask(_body(kit))
    assert (await semantic.ask(_body(kit, text))).headers[HEADER] == "miss"
    assert len(semantic.replicas[0].requests) == 2


_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "more",
    [
        {"seed": 3},
        {"top_p": 0.5},
        {"max_tokens": 9},
        {"stop": "x"},
        {"n": 2},
        {"stream": True},
        {"user": "somebody"},
        {"cache_salt": "mine"},
        {"tools": [_TOOL]},
        {"response_format": {"type": "json_object"}},
        {"presence_penalty": 0.5},
        {"messages": [{"role": "user", "content": SAME}]},
        {
            "messages": [
                {"role": "system", "content": "Be rude."},
                {"role": "user", "content": SAME},
            ]
        },
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Hi"},
                {"role": "user", "content": SAME},
            ]
        },
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": SAME, "name": "Eve"},
            ]
        },
    ],
)
async def test_everything_but_the_last_words_must_be_equal(
    semantic: Any, kit: Any, more: dict[str, Any]
) -> None:
    await semantic.ask(_body(kit))
    other = await semantic.ask(_body(kit, SAME, **more))
    assert (other.status, other.headers[HEADER]) == (200, "miss")
    # and what was asked now is there for its own kind
    changed = json.loads(json.dumps(_body(kit, SAME, **more)))
    changed["messages"][-1]["content"] = ASK
    assert (await semantic.ask(changed)).headers[HEADER] in ("hit", "semantic")


async def test_a_request_that_wants_new_answers_gets_them(semantic: Any, kit: Any) -> None:
    await semantic.ask(_body(kit))
    warm = {**_body(kit, SAME), "temperature": 0.7}
    assert (await semantic.ask(warm)).headers[HEADER] == "bypass"
    headers = {**semantic.headers, "cache-control": "no-cache"}
    assert (await semantic.ask(_body(kit, SAME), headers=headers)).headers[HEADER] == "bypass"


@pytest.mark.promise(7)
@pytest.mark.known_failure("semantic-router#2134", "litellm#29955")
async def test_tenants_never_share_a_meaning(semantic: Any, kit: Any) -> None:
    holder = Principal(
        "p", "p", PrincipalKind.SERVICE, "other", grants=(Grant("user", "other", "root"),)
    )
    for fact in (Tenant("other"), Project("other", "default"), holder):
        await semantic.state.put_identity(fact)
    minted = mint("o", Role.USER, kit.PEPPER, 1.0, tenant="other", principal="p")
    await semantic.state.put_key(minted.record)
    theirs = {**semantic.headers, "authorization": f"Bearer {minted.text}"}
    await semantic.ask(_body(kit))
    assert (await semantic.ask(_body(kit, SAME), headers=theirs)).headers[HEADER] == "miss"
    assert (await semantic.ask(_body(kit, SAME))).headers[HEADER] == "semantic"


async def _serve(rig: Any, model: str, replica: Any, revision: int = 1) -> None:
    await rig.state.put_endpoints(
        model, [Endpoint(model, f"{model}-r{revision}-0", replica.url, revision)]
    )
    await rig.gateway.view.refresh()


@pytest.mark.promise(7)
async def test_versions_and_models_never_share_a_meaning(kit: Any, tmp_path: Path) -> None:
    async with _rig(kit, tmp_path, semantic_models="*") as rig:
        await rig.ask(_body(kit))
        await rig.state.put_deployment(DeploymentSpec("twin", "models:/m/1"), now=1.0)
        await _serve(rig, "twin", rig.replicas[0])
        assert (await rig.ask(_body(kit, SAME, model="twin"))).headers[HEADER] == "miss"
        await _serve(rig, kit.MODEL, rig.replicas[0], 2)
        assert (await rig.ask(_body(kit, SAME))).headers[HEADER] == "miss"


async def test_models_opt_in_by_name(kit: Any, tmp_path: Path) -> None:
    async with _rig(kit, tmp_path, semantic_models="other*", cache_models="*") as rig:
        await rig.ask(_body(kit))
        assert (await rig.ask(_body(kit, SAME))).headers[HEADER] == "miss"
        assert (await rig.ask(_body(kit, SAME))).headers[HEADER] == "hit"


async def test_an_answer_that_is_gone_is_asked_again(kit: Any, tmp_path: Path) -> None:
    async with _rig(kit, tmp_path, cache_mb=1) as rig:
        await rig.ask(_body(kit))
        rig.replicas[0].default = kit.Plan(tokens=20_000)
        for number in range(12):  # push the first one out
            await rig.ask(_body(kit, f"Tell me story {number}"))
        rig.replicas[0].default = kit.Plan()
        assert (await rig.ask(_body(kit, SAME))).headers[HEADER] == "miss"


@pytest.mark.parametrize("text", [[{"type": "text", "text": SAME}], "x" * 1001, "  "])
async def test_what_is_not_compared(semantic: Any, kit: Any, text: Any) -> None:
    await semantic.ask(_body(kit))
    assert (await semantic.ask(_body(kit, text))).headers[HEADER] == "miss"


async def test_other_dialects_are_not_compared(semantic: Any, kit: Any) -> None:
    body = {"model": kit.MODEL, "max_tokens": 9, "temperature": 0}
    for text in (ASK, SAME):
        asked = {**body, "messages": [{"role": "user", "content": text}]}
        assert (await semantic.ask(asked, path="/v1/messages")).headers[HEADER] == "miss"


async def test_equal_questions_at_once_are_compared_and_asked_once(semantic: Any, kit: Any) -> None:
    semantic.replicas[0].default = kit.Plan(pause_s=0.5)
    leading = asyncio.create_task(semantic.ask(_body(kit)))
    await kit.until(lambda: semantic.replicas[0].requests)
    others = await asyncio.gather(*(semantic.ask(_body(kit)) for _ in range(3)))
    assert [one.headers[HEADER] for one in others] == ["coalesced"] * 3
    assert (await leading).headers[HEADER] == "miss"
    name = 'cloudlm_gateway_semantic_lookups_total{result="nothing like it"}'
    assert _metric(semantic, name) == 1


async def test_an_answer_of_other_guardrails_or_for_one_alone_is_none(
    semantic: Any, kit: Any
) -> None:
    """What guardrails did to a request stands in its call."""
    recall = semantic.gateway.handler.recall
    snapshot = semantic.gateway.view.snapshot()
    request = semantic.request(_body(kit))
    exchange = Exchange("r", recall.clock, semantic.gateway.meter)
    exchange.key = snapshot.keys[semantic.key_id]
    model = snapshot.models[kit.MODEL]

    def asked(**more: Any) -> Any:
        call = Call(Operation.CHAT, kit.MODEL, request.body, **more)
        return recall.question(exchange, request, call, model)

    parts = [b"semantic"]
    plain, other = asked()._asked, asked(policy="strict")._asked
    assert plain.place != other.place
    assert plain.key(parts) != other.key(parts) and plain.key(parts) == asked()._asked.key(parts)
    assert asked(private=True) is None


# Configuration ----------------------------------------------------------------------------------


async def test_nothing_uncalibrated_is_served(kit: Any, tmp_path: Path) -> None:
    def start(**settings: str) -> None:
        wanted = GatewaySettings(semantic_models="*", **settings)
        Gateway(wanted, MemoryState(), home=tmp_path, pepper=kit.PEPPER, worker_token=None)

    with pytest.raises(BadSetting, match="cloudlm cache calibrate"):
        start()
    calibration.write(KNOWN, tmp_path)
    start()
    with pytest.raises(BadSetting, match="semantic_embedder"):
        start(semantic_embedder="another")


async def test_a_calibration_of_other_rules_serves_nothing(kit: Any, tmp_path: Path) -> None:
    async with _rig(kit, tmp_path, replace(KNOWN, rules="older")) as rig:
        await rig.ask(_body(kit))
        assert (await rig.ask(_body(kit, SAME))).headers[HEADER] == "miss"
        assert (await rig.ask(_body(kit, SAME))).headers[HEADER] == "hit"


@pytest.mark.promise(7)
async def test_a_threshold_can_only_be_raised(kit: Any, tmp_path: Path) -> None:
    async with _rig(kit, tmp_path, replace(KNOWN, threshold=1.0005), semantic_threshold=0.1) as rig:
        await rig.ask(_body(kit))
        assert (await rig.ask(_body(kit, SAME))).headers[HEADER] == "miss"
        assert _metric(rig, "cloudlm_gateway_semantic_threshold") == 1.0005
        assert _metric(rig, "cloudlm_gateway_semantic_false_hit_rate") == 0.003
        assert _metric(rig, "cloudlm_gateway_semantic_false_hit_rate_high") == 0.0087


# A deployment as the embedder -------------------------------------------------------------------


def _vector(*values: float, tokens: int = 4) -> bytes:
    data = [{"index": 0, "embedding": list(values)}]
    return json.dumps({"data": data, "usage": {"prompt_tokens": tokens}}).encode()


@contextlib.asynccontextmanager
async def _embedded(kit: Any, home: Path, fingerprint: tuple[float, ...] = (0.6, 0.8)) -> Any:
    known = replace(KNOWN, embedder=EMBEDDER, fingerprint=fingerprint)
    settings = {"semantic_embedder": EMBEDDER, "prices": f"{EMBEDDER}=10/1/0"}
    embedder = kit.MockReplica("e")
    await embedder.start()
    embedder.default = kit.Plan(body=_vector(3.0, 4.0))
    try:
        async with _rig(kit, home, known, **settings) as rig:
            await rig.state.put_deployment(DeploymentSpec(EMBEDDER, "models:/e/1"), now=1.0)
            await _serve(rig, EMBEDDER, embedder)
            yield rig, embedder
    finally:
        await embedder.stop()


async def test_a_deployment_makes_the_vectors(kit: Any, tmp_path: Path) -> None:
    async with _embedded(kit, tmp_path) as (rig, embedder):
        await rig.ask(_body(kit))
        again = await rig.ask(_body(kit, SAME))
        assert again.headers[HEADER] == "semantic"
        assert (await rig.ask(_body(kit, "How do I reset my PIN?"))).headers[HEADER] == "miss"
        assert [one["input"] for one in embedder.requests][1:3] == [ASK, SAME]
        assert "x-cloudlm-tenant" in embedder.heads[0].lower()
        rows = [r for r in await rig.rows() if r.model == EMBEDDER]
        assert {(r.outcome, r.prompt_tokens, r.cost) for r in rows} == {
            (Outcome.FINISHED, 4, 40_000)
        }
        assert len(rows) == len(embedder.requests) == 4  # the fingerprint's too
        assert rows[-1].request_id != rows[0].request_id
        rig.assert_nothing_open()


async def test_no_turn_goes_to_an_embedder_that_its_key_may_not_use(
    kit: Any, tmp_path: Path
) -> None:
    async with _embedded(kit, tmp_path) as (rig, embedder):
        spec = DeploymentSpec(EMBEDDER, "models:/e/1", tenant="another")
        await rig.state.put_deployment(spec, now=2.0)
        await rig.gateway.view.refresh()
        for text in (ASK, SAME):
            answer = await rig.ask(_body(kit, text))
            assert (answer.status, answer.headers[HEADER]) == (200, "miss")
        assert not embedder.requests


async def test_another_embedder_than_the_calibrated_one_is_not_used(
    kit: Any, tmp_path: Path
) -> None:
    async with _embedded(kit, tmp_path) as (rig, embedder):
        await rig.ask(_body(kit))
        embedder.default = kit.Plan(body=_vector(-4.0, 3.0))
        await _serve(rig, EMBEDDER, embedder, 2)
        for _ in range(2):
            assert (await rig.ask(_body(kit, SAME + "?"))).status == 200
        assert len(embedder.requests) == 3  # asked once for its fingerprint, and not again


async def test_a_client_that_leaves_is_no_fault_of_the_embedder(kit: Any, tmp_path: Path) -> None:
    async with _embedded(kit, tmp_path) as (rig, embedder):
        embedder.plans.append(kit.Plan(kind="silence"))
        request = rig.request(_body(kit))
        asking = asyncio.create_task(rig.gateway.handler.handle(request))
        await kit.until(lambda: embedder.requests)
        request.disconnected.set_result(None)
        assert (await asking).status == 499
        assert (await rig.ask(_body(kit))).headers[HEADER] == "miss"
        assert (await rig.ask(_body(kit, SAME))).headers[HEADER] == "semantic"
        rig.assert_nothing_open()


@pytest.mark.parametrize(
    "plan",
    [
        {"kind": "status", "status": 500},
        {"kind": "silence"},
        {"kind": "close"},
        {"body": b"{}"},
        {"body": b'{"data": [{"embedding": "x"}]}'},
        {"body": b'{"data": [{"embedding": [1e999]}]}'},
    ],
)
async def test_without_its_embedder_a_request_is_served_as_ever(
    kit: Any, tmp_path: Path, plan: dict[str, Any]
) -> None:
    async with _embedded(kit, tmp_path) as (rig, embedder):
        embedder.default = kit.Plan(**plan)
        for text in (ASK, SAME, SAME + " now"):
            answer = await rig.ask(_body(kit, text))
            assert (answer.status, answer.headers[HEADER]) == (200, "miss")
        assert len(embedder.requests) == 1  # then nobody waits for it for a while
        rows = [r for r in await rig.rows() if r.model == EMBEDDER]
        assert len(rows) == 1 and rows[0].outcome is not Outcome.FINISHED
        rig.assert_nothing_open()
