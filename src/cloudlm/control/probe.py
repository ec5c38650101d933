"""Asks replicas how they are, and judges the answers by progress, not by an open port.

The judging is pure (``judge``); ``HttpProber`` does the asking, every answer within a time limit.
"""

from __future__ import annotations

import json
import math
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from types import TracebackType
from typing import Any, Protocol

import aiohttp

UNREACHABLE_AFTER = 2
START_TIMEOUT_S = 900.0
_MAX_ANSWER_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer. ``steps`` is the engine's step counter; ``running`` and ``waiting`` count
    requests. ``reachable`` False: no answer within the time limit."""

    reachable: bool
    ready: bool = False
    alive: bool = True
    steps: int = 0
    running: int = 0
    waiting: int = 0
    sleeping: bool = False


UNREACHABLE = Sample(reachable=False)


class Verdict(StrEnum):
    """What the samples of one replica add up to."""

    NOT_READY = "not_ready"
    READY = "ready"
    SLEEPING = "sleeping"
    STALLED = "stalled"


@dataclass(frozen=True, slots=True)
class ProbeRecord:
    """What is remembered of one replica between samples; times are monotonic seconds.

    ``progress_at``: last moment at which it made progress or had nothing to do. ``misses``:
    probes in a row without an answer. ``answered``: whether it ever answered; if not, it may be
    silent for ``start_left_s`` more.
    """

    progress_at: float
    steps: int = 0
    misses: int = 0
    answered: bool = False
    verdict: Verdict = Verdict.NOT_READY
    busy: int = 0
    start_left_s: float = START_TIMEOUT_S


def judge(record: ProbeRecord, sample: Sample, now: float, stall_timeout_s: float) -> ProbeRecord:
    """The record after one more sample.

    A ready replica stays ready over a single missed probe, and a sleeping one asleep. Stalled is:
    the engine says that it is dead; steps stand still with work waiting, or no answer, for longer
    than ``stall_timeout_s`` (if it never answered, for as long as its start may still take).
    """
    if not sample.reachable:
        misses = record.misses + 1
        patience_s = stall_timeout_s
        if not record.answered:
            patience_s = max(record.start_left_s, stall_timeout_s)
        verdict = record.verdict if misses < UNREACHABLE_AFTER else Verdict.NOT_READY
        if now - record.progress_at > patience_s:
            verdict = Verdict.STALLED
        return replace(record, misses=misses, verdict=verdict)
    busy = sample.running + sample.waiting
    moved = sample.steps != record.steps or not busy or not record.answered
    progress_at = now if moved else record.progress_at
    stalled = not sample.alive or now - progress_at > stall_timeout_s
    verdict = Verdict.READY if sample.ready else Verdict.NOT_READY
    if sample.sleeping:
        verdict = Verdict.SLEEPING
    return ProbeRecord(
        progress_at=progress_at,
        steps=sample.steps,
        answered=True,
        verdict=Verdict.STALLED if stalled else verdict,
        busy=busy,
    )


class Prober(Protocol):
    """Asks one replica."""

    async def probe(self, url: str) -> Sample:
        """Never raises; a replica that does not answer is UNREACHABLE."""
        ...


class HttpProber:
    """Asks over HTTP: ``/health?verbose=1``, and ``/readyz`` of a server that knows no such thing.
    An async context manager. ``tls`` is spoken to https addresses."""

    def __init__(self, timeout_s: float, tls: ssl.SSLContext | None = None) -> None:
        self._timeout_s = timeout_s
        self._tls = tls
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> HttpProber:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._tls or True),
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
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

    async def probe(self, url: str) -> Sample:
        try:
            _, body = await self._get(f"{url}/health?verbose=1")
            sample = sample_from_body(body)
            if sample is not None:
                return sample
            status, _ = await self._get(f"{url}/readyz")
            return Sample(reachable=True, ready=status == 200)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            return UNREACHABLE

    async def ready(self, url: str, within_s: float) -> bool:
        """See ``lookout.Asker``: ``/readyz`` of our own workers waits, others answer at once."""
        longest = aiohttp.ClientTimeout(total=within_s + self._timeout_s)
        try:
            status, _ = await self._get(f"{url}/readyz?wait_s={within_s:g}", longest)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            return False
        return status == 200

    async def _get(self, url: str, longest: aiohttp.ClientTimeout | None = None) -> tuple[int, Any]:
        assert self._session is not None, "use the prober as a context manager"
        timeout = longest or self._session.timeout
        async with self._session.get(url, allow_redirects=False, timeout=timeout) as answer:
            raw = await answer.content.read(_MAX_ANSWER_BYTES)
            is_json = answer.content_type == "application/json"
            return answer.status, json.loads(raw) if is_json and raw else None


def sample_from_body(body: Any) -> Sample | None:
    """Read a verbose health answer; None if it is none."""
    if not isinstance(body, Mapping) or not isinstance(body.get("ready"), bool):
        return None
    return Sample(
        reachable=True,
        ready=body["ready"] and body.get("healthy") is not False,
        sleeping=body.get("phase") == "sleeping",
        alive=body.get("alive") is not False,
        steps=_count(body.get("steps")),
        running=_count(body.get("running")),
        waiting=_count(body.get("waiting")),
    )


def _count(value: Any) -> int:
    usable = isinstance(value, int | float) and math.isfinite(value) and value > 0
    return int(value) if usable else 0
