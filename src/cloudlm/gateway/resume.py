"""Going on with a broken stream on another replica of the same revision.

A resume is no retry: nothing is asked twice, so it takes nothing from the retry budget; a request
that itself kills replicas is stopped by the limit on resumes. Each resume is an attempt with a
ledger row of its own. Must not know what a stream says.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from cloudlm.core.deployment import Endpoint
from cloudlm.core.errors import CloudlmError, RequestCancelled, Retry, UpstreamFailed
from cloudlm.core.resuming import RESUMABLE_HEADER, RESUME_PATH
from cloudlm.gateway.account import Attempt, Exchange
from cloudlm.gateway.dialects.openai import Call
from cloudlm.gateway.progress import Progress
from cloudlm.gateway.router import choose
from cloudlm.gateway.upstream import Answer, ReplicaRefused
from cloudlm.telemetry.logs import get_logger

if TYPE_CHECKING:
    from cloudlm.gateway.rooms import Rooms

RESUMABLE = {RESUMABLE_HEADER: "1"}
"""What a replica is told, so that it says with every chunk what a resume would need."""

_log = get_logger(__name__)


def may_help(error: CloudlmError) -> bool:
    """Whether another replica may do better after ``error``."""
    if isinstance(error, ReplicaRefused):
        return error.elsewhere
    return error.retry is Retry.ELSEWHERE


class Resumer:
    """Finds who goes on with one stream. ``said`` are the headers for replicas; ``judge`` is told
    of every failure; ``begun`` is where the stream began."""

    def __init__(
        self,
        rooms: Rooms,
        exchange: Exchange,
        call: Call,
        begun: Endpoint,
        said: dict[str, str],
        judge: Callable[[str, CloudlmError], None],
    ) -> None:
        self._rooms = rooms
        self._exchange = exchange
        self._call = call
        self._revision = begun.revision
        self._is_ours = not begun.is_external  # others know nothing of going on
        self._said = said
        self._judge = judge
        self._left = rooms.settings.max_resumes

    async def go_on(
        self, progress: Progress, cached_tokens: int, error: CloudlmError
    ) -> tuple[Attempt, Answer]:
        """The next attempt and its answer, once ``error`` has ended the last. Raises the error that
        the client must be told: the last one, if nobody can go on."""
        rooms, exchange = self._rooms, self._exchange
        if not isinstance(error, RequestCancelled):
            self._judge(exchange.replica, error)
        if not (self._is_ours and progress.resumable and may_help(error)):
            raise error
        body = progress.request(self._call.path, self._call.body, cached_tokens)
        deadline = rooms.clock.monotonic() + rooms.settings.first_token_timeout_s
        tried = {exchange.replica}
        while True:
            left_s = deadline - rooms.clock.monotonic()
            endpoint = self._choose(tried, error)
            if self._left < 1 or left_s <= 0:
                raise error
            self._left -= 1
            tried.add(endpoint.replica)
            try:
                return await self._send(endpoint, body, left_s)
            except CloudlmError as failure:
                error = failure
                if exchange.interrupt.error is not None or not may_help(failure):
                    raise

    def _choose(self, tried: Collection[str], error: CloudlmError) -> Endpoint:
        rooms = self._rooms
        model = rooms.view.snapshot().models.get(self._call.model)
        serving = model.endpoints if model is not None else ()
        beside = model.beside if model is not None else ()  # they take no new requests, but these
        ours = [one for one in (*serving, *beside) if not one.is_external]
        same = [one for one in ours if one.revision == self._revision]
        keys = self._exchange.prompt_keys
        found = choose(same, rooms.loads, rooms.clock.monotonic(), tried=tried, keys=keys)
        if found is not None:
            return found
        others = [one for one in serving if one.replica not in tried]
        if others and not any(one.replica not in tried for one in same):
            raise UpstreamFailed(
                f"replica {self._exchange.replica} was lost, and no other replica runs the version "
                "that began this answer; send the request again"
            )
        raise error

    async def _send(
        self, endpoint: Endpoint, body: bytes, timeout_s: float
    ) -> tuple[Attempt, Answer]:
        rooms, exchange, replica = self._rooms, self._exchange, endpoint.replica
        fields = {"model": exchange.model, "from": exchange.replica, "to": replica}
        _log.warning("stream_resumed", extra={"fields": fields})
        exchange.attempts += 1
        exchange.replica = replica
        exchange.meter.resumed(exchange.model)
        turn = rooms.loads.begin(replica, exchange.prompt_keys, rooms.clock.monotonic())
        attempt = Attempt(
            exchange,
            rooms.ledger,
            lambda: rooms.loads.end(replica, turn),
            lambda: rooms.loads.computed(replica, turn),
        )
        try:
            answer = await rooms.upstream.send(
                endpoint,
                RESUME_PATH,
                body,
                self._said,
                timeout_s=timeout_s,
                now=rooms.clock.now(),
            )
        except BaseException as error:
            known = error if isinstance(error, CloudlmError) else RequestCancelled("cut off")
            if not isinstance(known, RequestCancelled):
                self._judge(replica, known)
            attempt.fail(exchange.interrupt.error or known)
            raise
        if not answer.is_event_stream:
            answer.close()
            failure = UpstreamFailed(f"replica {replica} went on with a stream without a stream")
            attempt.fail(failure)
            raise failure
        return attempt, answer
