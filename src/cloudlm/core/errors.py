"""The one error tree of cloudlm.

An error is a verdict: its class knows the HTTP status, the OpenAI ``type`` and ``code``, whether a
caller should try again (never, later, elsewhere) and which words a stranger may read. Foreign
errors are translated into this tree once, at the seam where they enter.

    CloudlmError 500
    ├── InvalidRequest 400
    │   ├── ContextLengthExceeded 400
    │   ├── ContentFiltered 400       (a guardrail's rule)
    │   ├── PayloadTooLarge 413
    │   ├── HeadTooLarge 431
    │   ├── UnprocessableRequest 422
    │   ├── BadSetting 400            (a process refuses to start)
    │   └── BrokenModel 422           (a model folder or version that cannot be used)
    │       ├── UnsafeModel           (pickled data or code of its own)
    │       ├── UnsupportedModel      (an architecture or format we do not run)
    │       └── CorruptModel          (bytes differ from the manifest)
    ├── AuthenticationFailed 401
    ├── PermissionDenied 403
    ├── NotFound 404
    │   └── ModelNotFound 404
    ├── MethodNotAllowed 405
    ├── Conflict 409
    │   └── Superseded 409           (an order of a control that leads no longer)
    ├── LimitExceeded 429             (retry later)
    │   └── BudgetExceeded 429
    ├── RequestCancelled 499          (the client went away)
    ├── InternalError 500
    ├── NotSupported 501
    ├── UpstreamFailed 502            (retry elsewhere)
    ├── Unavailable 503               (retry later)
    │   ├── NoReplica 503
    │   ├── ModelAsleep 503
    │   ├── ModelTooLarge 503         (it will never fit this machine's memory)
    │   └── Overloaded 503
    ├── UpstreamTimeout 504           (retry elsewhere)
    ├── StorageFailed 507             (full disk, unwritable folder)
    └── MissingExtra 501              (an optional dependency is not installed)

This module must not import anything of cloudlm.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, ClassVar


class Retry(StrEnum):
    """What a caller should do with the same request after this error."""

    NEVER = "never"
    LATER = "later"
    ELSEWHERE = "elsewhere"


class CloudlmError(Exception):
    """Something failed inside cloudlm. The message is safe to show to a stranger."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None
    retry: ClassVar[Retry] = Retry.NEVER

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's shape."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


class InvalidRequest(CloudlmError):
    """A field of the request is wrong; the message says which and what was expected."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class ContextLengthExceeded(InvalidRequest):
    """Prompt and answer together do not fit the model's context."""

    code = "context_length_exceeded"


class ContentFiltered(InvalidRequest):
    """A guardrail refused the text; the message names the rule, never the text."""

    code = "content_filter"


class PayloadTooLarge(InvalidRequest):
    """The body is larger than the server accepts."""

    status = 413
    code = "payload_too_large"


class HeadTooLarge(InvalidRequest):
    """The request line and headers are larger than the server accepts."""

    status = 431
    code = "head_too_large"


class UnprocessableRequest(InvalidRequest):
    """The body is well-formed but cannot be carried out (unknown fields, contradictory values)."""

    status = 422
    code = "unprocessable_entity"


class BadSetting(InvalidRequest):
    """A setting has a bad value; the message names the value and its source."""

    code = "bad_setting"


class BrokenModel(InvalidRequest):
    """A model folder or version cannot be used; the message names the file and the fault."""

    status = 422
    code = "broken_model"


class UnsafeModel(BrokenModel):
    """A model holds pickled data or code of its own and was refused before it was read."""

    code = "unsafe_model"


class UnsupportedModel(BrokenModel):
    """The model's architecture or format is not one that the engine runs."""

    code = "unsupported_model"


class CorruptModel(BrokenModel):
    """A file's bytes differ from the version's manifest."""

    code = "corrupt_model"


class AuthenticationFailed(CloudlmError):
    """No key, or one that is not valid. Never says which."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class PermissionDenied(CloudlmError):
    """The key is valid but may not do this."""

    status = 403
    type = "permission_error"
    code = "permission_denied"


class NotFound(CloudlmError):
    """No object of that name."""

    status = 404
    type = "not_found_error"
    code = "not_found"


class ModelNotFound(NotFound):
    """No model of that name; the message names those that exist."""

    code = "model_not_found"


class MethodNotAllowed(CloudlmError):
    """The path exists, the HTTP method does not."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class Conflict(CloudlmError):
    """The object exists already, is in use, or changed meanwhile."""

    status = 409
    type = "conflict_error"
    code = "conflict"


class Superseded(Conflict):
    """Whoever asked held a lease that another holds by now, and must stop acting at once."""

    code = "superseded"


class LimitExceeded(CloudlmError):
    """A rate, token, concurrency or spend limit is reached."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    retry = Retry.LATER


class BudgetExceeded(LimitExceeded):
    """The month's or the day's money is used up; trying again before its end does not help."""

    type = "insufficient_quota"
    code = "insufficient_quota"
    retry = Retry.NEVER


class RequestCancelled(CloudlmError):
    """The client went away before the answer was complete."""

    status = 499
    type = "cancelled"
    code = "request_cancelled"


class InternalError(CloudlmError):
    """A fault of ours; details are in the log under the request id, not in the answer."""

    code = "internal_error"


class NotSupported(CloudlmError):
    """What was asked exists in the dialect but is not implemented by this server."""

    status = 501
    type = "invalid_request_error"
    code = "not_supported"


class UpstreamFailed(CloudlmError):
    """A replica refused the connection, broke off or answered nonsense."""

    status = 502
    type = "upstream_error"
    code = "upstream_failed"
    retry = Retry.ELSEWHERE


class Unavailable(CloudlmError):
    """The server cannot serve this now."""

    status = 503
    type = "service_unavailable_error"
    code = "unavailable"
    retry = Retry.LATER


class NoReplica(Unavailable):
    """The model is deployed but none of its replicas is ready."""

    code = "no_replica"


class ModelTooLarge(Unavailable):
    """The model is deployed, but no replica of it fits the machine's memory budget."""

    code = "model_too_large"
    retry = Retry.NEVER


class ModelAsleep(Unavailable):
    """All replicas of the model sleep."""

    code = "model_asleep"


class Overloaded(Unavailable):
    """The queue is full."""

    code = "overloaded"


class UpstreamTimeout(CloudlmError):
    """A replica was silent for longer than allowed."""

    status = 504
    type = "upstream_error"
    code = "upstream_timeout"
    retry = Retry.ELSEWHERE


class StorageFailed(CloudlmError):
    """The disk is full or a folder cannot be written; the message names the path and the remedy."""

    status = 507
    type = "storage_error"
    code = "storage_failed"


class MissingExtra(NotSupported):
    """An optional dependency is not installed; the message names the extra that brings it."""

    code = "missing_extra"

    def __init__(self, extra: str, what: str) -> None:
        super().__init__(f"{what} needs the extra '{extra}': pip install 'cloudlm[{extra}]'")


def _by_code() -> dict[str, type[CloudlmError]]:
    found: dict[str, type[CloudlmError]] = {}
    waiting: list[type[CloudlmError]] = [CloudlmError]
    while waiting:
        cls = waiting.pop()
        waiting.extend(cls.__subclasses__())
        if cls.code is not None:
            found.setdefault(cls.code, cls)
    return found


_STATUS_CLASSES: dict[int, type[CloudlmError]] = {
    400: InvalidRequest,
    401: AuthenticationFailed,
    403: PermissionDenied,
    404: NotFound,
    405: MethodNotAllowed,
    409: Conflict,
    413: PayloadTooLarge,
    422: UnprocessableRequest,
    429: LimitExceeded,
    431: HeadTooLarge,
    500: InternalError,
    501: NotSupported,
    502: UpstreamFailed,
    503: Unavailable,
    504: UpstreamTimeout,
    507: StorageFailed,
}


def error_from_body(status: int, body: Any) -> CloudlmError:
    """Rebuild the error that a cloudlm or OpenAI-compatible server answered with.

    ``body`` is the decoded JSON (anything is accepted); unknown shapes become the class of the
    status with a plain message.
    """
    fields = body.get("error") if isinstance(body, dict) else None
    if not isinstance(fields, dict):
        fields = {}
    message = str(fields.get("message") or f"the server answered with status {status}")
    code = fields.get("code")
    by_code = _by_code().get(code) if isinstance(code, str) else None
    if by_code is not None and by_code.status == status and by_code is not MissingExtra:
        cls = by_code
    else:
        cls = _STATUS_CLASSES.get(status, InternalError)
    param = fields.get("param")
    return cls(message, param=param if isinstance(param, str) else None)
