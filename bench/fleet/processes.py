"""Real processes that change under load: what is dropped, and how long nothing takes to answer.

Part of ``make bench-fleet``: an installation with its gateway, control and the starter model.

- *Changes*: rolling updates of two replicas, each followed by a scale-down to one (and back to
  two), while clients ask for streams and whole answers without a pause. Dropped is every answer
  that is not 200, not whole, or of another length than asked.
- *Wakes*: one request to a deployment without replicas, again and again. *Beyond the start* is the
  time until its first token without what the worker takes from its process's beginning until it
  says that it is ready, and without what the first token of such a request takes a worker that
  is warm.
- *Herd*: so many requests at once to a deployment without replicas.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import statistics
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
from asking import Answer, ask, body_of, headers_of, unstreamed, url_of, whole
from closed_loop import Load
from stack import BenchFailed, Stack, running, until

MODEL, COLD = "bank-helper", "cold"
VERSION = f"models:/{MODEL}@champion"
QUESTION = "I am still waiting on my card number {}, when will it arrive?"
CLIENTS, TOKENS = 4, 60
ROUNDS, SHORT_ROUNDS = 10, 1
WAKES, SHORT_WAKES = 10, 2
HERD, SHORT_HERD = 1000, 100
WINDOWS = (480, 470)
"""Longest prompt and answer, by turns: what makes a new revision."""
GOAL_MS = 300.0
ASLEEP: Mapping[str, Any] = {
    "name": COLD,
    "model": VERSION,
    "min_replicas": 0,
    "max_replicas": 1,
    "target_ongoing_requests": 16,
    "scaling": {"idle_s": 1},
}


# Changes -----------------------------------------------------------------------------------------


@dataclass
class Changes:
    """What clients saw while so many updates and scale-downs went on."""

    updates: int = 0
    scale_downs: int = 0
    requests: int = 0
    dropped: int = 0
    more_attempts: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


def changes(stack: Stack, rounds: int) -> Changes:
    """Update, scale down and up again, under load. Raises BenchFailed if a change does not end."""
    found = Changes()
    stack.cli("scale", MODEL, "2")
    until("two replicas", lambda: ready(stack) == 2)
    began = time.perf_counter()
    with Load(stack, MODEL, QUESTION, CLIENTS, TOKENS) as load:
        until("answers of both", lambda: len(load.by_replica) > 1)
        for number in range(rounds):
            options = {"max_model_len": WINDOWS[number % 2]}
            two = {"min_replicas": 2, "max_replicas": 2}
            stack.deploy({"name": MODEL, "model": VERSION, "options": options, **two})
            stack.cli("rollout", "status", MODEL, "--wait", "--timeout", "120")
            until("the old replicas' end", lambda: len(stack.replicas(MODEL)) == 2)
            found.updates += 1
            stack.cli("scale", MODEL, "1")
            until("one replica", lambda: len(stack.replicas(MODEL)) == 1)
            found.scale_downs += 1
            stack.cli("scale", MODEL, "2")
            until("two replicas", lambda: ready(stack) == 2)
            note = f"changes: {found.updates + found.scale_downs}, {len(load.faults)} dropped"
            print(note, file=sys.stderr, flush=True)
    found.seconds = time.perf_counter() - began
    found.requests, found.dropped = load.asked, len(load.faults)
    found.faults = load.faults[:5]
    time.sleep(1.5)  # the ledger is written behind the answers
    found.more_attempts = more_attempts(stack.home)
    return found


def ready(stack: Stack) -> int:
    return sum(one["state"] == "ready" for one in stack.replicas(MODEL))


def more_attempts(home: Path) -> int:
    """Requests of which the ledger knows more than one attempt."""
    asked = "select count(*) from (select 1 from ledger group by request_id having count(*) > 1)"
    with sqlite3.connect(home / "state.db") as database:
        return int(database.execute(asked).fetchone()[0])


# Wakes -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wake:
    """One request to nothing; seconds. ``until_begun`` passes before the worker's process begins,
    ``start`` until it is ready, ``after_ready`` until the first token is there, of which a warm
    worker needs ``warm``."""

    total: float
    until_begun: float
    start: float
    after_ready: float
    warm: float

    @property
    def beyond(self) -> float:
        return self.until_begun + self.after_ready - self.warm


def wake(stack: Stack, number: int) -> Wake:
    """Ask a deployment that has no replica. Raises BenchFailed if it does not answer."""
    until("nothing runs", lambda: not stack.replicas(COLD))
    asked_at = time.time()
    answer = one(stack, 2 * number)
    (replica,) = stack.replicas(COLD)
    begun_at, ready_at = (
        process_begun_at(int(replica["pid"])),
        worker_ready_at(stack, replica["id"]),
    )
    warm_s = statistics.median(one(stack, 1000 + 5 * number + n).first_s for n in range(5))
    return Wake(
        answer.first_s,
        begun_at - asked_at,
        ready_at - begun_at,
        asked_at + answer.first_s - ready_at,
        warm_s,
    )


def one(stack: Stack, number: int) -> Answer:
    """One stream, as its client sees it. Raises BenchFailed if it is not whole."""
    answer = Answer(0.0)

    async def run() -> None:
        async with aiohttp.ClientSession(headers=headers_of(stack)) as session:
            # Words of their own in front: no cache of beginnings knows them.
            text = f"{number:04d} {QUESTION.format(number)}"
            await ask(session, url_of(stack), body_of(COLD, text, 4), answer)

    asyncio.run(run())
    if answer.fault:
        raise BenchFailed(answer.fault)
    return answer


def process_begun_at(pid: int) -> float:
    """When a process began, by the wall clock, to a hundredth of a second."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / 100.0
    return time.time() - age_s


def worker_ready_at(stack: Stack, replica: str) -> float:
    """When a worker last said that it was ready, by its log."""
    log = stack.home / "logs" / replica.rpartition("-")[0] / f"{replica}.log"
    lines = [line for line in log.read_text("utf-8").splitlines() if '"worker_ready"' in line]
    if not lines:
        raise BenchFailed(f"{log} does not say that the worker is ready")
    return datetime.fromisoformat(json.loads(lines[-1])["time"]).timestamp()


# The herd ----------------------------------------------------------------------------------------


@dataclass
class Herd:
    """So many at once to nothing: their statuses, and seconds until all were answered."""

    requests: int
    statuses: dict[str, int]
    seconds: float


def herd(stack: Stack, count: int) -> Herd:
    """Everybody asks at once, and is held until there is a replica."""
    until("nothing runs", lambda: not stack.replicas(COLD))
    body = unstreamed(body_of(COLD, QUESTION.format(1), 2))

    async def run() -> list[Answer]:
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=300)
        answers = [Answer(0.0) for _ in range(count)]
        async with aiohttp.ClientSession(
            headers=headers_of(stack), connector=connector, timeout=timeout
        ) as session:
            await asyncio.gather(*(whole(session, url_of(stack), body, a) for a in answers))
        return answers

    began = time.perf_counter()
    answers = asyncio.run(run())
    statuses = Counter(answer.fault.split(" ")[0] or "200" for answer in answers)
    return Herd(count, dict(statuses), time.perf_counter() - began)


# All of it ---------------------------------------------------------------------------------------


def measure(asked: Namespace) -> dict[str, Any]:
    """Everything, one after the other; plain data."""
    with running() as stack:
        changed = changes(stack, SHORT_ROUNDS if asked.short else ROUNDS)
        stack.cli("delete", MODEL)
        stack.deploy(ASLEEP)
        with stack.others() as others:
            wakes = [wake(stack, n) for n in range(SHORT_WAKES if asked.short else WAKES)]
        crowd = herd(stack, SHORT_HERD if asked.short else HERD)
    return {
        "changes": asdict(changed),
        "wakes": [{**asdict(each), "beyond": each.beyond} for each in wakes],
        "others_cpus": others(),
        "herd": asdict(crowd),
    }


def text(found: dict[str, Any]) -> str:
    """What was measured, as a section of RESULTS.md."""
    changed, crowd, wakes = found["changes"], found["herd"], found["wakes"]
    beyond_ms = statistics.median(1000 * each["beyond"] for each in wakes)
    lost = crowd["requests"] - crowd["statuses"].get("200", 0)
    lines = [
        "## Changes under load, and from zero: `make bench-fleet` (real processes)\n",
        "The starter model, gateway, control, workers (one thread each) and clients on the same "
        f"CPUs. Changes: {CLIENTS} clients ask for {TOKENS} tokens without a pause, half of them "
        "as streams, while two replicas are updated one by one and scaled to one and back.\n",
        "| changes | answers asked | dropped | needed a second replica | seconds |",
        "|---|--:|--:|--:|--:|",
        f"| {changed['updates']} rolling updates, {changed['scale_downs']} scale-downs | "
        f"{changed['requests']} | **{changed['dropped']}** | {changed['more_attempts']} | "
        f"{changed['seconds']:.0f} |",
        *(f"\nDropped: {fault}" for fault in changed["faults"]),
        f"\nFrom zero, {len(wakes)} times (CPUs that others used meanwhile: "
        f"{found['others_cpus']:.2f}), milliseconds:\n",
        "| part | median | worst |",
        "|---|--:|--:|",
        *(_row(name, [each[key] for each in wakes]) for name, key in PARTS),
        f"\nBeyond the start {beyond_ms:.0f} ms in the median: "
        f"{'met' if beyond_ms <= GOAL_MS else 'not met'} (goal: {GOAL_MS:.0f} ms).",
        f"\n{crowd['requests']} requests at once to nothing: {crowd['statuses']} by status after "
        f"{crowd['seconds']:.1f} s; not answered: {lost}.",
    ]
    return "\n".join(lines)


PARTS = (
    ("asked until first token", "total"),
    ("asked until the worker's process begins", "until_begun"),
    ("its own start: until it says that it is ready", "start"),
    ("ready until first token", "after_ready"),
    ("first token of a warm worker", "warm"),
    ("**beyond the start**", "beyond"),
)


def _row(name: str, seconds: list[float]) -> str:
    return f"| {name} | {1000 * statistics.median(seconds):.0f} | {1000 * max(seconds):.0f} |"
