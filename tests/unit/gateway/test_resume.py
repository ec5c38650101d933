"""A stream whose replica is lost goes on at another, and the client does not notice."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from cloudlm.core.tenant import Outcome
from cloudlm.gateway.progress import Progress

NOTES = {"tokens": 4, "notes": True}
ASK = {"stream": True, "stream_options": {"include_usage": True}}


async def whole_stream(rig: Any, kit: Any) -> bytes:
    result = await rig.ask(kit.chat_body(**ASK))
    assert result.events[-1] == "[DONE]"
    return bytes(result.body)


@pytest.mark.promise(1, 3)
async def test_cut_anywhere(kit: Any) -> None:
    """Whatever byte is the last, the client gets the very bytes of an unbroken stream, and the
    ledger counts each token once."""
    async with kit.open_rig(replicas=2) as rig:
        for replica in rig.replicas:
            replica.default = kit.Plan(**NOTES)
        whole = await whole_stream(rig, kit)
        assert b"cloudlm_resume" not in whole
        asked: dict[str, int] = {}
        for cut in range(5, 2600, 73):
            rig.gateway.handler.errands._budgets.clear()  # cuts before the content are retries
            rig.replicas[0].plans.append(kit.Plan(**NOTES, cut_byte=cut))
            rig.gateway.loads.begin(rig.replicas[1].name)  # so that the first is chosen
            response = await rig.gateway.handler.handle(rig.request(kit.chat_body(**ASK)))
            rig.gateway.loads.end(rig.replicas[1].name)
            result = await rig.finish(response)
            assert result.body == whole, cut
            rig.gateway.loads.answered(rig.replicas[0].name)
            asked[result.headers["x-request-id"]] = cut
        await rig.gateway.ledger.flush()
        ledger = await rig.state.list_ledger(limit=10_000)
        for request_id, cut in asked.items():
            rows = [row for row in ledger if row.request_id == request_id]
            assert sum(row.completion_tokens for row in rows) == 4, cut
            assert sum(row.prompt_tokens for row in rows) == 7, cut
            assert [row.outcome for row in rows].count(Outcome.FINISHED) == 1
        rig.assert_nothing_open()


@pytest.mark.promise(1, 3)
async def test_a_resumed_stream_is_two_attempts_and_one_request(kit: Any) -> None:
    async with kit.open_rig(replicas=2) as rig:
        rig.replicas[0].default = kit.Plan(**NOTES, cut_byte=1200)
        rig.replicas[1].default = kit.Plan(**NOTES)
        result = await rig.ask(kit.chat_body(**ASK))
        assert result.tokens == 4
        assert result.error is None
        rows = await rig.rows()
        assert [row.attempt for row in rows] == [1, 2]
        assert [row.outcome for row in rows] == [Outcome.FAILED, Outcome.FINISHED]
        assert all(row.completion_tokens for row in rows)
        asked = rig.replicas[1].requests[0]
        assert asked["path"] == "/v1/chat/completions"
        assert asked["request"]["messages"] == [{"role": "user", "content": "hello"}]
        begun = asked["begun"]
        assert (begun["id"], begun["seed"], begun["fingerprint"]) == ("c1", 7, "fp_1")
        (choice,) = begun["choices"]
        assert choice["token_ids"] == [100 + n for n in range(1, choice["chunks"])]
        metrics = rig.gateway.meter.exposition().decode()
        assert 'cloudlm_gateway_resumes_total{model="tiny"} 1.0' in metrics
        assert 'time_to_first_token_seconds_count{model="tiny"} 1.0' in metrics
        rig.assert_nothing_open()


@pytest.mark.promise(1)
async def test_a_stall_is_resumed(kit: Any) -> None:
    async with kit.open_rig(replicas=2, idle_timeout_s=1.0) as rig:
        rig.replicas[0].default = kit.Plan(**NOTES, stall_at=3)
        rig.replicas[1].default = kit.Plan(**NOTES)
        result = await rig.ask(kit.chat_body(**ASK))
        assert (result.tokens, result.events[-1]) == (4, "[DONE]")
        rows = await rig.rows()
        assert [(row.outcome, row.completion_tokens) for row in rows] == [
            (Outcome.FAILED, 2),
            (Outcome.FINISHED, 2),
        ]


@pytest.mark.promise(1)
async def test_garbage_in_a_stream_is_resumed(kit: Any) -> None:
    async with kit.open_rig(replicas=2) as rig:
        rig.replicas[0].default = kit.Plan(**NOTES, garbage_at=3)
        rig.replicas[1].default = kit.Plan(**NOTES)
        result = await rig.ask(kit.chat_body(**ASK))
        assert (result.tokens, result.events[-1]) == (4, "[DONE]")


@pytest.mark.promise(1)
async def test_a_foreign_endpoint_is_not_resumed(kit: Any) -> None:
    async with kit.open_rig(replicas=2) as rig:
        rig.replicas[0].default = kit.Plan(tokens=9, cut_byte=1500)
        result = await rig.ask(kit.chat_body(**ASK))
        assert result.error["code"] == "upstream_failed"
        assert b"[DONE]" not in result.body
        assert rig.replicas[1].requests == []
        (row,) = await rig.rows()
        assert row.completion_tokens == result.tokens


@pytest.mark.promise(1)
async def test_another_revision_is_not_asked(kit: Any) -> None:
    async with kit.open_rig(replicas=2) as rig:
        old, new = await rig.state.list_endpoints()
        new = dataclasses.replace(new, revision=2)
        await rig.state.put_endpoints(kit.MODEL, [old, new])
        await rig.gateway.view.refresh()
        rig.replicas[0].default = kit.Plan(**NOTES, cut_byte=1200)
        result = await rig.ask(kit.chat_body(**ASK))
        assert "no other replica runs the version" in result.error["message"]
        assert rig.replicas[1].requests == []


async def test_a_refusal_to_go_on_is_told(kit: Any) -> None:
    async with kit.open_rig(replicas=3) as rig:
        rig.replicas[0].default = kit.Plan(**NOTES, cut_byte=1200)
        error = {"error": {"message": "another version", "type": "x", "code": "conflict"}}
        rig.replicas[1].default = kit.Plan("status", status=409, error=error)
        result = await rig.ask(kit.chat_body(**ASK))
        assert result.error["message"] == "another version"
        assert rig.replicas[2].requests == []
        assert len(await rig.rows()) == 2
        rig.assert_nothing_open()


@pytest.mark.promise(1, 8)
@pytest.mark.parametrize("limit", [0, 1, 2])
async def test_the_number_of_resumes_is_limited(kit: Any, limit: int) -> None:
    """A request that kills its replicas does not kill them all."""
    async with kit.open_rig(replicas=4, max_resumes=limit) as rig:
        for replica in rig.replicas:
            replica.default = kit.Plan(tokens=40, notes=True, cut_byte=1200)
        result = await rig.ask(kit.chat_body(stream=True, max_tokens=5))
        assert result.error["code"] == "upstream_failed"
        assert sum(len(replica.requests) for replica in rig.replicas) == limit + 1
        rig.assert_nothing_open()


async def test_dead_replicas_are_passed_over(kit: Any) -> None:
    async with kit.open_rig(replicas=3) as rig:
        rig.replicas[0].default = kit.Plan(**NOTES, cut_byte=1200)
        rig.replicas[1].default = kit.Plan("close")
        rig.replicas[2].default = kit.Plan(**NOTES)
        result = await rig.ask(kit.chat_body(**ASK))
        assert (result.tokens, result.events[-1]) == (4, "[DONE]")
        assert [row.completion_tokens > 0 for row in await rig.rows()] == [True, False, True]


@pytest.mark.promise(2)
async def test_a_client_that_leaves_during_a_resume(kit: Any) -> None:
    async with kit.open_rig(replicas=2) as rig:
        rig.replicas[0].default = kit.Plan(**NOTES, cut_byte=1200)
        rig.replicas[1].default = kit.Plan("silence")
        request = rig.request(kit.chat_body(**ASK))
        response = await rig.gateway.handler.handle(request)
        reading = asyncio.create_task(rig.finish(response))
        await kit.until(lambda: rig.replicas[1].active)
        request.disconnected.set_result(None)
        result = await reading
        assert b"error" not in result.body
        outcomes = [row.outcome for row in await rig.rows()]
        assert outcomes == [Outcome.FAILED, Outcome.CANCELLED]
        rig.assert_nothing_open()


@pytest.mark.parametrize(
    "note",
    [None, 3, {}, {"token_ids": None}, {"token_ids": ["a"]}, {"token_ids": [2**40]}],
    ids=str,
)
def test_a_chunk_without_a_good_note_ends_the_hope(note: Any) -> None:
    progress = Progress()
    head = {"id": "c", "created": 1, "system_fingerprint": "fp"}
    choice = {"index": 0, "delta": {}, "finish_reason": None}
    progress.take({**head, "choices": [choice], "cloudlm_resume": {"token_ids": [1]}})
    assert progress.resumable
    chunk = {**head, "choices": [choice], "cloudlm_resume": note}
    progress.take(chunk)
    assert not progress.resumable
    assert "cloudlm_resume" not in chunk
