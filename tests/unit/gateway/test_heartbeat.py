"""Comments in a stream whose replica is silent: when they come, and what they leave alone."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.core.clock import ManualClock
from cloudlm.core.errors import UpstreamFailed, UpstreamTimeout
from cloudlm.core.settings import GatewaySettings
from cloudlm.core.tenant import Outcome
from cloudlm.gateway.account import Exchange
from cloudlm.gateway.dialects.openai import Call, OpenAIRendering, Operation
from cloudlm.gateway.flight import Recorded
from cloudlm.gateway.meter import Meter
from cloudlm.gateway.relay import Relay
from cloudlm.gateway.sse import PING, SseParser


def _parts(body: bytes) -> list[bytes]:
    """The events and comments of a stream, each whole."""
    assert body.endswith(b"\n\n")
    return [part + b"\n\n" for part in body.removesuffix(b"\n\n").split(b"\n\n")]


@pytest.mark.promise(10)
def test_clients_see_no_event_in_a_comment() -> None:
    assert SseParser().feed(b"data: 1\n\n" + PING + b"data: 2\n\n" + PING) == [b"1", b"2"]


@pytest.mark.promise(10)
@pytest.mark.known_failure("suna#3696")
async def test_a_silent_stream_gets_comments_until_its_time_is_up(kit: Any) -> None:
    """Four waits of 0.1 s and one of the rest: so many comments however slow the machine is."""
    async with kit.open_rig(heartbeat_s=0.1, idle_timeout_s=0.45) as rig:
        rig.replicas[0].default = kit.Plan(stall_at=3)
        response = await rig.gateway.handler.handle(rig.request(kit.chat_body(stream=True)))
        result = await rig.finish(response)
        *_, last = parts = _parts(result.body)
        assert b'"code":"upstream_timeout"' in last.replace(b" ", b"")
        assert b"silent for 0.45 s" in last
        assert parts[-5:-1] == [PING] * 4
        assert not parts[0].startswith(b":")  # the head is held until there is content
        (row,) = await rig.rows()
        assert (row.status, row.completion_tokens) == (504, 2)
        rig.assert_nothing_open()


@pytest.mark.promise(10)
async def test_before_the_first_content_there_is_none(kit: Any) -> None:
    """A replica that is lost before it can still be replaced, with a true status."""
    async with kit.open_rig(
        replicas=2, heartbeat_s=0.02, first_token_timeout_s=0.3, idle_timeout_s=0.3
    ) as rig:
        for replica in rig.replicas:
            replica.default = kit.Plan(stall_at=1)  # after the event with the role
        result = await rig.ask(kit.chat_body(stream=True))
        assert result.status == 504
        assert b": ping" not in result.body


@pytest.mark.promise(10)
async def test_a_stream_is_resumed_after_comments(kit: Any) -> None:
    async with kit.open_rig(replicas=2, heartbeat_s=0.05, idle_timeout_s=2.0) as rig:
        rig.replicas[0].default = kit.Plan(notes=True, tokens=4, stall_at=3)
        rig.replicas[1].default = kit.Plan(notes=True, tokens=4)
        result = await rig.ask(kit.chat_body(stream=True, seed=7))
        parts = _parts(result.body)
        assert parts.count(PING) >= 2
        told = kit.Result(200, {}, b"".join(part for part in parts if part != PING))
        assert (told.tokens, told.error, told.events[-1]) == (4, None, "[DONE]")
        assert [row.outcome for row in await rig.rows()] == [Outcome.FAILED, Outcome.FINISHED]


@pytest.mark.parametrize(
    ("path", "more", "wanted"),
    [
        ("/v1/chat/completions", {}, {"heartbeat_s": 0.0}),
        ("/api/chat", {}, {"heartbeat_s": 0.02}),  # lines of JSON know no comments
    ],
)
async def test_where_there_is_none(
    kit: Any, path: str, more: dict[str, Any], wanted: dict[str, Any]
) -> None:
    async with kit.open_rig(idle_timeout_s=0.2, **wanted) as rig:
        rig.replicas[0].default = kit.Plan(stall_at=3)
        result = await rig.ask(kit.chat_body(stream=True, **more), path=path)
        assert result.status == 200
        assert b"ping" not in result.body


class _Stream:
    """A stream whose pieces come half by pull and half by pump, as those of a relay do."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._left = deque(pieces)

    def __aiter__(self) -> _Stream:
        return self

    async def __anext__(self) -> bytes:
        if not self._left:
            raise StopAsyncIteration
        return self._left.popleft()

    async def pump(self, write: Callable[[bytes], bool]) -> None:
        if self._left:
            write(self._left.popleft())

    async def aclose(self) -> None:
        self._left.clear()


@pytest.mark.promise(10)
@given(st.lists(st.sampled_from([b"data: 1\n\n", b"data: 2\n\n", PING]), max_size=8))
async def test_a_kept_answer_holds_no_comment(pieces: list[bytes]) -> None:
    """The silence is one of the leader's stream; whoever asks again waits for nothing."""
    kept: list[bytes | None] = []
    sent: list[bytes] = []
    last = b"data: [DONE]\n\n"
    stream = _Stream([*pieces, last])
    recorded = Recorded(stream, kept.append, 10_000, lambda: not stream._left)
    async for piece in recorded:
        sent.append(piece)
        await recorded.pump(lambda piece: not sent.append(piece))
    await recorded.aclose()
    assert sent == [*pieces, last]
    assert kept == [b"".join(piece for piece in sent if piece != PING)]


async def test_a_comment_of_the_replicas_own_is_passed_on(kit: Any) -> None:
    """Behind a gateway of others the silence is measured there: its comments end it here."""
    async with kit.open_rig(heartbeat_s=60.0, idle_timeout_s=60.0) as rig:
        replica = rig.replicas[0]
        stream = replica._stream
        content_came, comment_came = asyncio.Event(), asyncio.Event()

        async def with_comments(plan: Any, body: Any, writer: Any, watch: Any) -> bool:
            write, drain, count = writer.write, writer.drain, 0
            comment = b"10\r\n: who is there\n\n\r\n"

            def say(data: bytes) -> None:
                nonlocal count
                count += 1
                write(data + comment if count == 1 else data)  # one after the head

            async def drained() -> None:
                await drain()
                if count == 3:  # one after the first content, in the silence that follows
                    await content_came.wait()
                    write(comment)
                    await comment_came.wait()

            writer.write, writer.drain = say, drained
            return bool(await stream(plan, body, writer, watch))

        replica._stream = with_comments
        response = await rig.gateway.handler.handle(rig.request(kit.chat_body(stream=True)))
        pieces: list[bytes] = []

        def note(piece: bytes) -> bool:
            pieces.append(piece)
            content_came.set()
            if piece == PING:
                comment_came.set()
            return True

        async for piece in response.body:
            note(piece)
            await response.body.pump(note)
        parts = _parts(b"".join(pieces))
        assert b"who is there" not in b"".join(parts)
        assert parts.count(PING) == 1
        assert b"t0" in parts[parts.index(PING) - 1]
        told = b"".join(part for part in parts if part != PING)
        assert kit.Result(200, {}, told).tokens == 5


class _Scripted:
    """An answer of these pieces; None is silence for as long as anybody waits."""

    is_event_stream = True

    def __init__(self, *pieces: bytes | None) -> None:
        self._left = deque(pieces)

    async def piece(self, timeout_s: float) -> bytes:
        piece = self._left.popleft()
        if piece is None:
            raise UpstreamTimeout("silent")
        return piece

    def close(self) -> None:
        self._left.clear()


class _Breaking(OpenAIRendering):
    """Cannot say everything."""

    def chunk(self, chunk: dict[str, Any]) -> bytes:
        if chunk.get("odd"):
            raise UpstreamFailed("nobody can say this")
        return super().chunk(chunk)


async def test_what_is_handed_over_after_a_silence_is_accounted_for() -> None:
    """However the piece ends: what was in front of the fault has gone to the client."""

    def said(text: str, **more: Any) -> bytes:
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
        return b"data: " + json.dumps({"choices": [choice], **more}).encode() + b"\n\n"

    call = Call(Operation.CHAT, "m", b"{}", stream=True)
    call = replace(call, translate=lambda _: _Breaking(call))
    answer = _Scripted(said("a"), None, said("b") + said("", odd=True))
    attempt = Mock()
    settings = GatewaySettings(heartbeat_s=0.5, idle_timeout_s=5.0)
    relay = Relay(Exchange("r", ManualClock(), Meter()), attempt, answer, call, settings, Mock())
    await relay.begin(5.0)
    pieces = [await anext(relay) for _ in range(3)]
    assert [b'"a"' in pieces[0], pieces[1] == PING, b'"b"' in pieces[2]] == [True] * 3
    assert attempt.follow.call_args.args[0]().completion_tokens == 2
