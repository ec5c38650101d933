"""The assembly of a worker: which routes there are, who may ask them, and the server's life.

The port opens at once; the model loads in a thread meanwhile. Nothing here decides anything about a
request.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route

from cloudlm.core.clock import Clock, SystemClock
from cloudlm.core.errors import CloudlmError, MethodNotAllowed, NotFound
from cloudlm.core.resuming import RESUME_PATH
from cloudlm.core.spec import VLLM
from cloudlm.security.tls import LiveContext
from cloudlm.security.transport import worker_context
from cloudlm.telemetry.logs import get_logger
from cloudlm.worker import serve
from cloudlm.worker.config import WorkerConfig, check, is_loopback
from cloudlm.worker.edge import Edge, error_response
from cloudlm.worker.loading import load_model
from cloudlm.worker.replica import Replica
from cloudlm.worker.serving import Served

logger = get_logger(__name__)
EXIT_OK = 0
EXIT_FAILED = 1
EXIT_PORT_IN_USE = 98  # EADDRINUSE: the driver takes another port
_BACKLOG = 2048

Handler = Callable[[Request], Awaitable[Response]]
Loader = Callable[[WorkerConfig, Callable[[float, str], None]], Awaitable[Served]]


@dataclass(frozen=True, slots=True)
class Entry:
    """One route. ``is_open``: no token is asked for, because probes have none."""

    method: str
    path: str
    handler: Handler
    is_open: bool = False


ROUTES = (
    Entry("POST", "/v1/chat/completions", serve.chat_completions),
    Entry("POST", "/v1/completions", serve.completions),
    Entry("POST", "/v1/embeddings", serve.embeddings),
    Entry("GET", "/v1/models", serve.models),
    Entry("GET", "/v1/models/{model_id:path}", serve.model),
    Entry("POST", "/v1/load_lora_adapter", serve.load_adapter),
    Entry("POST", "/v1/unload_lora_adapter", serve.unload_adapter),
    Entry("POST", "/sleep", serve.sleep),
    Entry("POST", "/wake_up", serve.wake_up),
    Entry("GET", "/is_sleeping", serve.is_sleeping),
    Entry("POST", "/tokenize", serve.tokenize),
    Entry("POST", "/detokenize", serve.detokenize),
    Entry("POST", "/internal/v1/generate", serve.internal_generate),
    Entry("POST", RESUME_PATH, serve.internal_resume),
    Entry("GET", "/version", serve.version),
    Entry("GET", "/health", serve.health, is_open=True),
    Entry("GET", "/livez", serve.livez, is_open=True),
    Entry("GET", "/readyz", serve.readyz, is_open=True),
    Entry("GET", "/metrics", serve.metrics, is_open=True),
)


@dataclass(frozen=True, slots=True)
class Kind:
    """What a replica's engine makes of it: how it is loaded, and its routes."""

    load: Loader
    routes: Sequence[Entry] = ROUTES


def build_app(replica: Replica[Any], entries: Sequence[Entry] = ROUTES) -> Starlette:
    """The ASGI application around one replica."""
    routes = [Route(entry.path, entry.handler, methods=[entry.method]) for entry in entries]

    def route_of(path: str) -> str:
        scope = {"type": "http", "method": "GET", "path": path, "root_path": ""}
        found = (
            route.path.replace(":path}", "}")
            for route in routes
            if route.matches(scope)[0] is not Match.NONE
        )
        return next(found, "unknown")

    edge = Middleware(
        Edge,
        metrics=replica.metrics,
        token=replica.config.token,
        open_paths=[entry.path for entry in entries if entry.is_open],
        route_of=route_of,
    )
    app = Starlette(
        routes=routes, middleware=[edge], exception_handlers={HTTPException: _plain_http_error}
    )
    app.router.redirect_slashes = False
    app.state.replica = replica
    return app


async def _plain_http_error(request: Request, error: Exception) -> Response:
    """The framework's own 404 and 405 in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    verdict: CloudlmError
    if error.status_code == 405:
        verdict = MethodNotAllowed(f"{request.method} is not possible on {request.url.path[:200]}")
    else:
        verdict = NotFound(f"there is no {request.url.path[:200]} on this server")
    response = error_response(verdict)
    response.headers.update(error.headers or {})
    return response


def run_worker(
    config: WorkerConfig, *, load: Loader | None = None, clock: Clock | None = None
) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code (0, 1 failed, 98 port in use).

    ``load`` brings the model (default: as ``config.engine_name`` says). What goes wrong is one
    line on standard error.
    """
    try:
        check(config)
        tls = worker_context(config.settings.worker)
        listener = _listen(config.host, config.port)
    except CloudlmError as error:
        return _fail(error.message)
    except OSError as error:
        where = f"{config.host}:{config.port}"
        if error.errno == errno.EADDRINUSE:
            message = f"port in use: {where} is taken by another process; name another with --port"
            return _fail(message, EXIT_PORT_IN_USE)
        return _fail(f"cannot listen on {where}: {error.strerror or error}")
    if tls is None and not is_loopback(config.host):
        fields = {"host": config.host, "remedy": "worker.tls_cert and worker.tls_client_ca"}
        logger.warning("worker_without_tls", extra={"fields": fields})
    replica: Replica[Any] = Replica(config, clock or SystemClock())
    kind = Kind(load) if load is not None else kind_of(config)
    with contextlib.closing(listener), asyncio.Runner(loop_factory=_new_loop) as runner:
        fault = runner.run(_Life(replica, listener, kind, tls).run())
    return EXIT_OK if fault is None else _fail(fault)


def kind_of(config: WorkerConfig) -> Kind:
    """How a replica of the configured engine is loaded and what it answers."""
    if config.engine_name != VLLM:
        return Kind(load_model)
    from cloudlm.worker.vllm import front
    from cloudlm.worker.vllm.loading import load_vllm

    own = front.HANDLERS
    routes = [replace(entry, handler=own.get(entry.path, entry.handler)) for entry in ROUTES]
    return Kind(load_vllm, routes)


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _fail(reason: str, code: int = EXIT_FAILED) -> int:
    sys.stderr.write(f"cloudlm worker: {reason}\n")
    sys.stderr.flush()
    return code


def _listen(host: str, port: int) -> socket.socket:
    """A bound, listening socket, so that a taken port is known before anything else happens."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


class _Life:
    """One run: open the port, load, serve, stop."""

    def __init__(
        self,
        replica: Replica[Any],
        listener: socket.socket,
        kind: Kind,
        tls: LiveContext | None,
    ) -> None:
        self._replica = replica
        self._listener = listener
        self._kind = kind
        self._tls = tls
        self._url = _url(listener, "http" if tls is None else "https")
        self._fault: str | None = None

    async def run(self) -> str | None:
        """Returns why the worker failed, None if it was asked to stop."""
        server = _Server(self._replica, self._kind.routes, self._tls)
        serving = asyncio.create_task(server.serve(sockets=[self._listener]))
        minders = [asyncio.create_task(self._bring_up()), asyncio.create_task(self._mind())]
        if self._tls is not None:
            minders.append(asyncio.create_task(self._tls.follow()))
        try:
            while not serving.done():
                done, _ = await asyncio.wait(
                    {serving, *minders}, return_when=asyncio.FIRST_COMPLETED
                )
                if serving not in done and self._fault is not None:
                    server.should_exit = True
                minders = [minder for minder in minders if not minder.done()]
            await serving
        finally:
            for minder in minders:
                minder.cancel()
            await asyncio.gather(*minders, return_exceptions=True)
            await self._replica.close()
        return self._fault

    async def _bring_up(self) -> None:
        replica = self._replica
        began = replica.clock.monotonic()

        def tell(share: float, what: str) -> None:
            replica.loading = f"{what}, {share:.0%}"
            if replica.config.on_progress is not None:
                replica.config.on_progress(share, what)

        try:
            serving = await self._kind.load(replica.config, tell)
        except CloudlmError as error:
            self._fault = error.message
            return
        except Exception as error:  # the process must say in a line why it ends
            self._fault = f"loading the model failed: {type(error).__name__}: {str(error)[:300]}"
            return
        replica.become_ready(serving)
        fields = {
            "model": serving.name,
            "root": serving.root,
            "seconds": round(replica.clock.monotonic() - began, 3),
        }
        logger.info("worker_ready", extra={"fields": fields})
        if replica.config.on_ready is not None:
            replica.config.on_ready(self._url)

    async def _mind(self) -> None:
        fault = await self._replica.watch()
        self._fault = f"{fault}; the worker ends so that it can be restarted"


def _url(listener: socket.socket, scheme: str) -> str:
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - as one reaches it
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


class _Server(uvicorn.Server):
    """uvicorn, quiet, with our way of stopping: no new requests, a grace for the running ones, then
    they are ended with an error that says so."""

    def __init__(
        self, replica: Replica[Any], entries: Sequence[Entry], tls: ssl.SSLContext | None
    ) -> None:
        super().__init__(
            uvicorn.Config(
                build_app(replica, entries),
                log_config=None,
                log_level="warning",
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=int(replica.config.grace_s) + 5,
                timeout_keep_alive=75,
                ssl_context_factory=None if tls is None else lambda *_: tls,
            )
        )
        self._replica = replica

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but the signal is not raised again afterwards: stopping is no failure."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._replica.stop_accepting()
        ending = asyncio.create_task(self._end_running())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()
            await asyncio.gather(ending, return_exceptions=True)

    async def _end_running(self) -> None:
        await asyncio.sleep(self._replica.config.grace_s)
        count = self._replica.end_running()
        logger.warning("requests_ended_by_stop", extra={"fields": {"count": count}})
