"""A deterministic engine and tokenizer, and servers around them."""

from __future__ import annotations

import asyncio
import codecs
import re
from array import array
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.applications import Starlette

from cloudlm.core.chat import Constraint, FinishReason, Message
from cloudlm.core.clock import Clock, ManualClock, SystemClock
from cloudlm.core.errors import CloudlmError, InternalError, ModelNotFound
from cloudlm.engine.api import (
    Embedding,
    EmbedRequest,
    EngineInfo,
    EngineStats,
    GenerateRequest,
    TokenEvent,
    TokenLogprob,
)
from cloudlm.worker.app import build_app
from cloudlm.worker.config import WorkerConfig
from cloudlm.worker.dialect import Dialect
from cloudlm.worker.replica import Replica
from cloudlm.worker.serving import Serving
from cloudlm.worker.template import Renderer
from cloudlm.worker.tokenise import control_pattern

CONTROL = ("<|start|>", "<|end|>")
EOS = 257
VOCAB_SIZE = 258
CONTEXT = 256


class ByteDetokenizer:
    """Bytes to text, characters held back until they are whole."""

    def __init__(self, tokenizer: ByteTokenizer, shown: frozenset[int] = frozenset()) -> None:
        self._bytes_of = partial(tokenizer.visible_bytes, shown=shown)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Iterable[int]) -> str:
        return self._decoder.decode(b"".join(map(self._bytes_of, token_ids)))

    def flush(self) -> str:
        return self._decoder.decode(b"", True)


class ByteTokenizer:
    """One token per UTF-8 byte; 256 and 257 are control tokens."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        found: list[int] = []
        for piece in re.split("(" + "|".join(map(re.escape, CONTROL)) + ")", text):
            if piece in CONTROL:
                found.append(256 + CONTROL.index(piece))
            else:
                found.extend(piece.encode())
        return found

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        raw = b"".join(
            bytes([i]) if i < 256 else (b"" if skip_special_tokens else self.token_bytes(i))
            for i in token_ids
        )
        return raw.decode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else CONTROL[token_id - 256].encode()

    def visible_bytes(self, token_id: int, shown: frozenset[int] = frozenset()) -> bytes:
        return self.token_bytes(token_id) if token_id < 256 or token_id in shown else b""

    def detokenizer(
        self, prompt_ids: Iterable[int], shown: frozenset[int] = frozenset()
    ) -> ByteDetokenizer:
        return ByteDetokenizer(self, shown)


class PlainRenderer:
    """A template in miniature: each turn between control tokens."""

    async def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Any = ()
    ) -> str:
        turns = "".join(f"<|start|>{m.role}:{m.content}<|end|>" for m in messages)
        return turns + ("<|start|>assistant:" if add_generation_prompt else "")

    async def close(self) -> None:
        return None


class EchoEngine:
    """Answers with ``answer`` (bytes as tokens, then the end token), one token per event.

    ``gate`` holds the events back while it is cleared; ``failure`` is raised after ``fail_after``
    events; ``refusal`` at submit. With a seed, every choice's index is the first token.
    """

    def __init__(self, answer: str = "Hello, world") -> None:
        self.info = EngineInfo(
            "EchoForCausalLM", 42, "float32", "cpu", VOCAB_SIZE, CONTEXT, 16, 64, (EOS,), 4
        )
        self.answer = answer
        self.gate = asyncio.Event()
        self.gate.set()
        self.refusal: CloudlmError | None = None
        self.refuse_from = 0
        self.failure: CloudlmError | None = None
        self.fail_after = 0
        self.requests: list[GenerateRequest] = []
        self.open: dict[int, GenerateRequest] = {}
        self.cancelled: list[str] = []
        self.embedded: list[EmbedRequest] = []
        self.loaded: dict[str, str] = {}
        self.level = 0
        self.constraints: list[Constraint] = []
        self.closed = False
        self.now = EngineStats(steps=7, blocks_total=64, prefix_queries=10, prefix_hits=4)

    def submit(self, request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        if self.refusal is not None and len(self.requests) >= self.refuse_from:
            raise self.refusal
        self.requests.append(request)
        number = len(self.requests)
        self.open[number] = request
        return _EchoStream(self, number, self._events(request))

    async def embed(self, requests: Sequence[EmbedRequest]) -> list[Embedding]:
        """Every prompt becomes (0.5, 0.5, 0.5, 0.5) with the sign of its length's parity."""
        if self.refusal is not None:
            raise self.refusal
        self.embedded.extend(requests)
        await self.gate.wait()
        lengths = [len(one.prompt_token_ids) for one in requests]
        return [
            Embedding(array("f", [-0.5 if length % 2 else 0.5] * 4), length, cached_tokens=1)
            for length in lengths
        ]

    async def sleep(self, level: int) -> None:
        if self.refusal is not None:
            raise self.refusal
        while self.open:
            await asyncio.sleep(0)
        self.level = level

    async def wake(self) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.level = 0

    def adapters(self) -> dict[str, str]:
        return dict(self.loaded)

    async def load_adapter(self, name: str, folder: Path, address: str) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.loaded[name] = address

    async def unload_adapter(self, name: str) -> None:
        if self.loaded.pop(name, None) is None:
            raise ModelNotFound("no such adapter", param="lora_name")

    async def guide(self, constraint: Constraint, output_token_ids: tuple[int, ...] = ()) -> object:
        if self.refusal is not None:
            raise self.refusal
        self.constraints.append(constraint)
        return object()

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    def stats(self) -> EngineStats:
        return replace(self.now, running=len(self.open))

    async def close(self) -> None:
        self.closed = True

    async def _events(self, request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        tokens = [*self.answer.encode(), EOS]
        sampling = request.sampling
        position = len(request.output_token_ids)
        text = bytearray(tokens[:position])
        sent = len(text.decode("utf-8", "ignore"))
        for count, token in enumerate(tokens[position:], start=position + 1):
            await self.gate.wait()
            if request.request_id in self.cancelled:
                yield TokenEvent((), "", finish_reason=FinishReason.ABORT)
                return
            if self.failure is not None and count > self.fail_after:
                raise self.failure
            logprobs: tuple[TokenLogprob, ...] = ()
            if sampling.logprobs is not None:
                top = tuple((token + n, -0.5 - n) for n in range(sampling.logprobs))
                logprobs = (TokenLogprob(token, -0.5, top),)
            first = count == position + 1
            prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
            if first and request.prompt_logprobs:
                rest = (TokenLogprob(i, -1.0) for i in request.prompt_token_ids[1:])
                prompt_logprobs = (None, *rest)
            reason: FinishReason | None = None
            match: str | int | None = None
            piece = ""
            if token == EOS:
                reason = FinishReason.STOP  # as the real engine: only asked-for ids are named
            else:
                text.append(token)
                known = text.decode("utf-8", "ignore")
                piece, sent = known[sent:], len(known)
                for stop in sampling.stop:
                    if stop in known:
                        reason, match = FinishReason.STOP, stop
                        piece = piece[: -len(stop)] if piece.endswith(stop) else ""
                if reason is None and sampling.max_tokens == count:
                    reason = FinishReason.LENGTH
            yield TokenEvent(
                (token,),
                piece,
                logprobs,
                reason,
                match,
                cached_tokens=3 if first else 0,
                prompt_logprobs=prompt_logprobs,
                queued_s=0.002 if first else None,
            )
            if reason is not None:
                return


class _EchoStream:
    def __init__(self, engine: EchoEngine, number: int, events: Any) -> None:
        self._engine, self._number, self._events = engine, number, events

    def __aiter__(self) -> _EchoStream:
        return self

    async def __anext__(self) -> TokenEvent:
        try:
            event: TokenEvent = await anext(self._events)
        except BaseException:
            self._engine.open.pop(self._number, None)
            raise
        if event.finish_reason is not None:
            self._engine.open.pop(self._number, None)
        return event

    async def aclose(self) -> None:
        self._engine.open.pop(self._number, None)
        await self._events.aclose()


class Bench:
    """A replica with its app and a client that speaks ASGI."""

    def __init__(self, replica: Replica, engine: EchoEngine, serving: Serving) -> None:
        self.replica, self.engine, self.serving = replica, engine, serving
        self.app: Starlette = build_app(replica)
        token = replica.config.token
        self.client = httpx2.AsyncClient(
            transport=httpx2.ASGITransport(self.app, raise_app_exceptions=True),
            base_url="http://worker",
            headers={"authorization": f"Bearer {token}"} if token else {},
        )

    async def post(self, path: str, body: Any) -> httpx2.Response:
        return await self.client.post(path, json=body)

    async def chat(self, **fields: Any) -> httpx2.Response:
        body = {"model": "echo", "messages": [{"role": "user", "content": "hi"}], **fields}
        return await self.post("/v1/chat/completions", body)

    async def complete(self, **fields: Any) -> httpx2.Response:
        return await self.post("/v1/completions", {"model": "echo", "prompt": "hi", **fields})


MakeBench = Callable[..., Bench]


def make_serving(
    engine: EchoEngine, renderer: Renderer | None = None, dialect: Dialect | None = None
) -> Serving:
    return Serving(
        name="echo",
        root="models:/echo/1",
        engine=engine,
        tokenizer=ByteTokenizer(),
        renderer=renderer or PlainRenderer(),
        control=control_pattern(CONTROL),
        created=1_700_000_000,
        dialect=dialect or Dialect(),
    )


@pytest.fixture
def config(tmp_path: Path) -> WorkerConfig:
    return WorkerConfig(model="models:/echo/1", served_model_name="echo", home=tmp_path)


@pytest.fixture
async def make_bench(config: WorkerConfig) -> AsyncIterator[MakeBench]:
    made: list[Bench] = []

    def make(
        *,
        ready: bool = True,
        clock: Clock | None = None,
        renderer: Renderer | None = None,
        dialect: Dialect | None = None,
        **more: Any,
    ) -> Bench:
        engine = EchoEngine()
        replica = Replica(replace(config, **more), clock or ManualClock())
        serving = make_serving(engine, renderer, dialect)
        if ready:
            replica.become_ready(serving)
        made.append(Bench(replica, engine, serving))
        return made[-1]

    yield make
    for bench in made:
        await bench.client.aclose()
        await bench.replica.close()


@pytest.fixture
async def bench(make_bench: MakeBench) -> Bench:
    return make_bench()


@pytest.fixture
def server_gone() -> InternalError:
    return InternalError("the engine failed and this replica must be restarted")


@pytest.fixture
def serving_of() -> Callable[..., Serving]:
    return make_serving


@pytest.fixture
def echo_engine() -> type[EchoEngine]:
    return EchoEngine


@pytest.fixture
def parse_events() -> Callable[[str], list[Any]]:
    """The JSON of every event; the string '[DONE]' for the last."""
    import json

    def parse(text: str) -> list[Any]:
        assert text.endswith("\n\n")
        found: list[Any] = []
        for block in text[:-2].split("\n\n"):
            assert block.startswith("data: ")
            data = block.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
        return found

    return parse


@pytest.fixture
def system_clock() -> Iterator[SystemClock]:
    yield SystemClock()
