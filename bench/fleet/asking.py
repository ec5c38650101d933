"""Clients of a benchmark: ask a gateway for streams at given moments and note what came when.

``ask_all`` is an open loop: nobody waits for an earlier answer, as strangers do not. Must not
judge.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import aiohttp
from small_model import words
from stack import BenchFailed, Stack

from cloudlm.sim.traffic import Arrival

_FIRST = b'"content":"'
LONGEST_S = 120.0


@dataclass(slots=True)
class Answer:
    """One request as its client saw it, in seconds from ``began_s``, which counts from the first
    moment of all. ``fault`` is empty if the answer was whole."""

    began_s: float
    late_s: float = 0.0
    first_s: float = 0.0
    whole_s: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0
    replica: str = ""
    fault: str = ""

    @property
    def ended_s(self) -> float:
        return self.began_s + self.whole_s

    @property
    def token_s(self) -> float:
        """Mean seconds between two tokens."""
        return (self.whole_s - self.first_s) / max(self.tokens - 1, 1)


def headers_of(stack: Stack) -> dict[str, str]:
    return {**stack.headers, "content-type": "application/json"}


def url_of(stack: Stack) -> str:
    return f"{stack.gateway}/v1/chat/completions"


def unstreamed(body: bytes) -> bytes:
    """The same request for a whole answer."""
    fields = json.loads(body)
    del fields["stream"], fields["stream_options"]
    return json.dumps(fields).encode()


async def whole(session: aiohttp.ClientSession, url: str, body: bytes, answer: Answer) -> None:
    """One answer that is no stream; never raises, the answer says what was wrong."""
    try:
        async with session.post(url, data=body) as response:
            answer.replica = response.headers.get("x-cloudlm-replica", "")
            said = await response.text()
            if response.status == 200:
                answer.tokens = json.loads(said)["usage"]["completion_tokens"]
            else:
                answer.fault = f"{response.status} {said[:200]}"
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError) as error:
        answer.fault = f"{type(error).__name__}: {error}"


def body_of(model: str, text: str, tokens: int, **more: Any) -> bytes:
    """A request for a stream of exactly so many tokens."""
    return json.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **more,
        }
    ).encode()


async def ask(session: aiohttp.ClientSession, url: str, body: bytes, answer: Answer) -> None:
    """One stream; never raises, the answer says what was wrong."""
    began = time.perf_counter()
    try:
        async with session.post(url, data=body) as response:
            answer.replica = response.headers.get("x-cloudlm-replica", "")
            if response.status != 200:
                answer.fault = f"{response.status} {(await response.text())[:200]}"
                return
            tail = b""
            async for data in response.content.iter_any():
                if not answer.first_s and _FIRST in data:
                    answer.first_s = time.perf_counter() - began
                tail = (tail + data)[-4096:]
        answer.whole_s = time.perf_counter() - began
        _account(tail, answer)
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        answer.fault = f"{type(error).__name__}: {error}"


def _account(tail: bytes, answer: Answer) -> None:
    """The stream's last events: the usage and the end."""
    events = [line[6:] for line in tail.splitlines() if line.startswith(b"data: ")]
    if events[-1:] != [b"[DONE]"]:
        answer.fault = f"ended without [DONE]: {events[-1:]}"
        return
    last = json.loads(events[-2]) if len(events) > 1 else {}
    usage = last.get("usage") or {}
    if "error" in last or not usage:
        answer.fault = str(last)[:200]
        return
    answer.tokens = usage["completion_tokens"]
    answer.prompt_tokens = usage["prompt_tokens"]


async def ask_all(
    stack: Stack, model: str, arrivals: Sequence[Arrival], chance: Random
) -> list[Answer]:
    """Ask each at its moment; the answers in that order. Raises BenchFailed if an answer was not
    whole or of another length than asked: nothing could be compared."""
    url = url_of(stack)
    bodies = [
        body_of(model, words(chance, one.prompt_tokens), one.output_tokens) for one in arrivals
    ]
    timeout = aiohttp.ClientTimeout(total=LONGEST_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        headers=headers_of(stack), timeout=timeout, connector=connector
    ) as session:
        began = time.perf_counter()

        async def at(arrival: Arrival, body: bytes) -> Answer:
            await asyncio.sleep(began + arrival.at - time.perf_counter())
            now_s = time.perf_counter() - began
            answer = Answer(now_s, now_s - arrival.at)
            await ask(session, url, body, answer)
            return answer

        answers = await asyncio.gather(*(at(*one) for one in zip(arrivals, bodies, strict=True)))
    for asked, got in zip(arrivals, answers, strict=True):
        if (
            got.fault
            or got.tokens != asked.output_tokens
            or got.prompt_tokens != asked.prompt_tokens
        ):
            raise BenchFailed(f"asked {asked}, got {got}")
    return answers
