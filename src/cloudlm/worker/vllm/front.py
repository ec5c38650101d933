"""The routes that vLLM answers itself, passed on as they are.

A body goes to vLLM unread, and its answer comes back unread, in whole events, but for streams of
which a gateway wants to know how to go on with them elsewhere; errors come in cloudlm's words. What
a replica answers for itself (health, adapters, sleep, models) is in ``worker.serve``, the same for
every engine.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import cast

import aiohttp
import msgspec
from prometheus_client import generate_latest
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from cloudlm.core.errors import Unavailable
from cloudlm.core.requests import decode_body
from cloudlm.core.resuming import RESUMABLE_HEADER, RESUME_PATH
from cloudlm.worker.edge import log_failure, read_body
from cloudlm.worker.internal import parse_internal
from cloudlm.worker.metrics import CONTENT_TYPE, Metrics
from cloudlm.worker.replica import Replica
from cloudlm.worker.serve import MAX_RESUME_BYTES
from cloudlm.worker.serving import new_id
from cloudlm.worker.stream import DONE, EventStream, event, unless_gone
from cloudlm.worker.vllm.events import chunks_of
from cloudlm.worker.vllm.exact import ExactStream, exact_stream
from cloudlm.worker.vllm.loading import VllmServing
from cloudlm.worker.vllm.noted import NotedStream
from cloudlm.worker.vllm.resume import continue_answer
from cloudlm.worker.vllm.takeup import go_on, read_rest

_EVENT_STREAM = "text/event-stream"
_EVENT_END = b"\n\n"


async def passed_on(request: Request) -> Response:
    """Pass the request on, and its answer back."""
    replica = replica_of(request)
    engine = replica.serving.engine
    raw = await read_body(request, replica.config.settings.gateway.max_body_bytes)
    request_id = new_id("req")
    exact = _exact(request, raw, engine.parses)
    if exact is not None:
        raw = msgspec.json.encode(exact.beginning())
    async with contextlib.AsyncExitStack() as held:
        held.enter_context(replica.running(request_id))
        answer = await unless_gone(
            request.receive,
            held.enter_async_context(engine.post(request.url.path, raw, request_id)),
        )
        if answer.content_type != _EVENT_STREAM:
            body = await unless_gone(request.receive, answer.read())
            return Response(body, answer.status, media_type=answer.content_type)
        if exact is None:
            events = _events(answer, held.pop_all())
        else:
            noted = NotedStream(replica.serving.fingerprint, exact.stops)
            events = _noted_events(answer, held.pop_all(), noted)
        await anext(events)  # from here on, closing it lets go of what is held
        return EventStream(events, on_failure=log_failure)


async def _events(
    answer: aiohttp.ClientResponse, held: contextlib.AsyncExitStack
) -> AsyncGenerator[bytes, None]:
    """Nothing, then whole events only, so that an error can follow at any time. What breaks the
    answer off is raised as the block in ``VllmEngine.post`` says it."""
    async with held:
        yield b""
        rest = b""
        async for piece in answer.content.iter_any():
            whole, end, rest = (rest + piece).rpartition(_EVENT_END)
            if end:
                yield whole + end
        if rest.strip():
            yield rest + _EVENT_END


def _exact(request: Request, raw: bytes, parses: bool) -> ExactStream | None:
    """The stream that is asked for, if a gateway would go on with it elsewhere and that is exact.
    What is not readable is for vLLM to refuse."""
    if RESUMABLE_HEADER not in request.headers:
        return None
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None
    return exact_stream(request.url.path, body, parses=parses) if isinstance(body, dict) else None


async def _noted_events(
    answer: aiohttp.ClientResponse, held: contextlib.AsyncExitStack, noted: NotedStream
) -> AsyncGenerator[bytes, None]:
    """As ``_events``, with notes."""
    async with held, contextlib.aclosing(chunks_of(answer)) as chunks:
        yield b""
        async for chunk in chunks:
            if chunk is None:
                yield DONE
                return
            for ready in noted.take(chunk):
                yield event(ready)


async def internal_generate(request: Request) -> Response:
    """POST /internal/v1/generate: token ids in and out, resume as far as it is exact."""
    replica = replica_of(request)
    raw = await read_body(request, replica.config.settings.gateway.max_body_bytes)
    asked = parse_internal(decode_body(raw), request.headers)
    request_id = new_id("gen")
    events = continue_answer(replica.serving.engine, replica.serving.name, asked, request_id)
    return _streamed(replica, request_id, events)


async def internal_resume(request: Request) -> Response:
    """POST /internal/v1/resume: go on with another replica's stream; see ``takeup``."""
    replica = replica_of(request)
    serving = replica.serving
    limit = replica.config.settings.gateway.max_body_bytes + MAX_RESUME_BYTES
    body = decode_body(await read_body(request, limit))
    rest = read_rest(body, serving.fingerprint, parses=serving.engine.parses)
    request_id = new_id("req")
    return _streamed(replica, request_id, go_on(serving.engine, rest, request_id))


def _streamed(
    replica: Replica[VllmServing], request_id: str, events: AsyncGenerator[bytes, None]
) -> Response:
    async def running() -> AsyncGenerator[bytes, None]:
        with replica.running(request_id):
            async with contextlib.aclosing(events):
                async for data in events:
                    yield data

    return EventStream(running(), on_failure=log_failure)


async def metrics(request: Request) -> Response:
    """GET /metrics: vLLM's own, and what this front measures."""
    replica = replica_of(request)
    ours = generate_latest(_OurOwn(replica.metrics))
    try:
        theirs = (await replica.serving.engine.metrics()).encode()
    except Unavailable:  # still loading, asleep or stopping; ours say so
        theirs = b""
    return Response(ours + theirs, headers={"content-type": CONTENT_TYPE})


class _OurOwn(Collector):
    """Our metrics without those that vLLM has itself."""

    def __init__(self, metrics: Metrics) -> None:
        self._registry = metrics.registry

    def collect(self) -> list[object]:  # type: ignore[override]
        return [one for one in self._registry.collect() if one.name.startswith("cloudlm_")]


def replica_of(request: Request) -> Replica[VllmServing]:
    """The replica that this server was assembled around."""
    return cast(Replica[VllmServing], request.app.state.replica)


HANDLERS: dict[str, Callable[[Request], Awaitable[Response]]] = {
    "/v1/chat/completions": passed_on,
    "/v1/completions": passed_on,
    "/v1/embeddings": passed_on,
    "/tokenize": passed_on,
    "/detokenize": passed_on,
    "/internal/v1/generate": internal_generate,
    RESUME_PATH: internal_resume,
    "/metrics": metrics,
}
