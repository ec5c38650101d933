"""Puts replicas to sleep and wakes them, as their deployment asks.

A deployment's ``asleep`` is a desired fact: true puts every replica to sleep, also one that was
started anew; false keeps every replica awake; unsaid leaves them as they are, so that one that was
put to sleep by hand sleeps on. What to do is decided by a pure function; falling asleep takes as
long as running requests do, so it is done beside the loop. Must not restart or route anything.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Collection, Mapping, Sequence
from types import TracebackType
from typing import Protocol

import aiohttp

from cloudlm.control.drain import GATEWAYS_NOTICE_S
from cloudlm.core.deployment import Replica
from cloudlm.core.errors import CloudlmError, UpstreamFailed, error_from_body
from cloudlm.telemetry.logs import get_logger

TURN_TIMEOUT_S = 900.0
RETRY_S = 5.0
_MAX_ANSWER_BYTES = 65_536
_log = get_logger(__name__)


class Turner(Protocol):
    """Asks one replica to fall asleep or to wake up, and returns when it has."""

    async def turn(self, url: str, *, asleep: bool) -> None:
        """Raises CloudlmError: it cannot, or did not answer."""
        ...


class HttpTurner:
    """Asks over HTTP, with the workers' token. An async context manager. ``tls`` is spoken to
    https addresses."""

    def __init__(self, token: str, tls: ssl.SSLContext | None = None) -> None:
        self._token = token
        self._tls = tls
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> HttpTurner:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._tls or True),
            timeout=aiohttp.ClientTimeout(total=TURN_TIMEOUT_S, sock_connect=5.0),
            trust_env=False,
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def turn(self, url: str, *, asleep: bool) -> None:
        assert self._session is not None, "use the turner as a context manager"
        path = "/sleep?level=1" if asleep else "/wake_up"
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        try:
            async with self._session.post(
                url + path, headers=headers, allow_redirects=False
            ) as answer:
                if answer.status == 200:
                    return
                await answer.content.read(_MAX_ANSWER_BYTES)
                is_json = answer.content_type == "application/json"
                raise error_from_body(answer.status, await answer.json() if is_json else {})
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            raise UpstreamFailed("it did not answer") from None


def turns(
    asleep: bool | None,
    replicas: Sequence[Replica],
    ready: Collection[str],
    sleeping: Collection[str],
    withdrawn_s: Mapping[str, float],
) -> list[Replica]:
    """The replicas to turn now. ``withdrawn_s`` is for how long each has had no endpoint, seconds:
    one that gateways may still send requests to is not put to sleep."""
    if asleep is None:
        return []
    if not asleep:
        return [one for one in replicas if one.id in sleeping]
    quiet = {one for one, seconds in withdrawn_s.items() if seconds >= GATEWAYS_NOTICE_S}
    return [one for one in replicas if one.id in ready and one.id in quiet]


class Naps:
    """What is under way for the replicas of all deployments. Times are monotonic seconds."""

    def __init__(self, turner: Turner) -> None:
        self._turner = turner
        self._withdrawn: dict[str, float] = {}
        self._turning: dict[str, asyncio.Task[None]] = {}
        self._failed: dict[str, tuple[float, str]] = {}

    def mind(
        self,
        asleep: bool | None,
        replicas: Sequence[Replica],
        ready: Collection[str],
        sleeping: Collection[str],
        now: float,
    ) -> str:
        """One look at a deployment's replicas (those that stay); starts what is to be done, and
        returns why it could not be done before, empty if nothing hinders."""
        for one in replicas:
            if asleep:
                self._withdrawn.setdefault(one.id, now)
            else:
                self._withdrawn.pop(one.id, None)
        waits = {one.id: now - self._withdrawn.get(one.id, now) for one in replicas}
        wanted = turns(asleep, replicas, ready, sleeping, waits)
        for one in replicas:
            if one not in wanted and one.id not in self._turning:
                self._failed.pop(one.id, None)
        for one in wanted:
            failed_at, _ = self._failed.get(one.id, (now - RETRY_S, ""))
            if one.id not in self._turning and now - failed_at >= RETRY_S:
                task = asyncio.create_task(self._turn(one, bool(asleep), now))
                self._turning[one.id] = task
        return next((self._failed[one.id][1] for one in replicas if one.id in self._failed), "")

    def keep_only(self, existing: Collection[str]) -> None:
        """Forget replicas that exist no longer."""
        for known in (self._withdrawn, self._failed):
            for replica in [one for one in known if one not in existing]:
                del known[replica]

    async def close(self) -> None:
        """Wait for nothing: what a replica has begun it finishes alone."""
        tasks = list(self._turning.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _turn(self, replica: Replica, asleep: bool, now: float) -> None:
        what = "fall asleep" if asleep else "wake up"
        try:
            assert replica.url is not None
            await self._turner.turn(replica.url, asleep=asleep)
            self._failed.pop(replica.id, None)
            _log.info("replica_turned", extra={"fields": {"replica": replica.id, "did": what}})
        except CloudlmError as error:
            self._failed[replica.id] = (now, f"{replica.id} cannot {what}: {error.message}")
            fields = {"replica": replica.id, "reason": error.message}
            _log.warning("replica_not_turned", extra={"fields": fields})
        finally:
            self._turning.pop(replica.id, None)
