"""Speaking HTTP to replicas: time limits, and every fault in cloudlm's words.

Must not retry, choose or account; it makes one attempt and says truly how it went. Only a line that
had been kept open and turns out dead, before a byte came back, is replaced by a new one unseen.
"""

from __future__ import annotations

import asyncio
import math
import ssl
from collections.abc import Awaitable, Callable
from email.utils import parsedate_to_datetime
from typing import Any

import msgspec

from cloudlm.core.errors import (
    CloudlmError,
    InternalError,
    UpstreamFailed,
    UpstreamTimeout,
    error_from_body,
)
from cloudlm.gateway.pool import Broken, Find, Line, Place, Pool, Silent, header_lines, read_url
from cloudlm.security.hosts import is_loopback
from cloudlm.security.tls import LiveContext, client_context

MAX_ANSWER_BYTES = 64 * 1024 * 1024
MAX_ERROR_BYTES = 64 * 1024
LONGEST_RETRY_AFTER_S = 3600.0
_ERROR_BODY_TIMEOUT_S = 5.0
_RETRY_ELSEWHERE = frozenset({408, 429, 500, 502, 503, 504})


class ReplicaRefused(CloudlmError):
    """A replica answered with an error status. The answer is passed on as it is, unless another
    replica does better."""

    def __init__(self, status: int, answer: dict[str, Any], retry_after_s: float | None) -> None:
        super().__init__(error_from_body(status, answer).message, retry_after_s=retry_after_s)
        self.answered_status = status
        self._answer = answer

    @property
    def elsewhere(self) -> bool:
        """Whether another replica may do better."""
        return self.answered_status in _RETRY_ELSEWHERE

    def body(self) -> dict[str, Any]:
        """The replica's own error object, or one in OpenAI's shape if it sent none."""
        if isinstance(self._answer.get("error"), dict):
            return {"error": self._answer["error"]}
        return error_from_body(self.answered_status, self._answer).body()


def _as_it_is(error: ReplicaRefused) -> CloudlmError:
    return error


class Answer:
    """The answer of one replica whose head has arrived. Must be closed."""

    def __init__(self, line: Line, replica: str) -> None:
        self._line: Line | None = line
        self._loop = asyncio.get_running_loop()
        self._replica = replica
        self.status = line.status
        self.headers = line.headers
        self.translated: Callable[[ReplicaRefused], CloudlmError] = _as_it_is
        """What an error inside the answer is to be called."""

    @property
    def is_event_stream(self) -> bool:
        kind = self.headers.get("content-type", "").partition(";")[0]
        return kind.strip().lower() == "text/event-stream"

    async def piece(self, timeout_s: float) -> bytes:
        """The next bytes, empty at the end. Raises UpstreamTimeout after ``timeout_s`` of silence
        and UpstreamFailed if the connection breaks."""
        if self._line is None:
            return b""
        try:
            return await self._line.piece(self._loop.time() + timeout_s)
        except Silent:
            raise _silent(self._replica, timeout_s) from None
        except Broken:
            raise UpstreamFailed(f"replica {self._replica} broke off its answer") from None

    async def flow(self, sink: Callable[[bytes], bool], silence_s: float) -> None:
        """Hand bytes to ``sink`` as they arrive, until it returns False or there is something that
        ``piece`` must tell. Raises UpstreamTimeout after ``silence_s`` of silence."""
        if self._line is not None:
            try:
                await self._line.flow(sink, silence_s)
            except Silent:
                raise _silent(self._replica, silence_s) from None

    async def whole(self, timeout_s: float, limit_bytes: int = MAX_ANSWER_BYTES) -> bytes:
        """The whole body. Raises UpstreamFailed also if it is larger than ``limit_bytes``."""
        line = self._line
        if line is not None and line.is_whole and line.held_bytes <= limit_bytes:
            return line.rest()
        pieces: list[bytes] = []
        size = 0
        deadline = self._loop.time() + timeout_s
        while True:
            left_s = max(deadline - self._loop.time(), 0.0)
            piece = await self.piece(left_s)
            if not piece:
                return b"".join(pieces)
            pieces.append(piece)
            size += len(piece)
            if size > limit_bytes:
                raise UpstreamFailed(f"replica {self._replica} sent too large an answer")

    def silent(self, seconds: float) -> UpstreamTimeout:
        """The error that so much silence in all is; see ``piece`` for a shorter one."""
        return _silent(self._replica, seconds)

    def close(self) -> None:
        """End the exchange: keep the connection if the answer was read to its end, else close it
        at once, which tells the replica to stop working."""
        if self._line is not None:
            line, self._line = self._line, None
            line.release()


class Unreachable(UpstreamFailed):
    """A replica took no connection."""


class Declined(UpstreamFailed):
    """A service will not do this one request, for its content, its region, what its key may do with
    it: that says little of the next one. Another service may."""


async def refusal(answer: Answer, replica: str, now: float) -> CloudlmError:
    """The error that an answer with an error status is, for the caller to raise."""
    status = answer.status
    if not 400 <= status <= 599:
        return UpstreamFailed(f"replica {replica} answered with the unexpected status {status}")
    try:
        raw = await answer.whole(_ERROR_BODY_TIMEOUT_S, MAX_ERROR_BYTES)
        fields = msgspec.json.decode(raw)
    except (CloudlmError, msgspec.DecodeError, ValueError, RecursionError):
        fields = {}  # the status alone says enough
    known = fields if isinstance(fields, dict) else {}
    wait_s = retry_after(answer.headers.get("retry-after"), now)
    return ReplicaRefused(status, known, wait_s)


async def worker_refusal(answer: Answer, replica: str, now: float) -> CloudlmError:
    """As ``refusal``, of a worker: what it says of a key is about our token, not the client's."""
    if answer.status in (401, 403):
        return UpstreamFailed(f"replica {replica} does not accept this gateway's token")
    return await refusal(answer, replica, now)


class Upstream:
    """The client of all replicas. ``token`` opens workers; never shown to clients. ``tls`` is
    spoken to https addresses (without it, the system's authorities count); over plain HTTP only
    this machine is asked, unless ``plaintext`` trusts the network. ``find`` says where a place
    may be connected to, ``refused`` what an answer with an error status means."""

    def __init__(
        self,
        *,
        token: str | None,
        connect_timeout_s: float,
        tls: ssl.SSLContext | None = None,
        plaintext: bool = False,
        find: Find | None = None,
        refused: Callable[[Answer, str, float], Awaitable[CloudlmError]] = worker_refusal,
    ) -> None:
        self._find = find
        self._refused = refused
        self._tls = tls or LiveContext(lambda: client_context((), None), ())
        self._plaintext = plaintext
        self._connect_timeout_s = connect_timeout_s
        self._pool: Pool | None = None
        fixed = {"content-type": "application/json", "accept-encoding": "identity"}
        if token:
            fixed["authorization"] = f"Bearer {token}"
        self._fixed = header_lines(fixed)

    async def open(self) -> None:
        """Make the connection pool; call inside the event loop."""
        self._pool = Pool(connect_timeout_s=self._connect_timeout_s, tls=self._tls, find=self._find)

    async def close(self) -> None:
        """Close all connections."""
        if self._pool is not None:
            await self._pool.close()
            self._pool = None

    async def send(
        self,
        url: str,
        body: bytes,
        headers: dict[str, str],
        *,
        replica: str,
        timeout_s: float,
        now: float,
    ) -> Answer:
        """Post ``body`` and wait for a good answer's head.

        ``now`` is wall time, for a ``Retry-After`` that is a date. Raises Unreachable,
        UpstreamFailed (nonsense), UpstreamTimeout (no head within ``timeout_s``), ReplicaRefused
        (an error status).
        """
        try:
            place, host, target = read_url(url)
        except ValueError as error:
            raise UpstreamFailed(f"replica {replica} has a bad address: {error}") from None
        head = self._head(host, target, headers, len(body))
        due = asyncio.get_running_loop().time() + timeout_s
        line = await self._exchange(place, head, body, replica, due, timeout_s)
        answer = Answer(line, replica)
        if answer.status == 200:
            return answer
        try:
            raise await self._refused(answer, replica, now)
        finally:
            answer.close()

    def _head(self, host: str, target: str, headers: dict[str, str], length: int) -> bytes:
        try:
            more = header_lines(headers)
        except ValueError as error:
            raise InternalError(f"a request for a replica could not be written: {error}") from None
        first = f"POST {target} HTTP/1.1\r\nhost: {host}\r\ncontent-length: {length}\r\n"
        return b"".join((first.encode(), self._fixed, more, b"\r\n"))

    async def _exchange(
        self, place: Place, head: bytes, body: bytes, replica: str, due: float, timeout_s: float
    ) -> Line:
        """A line on which the answer's head has arrived."""
        assert self._pool is not None, "Upstream.open was not called"
        line = self._pool.take(place)
        while True:
            kept = line is not None
            line = line or await self._connected(place, replica)
            line.begin(head, body)
            try:
                await line.head(due)
                return line
            except Broken as error:
                line.drop()
                if not (kept and error.untouched):
                    raise UpstreamFailed(f"replica {replica} broke off before its answer") from None
            except Silent:
                line.drop()
                raise UpstreamTimeout(
                    f"replica {replica} gave no answer in {timeout_s:g} s"
                ) from None
            except BaseException:
                line.drop()
                raise
            line = None

    async def _connected(self, place: Place, replica: str) -> Line:
        assert self._pool is not None
        if not (place.tls or self._plaintext or is_loopback(place.host)):
            raise UpstreamFailed(
                f"replica {replica} is on another machine and speaks plain HTTP, which would show "
                "prompts and the workers' token to the network: give it TLS, or trust the network "
                "with gateway.upstream_plaintext=anywhere"
            )
        try:
            return await self._pool.connect(place)
        except ssl.SSLError as error:
            reason = getattr(error, "verify_message", "") or error.reason or "no TLS"
            raise UpstreamFailed(f"no trusted TLS with replica {replica}: {reason}") from None
        except CloudlmError as error:
            raise UpstreamFailed(f"no TLS with replica {replica}: {error.message}") from None
        except TimeoutError:
            raise Unreachable(f"replica {replica} did not accept a connection") from None
        except OSError:
            raise Unreachable(f"replica {replica} cannot be reached") from None


def _silent(replica: str, seconds: float) -> UpstreamTimeout:
    return UpstreamTimeout(f"replica {replica} was silent for {seconds:g} s")


def retry_after(text: str | None, now: float) -> float | None:
    """Seconds to wait out of a ``Retry-After`` header (seconds or a date); None if unreadable."""
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - now
        except (ValueError, OverflowError):
            return None
    if math.isnan(seconds):
        return None
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_S)
