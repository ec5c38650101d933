"""What is passed on unread is what reading it would have given, to the byte and to the count."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import Any
from unittest.mock import Mock

import httptools
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.core.clock import ManualClock
from cloudlm.core.errors import CloudlmError, UpstreamFailed
from cloudlm.core.settings import GatewaySettings
from cloudlm.gateway import pool, skim
from cloudlm.gateway.account import Exchange
from cloudlm.gateway.dialects import openai
from cloudlm.gateway.dialects.openai import Call, Operation
from cloudlm.gateway.forms import Form, learn
from cloudlm.gateway.meter import Meter
from cloudlm.gateway.relay import Relay

HEAD = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "theirs"}
TEXT = st.one_of(
    st.sampled_from(["", " a", "\n", '"', "\\", "\x7f", "\x01", "é", "\u200b", "😀", '"},"']),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
)
ODD = [
    b'{"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":"abort"}]}',
    b'{"error":{"message":"no","code":400}}',
    b"{not json",
    b'{"choices":[]}',
    b'{"choices":[{"index":0,"delta":{"content":"\xff"},"finish_reason":null}]}',
]


def chunk(kind: str, place: str, text: str, at: int, index: int) -> dict[str, Any]:
    """The ``at``-th chunk in the form of one kind of server."""
    if place == "text":
        choice: dict[str, Any] = {"index": index, "text": text, "finish_reason": None}
    else:
        choice = {"index": index, "delta": {place: text}, "logprobs": None, "finish_reason": None}
    body: dict[str, Any] = {**HEAD, "choices": [choice]}
    counts = {"prompt_tokens": 7, "completion_tokens": at, "total_tokens": 7 + at}
    if kind == "ours":
        details = {"prompt_tokens_details": {"cached_tokens": 3}}
        note = {"token_ids": [90 + at] * (at % 3)}
        return {
            **HEAD,
            "system_fingerprint": "fp",
            "choices": [choice],
            "usage": {**counts, **details},
            "cloudlm_resume": note,
        }
    if kind == "counting":
        order = ("prompt_tokens", "total_tokens", "completion_tokens")
        return {**body, "usage": {name: counts[name] for name in order}}
    return body if kind == "bare" else {**body, "usage": None}


KINDS = st.sampled_from(["ours", "counting", "bare", "null"])


@st.composite
def wires(draw: st.DrawFn) -> bytes:
    """A stream of one server, with something odd in it now and then."""
    kind = draw(KINDS)
    place = draw(st.sampled_from(["content", "content", "reasoning_content", "text"]))
    spaced, plain, choices = draw(st.booleans()), draw(st.booleans()), draw(st.integers(1, 2))
    end = draw(st.sampled_from(["\n\n", "\n\n", "\n\n", "\r\n\r\n"])).encode()
    events = []
    for at, text in enumerate(draw(st.lists(TEXT, min_size=1, max_size=12)), 1):
        body = chunk(kind, place, text, at, at % choices)
        if draw(st.integers(0, 20)) == 0:
            body["choices"][0]["logprobs"] = {"content": [at]}
        written = json.dumps(
            body, ensure_ascii=plain, separators=(", ", ": ") if spaced else (",", ":")
        ).encode()
        if draw(st.integers(0, 30)) == 0:
            spot = draw(st.integers(0, len(written) - 1))
            written = written[:spot] + draw(st.sampled_from([b"0", b'"', b"x"])) + written[spot:]
        events.append(b"data: " + written + end)
        if draw(st.integers(0, 15)) == 0:
            events.append(draw(st.sampled_from([b": beat", b"id: 1", b"data:  "])) + end)
    if draw(st.integers(0, 4)) == 0:
        events.append(b"data: " + draw(st.sampled_from(ODD)) + end)
    if draw(st.booleans()):
        events.append(b"data: [DONE]" + end)
    return b"".join(events)


class _Scripted:
    """An answer in given pieces."""

    is_event_stream = True

    def __init__(self, pieces: list[bytes]) -> None:
        self._left = deque(pieces)

    async def piece(self, timeout_s: float) -> bytes:
        return self._left.popleft() if self._left else b""

    async def flow(self, sink: Callable[[bytes], bool], silence_s: float) -> None:
        while self._left and sink(self._left.popleft()):
            pass

    def translated(self, error: CloudlmError) -> CloudlmError:
        return error

    def close(self) -> None:
        self._left.clear()


class _NobodyGoesOn:
    """Remembers what another replica would have been told."""

    told = b""

    async def go_on(self, progress: Any, cached_tokens: int, error: CloudlmError) -> Any:
        self.told = progress.request("/v1", b"{}", cached_tokens) + b"%d" % progress.resumable
        raise error


async def passed_on(pieces: list[bytes], call: Call, most: int = 0) -> list[Any]:
    """All that becomes of a stream: what is handed over with what it counts, and how it ends. At
    most ``most`` at a time go the shorter way, between two pulls."""
    resumer, attempt = _NobodyGoesOn(), Mock()
    relay = Relay(
        Exchange("r", ManualClock(), Meter()),
        attempt,
        _Scripted(pieces),  # type: ignore[arg-type]
        call,
        GatewaySettings(),
        resumer,
    )
    seen: list[Any] = []

    def write(out: bytes) -> bool:
        seen.append((out, attempt.follow.call_args.args[0]()))
        return len(seen) % most > 0

    try:
        await relay.begin(5.0)
        async for out in relay:
            seen.append((out, attempt.follow.call_args.args[0]()))
            if most:
                await relay.pump(write)
    except CloudlmError as error:
        seen.append(repr(error))
    relay._skimmer.settle()
    seen.append(relay._progress.request("/v1", b"{}", 0))
    return [*seen, relay._progress.resumable, relay._skimmer.pieces, resumer.told]


def never(data: bytes, shape: Any) -> Form | None:
    return None


@pytest.mark.promise(1, 38)
@given(
    wire=wires(),
    cuts=st.lists(st.integers(0, 3000), max_size=30),
    asked=st.sampled_from([(False, False), (True, False), (True, True)]),
    most=st.sampled_from([0, 2, 100]),
)
def test_unread_and_read_are_the_same(
    wire: bytes, cuts: list[int], asked: tuple[bool, bool], most: int
) -> None:
    call = Call(Operation.CHAT, "ours", b"{}", True, include_usage=asked[0])
    call.continuous_usage = asked[1]
    edges = sorted({min(cut, len(wire)) for cut in cuts} | {0, len(wire)})
    pieces = [wire[a:b] for a, b in pairwise(edges)]
    quick = asyncio.run(passed_on(pieces, call, most))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(skim, "learn", never)
        assert asyncio.run(passed_on(pieces, call, most)) == quick


def formed(place: str = "content", kind: str = "ours") -> Form | None:
    call = Call(Operation.CHAT, "ours", b"{}", True)
    data = openai.encode(chunk(kind, place, "a", 1, 0))
    return learn(data, lambda one: openai.shape_chunk(one, call))


@pytest.mark.parametrize("kind", ["ours", "counting", "bare", "null"])
@pytest.mark.parametrize("place", ["content", "text"])
def test_every_usual_form_is_learned(kind: str, place: str) -> None:
    """Else the property above would show nothing."""
    form = formed(place, kind)
    assert form is not None
    events = [b"data: " + openai.encode(chunk(kind, place, f"b{at}", at, 0)) for at in range(1, 99)]
    out: list[bytes] = []
    assert form.take(events, out) == 98
    assert b"theirs" not in b"".join(out)
    assert b"cloudlm_resume" not in b"".join(out)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"b"', b'"b\xff"'),
        (b'"b"', b'"b\n"'),
        (b'"b"', rb'"\u0062"'),
        (b'"b"', b'"b\\"'),
        (b'"b"', b'"b","tool_calls":[]'),
        (b'_tokens":2', b'_tokens":02'),
        (b'_tokens":2', b'_tokens":-2'),
        (b'_tokens":2', b'_tokens":2.0'),
        (b'_tokens":2', b'_tokens":9999999999'),
        (b"[92,92]", b"[92,]"),
        (b"[92,92]", b'[92],"seed":7'),
        (b'"finish_reason":null', b'"finish_reason":"stop"'),
        (b'"index":0', b'"index":1'),
        (b'"c1"', b'"c2"'),
        (b"}}", b"} }"),
        (b"}}", b"}}}"),
    ],
)
def test_what_differs_elsewhere_must_be_read(old: bytes, new: bytes) -> None:
    form = formed()
    assert form is not None
    event = b"data: " + openai.encode(chunk("ours", "content", "b", 2, 0))
    assert old in event
    out: list[bytes] = []
    assert form.take([event], out) == 1
    assert form.take([event.replace(old, new)], out) == 0
    assert (len(form.ids), len(out)) == (1, 3)


class _Pool:
    """What a line needs of its pool."""

    sweep = Mock()

    def forget(self, line: Any) -> None:
        """Nothing is kept here."""


async def received(wire: bytes, cuts: list[int]) -> tuple[bytes, bool, bool, bool]:
    """The body that a line reads out of ``wire``, and what it thinks of it."""
    line = pool.Line(_Pool(), pool.Place("h", 1, tls=False))  # type: ignore[arg-type]
    line.connection_made(Mock())
    line.begin(b"", b"")
    body: list[bytes] = []

    def sink(piece: bytes) -> bool:
        body.append(piece)
        return True

    edges = sorted({min(cut, len(wire)) for cut in cuts} | {0, len(wire)})
    for begin, end in pairwise(edges):
        line.data_received(wire[begin:end])
        if line._has_head and line._sink is None and not (line._complete or line._broken):
            body += line._pieces
            line._pieces.clear()
            line._sink = sink
    body += line._pieces
    return b"".join(body), line._complete, line._broken, line._surplus


SIZE_LINE = st.sampled_from(["%x", "%x", "%x", "%x", "%X", "0%x", "%x;a=b", " %x", "0x%x", "+%x"])


@pytest.mark.promise(38)
@given(
    chunks=st.lists(st.tuples(st.binary(min_size=1, max_size=40), SIZE_LINE), max_size=8),
    end=st.sampled_from([b"0\r\n\r\n", b"0\r\na: b\r\n\r\n", b"", b"0\r\n\r\nHTTP/1.1 200 OK\r\n"]),
    spoilt=st.one_of(st.none(), st.tuples(st.integers(0, 300), st.sampled_from(b"\r\n0a;x"))),
    cuts=st.lists(st.integers(0, 400), max_size=20),
    whole=st.booleans(),
)
def test_chunks_are_framed_as_the_parser_frames_them(
    chunks: list[tuple[bytes, str]],
    end: bytes,
    spoilt: tuple[int, int] | None,
    cuts: list[int],
    whole: bool,
) -> None:
    wire = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    edges = []
    for data, line in chunks:
        edges.append(len(wire))
        wire += (line % len(data)).encode() + b"\r\n" + data + b"\r\n"
    if spoilt is not None and spoilt[0] < len(wire) - 50:
        at = spoilt[0] + 50
        wire = wire[:at] + bytes([spoilt[1]]) + wire[at + 1 :]
    wire += end
    cuts = edges + cuts[:2] if whole else cuts
    quick = asyncio.run(received(wire, cuts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool.Line, "_unframed", lambda _, data: data)
        assert asyncio.run(received(wire, cuts)) == quick


async def test_whole_chunks_do_not_pass_the_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the property above would show nothing."""
    fed: list[bytes] = []

    class Parser(httptools.HttpResponseParser):  # type: ignore[misc]
        def feed_data(self, data: bytes) -> None:
            fed.append(data)
            super().feed_data(data)

    monkeypatch.setattr(httptools, "HttpResponseParser", Parser)
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    wire = head + b"1\r\na\r\n" + b"2\r\nbc\r\n" + b"3\r\ndef\r\n1\r\ng\r\n" + b"0\r\n\r\n"
    edges = [len(head), len(head) + 6, len(head) + 13, len(wire) - 5]
    assert await received(wire, edges) == (b"abcdefg", True, False, False)
    assert fed == [head, b"1\r\na\r\n", b"0\r\n\r\n"]


def test_a_replica_that_fails_is_told_of_unread_tokens() -> None:
    """What was passed on unread stands in what the next replica is asked."""
    call = Call(Operation.CHAT, "ours", b"{}", True)
    events = [
        b"data: " + openai.encode(chunk("ours", "content", "a", at, 0)) + b"\n\n"
        for at in range(1, 500)
    ]
    seen = asyncio.run(passed_on([*events, b"data: {not json\n\n"], call))
    begun = json.loads(seen[-1][:-1])["begun"]
    wanted = [90 + at for at in range(1, 500) for _ in range(at % 3)]
    assert begun["choices"] == [{"index": 0, "chunks": 499, "token_ids": wanted}]
    assert seen[-1].endswith(b"1")
    assert UpstreamFailed.code.encode() in seen[-5][0]


def test_a_stream_that_changes_its_form_is_learned_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that thinks first, and then answers."""
    read: list[bytes] = []
    decode = openai.decode

    def counted(data: bytes) -> Any:
        read.append(data)
        return decode(data)

    monkeypatch.setattr(openai, "decode", counted)
    pieces = [
        b"data: %b\n\n" % msgspec.json.encode(chunk("ours", place, "x", at, 0))
        for at, place in enumerate(["reasoning_content"] * 40 + ["content"] * 40, 1)
    ]
    call = Call(Operation.CHAT, "theirs", b"", stream=True, include_usage=True)
    asyncio.run(passed_on([*pieces, b"data: [DONE]\n\n"], call))
    assert len(read) < 12
