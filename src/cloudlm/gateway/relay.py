"""Passing a replica's stream on, event by event, to its end.

``begin`` holds everything back until the first content, so that a replica which fails before it can
still be replaced and the client still gets a true status. After that the ``resumer`` is asked for
somebody who goes on where the stream broke; if there is nobody, the failure becomes an explicit
error event. While a replica is silent after that, the client of an event stream gets a comment now
and then. ``[DONE]`` and ``finish_reason`` are what a replica sent, or a rendering that ends the
answer before the replica does. Reads no further ahead than one piece: a client that reads slowly
slows the replica down. Must not choose or retry.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextvars import copy_context
from typing import Protocol, Self

from cloudlm.core.chat import Usage
from cloudlm.core.errors import CloudlmError, RequestCancelled, UpstreamFailed, UpstreamTimeout
from cloudlm.core.settings import GatewaySettings
from cloudlm.gateway.account import Attempt, Exchange
from cloudlm.gateway.dialects import openai
from cloudlm.gateway.dialects.base import EVENT_STREAM, AnswerEnded
from cloudlm.gateway.progress import Progress
from cloudlm.gateway.skim import Counts, Skimmer, usage_of
from cloudlm.gateway.sse import PING, SseParser
from cloudlm.gateway.upstream import Answer, ReplicaRefused

MAX_HELD_BYTES = 4 * 1024 * 1024
_END_TIMEOUT_S = 0.25


class GoesOn(Protocol):
    """Finds the replica that goes on with a broken stream."""

    async def go_on(
        self, progress: Progress, cached_tokens: int, error: CloudlmError
    ) -> tuple[Attempt, Answer]: ...


class Relay:
    """The body of a streamed response. See ``exchange.BodyStream`` for who must call what."""

    def __init__(
        self,
        exchange: Exchange,
        attempt: Attempt,
        answer: Answer,
        call: openai.Call,
        settings: GatewaySettings,
        resumer: GoesOn,
    ) -> None:
        self._exchange = exchange
        self._attempt = attempt
        self._answer = answer
        self._rendering = openai.rendering(call)
        self._settings = settings
        self._resumer = resumer
        self._progress = Progress()
        self._timeout_s = settings.idle_timeout_s
        beats = settings.heartbeat_s > 0 and self._rendering.stream_type == EVENT_STREAM
        self._beat_s = settings.heartbeat_s if beats else math.inf
        self._quiet_s = 0.0  # how long the replica has been silent, as far as the client was told
        self._parser, self._between = SseParser(), False  # whether an event may begin now
        plain = self._rendering.chunk if call.translate is None else None
        self._skimmer = Skimmer(self._progress, plain)
        self._ready: list[bytes] = []
        self._handed: Counts = (None, b"", 0)
        self._followed: Attempt | None = None  # it knows whom to ask for what it used
        self._usage_before: Usage | None = None  # what other attempts account for
        self._finished = False
        self._failure: CloudlmError | None = None
        self._told = False
        self._closed = False

    @property
    def content_type(self) -> str:
        return self._rendering.stream_type

    async def begin(self, deadline: float) -> None:
        """Read until the first content; ``deadline`` is in the clock's monotonic seconds.

        Raises UpstreamFailed or UpstreamTimeout if there will be none.
        """
        if not self._answer.is_event_stream:
            raise UpstreamFailed("a replica answered a streamed request without a stream")
        while not self._skimmer.pieces:
            left_s = max(deadline - self._exchange.clock.monotonic(), 0.0)
            await self._read(left_s)
            if self._failure is not None and not self._skimmer.pieces:
                raise self._failure
            if self._finished and not self._skimmer.pieces:
                raise UpstreamFailed("a replica ended its stream without any content")
            if sum(map(len, self._ready)) > MAX_HELD_BYTES:
                raise UpstreamFailed("a replica sent too much without any content")

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        """The next events, whole, in one piece."""
        while not self._ready:
            if self._closed or self._told or (self._finished and self._failure is None):
                await self._close_gently()
                raise StopAsyncIteration
            try:
                with self._exchange.interrupt:
                    if self._failure is not None:
                        await self._go_on(self._failure)
                    await self._read_on()
            except CloudlmError as error:
                if self._failure is not None or isinstance(error, RequestCancelled):
                    self._tell(error)
                else:
                    self._failure = error
        return self._hand_over()

    async def pump(self, write: Callable[[bytes], bool]) -> None:
        """Hand events to ``write`` as they arrive, until it wants no more or something happens
        that ``__anext__`` sees to: the end, a failure. Most of a stream goes this way, because
        waking a task for every event costs more than the event itself."""
        if self._ready or self._over or self._closed or self._quiet_s:
            return

        def read(rest: bytes) -> bool:
            try:
                self._parse(rest)
            except CloudlmError as error:
                self._failure = error
            return not self._ready or write(self._hand_over())

        def pour(piece: bytes) -> bool:
            rest = self._skimmer.skim(piece, self._ready) if self._between else piece
            if not rest:
                return write(self._hand_over())
            return here.run(read, rest) and not self._over

        here = copy_context()  # what arrives comes in that of the connection: another request's
        try:
            with self._exchange.interrupt:
                silence_s = min(self._beat_s, self._timeout_s)
                try:
                    await self._answer.flow(pour, silence_s)
                except UpstreamTimeout:
                    self._fall_silent(silence_s)
        except CloudlmError as error:
            if isinstance(error, RequestCancelled):
                self._tell(error)
            else:
                self._failure = error

    @property
    def _over(self) -> bool:
        """Whether the replica's answer has ended, well or not."""
        return self._finished or self._failure is not None

    async def _go_on(self, error: CloudlmError) -> None:
        """Have another replica take over. Raises the error that the client must be told."""
        self._answer.close()
        self._attempt.fail(error)
        self._skimmer.forget()
        self._usage_before = usage_of(self._handed)
        cached = self._usage_before.cached_tokens
        self._attempt, self._answer = await self._resumer.go_on(self._progress, cached, error)
        self._failure = None
        self._parser, self._between = SseParser(), False
        self._timeout_s, self._quiet_s = self._settings.first_token_timeout_s, 0.0

    async def aclose(self) -> None:
        """End now. A stream that was not read to its end counts as cancelled by the client."""
        self._close(self._exchange.interrupt.error or RequestCancelled("the client went away"))

    async def _read_on(self) -> None:
        """Read the next piece, or make a comment ready where there is none for a while."""
        silence_s = min(self._beat_s, self._timeout_s - self._quiet_s)
        try:
            await self._read(silence_s)
        except UpstreamTimeout:
            self._fall_silent(silence_s)
        else:
            self._timeout_s, self._quiet_s = self._settings.idle_timeout_s, 0.0

    def _fall_silent(self, more_s: float) -> None:
        """The replica said nothing for ``more_s``. Raises UpstreamTimeout if that was the last of
        the time it has."""
        self._quiet_s += more_s
        if more_s < self._beat_s or self._quiet_s >= self._timeout_s:
            raise self._answer.silent(self._timeout_s)
        self._beat()

    def _beat(self) -> None:
        if self._beat_s < math.inf:
            self._ready.append(PING)

    async def _read(self, timeout_s: float) -> None:
        piece = await self._answer.piece(timeout_s)
        if not piece:
            self._failure = UpstreamFailed(
                "a replica ended its stream before the answer was complete"
            )
            return
        self._feed(piece)

    def _feed(self, piece: bytes) -> None:
        rest = self._skimmer.skim(piece, self._ready) if self._between else piece
        if rest:
            self._parse(rest)

    def _parse(self, piece: bytes) -> None:
        events = self._parser.feed(piece)
        self._between = self._parser.between
        if not (events or self._ready) and piece.startswith(b":") and self._skimmer.pieces:
            self._beat()  # a comment of the replica's own: its silence is not ours to measure
        for data in events:
            self._take(data)
            if self._over:
                return

    def _take(self, data: bytes) -> None:
        """One event of the replica."""
        if data == openai.DONE_DATA:
            self._finished = True
            self._ready.append(self._rendering.done())
            return
        chunk = openai.decode(data)
        if chunk is None:
            self._failure = UpstreamFailed("a replica sent an event that is not JSON")
        elif chunk.get("error"):
            error = chunk["error"]
            status = error.get("code") if isinstance(error, dict) else None
            known = status if type(status) is int and 400 <= status <= 599 else 502
            self._failure = self._answer.translated(ReplicaRefused(known, chunk, None))
        elif openai.is_aborted(chunk):
            self._failure = UpstreamFailed("a replica gave up on the answer")
        else:
            self._skimmer.settle()
            self._progress.take(chunk)
            self._skimmer.read(data, chunk)
            try:
                shaped = self._rendering.chunk(chunk)
            except AnswerEnded as end:  # before the replica is done: it need not go on
                shaped = end.events
                self._finished = True
                self._answer.close()
            if shaped:
                self._ready.append(shaped)

    def _tell(self, error: CloudlmError) -> None:
        """Nobody goes on: tell the client, unless it is gone."""
        self._failure = error
        self._told = True
        if not isinstance(error, RequestCancelled):
            self._ready.append(self._rendering.error(error))

    def _hand_over(self) -> bytes:
        out = b"".join(self._ready)
        self._ready.clear()
        if self._told:
            self._close(self._failure or UpstreamFailed("the stream broke"))
            return out
        if out == PING:  # nothing of the answer
            return out
        self._handed = self._skimmer.counts()
        if self._followed is not self._attempt:
            self._followed = self._attempt
            self._attempt.first_content()
            self._attempt.follow(self._share)
        if self._finished and self._failure is None:
            self._attempt.finish()
            self._exchange.finish()
        return out

    def _share(self) -> Usage:
        """What this attempt alone accounts for; the prompt is the first one's."""
        usage, before = usage_of(self._handed), self._usage_before
        if before is None:
            return usage
        more = usage.completion_tokens - before.completion_tokens
        return Usage(completion_tokens=max(more, 0))

    async def _close_gently(self) -> None:
        """After ``[DONE]``: see the end of the body, so that the connection can be used again."""
        if self._finished and not self._closed:
            try:
                with self._exchange.interrupt:
                    await self._answer.piece(_END_TIMEOUT_S)
            except CloudlmError:
                pass  # the answer is complete; only the connection is lost
        self._close(self._failure or RequestCancelled("the client went away"))

    def _close(self, error: CloudlmError) -> None:
        if self._closed:
            return
        self._closed = True
        self._answer.close()
        self._attempt.fail(error)
        self._exchange.fail(error)
