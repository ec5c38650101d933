"""Bytes that no client would send, in any pieces: the server answers or closes, and serves on.

``CLOUDLM_FUZZ`` is the number of malformed requests; `make fuzz-gateway` sends 100,000.
"""

from __future__ import annotations

import asyncio
import os
import random
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudlm.core.errors import CloudlmError
from cloudlm.core.requests import decode_body, parse_chat
from cloudlm.gateway.connection import Connection, Site
from cloudlm.gateway.dialects import openai, plain
from cloudlm.gateway.exchange import GatewayRequest, GatewayResponse
from cloudlm.security.hosts import HostGuard

COUNT = int(os.environ.get("CLOUDLM_FUZZ", "3000"))
MAX_BODY_BYTES = 2000


class FakeTransport(asyncio.Transport):
    """What a connection writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.closed = False

    def write(self, data: Any) -> None:
        assert not self.closed
        self.written.append(bytes(data))

    def can_write_eof(self) -> bool:
        return False

    def close(self) -> None:
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass


SEEDS = [
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello",
    b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    b"HEAD / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\nok",
]
WORDS = [
    *(b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b";x=y", b"ffffffff", b"-1", b"\r\n\r\n"),
    *(b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"chunked", b"0\r\n\r\n"),
    *(b"Host: b\r\n", b"HTTP/1.0", b"HTTP/9.9", b"\xff\xfe"),
    b"Connection: upgrade\r\nUpgrade: x\r\n",
    b"X: " + b"y" * 70_000,
]


def mutated(chance: random.Random) -> bytes:
    wire = bytearray(chance.choice(SEEDS))
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(wire) + 1)
        step = chance.randrange(4)
        if step == 0:
            wire[at:at] = chance.choice(WORDS) if chance.random() < 0.98 else WORDS[-1]
        elif step == 1:
            del wire[at : at + chance.randint(1, 9)]
        elif step == 2:
            wire[at : at + 1] = bytes([chance.randrange(256)])
        else:
            wire[at:at] = wire[at : at + chance.randint(1, 40)]
        wire = wire or bytearray(b"\r\n")
    return bytes(wire)


async def fed(pieces: list[bytes]) -> tuple[list[GatewayRequest], bytes, Connection]:
    """What a connection makes of these pieces: requests that got through, and what it said."""
    seen: list[GatewayRequest] = []

    async def answer(request: GatewayRequest) -> GatewayResponse:
        seen.append(request)
        return GatewayResponse(200, {}, b"ok")

    def refuse(error: CloudlmError, _: dict[str, str]) -> GatewayResponse:
        assert 400 <= error.status < 502
        return GatewayResponse(error.status, {}, b"no")

    site = Site(answer, refuse, HostGuard("0.0.0.0"), MAX_BODY_BYTES, 1.0)
    connection, transport = Connection(site), FakeTransport()
    connection.connection_made(transport)
    for piece in pieces:
        if not transport.closed:
            connection.data_received(piece)
        if seen or connection._turn is not None:
            await asyncio.sleep(0)
    while connection._turn is not None:
        await asyncio.sleep(0)
    connection.connection_lost(None)
    assert not site.connections
    assert not len(site.sweep)
    return seen, b"".join(transport.written), connection


@pytest.mark.promise(6, 18)
async def test_malformed_requests() -> None:
    chance = random.Random(20260401)
    for number in range(COUNT):
        wire = mutated(chance)
        cuts = sorted(chance.randrange(len(wire) + 1) for _ in range(chance.randint(0, 3)))
        edges = [0, *cuts, len(wire)]
        pieces = [wire[a:b] for a, b in pairwise(edges)]
        seen, said, _ = await fed(pieces)
        answers = said.count(b"HTTP/1.1 2") + said.count(b"HTTP/1.1 4") + said.count(b"HTTP/1.1 5")
        assert len(seen) <= answers <= len(seen) + 1, (number, wire)
        for request in seen:
            assert len(request.body) <= MAX_BODY_BYTES
            assert all(
                "\n" not in value and "\r" not in value for value in request.headers.values()
            )
            assert not ({"content-length", "transfer-encoding"} <= request.headers.keys()), wire


@given(st.integers(0, 2**32), st.lists(st.integers(0, 400), max_size=8))
@settings(max_examples=100, deadline=None)
def test_pieces_do_not_matter(seed: int, cuts: list[int]) -> None:
    """However the bytes are cut, the same requests come through."""

    async def both() -> None:
        wire = mutated(random.Random(seed))
        if len(wire) > 5000:
            return
        edges = [0, *sorted(min(cut, len(wire)) for cut in cuts), len(wire)]
        whole, _, _ = await fed([wire])
        cut, _, _ = await fed([wire[a:b] for a, b in pairwise(edges)])
        assert [(r.method, r.path, r.body, r.headers) for r in whole] == [
            (r.method, r.path, r.body, r.headers) for r in cut
        ]

    asyncio.run(both())


# The typed form of a request -------------------------------------------------------------------

values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**63, -(2**70), 1e99, 0.5, 2.0, -2.0, 1e-9]),
    st.text(max_size=3),
    st.just("x" * 257),
    st.lists(st.text(max_size=2), max_size=2),
    st.dictionaries(st.sampled_from(["include_usage", "type"]), st.booleans(), max_size=1),
)
roles = st.sampled_from(["system", "user", "assistant", "tool", "developer", "x"])
messages = st.lists(
    st.fixed_dictionaries({"role": roles, "content": st.text(max_size=4)})
    | st.dictionaries(st.sampled_from(["role", "content", "name"]), values, max_size=3),
    max_size=3,
)
FIELDS = [
    "max_tokens", "max_completion_tokens", "temperature", "top_p", "presence_penalty",
    "frequency_penalty", "n", "seed", "stop", "user", "stream", "stream_options", "cache_salt",
    "tools", "logprobs", "top_k", "priority",
]  # fmt: skip
bodies = st.builds(
    lambda fixed, more: {**fixed, **more},
    st.fixed_dictionaries(
        {"model": st.sampled_from(["m", "", 1, "x" * 256]), "messages": messages}
    ),
    st.dictionaries(st.sampled_from(FIELDS), values, max_size=4),
)


@given(bodies)
@settings(max_examples=500, deadline=None)
def test_the_typed_form_accepts_only_what_the_rules_accept(body: dict[str, Any]) -> None:
    raw = msgspec.json.encode(body)
    if plain.read(raw) is None:
        return
    parse_chat(decode_body(raw))  # raises if the rules refuse it
    quick = openai.parse(openai.Operation.CHAT, raw, lambda own: f"salt-{own}")
    assert msgspec.json.decode(quick.body)["cache_salt"].startswith("salt-")
    slow = openai._generation(
        openai.Operation.CHAT, decode_body(raw), parse_chat(body), lambda own: f"salt-{own}"
    )
    assert msgspec.json.decode(quick.body) == msgspec.json.decode(slow.body)
    same = ("model", "stream", "include_usage", "continuous_usage")
    assert [getattr(quick, n) for n in same] == [getattr(slow, n) for n in same]


@pytest.mark.parametrize("more", [{}, {"stream": True}, {"temperature": 1, "max_tokens": 5}])
def test_what_most_clients_send_takes_the_typed_form(more: dict[str, Any]) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **more}
    assert plain.read(msgspec.json.encode(body)) is not None
