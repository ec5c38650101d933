"""Replicas in memory, and the way to them: what takes the place of ``gateway.upstream``.

A replica speaks our worker's streams, notes for resuming included. What it says is a function of
the tenant, the prompt and the revision, so that whoever reads an answer knows whether it is the
right one. It notes what it was asked, and whether whoever went on with a stream said truly how far
it had come. Must not know the gateway beyond the contract of ``Upstream`` and ``Answer``.
"""

from __future__ import annotations

import asyncio
import random
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import msgspec
from tests.fuzz.loop import VirtualLoop

from cloudlm.core.errors import CloudlmError, UpstreamFailed, UpstreamTimeout
from cloudlm.core.resuming import NOTE, RESUMABLE_HEADER, RESUME_PATH
from cloudlm.core.tenant import TENANT_HEADER
from cloudlm.gateway.upstream import ReplicaRefused, Unreachable

CONNECT_TIMEOUT_S = 0.5
PROMPT_TOKENS = 7
_LATENCY_S = 0.002
_FIRST_S = 0.05
_EACH_S = 0.02
_KEPT = 16_384
"""Runs ask the same few questions of the same tenants: so many answers are made only once."""
_encode = msgspec.json.Encoder().encode
_decode = lru_cache(_KEPT)(msgspec.json.Decoder().decode)


@dataclass(frozen=True, slots=True, eq=False)
class Said:
    """The right answer: the text and the id of each token. There is one of each, so that it need
    not be compared."""

    texts: tuple[str, ...]
    ids: tuple[int, ...]


@lru_cache(_KEPT)
def right_answer(mark: str, prompt: str, revision: int, most: int) -> Said:
    """What every replica of a revision says to a prompt of a tenant; ``mark`` is the tenant's."""
    seed = zlib.crc32(f"{mark}|{prompt}|{revision}".encode())
    count = min(3 + seed % 10, most)
    texts = tuple(f"{seed:08x}.{n} " for n in range(count))
    return Said(texts, tuple((seed + n * 7919) % 50_000 for n in range(count)))


@dataclass(slots=True)
class Send:
    """One attempt as the network saw it. It ``works`` until the replica has said all."""

    request_id: str
    replica: str
    resumed: bool
    at: float
    open: bool = True
    works: bool = True


@dataclass(slots=True)
class Replica:
    """One replica. Times are the loop's; ``troubles`` are faults that hold until a time, with what
    the schedule says of each."""

    name: str
    revision: int
    alive: bool = True
    held_until: float = 0.0
    cut_until: float = 0.0
    troubles: dict[str, tuple[float, float]] = field(default_factory=dict)
    lines: dict[MemoryAnswer, None] = field(default_factory=dict)

    def trouble(self, kind: str, now: float) -> float | None:
        """How the trouble is, None if there is none now."""
        until, how = self.troubles.get(kind, (-1.0, 0.0))
        return how if until > now else None

    def crash(self) -> None:
        """The process is gone, and every connection with it."""
        self.alive = False
        for line in list(self.lines):
            line.break_off()

    def hold(self, until: float) -> None:
        """Say nothing until then."""
        self.held_until = max(self.held_until, until)
        for line in list(self.lines):
            line.wake()

    def heal(self) -> None:
        """From now on it is well, if it lives."""
        self.troubles.clear()
        self.held_until = self.cut_until = 0.0
        for line in list(self.lines):
            line.wake()

    @property
    def stalled_by(self) -> float:
        return max(self.held_until, self.cut_until)


class MemoryAnswer:
    """As ``gateway.upstream.Answer``. ``pieces`` are bytes with the moment each arrives; after
    them comes the end, ``broken`` or not."""

    def __init__(
        self,
        replica: Replica,
        send: Send,
        loop: VirtualLoop,
        pieces: deque[tuple[float, bytes]],
        stream: bool,
        broken: bool,
    ) -> None:
        self._replica = replica
        self._send = send
        self._loop = loop
        self._pieces = pieces
        self._broken_at_end = broken
        self._broken = False
        self._closed = False
        self._waiter: asyncio.Future[None] | None = None
        self._sink: Callable[[bytes], bool] | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._silence_s = self._quiet_from = 0.0
        self.is_event_stream = stream
        self.status = 200
        self.headers: dict[str, str] = {}
        self.translated: Callable[[ReplicaRefused], CloudlmError] = lambda error: error
        replica.lines[self] = None

    def break_off(self) -> None:
        """The connection is lost."""
        self._broken = True
        self.wake()

    def wake(self) -> None:
        """Whoever waits here shall look again."""
        if self._waiter is None or self._waiter.done():
            return
        if self._sink is None:
            self._waiter.set_result(None)
        else:  # not from within whatever wakes it: pieces arrive in turns of their own
            self._loop.call_soon(self._pour, self._waiter)

    async def head(self, timeout_s: float) -> None:
        """Wait until the answer begins. Raises as ``Upstream.send``."""
        deadline = self._loop.time() + timeout_s
        while not self._broken:
            now, due = self._loop.time(), self._due()
            if now >= due:
                return
            if now >= deadline:
                raise UpstreamTimeout(f"replica {self._replica.name} gave no answer")
            await self._until(min(due, deadline))
        raise UpstreamFailed(f"replica {self._replica.name} broke off before its answer")

    async def piece(self, timeout_s: float) -> bytes:
        deadline = self._loop.time() + timeout_s
        while not self._closed:
            if self._broken:
                raise UpstreamFailed(f"replica {self._replica.name} broke off its answer")
            now, due = self._loop.time(), self._due()
            if now >= due:
                return self._next()
            if now >= deadline:
                raise UpstreamTimeout(f"replica {self._replica.name} was silent")
            await self._until(min(due, deadline))
        return b""

    async def flow(self, sink: Callable[[bytes], bool], silence_s: float) -> None:
        """As the real one: pieces go to ``sink`` as they arrive, with no task between; returns at
        whatever ``piece`` must tell."""
        self._sink, self._silence_s = sink, silence_s
        self._quiet_from = self._loop.time()
        waiter = self._waiter = self._loop.create_future()
        self._pour(waiter)
        try:
            await waiter
        finally:
            if self._alarm is not None:
                self._alarm.cancel()
            self._sink = self._waiter = self._alarm = None

    def silent(self, seconds: float) -> UpstreamTimeout:
        return UpstreamTimeout(f"replica {self._replica.name} was silent for {seconds:g} s")

    async def whole(self, timeout_s: float, limit_bytes: int = 0) -> bytes:
        deadline = self._loop.time() + timeout_s
        parts: list[bytes] = []
        while piece := await self.piece(max(deadline - self._loop.time(), 0.0)):
            parts.append(piece)
        return b"".join(parts)

    def close(self) -> None:
        self._closed = True
        self._send.open = False
        self._replica.lines.pop(self, None)
        self.wake()

    def _due(self) -> float:
        """When the next piece arrives, or the end."""
        there = self._replica
        due = self._pieces[0][0] if self._pieces else 0.0
        return max(due, there.held_until, there.cut_until)

    def _next(self) -> bytes:
        if self._pieces:
            piece = self._pieces.popleft()[1]
            self._send.works = bool(self._pieces)
            return piece
        if self._broken_at_end:
            self._broken = True
            raise UpstreamFailed(f"replica {self._replica.name} broke off its answer")
        return b""

    def _pour(self, waiter: asyncio.Future[None]) -> None:
        """What has arrived goes to the sink; comes again with the next piece."""
        sink = self._sink
        if waiter.done() or sink is None or self._waiter is not waiter:
            return
        now = self._loop.time()
        while self._pieces and not (self._closed or self._broken):
            due = self._due()
            if now < due:
                self._pour_at(due, waiter)
                return
            self._quiet_from = now
            try:
                wanted = sink(self._next())
            except Exception as error:  # for whoever waits in ``flow``, not for the loop
                waiter.set_exception(error)
                return
            if not wanted:
                break
        waiter.set_result(None)

    def _pour_at(self, due: float, waiter: asyncio.Future[None]) -> None:
        silent_from = self._quiet_from + self._silence_s
        if self._loop.time() >= silent_from:
            name = self._replica.name
            waiter.set_exception(UpstreamTimeout(f"replica {name} was silent"))
            return
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = self._loop.call_at(min(due, silent_from), self._pour, waiter)

    async def _until(self, when: float) -> None:
        self._waiter = self._loop.alarm(when)
        try:
            await self._waiter
        finally:
            self._waiter = None


class MemoryUpstream:
    """The network between one gateway and all replicas. ``note`` is told what may never be."""

    def __init__(
        self,
        loop: VirtualLoop,
        replicas: dict[str, Replica],
        seed: int,
        note: Callable[[str, str], None],
        sent: Callable[[Send], None] = lambda _: None,
    ) -> None:
        self._loop = loop
        self._replicas = replicas
        self._chance = random.Random(f"{seed}/network")
        self._note = note
        self._sent = sent
        self.sends: list[Send] = []
        self._open: list[Send] = []

    @property
    def under_way(self) -> list[Send]:
        """Attempts that a replica works for."""
        self._open = [send for send in self._open if send.open and send.works]
        return self._open

    async def open(self) -> None:
        """Nothing to open."""

    async def close(self) -> None:
        """Nothing to close."""

    async def send(
        self,
        url: str,
        body: bytes,
        headers: dict[str, str],
        *,
        replica: str,
        timeout_s: float,
        now: float,
    ) -> MemoryAnswer:
        resumed = url.endswith(RESUME_PATH)
        send = Send(headers["x-request-id"], replica, resumed, self._loop.time())
        self.sends.append(send)
        self._open.append(send)
        self._sent(send)
        try:
            return await self._answered(send, body, headers, timeout_s)
        except BaseException:
            send.open = False
            raise

    async def _answered(
        self, send: Send, body: bytes, headers: dict[str, str], timeout_s: float
    ) -> MemoryAnswer:
        there = self._replicas.get(send.replica)
        await self._loop.pause(_LATENCY_S)
        now = self._loop.time()
        if there is None or not there.alive or there.trouble("refuse", now) is not None:
            raise Unreachable(f"replica {send.replica} cannot be reached")
        if there.cut_until > now:
            await self._loop.pause(min(CONNECT_TIMEOUT_S, timeout_s))
            if there.cut_until > self._loop.time():
                raise Unreachable(f"replica {send.replica} did not accept a connection")
        chance = self._chance
        how = there.trouble("status", now)
        if how is not None:
            status = (429, 503, 500)[int(how * 3)]
            wait_s = 0.5 + how * 2 if status != 500 and chance.random() < 0.7 else None
            error = {"error": {"message": "busy", "type": "busy", "code": "busy"}}
            raise ReplicaRefused(status, error, wait_s)
        answer = self._answer(there, send, body, headers, chance)
        try:
            await answer.head(timeout_s - _LATENCY_S)
        except BaseException:
            answer.close()
            raise
        return answer

    def _answer(
        self,
        there: Replica,
        send: Send,
        body: bytes,
        headers: dict[str, str],
        chance: random.Random,
    ) -> MemoryAnswer:
        now = self._loop.time()
        fields = _decode(body)
        begun = fields.get("begun")
        asked = fields["request"] if begun is not None else fields
        if asked.get("model", "") != there.name.rpartition("-r")[0]:
            self._note("tokens", f"{there.name} was asked for {asked.get('model')!r}")
        most = asked.get("max_completion_tokens") or asked.get("max_tokens") or 1000
        prompt = asked["messages"][0]["content"]
        right = right_answer(headers[TENANT_HEADER], prompt, there.revision, most)
        slow = 1.0 + 40 * (there.trouble("slow", now) or 0.0)
        first = now + _FIRST_S * slow
        if begun is None and not asked.get("stream"):
            whole, broken = self._spoilt([_whole(right)], there, chance)
            return MemoryAnswer(there, send, self._loop, _timed(whole, first, 0), False, broken)
        if begun is not None:
            self._compare(send, begun, right)
        notes = headers.get(RESUMABLE_HEADER) == "1"
        events = list(_events(right, begun, notes or begun is not None, chance))
        events, broken = self._spoilt(events, there, chance)
        pieces = _timed(_cut_anywhere(events, chance), first, _EACH_S * slow)
        return MemoryAnswer(there, send, self._loop, pieces, True, broken)

    def _compare(self, send: Send, begun: dict[str, Any], right: Said) -> None:
        """Whoever asks to go on must say what this very answer begins with."""
        for choice in begun["choices"]:
            told = choice.get("token_ids")
            if told is not None and tuple(told) != right.ids[: len(told)]:
                self._note("tokens", f"{send.request_id} goes on from {told}, which nobody said")

    def _spoilt(
        self, events: list[bytes], there: Replica, chance: random.Random
    ) -> tuple[list[bytes], bool]:
        """The events as this replica sends them now, and whether the connection breaks then."""
        now = self._loop.time()
        at = chance.randrange(len(events))
        if there.trouble("garbage", now) is not None:
            return [*events[:at], b"data: {not\n\n"], False
        if there.trouble("error_event", now) is not None:
            error = {"error": {"message": "out of memory", "type": "x", "code": 500}}
            return [*events[:at], _data(error)], False
        if there.trouble("abort", now) is not None:
            end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "abort"}]}
            return [*events[:at], _data(end)], False
        how = there.trouble("cut", now)
        if how is None:
            return events, False
        whole = b"".join(events)
        return [whole[: chance.randrange(len(whole))]], how < 0.5


def _timed(pieces: list[bytes], first: float, each_s: float) -> deque[tuple[float, bytes]]:
    return deque((first + n * each_s, piece) for n, piece in enumerate(pieces) if piece)


def _cut_anywhere(events: list[bytes], chance: random.Random) -> list[bytes]:
    """The same bytes in other pieces, as a network hands them over: several events in one, or one
    in several."""
    if chance.random() < 0.7:
        return events
    whole = b"".join(events)
    cuts = sorted(chance.randrange(len(whole) + 1) for _ in range(len(events)))
    return [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


def _data(fields: dict[str, Any]) -> bytes:
    return b"data: " + _encode(fields) + b"\n\n"


def usage(tokens: int) -> dict[str, Any]:
    """The usage of an answer with so many tokens."""
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": tokens,
        "total_tokens": PROMPT_TOKENS + tokens,
    }


@lru_cache(_KEPT)
def _whole(right: Said) -> bytes:
    message = {"role": "assistant", "content": "".join(right.texts)}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    body = {"id": "c", "object": "chat.completion", "created": 1, "model": "x"}
    return _encode({**body, "choices": [choice], "usage": usage(len(right.texts))})


def _events(
    right: Said, begun: dict[str, Any] | None, notes: bool, chance: random.Random
) -> Iterator[bytes]:
    """The events of an answer, or those that are left of it; one to three tokens in each."""
    known = begun or {"choices": [], "id": "c1", "usage_shown": False}
    choice = known["choices"][0] if known["choices"] else {}
    so_far = choice.get("tokens", len(choice.get("token_ids", ())))
    name = known["id"]
    if not choice:
        yield _chunk(name, right, so_far, so_far, None, notes)
    while so_far < len(right.ids) and not choice.get("finished"):
        end = min(so_far + chance.choice((1, 1, 2, 3)), len(right.ids))
        yield _chunk(name, right, so_far, end, None, notes)
        so_far = end
    if not choice.get("finished"):
        yield _chunk(name, right, so_far, so_far, "stop", notes)
    if not known["usage_shown"]:
        yield _usage_chunk(name, so_far)
    yield b"data: [DONE]\n\n"


@lru_cache(_KEPT)
def _chunk(name: str, right: Said, begin: int, end: int, finish: str | None, notes: bool) -> bytes:
    """The event with the tokens from ``begin`` to ``end``; the first of an answer has none, nor has
    the one that says how it ended."""
    delta: dict[str, Any] = {} if finish else {"content": "".join(right.texts[begin:end])}
    if not end and not finish:
        delta = {"role": "assistant", **delta}
    one = {"index": 0, "delta": delta, "finish_reason": finish}
    fields = {"id": name, "object": "chat.completion.chunk", "created": 1, "model": "x"}
    fields |= {"system_fingerprint": "fp", "choices": [one], "usage": usage(end)}
    if notes:
        fields[NOTE] = {"token_ids": list(right.ids[begin:end]), "seed": 7}
    return _data(fields)


@lru_cache(_KEPT)
def _usage_chunk(name: str, tokens: int) -> bytes:
    fields = {"id": name, "object": "chat.completion.chunk", "created": 1, "model": "x"}
    return _data({**fields, "choices": [], "usage": usage(tokens)})
