"""The handlers of a replica's routes: read, prepare, run, answer. Each is read from top to bottom;
what is hard lives in the plain functions that it calls."""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from cloudlm import __version__
from cloudlm.core.chat import ChatRequest, CompletionRequest, FinishReason
from cloudlm.core.errors import InvalidRequest, Unavailable
from cloudlm.core.requests import (
    decode_body,
    parse_chat,
    parse_completion,
    parse_embedding,
    token_ids,
)
from cloudlm.core.resuming import RESUMABLE_HEADER
from cloudlm.engine.api import Embedding, EmbedRequest, TokenEvent
from cloudlm.engine.intake import check_token_ids
from cloudlm.telemetry.logs import get_logger
from cloudlm.worker.adapters import add_adapter, parse_load, parse_unload
from cloudlm.worker.chat import stream_chat, whole_chat
from cloudlm.worker.complete import stream_completion, whole_completion
from cloudlm.worker.edge import log_failure, read_body
from cloudlm.worker.embed import embedding_answer, prepare_embedding
from cloudlm.worker.generate import Numbered, generate
from cloudlm.worker.internal import parse_internal, prepare_internal, stream_internal
from cloudlm.worker.metrics import CONTENT_TYPE, RequestWatch
from cloudlm.worker.prepare import (
    Prepared,
    cache_salt,
    prepare_chat,
    prepare_completion,
    render_messages,
)
from cloudlm.worker.replica import Phase, Replica
from cloudlm.worker.resume import Thread, parse_resume, take_up
from cloudlm.worker.serving import Served, Serving, check_model
from cloudlm.worker.sharing import share_of
from cloudlm.worker.stream import EventStream, unless_gone

T = TypeVar("T")
MAX_WAIT_S = 60.0
"""How long a probe may wait until the model is loaded."""
MAX_RESUME_BYTES = 16 << 20
"""What the tokens of an answer may add to a request that is resumed."""
logger = get_logger(__name__)


async def chat_completions(request: Request) -> Response:
    """POST /v1/chat/completions: answer a conversation."""
    replica = replica_of(request)
    serving = replica.serving
    asked, salt, share = await _read(
        request,
        lambda body: (parse_chat(body), cache_salt(body), share_of(request.headers, body)),
    )
    prepared = await prepare_chat(serving, replica.offload, asked, salt, share)
    events, created = _run(request, serving, prepared), int(replica.clock.now())
    if asked.stream:
        thread = _thread(request, asked)
        return _stream(events, stream_chat(serving, asked, prepared, events, created, thread))
    return await _whole(request, events, whole_chat(serving, asked, prepared, events, created))


async def completions(request: Request) -> Response:
    """POST /v1/completions: continue a text."""
    replica = replica_of(request)
    serving = replica.serving
    asked, salt, share = await _read(
        request,
        lambda body: (parse_completion(body), cache_salt(body), share_of(request.headers, body)),
    )
    prepared = await prepare_completion(serving, replica.offload, asked, salt, share)
    events, created = _run(request, serving, prepared), int(replica.clock.now())
    if asked.stream:
        thread = _thread(request, asked)
        return _stream(events, stream_completion(serving, asked, prepared, events, created, thread))
    answer = whole_completion(serving, asked, prepared, events, created)
    return await _whole(request, events, answer)


async def embeddings(request: Request) -> Response:
    """POST /v1/embeddings: texts to vectors."""
    replica = replica_of(request)
    serving = replica.serving
    asked, salt, share = await _read(
        request,
        lambda body: (parse_embedding(body), cache_salt(body), share_of(request.headers, body)),
    )
    size = sum(len(one) for one in asked.inputs)
    prompts = await replica.offload.sized(size, prepare_embedding, serving, asked, salt, share)
    found = await unless_gone(request.receive, _embed(request, serving, prompts))
    numbers = sum(len(one.values) for one in found)
    answer = await replica.offload.sized(numbers, embedding_answer, asked, found)
    return Response(answer, media_type="application/json")


async def internal_generate(request: Request) -> Response:
    """POST /internal/v1/generate: token ids in and out, resume; see ``internal``."""
    replica = replica_of(request)
    serving = replica.serving
    asked = await _read(request, lambda body: parse_internal(body, request.headers))
    prepared = await prepare_internal(serving, replica.offload, asked)
    events = _run(request, serving, prepared)
    return _stream(events, stream_internal(prepared, events))


async def internal_resume(request: Request) -> Response:
    """POST /internal/v1/resume: go on with another replica's stream; see ``resume``."""
    replica = replica_of(request)
    serving = replica.serving
    asked = await _read(request, lambda body: parse_resume(body, request.headers), MAX_RESUME_BYTES)
    begun, wanted = asked.begun, asked.asked
    if isinstance(wanted, ChatRequest):
        prepared = await prepare_chat(serving, replica.offload, wanted, asked.salt, asked.share)
    else:
        prepared = await prepare_completion(
            serving, replica.offload, wanted, asked.salt, asked.share
        )
    resumed = await take_up(serving, prepared, begun)
    live = _run(request, serving, resumed.left) if resumed.numbers else None
    events, whole, thread = resumed.events(live), resumed.prepared, resumed.thread
    if isinstance(wanted, ChatRequest):
        chunks = stream_chat(serving, wanted, whole, events, begun.created, thread)
    else:
        chunks = stream_completion(serving, wanted, whole, events, begun.created, thread)
    return _stream(events, chunks)


async def models(request: Request) -> Response:
    """GET /v1/models: list the one model served here, and its adapters."""
    serving = minded(request).serving
    adapters = [_adapter_body(serving, name) for name in sorted(serving.engine.adapters())]
    return JSONResponse({"object": "list", "data": [_model_body(serving), *adapters]})


async def model(request: Request) -> Response:
    """GET /v1/models/{id}: show it."""
    serving = minded(request).serving
    adapter = check_model(serving, request.path_params["model_id"])
    return JSONResponse(_adapter_body(serving, adapter) if adapter else _model_body(serving))


async def load_adapter(request: Request) -> Response:
    """POST /v1/load_lora_adapter: load a LoRA adapter while others are served."""
    replica = minded(request)
    serving = replica.serving
    name, address = await _read(request, parse_load)
    await add_adapter(replica.config, serving, name, address)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


async def unload_adapter(request: Request) -> Response:
    """POST /v1/unload_lora_adapter: wait for the adapter's requests, then forget it."""
    serving = minded(request).serving
    name = await _read(request, parse_unload)
    await serving.engine.unload_adapter(name)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


async def sleep(request: Request) -> Response:
    """POST /sleep: finish what runs, then give the weights' memory back (level 1 or 2)."""
    level = request.query_params.get("level", "1")
    if level not in ("1", "2"):
        raise InvalidRequest(
            f"level is {level[:40]!r}; expected 1 (the weights' files stay in the system's cache) "
            "or 2 (they do not)",
            param="level",
        )
    replica = minded(request)
    began = replica.clock.monotonic()
    await replica.sleep(int(level))
    _log_turn("worker_sleeps", replica, began)
    return Response(status_code=200)


async def wake_up(request: Request) -> Response:
    """POST /wake_up: load the weights again; answered when requests are."""
    replica = minded(request)
    began = replica.clock.monotonic()
    await replica.wake()
    _log_turn("worker_awake", replica, began)
    return Response(status_code=200)


async def is_sleeping(request: Request) -> Response:
    """GET /is_sleeping: whether the model is asleep."""
    return JSONResponse({"is_sleeping": minded(request).phase is Phase.SLEEPING})


def _log_turn(event: str, replica: Replica[Served], began: float) -> None:
    seconds = round(replica.clock.monotonic() - began, 3)
    logger.info(event, extra={"fields": {"seconds": seconds}})


async def tokenize(request: Request) -> Response:
    """POST /tokenize: a ``prompt`` or ``messages`` to token ids, as vLLM answers it."""
    replica = replica_of(request)
    serving = replica.serving
    body = await _read(request, dict)
    _check_named_model(serving, body)
    if body.get("messages") is not None:
        known: dict[str, Any] = {
            name: body[name] for name in ("messages", "tools", "tool_choice") if name in body
        }
        asked = parse_chat({"model": "-", **known})
        found = await render_messages(
            serving,
            replica.offload,
            asked.messages,
            add_generation_prompt=_flag(body, "add_generation_prompt", True),
            use=asked.tool_use,
        )
    else:
        prompt = body.get("prompt")
        if not isinstance(prompt, str):
            raise InvalidRequest("prompt must be a text, or messages a list", param="prompt")
        text = cast(str, parse_completion({"model": "-", "prompt": prompt}).prompts[0])
        special = _flag(body, "add_special_tokens", True)
        size = len(text)
        found = tuple(await replica.offload.sized(size, serving.tokenizer.encode, text, special))
    strings = None
    if _flag(body, "return_token_strs", False):
        strings = await replica.offload.sized(
            len(found), lambda: [serving.tokenizer.token_text(i) for i in found]
        )
    answer = {
        "count": len(found),
        "max_model_len": serving.info.max_model_len,
        "tokens": found,
        "token_strs": strings,
    }
    # A million ids take the standard encoder a third of a second, in which nobody else is served.
    encoded = await replica.offload.sized(len(found), msgspec.json.encode, answer)
    return Response(encoded, media_type="application/json")


async def detokenize(request: Request) -> Response:
    """POST /detokenize: token ids to text."""
    replica = replica_of(request)
    serving = replica.serving
    body = await _read(request, dict)
    _check_named_model(serving, body)
    ids = token_ids(body.get("tokens"), "tokens")
    check_token_ids(ids, serving.info.vocab_size, "tokens")
    text = await replica.offload.sized(len(ids), serving.tokenizer.decode, ids, False)
    return JSONResponse({"prompt": text})


async def version(request: Request) -> Response:
    """GET /version: cloudlm's version."""
    return JSONResponse({"version": __version__})


async def health(request: Request) -> Response:
    """GET /health: 200 while the engine makes progress, 503 when it stands still or is dead."""
    replica = minded(request)
    if request.query_params.get("verbose", "") not in ("", "0", "false"):
        report = replica.report()
        return JSONResponse(report, status_code=200 if report["healthy"] else 503)
    verdict = replica.health()
    if verdict.fault is not None:
        raise Unavailable(f"this replica is not healthy: {verdict.fault}")
    return Response(status_code=200)


async def livez(request: Request) -> Response:
    """GET /livez: 200 as long as the event loop answers."""
    return PlainTextResponse("ok")


async def readyz(request: Request) -> Response:
    """GET /readyz: 200 when the model is loaded, healthy, and requests are taken.

    With ``wait_s`` the answer waits for a model that loads, so many seconds at most."""
    replica = minded(request)
    await replica.until_loaded(_wait_s(request.query_params.get("wait_s", "0")))
    _ = replica.serving  # raises Unavailable with the reason
    verdict = replica.health()
    if verdict.fault is not None or replica.phase is not Phase.READY:
        raise Unavailable(f"this replica is not ready: {verdict.fault or replica.phase.value}")
    return PlainTextResponse("ok")


async def metrics(request: Request) -> Response:
    """GET /metrics: metrics in Prometheus' text format."""
    exposition = minded(request).metrics.exposition()
    return Response(exposition, headers={"content-type": CONTENT_TYPE})


def replica_of(request: Request) -> Replica[Serving]:
    """The replica that this server was assembled around, served by our own engine."""
    return cast(Replica[Serving], request.app.state.replica)


def minded(request: Request) -> Replica[Served]:
    """The replica that this server was assembled around, whichever engine serves it."""
    return cast(Replica[Served], request.app.state.replica)


def _thread(request: Request, asked: ChatRequest | CompletionRequest) -> Thread:
    """Notes go with the usage of every chunk: only then does every token have a chunk."""
    tells = RESUMABLE_HEADER in request.headers and asked.stream_options.continuous_usage_stats
    return Thread(tells=tells)


async def _read(request: Request, parse: Callable[[dict[str, Any]], T], more_bytes: int = 0) -> T:
    """The parsed body; a large one is parsed off the event loop. It may be ``more_bytes`` larger
    than what clients may send."""
    replica = minded(request)
    limit_bytes = replica.config.settings.gateway.max_body_bytes + more_bytes
    raw = await read_body(request, limit_bytes)
    return await replica.offload.sized(len(raw), lambda: parse(decode_body(raw)))


def _run(request: Request, serving: Serving, prepared: Prepared) -> AsyncGenerator[Numbered, None]:
    """The events of the prepared sequences; nothing starts before the first is asked for."""
    replica = replica_of(request)
    arrived: float = request.scope["state"]["arrived"]
    watch = RequestWatch(
        replica.metrics, arrived, len(prepared.requests), sum(prepared.prompt_tokens)
    )

    async def events() -> AsyncGenerator[Numbered, None]:
        source = generate(serving.engine, prepared.requests, watch)
        with replica.running(prepared.id):
            async with contextlib.aclosing(source):
                async for numbered in source:
                    yield numbered

    return events()


async def _embed(
    request: Request, serving: Serving, prompts: Sequence[EmbedRequest]
) -> list[Embedding]:
    """The vectors of all prompts, counted as one request that generates nothing."""
    replica = replica_of(request)
    arrived: float = request.scope["state"]["arrived"]
    tokens = sum(len(one.prompt_token_ids) for one in prompts)
    watch = RequestWatch(replica.metrics, arrived, 1, tokens)
    with replica.running(prompts[0].request_id), contextlib.closing(watch):
        found = await serving.engine.embed(prompts)
        watch.on_event(0, TokenEvent((), "", finish_reason=FinishReason.STOP))
        return found


async def _whole(request: Request, events: AsyncGenerator[Numbered, None], answer: Any) -> Response:
    async with contextlib.aclosing(events):
        return JSONResponse(await unless_gone(request.receive, answer))


def _stream(
    events: AsyncGenerator[Numbered, None], chunks: AsyncGenerator[bytes, None]
) -> Response:
    async def closing() -> AsyncGenerator[bytes, None]:
        async with contextlib.aclosing(events), contextlib.aclosing(chunks):
            async for data in chunks:
                yield data

    return EventStream(closing(), on_failure=log_failure)


def _model_body(serving: Served) -> dict[str, Any]:
    return {
        "id": serving.name,
        "object": "model",
        "created": serving.created,
        "owned_by": "cloudlm",
        "root": serving.root,
        "parent": None,
        "max_model_len": serving.engine.info.max_model_len,
    }


def _adapter_body(serving: Served, name: str) -> dict[str, Any]:
    address = serving.engine.adapters().get(name)
    return {**_model_body(serving), "id": name, "root": address, "parent": serving.name}


def _check_named_model(serving: Serving, body: Mapping[str, Any]) -> None:
    named = body.get("model")
    if named is None:
        return
    if not isinstance(named, str):
        raise InvalidRequest("model must be a text", param="model")
    serving.check_model(named)


def _wait_s(text: str) -> float:
    try:
        wait_s = float(text)
    except ValueError:
        wait_s = math.nan
    if not 0.0 <= wait_s <= MAX_WAIT_S:
        raise InvalidRequest(
            f"wait_s is {text[:40]!r}; expected seconds from 0 to {MAX_WAIT_S:g}", param="wait_s"
        )
    return wait_s


def _flag(body: Mapping[str, Any], name: str, default: bool) -> bool:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} must be true or false", param=name)
    return value
