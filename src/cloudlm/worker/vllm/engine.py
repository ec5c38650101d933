"""A running vLLM server, minded: requests to it, how it is, sleep, adapters, its end.

Speaks HTTP over a Unix socket in a private folder, which nobody else can open; so vLLM needs no
token and takes no port. Must not know what a request asks for.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from cloudlm.core.clock import Clock
from cloudlm.core.errors import (
    BrokenModel,
    CloudlmError,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    NotSupported,
    Overloaded,
    Unavailable,
    UpstreamFailed,
    error_from_body,
)
from cloudlm.engine.api import EngineInfo, EngineStats
from cloudlm.engine.scratch import Scratch
from cloudlm.telemetry.logs import get_logger
from cloudlm.worker.vllm.child import Child
from cloudlm.worker.vllm.reading import read_metrics, stats_of

POLL_INTERVAL_S = 1.0
_POLL_TIMEOUT_S = 5.0
_SILENT_AFTER_S = 7.0
_TURN_TIMEOUT_S = 600.0
_IDLE_LOOK_S = 0.05
_MAX_METRICS_BYTES = 16 << 20
_logger = get_logger(__name__)


class VllmEngine:
    """Everything that the front and the replica ask of vLLM. ``scratch`` holds its socket and is
    closed with it. ``options`` are those it was started with."""

    def __init__(
        self,
        child: Child,
        scratch: Scratch,
        options: Mapping[str, str],
        clock: Clock,
        *,
        max_waiting: int,
    ) -> None:
        self.info = EngineInfo("", 0, "", "", 0, 0, 0, 0, ())
        self.version = ""
        """vLLM's own, empty if it does not say."""
        self._child = child
        self._scratch = scratch
        self._options = options
        self._clock = clock
        self._max_waiting = max_waiting
        self._session = aiohttp.ClientSession(
            "http://vllm",
            connector=aiohttp.UnixConnector(str(scratch.path / "socket"), limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
        )
        # What ends a request: its asking while vLLM has not begun to answer, then its answer.
        self._open: dict[str, asyncio.Future[aiohttp.ClientResponse] | aiohttp.ClientResponse] = {}
        self._cancelled: set[str] = set()
        self._adapters: dict[str, str] = {}
        self._found: dict[str, float] = {}
        self._answered_at = clock.monotonic()
        self._dead = False
        self._minding: asyncio.Task[None] | None = None

    # Its life -----------------------------------------------------------------------------------

    async def is_up(self) -> bool:
        """Whether it answers requests. Raises BrokenModel if it has ended."""
        if not self._child.alive:
            await self._child.wait()
            raise BrokenModel(f"vLLM cannot serve this model: {self._child.last_words}")
        return await self._health() == 200

    async def begin(self, info: EngineInfo) -> None:
        """It is up: take the model's facts and watch it from now on."""
        async with self._session.get("/v1/models") as answer:
            body = await answer.json()
        self.info = replace(info, max_model_len=int(body["data"][0]["max_model_len"]))
        async with self._session.get("/version") as answer:
            if answer.status == 200:
                self.version = str((await answer.json()).get("version", ""))
        await self._look()
        self._minding = asyncio.create_task(self._mind())

    @property
    def options(self) -> Mapping[str, str]:
        return self._options

    @property
    def parses(self) -> bool:
        """Whether it reads reasoning or tool calls out of what a chat model writes; of some models
        it does so unasked."""
        asked = "reasoning_parser" in self._options or "tool_call_parser" in self._options
        return asked or self.info.architecture.startswith("GptOss")

    async def close(self) -> None:
        """End it, and all requests with it."""
        if self._minding is not None:
            self._minding.cancel()
            await asyncio.gather(self._minding, return_exceptions=True)
        await self._session.close()
        await self._child.stop()
        self._scratch.close()

    def stats(self) -> EngineStats:
        silent = self._clock.monotonic() - self._answered_at > _SILENT_AFTER_S
        return replace(
            stats_of(self._found, ongoing=len(self._open), answering=not silent),
            alive=self._child.alive and not self._dead,
        )

    async def metrics(self) -> str:
        """Its own metrics in Prometheus' text format. Raises Unavailable."""
        try:
            async with asyncio.timeout(_POLL_TIMEOUT_S):
                async with self._session.get("/metrics") as answer:
                    raw = bytearray()
                    async for piece in answer.content.iter_any():
                        raw += piece
                        if len(raw) > _MAX_METRICS_BYTES:
                            raise Unavailable("vLLM's metrics are too long", retry_after_s=1.0)
        except (aiohttp.ClientError, OSError):
            raise Unavailable("vLLM did not answer with its metrics", retry_after_s=1.0) from None
        return raw.decode("utf-8", "replace")

    async def _mind(self) -> None:
        while True:
            await self._clock.sleep(POLL_INTERVAL_S)
            await self._look()

    async def _look(self) -> None:
        try:
            self._found = read_metrics(await self.metrics())
            self._dead = await self._health() == 503
            self._answered_at = self._clock.monotonic()
        except Unavailable:
            return
        if self._dead:
            _logger.error("vllm_engine_dead")

    async def _health(self) -> int:
        """The status of ``/health``: 200, 503 if its engine is dead; 0 if it does not answer."""
        with contextlib.suppress(aiohttp.ClientError, OSError):
            async with asyncio.timeout(_POLL_TIMEOUT_S):
                async with self._session.get("/health") as answer:
                    return answer.status
        return 0

    # Requests -----------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def post(
        self, path: str, body: bytes, request_id: str
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer to ``body``; leaving the block before its end makes vLLM stop working on it.

        Raises Overloaded (too many wait already), UpstreamFailed (it broke off, or was never
        reached), and what a status of 400 or more means.
        """
        waiting = len(self._open) - int(self._found.get("vllm:num_requests_running", 0))
        if waiting >= self._max_waiting:
            raise Overloaded(
                f"{waiting} requests wait already (worker.max_waiting_requests)", retry_after_s=1.0
            )
        headers = {"content-type": "application/json"}
        asking = asyncio.ensure_future(self._session.post(path, data=body, headers=headers))
        self._open[request_id] = asking
        try:
            async with await asking as answer:
                self._open[request_id] = answer
                if answer.status >= 400:
                    raise _verdict(answer.status, await answer.read())
                try:
                    yield answer
                finally:
                    if not answer.content.at_eof():
                        answer.close()
        except (aiohttp.ClientError, OSError, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and request_id not in self._cancelled:
                raise  # whoever asked us is gone; the asking is cancelled with them
            raise self._broken(request_id, error) from None
        finally:
            self._open.pop(request_id, None)
            self._cancelled.discard(request_id)

    def cancel(self, request_id: str) -> None:
        """End this request: whoever reads its answer gets Unavailable."""
        opened = self._open.get(request_id)
        if opened is None:
            return
        self._cancelled.add(request_id)
        if isinstance(opened, asyncio.Future):
            opened.cancel()
        else:
            opened.close()

    def _broken(self, request_id: str, error: BaseException) -> CloudlmError:
        if request_id in self._cancelled:
            return Unavailable("this replica is stopping", retry_after_s=1.0)
        return UpstreamFailed(f"vLLM broke off ({type(error).__name__})")

    async def _ask(self, path: str, fields: Mapping[str, Any], query: str = "") -> None:
        """A request of ours to vLLM. Raises as ``post`` does."""
        try:
            async with asyncio.timeout(_TURN_TIMEOUT_S):
                async with self._session.post(path + query, json=dict(fields)) as answer:
                    raw = await answer.read()
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamFailed(f"vLLM broke off ({type(error).__name__})") from None
        if answer.status >= 400:
            raise _verdict(answer.status, raw)

    # Adapters and sleep -------------------------------------------------------------------------

    def adapters(self) -> Mapping[str, str]:
        return self._adapters

    async def load_adapter(self, name: str, folder: Path, address: str) -> None:
        """Raises NotSupported (started without), InvalidRequest (name taken), BrokenModel."""
        if self._options.get("enable_lora") != "true":
            raise NotSupported(
                "this vLLM was started without adapters: set the option enable_lora to true, or "
                "name an adapter in the deployment"
            )
        if name in self._adapters:
            raise InvalidRequest(
                f"an adapter {name[:120]!r} is loaded already; unload it first", param="lora_name"
            )
        asked = {"lora_name": name, "lora_path": str(folder)}
        try:
            await self._ask("/v1/load_lora_adapter", asked)
        except (InvalidRequest, InternalError, NotFound) as error:
            raise BrokenModel(f"vLLM does not take this adapter: {error.message}") from None
        self._adapters[name] = address

    async def unload_adapter(self, name: str) -> None:
        """Raises ModelNotFound. Requests that vLLM has begun with it go on."""
        if name not in self._adapters:
            raise ModelNotFound(f"no adapter {name[:120]!r} is loaded here", param="lora_name")
        await self._ask("/v1/unload_lora_adapter", {"lora_name": name})
        del self._adapters[name]

    async def sleep(self, level: int) -> None:
        """Raises NotSupported unless vLLM was started with ``enable_sleep_mode``."""
        if self._options.get("enable_sleep_mode") != "true":
            raise NotSupported(
                "this vLLM cannot sleep: set the option enable_sleep_mode to true (GPUs only)"
            )
        while self._open:
            await self._clock.sleep(_IDLE_LOOK_S)
        await self._ask("/sleep", {}, f"?level={level}&mode=wait")

    async def wake(self) -> None:
        await self._ask("/wake_up", {})


def _verdict(status: int, raw: bytes) -> CloudlmError:
    """vLLM's refusal in cloudlm's words."""
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, ValueError, RecursionError):
        body = {}
    return error_from_body(status, body)
