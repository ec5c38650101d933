"""The outermost layer of the server: request id, token, errors in OpenAI's shape, counting.

Plain ASGI, so that the handlers' streams and disconnects pass through untouched. Knows no route's
meaning; which paths are open is told by the assembly.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import secrets
import traceback
from collections.abc import Callable, Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cloudlm.core.errors import (
    CloudlmError,
    InternalError,
    InvalidRequest,
    PayloadTooLarge,
    RequestCancelled,
)
from cloudlm.security.keys import bearer, invalid_key
from cloudlm.telemetry.logs import get_logger, request_id_var
from cloudlm.worker.metrics import Metrics

logger = get_logger(__name__)
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}", re.ASCII)
_DRAIN_LIMIT_BYTES = 64 << 20
BODY_TIMEOUT_S = 60.0


class Edge:
    """Wraps the routes. ``token`` None asks for none; ``open_paths`` never ask for it.
    ``route_of`` gives a request's route from its path, for the metrics' labels."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        token: str | None,
        open_paths: Collection[str],
        route_of: Callable[[str], str],
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._token = None if token is None else token.encode()
        self._open_paths = frozenset(open_paths)
        self._route_of = route_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers.get("x-request-id"))
        reset = request_id_var.set(request_id)
        seen = _Seen(send, request_id)
        began = self._metrics.clock.monotonic()
        scope.setdefault("state", {})["arrived"] = began
        try:
            self._check_token(scope["path"], headers)
            await self._app(scope, receive, seen)
        except RequestCancelled:
            seen.status = seen.status or RequestCancelled.status
        except Exception as error:
            await _answer_error(scope, receive, seen, error)
        finally:
            request_id_var.reset(reset)
            self._count(scope["path"], seen.status, began)

    def _check_token(self, path: str, headers: Headers) -> None:
        if self._token is None or path in self._open_paths:
            return
        given = bearer(headers.get("authorization"), headers.get("x-api-key"))
        if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self._token):
            raise invalid_key()

    def _count(self, path: str, status: int, began: float) -> None:
        route = self._route_of(path)
        self._metrics.http_requests.labels(route, str(status)).inc()
        self._metrics.http_seconds.labels(route).observe(self._metrics.clock.monotonic() - began)


class _Seen:
    """A send that adds the request id and remembers the status."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self._request_id
        await self._send(message)


def _request_id(given: str | None) -> str:
    """The caller's id if it is plain and short, else a fresh one."""
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given
    return f"req-{secrets.token_hex(12)}"


async def _answer_error(scope: Scope, receive: Receive, seen: _Seen, error: Exception) -> None:
    verdict = error if isinstance(error, CloudlmError) else InternalError("the server failed")
    if verdict.status == InternalError.status:  # others are verdicts, not faults of ours
        log_failure(error)
    if seen.status:
        return  # the answer has begun; the stream itself told of the error
    await error_response(verdict, Headers(scope=scope))(scope, receive, seen)


def log_failure(error: Exception) -> None:
    """Log where it happened, but not the exception's words, which may quote a prompt."""
    fields: dict[str, str] = {"kind": type(error).__name__}
    if isinstance(error, CloudlmError):
        fields["message"] = error.message
    else:
        fields["where"] = "".join(traceback.format_tb(error.__traceback__)[-4:])
    logger.error("request_failed", extra={"fields": fields})


def error_response(error: CloudlmError, request_headers: Headers | None = None) -> JSONResponse:
    """The error with its status and retry advice."""
    headers: dict[str, str] = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, round(error.retry_after_s)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, PayloadTooLarge) and request_headers is not None:
        length = request_headers.get("content-length", "")
        # The server passes over the rest of the body, so that the client gets to read the answer;
        # one that announced far too much is cut off.
        if length.isdigit() and int(length[:20]) > _DRAIN_LIMIT_BYTES:
            headers["connection"] = "close"
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """The request's body. Raises PayloadTooLarge as soon as it is known to be larger than
    ``limit_bytes``, which a declared length may tell before a byte is read; InvalidRequest if it
    does not arrive in BODY_TIMEOUT_S; RequestCancelled if the client goes."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > limit_bytes:
        raise _too_large(limit_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit_bytes:
                    raise _too_large(limit_bytes)
    except TimeoutError:
        raise InvalidRequest(f"the body did not arrive within {BODY_TIMEOUT_S:g} s") from None
    except ClientDisconnect:
        raise RequestCancelled("the client closed the connection") from None
    return bytes(body)


def _too_large(limit_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the body is larger than {limit_bytes} bytes")
