"""Speaking HTTP to replicas: one pooled client, time limits, and every fault in cloudlm's words.

The only file of the gateway that knows aiohttp. Must not retry, choose or account; it makes one
attempt and says truly how it went.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
import msgspec

from cloudlm.core.errors import CloudlmError, UpstreamFailed, UpstreamTimeout, error_from_body

MAX_ANSWER_BYTES = 64 * 1024 * 1024
MAX_ERROR_BYTES = 64 * 1024
LONGEST_RETRY_AFTER_S = 3600.0
# Shorter than the 5 s for which common servers keep an idle connection, so that none of ours is
# closed by the other side at the moment we use it.
_KEEP_IDLE_S = 4.0
_ERROR_BODY_TIMEOUT_S = 5.0
_RETRY_ELSEWHERE = frozenset({408, 429, 500, 502, 503, 504})
_READ_PIECE_BYTES = 256 * 1024


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


class Answer:
    """The answer of one replica whose head has arrived. Must be closed."""

    def __init__(self, response: aiohttp.ClientResponse, replica: str) -> None:
        self._response = response
        self._replica = replica

    @property
    def is_event_stream(self) -> bool:
        return self._response.content_type == "text/event-stream"

    async def piece(self, timeout_s: float) -> bytes:
        """The next bytes, empty at the end. Raises UpstreamTimeout after ``timeout_s`` of silence
        and UpstreamFailed if the connection breaks."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._response.content.readany()
        except TimeoutError:
            raise UpstreamTimeout(
                f"replica {self._replica} was silent for {timeout_s:g} s"
            ) from None
        except (aiohttp.ClientError, OSError):
            raise UpstreamFailed(f"replica {self._replica} broke off its answer") from None

    async def whole(self, timeout_s: float, limit_bytes: int = MAX_ANSWER_BYTES) -> bytes:
        """The whole body. Raises UpstreamFailed also if it is larger than ``limit_bytes``."""
        pieces: list[bytes] = []
        size = 0
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            left_s = max(deadline - asyncio.get_running_loop().time(), 0.0)
            piece = await self.piece(left_s)
            if not piece:
                return b"".join(pieces)
            pieces.append(piece)
            size += len(piece)
            if size > limit_bytes:
                raise UpstreamFailed(f"replica {self._replica} sent too large an answer")

    def close(self) -> None:
        """End the exchange: keep the connection if the answer was read to its end, else close it
        at once, which tells the replica to stop working."""
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()


class Upstream:
    """The client of all replicas. ``token`` opens workers; never shown to clients."""

    def __init__(self, *, token: str | None, connect_timeout_s: float) -> None:
        self._token = token
        self._connect_timeout_s = connect_timeout_s
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        """Make the connection pool; call inside the event loop."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_IDLE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            read_bufsize=_READ_PIECE_BYTES,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
        )

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def send(
        self,
        url: str,
        body: bytes,
        headers: Mapping[str, str],
        *,
        replica: str,
        timeout_s: float,
        now: float,
    ) -> Answer:
        """Post ``body`` and wait for a good answer's head.

        ``now`` is wall time, for a ``Retry-After`` that is a date. Raises UpstreamFailed (not
        reachable, nonsense), UpstreamTimeout (no head within ``timeout_s``), ReplicaRefused (an
        error status).
        """
        assert self._session is not None, "Upstream.open was not called"
        sent = {"Content-Type": "application/json", "Accept-Encoding": "identity", **headers}
        if self._token:
            sent["Authorization"] = f"Bearer {self._token}"
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._session.post(
                    url, data=body, headers=sent, allow_redirects=False
                )
        except aiohttp.ConnectionTimeoutError:
            raise UpstreamFailed(f"replica {replica} did not accept a connection") from None
        except aiohttp.ClientConnectorError:
            raise UpstreamFailed(f"replica {replica} cannot be reached") from None
        except TimeoutError:
            raise UpstreamTimeout(f"replica {replica} gave no answer in {timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError):
            raise UpstreamFailed(f"replica {replica} broke off before its answer") from None
        answer = Answer(response, replica)
        if response.status == 200:
            return answer
        try:
            raise await _refusal(response, answer, replica, now)
        finally:
            answer.close()


async def _refusal(
    response: aiohttp.ClientResponse, answer: Answer, replica: str, now: float
) -> CloudlmError:
    status = response.status
    if status in (401, 403):  # about our token, not about the client's key
        return UpstreamFailed(f"replica {replica} does not accept this gateway's token")
    if not 400 <= status <= 599:
        return UpstreamFailed(f"replica {replica} answered with the unexpected status {status}")
    try:
        raw = await answer.whole(_ERROR_BODY_TIMEOUT_S, MAX_ERROR_BYTES)
        fields = msgspec.json.decode(raw)
    except (CloudlmError, msgspec.DecodeError, ValueError, RecursionError):
        fields = {}  # the status alone says enough
    known = fields if isinstance(fields, dict) else {}
    wait_s = retry_after(response.headers.get("Retry-After"), now)
    return ReplicaRefused(status, known, wait_s)


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
