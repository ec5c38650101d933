"""The routes that vLLM answers itself, passed on as they are.

A body goes to vLLM unread, and its answer comes back unread, in whole events; errors come in
cloudlm's words. What a replica answers for itself (health, adapters, sleep, models) is in
``worker.serve``, the same for every engine.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import cast

import aiohttp
from prometheus_client import generate_latest
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from cloudlm.core.errors import NotSupported, Unavailable
from cloudlm.core.requests import decode_body
from cloudlm.core.resuming import RESUME_PATH
from cloudlm.worker.edge import log_failure, read_body
from cloudlm.worker.internal import parse_internal
from cloudlm.worker.metrics import CONTENT_TYPE, Metrics
from cloudlm.worker.replica import Replica
from cloudlm.worker.serving import new_id
from cloudlm.worker.stream import EventStream, unless_gone
from cloudlm.worker.vllm.loading import VllmServing
from cloudlm.worker.vllm.resume import continue_answer

_EVENT_STREAM = "text/event-stream"
_EVENT_END = b"\n\n"


async def passed_on(request: Request) -> Response:
    """Pass the request on, and its answer back."""
    replica = replica_of(request)
    engine = replica.serving.engine
    raw = await read_body(request, replica.config.settings.gateway.max_body_bytes)
    request_id = new_id("req")
    async with contextlib.AsyncExitStack() as held:
        held.enter_context(replica.running(request_id))
        answer = await unless_gone(
            request.receive,
            held.enter_async_context(engine.post(request.url.path, raw, request_id)),
        )
        if answer.content_type != _EVENT_STREAM:
            body = await unless_gone(request.receive, answer.read())
            return Response(body, answer.status, media_type=answer.content_type)
        events = _events(answer, held.pop_all())
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


async def internal_generate(request: Request) -> Response:
    """POST /internal/v1/generate: token ids in and out, resume as far as it is exact."""
    replica = replica_of(request)
    raw = await read_body(request, replica.config.settings.gateway.max_body_bytes)
    asked = parse_internal(decode_body(raw), request.headers)
    request_id = new_id("gen")
    events = continue_answer(replica.serving.engine, replica.serving.name, asked, request_id)

    async def running() -> AsyncGenerator[bytes, None]:
        with replica.running(request_id):
            async with contextlib.aclosing(events):
                async for data in events:
                    yield data

    return EventStream(running(), on_failure=log_failure)


async def no_resume(request: Request) -> Response:
    """POST /internal/v1/resume: never. A stream of vLLM has no notes to go on from, so no gateway
    should ask."""
    raise NotSupported("a stream cannot be taken up in the middle by the engine vllm")


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
    RESUME_PATH: no_resume,
    "/metrics": metrics,
}
