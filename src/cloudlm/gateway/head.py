"""What a request's head must be before anything of it is believed (RFC 9112 and 9110).

llhttp, the parser underneath, refuses what is malformed: conflicting or repeated lengths, folded
lines, bare line ends, control characters, bad chunk sizes. This module refuses what is well-formed
and still not for us: more than one host or key, codings other than ``chunked``, other versions.
Two servers that disagree about where a request ends can be made to see different requests; so
whatever could be read in two ways is refused and the connection closed. Pure: no I/O.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple
from urllib.parse import unquote

from cloudlm.core.errors import (
    CloudlmError,
    HeadTooLarge,
    InvalidRequest,
    MethodNotAllowed,
    NotSupported,
    PayloadTooLarge,
)

MAX_HEAD_BYTES: Final = 64 * 1024
MAX_HEADERS: Final = 128
_USUAL_TARGET_BYTES: Final = 100
_SINGLE: Final = frozenset(
    {
        "authorization",
        "content-length",
        "content-type",
        "expect",
        "host",
        "transfer-encoding",
        "x-api-key",
        "x-request-id",
    }
)
_COMMON = (
    "accept accept-encoding authorization connection content-length content-type cookie expect "
    "host origin traceparent transfer-encoding user-agent x-api-key x-request-id x-session-id"
)
# Making text of a header's name costs as much as all else that is done for the header.
_NAMES: Final = {
    form: name
    for name in _COMMON.split()
    for form in (name.encode(), name.title().encode(), name.title().replace("Id", "ID").encode())
}


class Head:
    """The head of one request as it comes in. ``headers`` have lower-case names."""

    __slots__ = ("count", "headers", "size_bytes", "target")

    def __init__(self) -> None:
        self.target = b""
        self.headers: dict[str, str] = {}
        self.size_bytes = 0
        self.count = 0

    def add(self, name: bytes, value: bytes) -> None:
        """Take one header line. Raises HeadTooLarge and InvalidRequest."""
        self.count += 1
        self.size_bytes += len(name) + len(value) + 4
        if self.size_bytes > MAX_HEAD_BYTES:
            raise head_too_large()
        if self.count > MAX_HEADERS:
            raise HeadTooLarge(f"the request has more than {MAX_HEADERS} headers")
        key = _NAMES.get(name) or name.decode("latin-1").lower()
        text = value.decode("latin-1").strip(" \t")
        headers = self.headers
        if key not in headers:
            headers[key] = text
        elif key in _SINGLE:
            raise InvalidRequest(f"the header {key} may be given once only", param=key)
        else:
            headers[key] += ", " + text

    def grow(self, size_bytes: int) -> None:
        """Count bytes. Raises HeadTooLarge."""
        self.size_bytes += size_bytes
        if self.size_bytes > MAX_HEAD_BYTES:
            raise head_too_large()


class Target(NamedTuple):
    """Where a request goes. ``host`` is the authority of an absolute target, else empty."""

    path: str
    query: str
    host: str = ""


def read_target(raw: bytes) -> Target:
    """The target of a request line, percent-decoded. Raises InvalidRequest."""
    return _usual_target(raw) if len(raw) <= _USUAL_TARGET_BYTES else _target(raw)


def _target(raw: bytes) -> Target:
    try:
        text = raw.decode("ascii")
    except UnicodeDecodeError:
        raise InvalidRequest("the target must be ASCII; percent-encode the rest") from None
    host = ""
    if not text.startswith("/"):
        scheme, mark, rest = text.partition("://")
        if mark and scheme.lower() in ("http", "https") and rest:
            host, slash, rest = rest.partition("/")
            text = slash + rest or "/"
        elif text != "*":
            raise InvalidRequest("the request's target must begin with '/'")
    path, _, query = text.partition("#")[0].partition("?")
    return Target(unquote(path) if "%" in path else path, query, host)


_usual_target = lru_cache(1024)(_target)


def check(method: str, version: str, head: Head, target: Target, max_body_bytes: int) -> bool:
    """Refuse a head that is not for us; True if a body follows.

    Raises InvalidRequest, MethodNotAllowed, NotSupported, PayloadTooLarge.
    """
    headers = head.headers
    if version not in ("1.1", "1.0"):
        raise InvalidRequest("this server speaks HTTP/1.1 and HTTP/1.0 only")
    if method in ("CONNECT", "TRACE"):
        raise MethodNotAllowed(f"this server does not take {method}")
    if "host" not in headers and version == "1.1":
        raise InvalidRequest("a request needs a Host header", param="host")
    if target.host and target.host.lower() != headers.get("host", target.host).lower():
        raise InvalidRequest("the target names another host than the Host header", param="host")
    coding = headers.get("transfer-encoding")
    if coding is not None:
        if coding.lower() != "chunked":
            raise NotSupported("transfer codings other than 'chunked' are not supported")
        if version == "1.0" or "content-length" in headers:
            raise InvalidRequest("Transfer-Encoding: chunked needs HTTP/1.1 and no Content-Length")
        return True
    length = int(headers.get("content-length") or 0)
    if length > max_body_bytes:
        raise too_large(max_body_bytes)
    return length > 0


def check_expect(headers: dict[str, str]) -> bool:
    """Whether the client waits for ``100 Continue``. Raises InvalidRequest for other wishes."""
    wish = headers.get("expect")
    if wish is None:
        return False
    if wish.lower() != "100-continue":
        raise InvalidRequest("the only expectation understood is 100-continue", param="expect")
    return True


def head_too_large() -> CloudlmError:
    """The refusal of a head over the limit."""
    return HeadTooLarge(
        f"the request's head is larger than {MAX_HEAD_BYTES} bytes, the limit of this server; "
        "send fewer or shorter headers"
    )


def too_large(max_body_bytes: int) -> CloudlmError:
    """The refusal of a body over the limit."""
    return PayloadTooLarge(
        f"the body has more than {max_body_bytes} bytes, the limit of this server "
        "(gateway.max_body_bytes)"
    )
