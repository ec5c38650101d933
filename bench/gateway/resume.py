"""Streams that survive SIGKILL of their replica: how many, and how long the gap is.

    python bench/gateway/resume.py [--count 500] [--streams 16] [--tokens 150] [--seconds 1200]

Starts an installation of its own (temporary home, free ports) with two replicas of the starter
model. Each of the ``--streams`` requests (half greedy, half drawn with a seed) is first answered
undisturbed. Then, in rounds, all are sent at once, one replica is killed at a random moment, and
every stream is compared with its undisturbed answer, event for event, without ids and times. A
stream counts if the ledger knows two attempts of it; rounds go on until ``--count`` of
them, or until ``--seconds`` are over.
Prints one JSON line; exits 1 if a stream was not the same or the ledger's tokens are not.

``gap_ms`` is a counted stream's longest silence, from event to event; ``undisturbed_gap_ms_p99`` is
that of the answers without a kill, which no resume can be shorter than.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sqlite3
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from stack import Stack, running

MODEL = "bank-helper"
_ROUND_S = 120.0


async def replicas(stack: Stack, client: httpx2.AsyncClient) -> dict[str, int]:
    """Pids of both replicas, once both are ready."""
    deadline = time.monotonic() + _ROUND_S
    while time.monotonic() < deadline:
        url = f"{stack.control}/api/v1/deployments/{MODEL}"
        status = (await client.get(url)).json().get("status") or {}
        found = {r["id"]: r["pid"] for r in status.get("replicas", []) if r["state"] == "ready"}
        if len(found) == 2:
            return found
        await asyncio.sleep(0.1)
    raise SystemExit("two replicas did not become ready in time")


def body_of(number: int, tokens: int) -> dict[str, Any]:
    text = f"My card number {number} has not arrived. What can I do about it?"
    drawn = {"temperature": 0.9, "seed": number} if number % 2 else {"temperature": 0}
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": text}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": tokens,
        "ignore_eos": True,
        **drawn,
    }


@dataclass
class Answer:
    """One stream as its client saw it."""

    events: list[Any] = field(default_factory=list)
    request_id: str = ""
    gap_s: float = 0.0
    tokens: int = 0


async def ask(stack: Stack, client: httpx2.AsyncClient, number: int, tokens: int) -> Answer:
    answer, last = Answer(), None
    url = f"{stack.gateway}/v1/chat/completions"
    async with client.stream("POST", url, json=body_of(number, tokens)) as response:
        answer.request_id = response.headers["x-request-id"]
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            now = time.perf_counter()
            answer.gap_s = max(answer.gap_s, now - (last or now))
            last = now
            data = line.removeprefix("data: ")
            event = data if data == "[DONE]" else json.loads(data)
            if isinstance(event, dict):
                usage = event.get("usage") or {}
                answer.tokens = usage.get("completion_tokens", answer.tokens)
                for differs in ("id", "created", "usage"):
                    event.pop(differs, None)
            answer.events.append(event)
    return answer


def attempts(home: Path) -> dict[str, tuple[int, int]]:
    """By request id: attempts and completion tokens in the ledger."""
    with sqlite3.connect(home / "state.db") as database:
        rows = database.execute(
            "select request_id, count(*), sum(completion_tokens) from ledger group by request_id"
        )
        return {request_id: (count, tokens) for request_id, count, tokens in rows}


async def one_round(
    stack: Stack, client: httpx2.AsyncClient, args: argparse.Namespace, draw: random.Random
) -> list[Answer]:
    pids = await replicas(stack, client)
    asking = [
        asyncio.create_task(ask(stack, client, number, args.tokens))
        for number in range(args.streams)
    ]
    await asyncio.sleep(draw.uniform(0.3, 0.3 + args.spread_s))
    os.kill(pids[draw.choice(sorted(pids))], signal.SIGKILL)
    return list(await asyncio.gather(*asking))


async def measure(stack: Stack, args: argparse.Namespace) -> dict[str, Any]:
    draw = random.Random(args.seed)
    broken: list[Answer] = []
    same = rounds = wrong_accounts = 0
    async with httpx2.AsyncClient(headers=stack.headers, timeout=_ROUND_S) as client:
        await replicas(stack, client)
        began = time.perf_counter()
        numbers = range(args.streams)
        whole = await asyncio.gather(*(ask(stack, client, n, args.tokens) for n in numbers))
        args.spread_s = max(time.perf_counter() - began - 0.5, 0.2)
        ends = time.monotonic() + args.seconds
        while len(broken) < args.count and time.monotonic() < ends:
            rounds += 1
            answers = await one_round(stack, client, args, draw)
            await asyncio.sleep(1.5)  # the ledger is written behind the answers
            known = attempts(stack.home)
            for answer, reference in zip(answers, whole, strict=True):
                count, tokens = known.get(answer.request_id, (0, 0))
                wrong_accounts += tokens != reference.tokens
                if count > 1:
                    broken.append(answer)
                    same += answer.events == reference.events
                elif answer.events != reference.events:
                    raise SystemExit(f"an undisturbed stream differs: {answer.events[-1]}")
    gaps = sorted(answer.gap_s * 1000 for answer in broken)
    quiet = sorted(answer.gap_s * 1000 for answer in whole)
    return {
        "kills": rounds,
        "broken_streams": len(broken),
        "survived_byte_for_byte": same,
        "wrong_ledgers": wrong_accounts,
        "gap_ms_p50": round(gaps[len(gaps) // 2], 1),
        "gap_ms_p99": round(gaps[min(len(gaps) - 1, int(len(gaps) * 0.99))], 1),
        "gap_ms_max": round(gaps[-1], 1),
        "undisturbed_gap_ms_p99": round(quiet[min(len(quiet) - 1, int(len(quiet) * 0.99))], 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1200.0, help="no further kill after these")
    args = parser.parse_args()
    with running() as stack:
        stack.cli("scale", MODEL, "2", "--no-wait")
        result = asyncio.run(measure(stack, args))
    print(json.dumps(result))
    lost = result["broken_streams"] - result["survived_byte_for_byte"]
    return 1 if lost or result["wrong_ledgers"] else 0


if __name__ == "__main__":
    sys.exit(main())
