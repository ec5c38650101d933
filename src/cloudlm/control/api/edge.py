"""The outermost layer of the control API: request id, host and origin, key, right, size of the
body, errors.

Default deny: whatever the path, a request goes no further without a valid key, and without a row in
``security.matrix`` that its key fulfils, so that a new route cannot be forgotten.
"""

from __future__ import annotations

import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cloudlm.control.api.caller import Callers
from cloudlm.control.audit import Auditor
from cloudlm.core.errors import (
    CloudlmError,
    InternalError,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    Retry,
    StorageFailed,
)
from cloudlm.security.hosts import HostGuard
from cloudlm.security.matrix import PREFIX, SHARED, Holder, control_row, shared_ask
from cloudlm.telemetry.logs import get_logger, request_id_var

MAX_BODY_BYTES = 1_000_000
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}", re.ASCII)
_log = get_logger(__name__)


class Edge:
    """Wraps all routes of the control API."""

    def __init__(self, app: ASGIApp, callers: Callers, auditor: Auditor, guard: HostGuard) -> None:
        self._guard = guard
        self._app = app
        self._callers = callers
        self._auditor = auditor

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        reset = request_id_var.set(request_id)
        answer = _Answer(send, request_id)
        deed = self._auditor.deed(scope, request_id)
        try:
            await self._let_in(scope, headers)
            await deed.begin()
            await self._app(scope, _capped(receive, headers), answer)
            await deed.end(answer.status)
        except Exception as error:
            await deed.end(error.status if isinstance(error, CloudlmError) else 500)
            if not answer.begun:
                await error_response(error)(scope, receive, answer)
            elif not answer.complete:
                _log.exception("answer_broken_off", extra={"fields": {"path": scope["path"]}})
        finally:
            request_id_var.reset(reset)

    async def _let_in(self, scope: Scope, headers: Headers) -> None:
        """Raise AuthenticationFailed, NotFound, MethodNotAllowed or PermissionDenied unless this
        key may take this route."""
        self._guard.check(headers)
        method, path = scope["method"], scope["path"]
        found = control_row(method, path)
        row = None if found is None else found.row
        if row is not None and row.holder is Holder.OPEN:
            return
        caller = await self._callers.of(headers.get("authorization"), headers.get("x-api-key"))
        scope.setdefault("state", {})["caller"] = caller
        if found is None:
            raise NotFound(f"there is nothing at {path[:200]}; see {PREFIX}/openapi.json")
        if row is None:
            raise MethodNotAllowed(f"{path[:200]} does not answer {method[:20]}")
        if row.holder is Holder.ANY_KEY:
            return
        if row.resource in SHARED:
            caller.demand_ask(shared_ask(row, found.names))
            return
        assert row.verb is not None and row.resource is not None
        if not caller.directory.reaches(caller.key, row.verb, row.resource):
            caller.demand(row.verb, row.resource, "", "*")


class _Answer:
    """A send that adds the request id and remembers how far the answer has come."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self.begun = False
        self.complete = False
        self.status = 500

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            self.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self._request_id
        elif not message.get("more_body", False):
            self.complete = True
        await self._send(message)


def _capped(receive: Receive, headers: Headers) -> Receive:
    """``receive`` that raises PayloadTooLarge for more than MAX_BODY_BYTES."""
    announced = headers.get("content-length", "")
    if announced.isdigit() and int(announced) > MAX_BODY_BYTES:
        raise _too_large()
    received = 0

    async def capped() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > MAX_BODY_BYTES:
            raise _too_large()
        return message

    return capped


def _too_large() -> PayloadTooLarge:
    return PayloadTooLarge(f"the body is larger than {MAX_BODY_BYTES} bytes")


def error_response(error: Exception) -> Response:
    """Any error as an answer in OpenAI's shape; a foreign one is logged, not shown."""
    if isinstance(error, CloudlmError):
        verdict: CloudlmError = error
    else:
        _log.error("request_failed", exc_info=error)
        verdict = InternalError("control failed; details are in its log under the request id")
    if isinstance(error, StorageFailed):
        _log.error("storage_failed", extra={"fields": {"reason": error.message}})
    headers = {}
    if verdict.status == 401:
        headers["www-authenticate"] = "Bearer"
    if verdict.retry is Retry.LATER:
        headers["retry-after"] = str(max(1, round(verdict.retry_after_s or 1)))
    return JSONResponse(verdict.body(), status_code=verdict.status, headers=headers)


async def handle_error(request: Request, error: Exception) -> Response:
    """The framework's hook for our own errors."""
    return error_response(error)
