"""A long run of requests with all kinds of ends leaves the process as it was: tasks, descriptors,
threads, and everything that the gateway keeps. Resident memory is the bench's to measure."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from served_gateway import close, connect, served, talk, wire

from cloudlm.core.access import Limits
from cloudlm.core.tenant import Role
from cloudlm.security.keys import mint

ROUNDS = 6
SPARE = 6
"""Connections to replicas that may be kept open at one moment and not at another, and their tasks;
what leaks with every request or every fault would be many times as much after so many rounds."""
PATIENCE_S = 30.0


def holdings(root: Any) -> dict[str, int]:
    """The sizes of all collections that are reached from ``root`` over objects of the gateway, by
    where they are. What belongs to the state is not looked at: it is a database elsewhere."""
    sizes: dict[str, int] = {}
    waiting: list[tuple[str, Any]] = [("gateway", root)]
    seen: set[int] = set()
    while waiting:
        where, one = waiting.pop()
        if id(one) in seen or where.count(".") > 12:
            continue
        seen.add(id(one))
        if isinstance(one, Mapping | set | frozenset | list | tuple | deque):
            if not isinstance(one, tuple):
                sizes[where] = sizes.get(where, 0) + len(one)
            inner = one.values() if isinstance(one, Mapping) else one
            waiting.extend((f"{where}[]", part) for part in list(inner))
        elif type(one).__module__.startswith("cloudlm.") and "State" not in type(one).__name__:
            names = {name for kind in type(one).__mro__ for name in getattr(kind, "__slots__", ())}
            names |= set(getattr(one, "__dict__", ()))
            found = ((name, getattr(one, name, None)) for name in sorted(names))
            waiting.extend((f"{where}.{name}", part) for name, part in found)
    # Slices of a minute: their number goes with the time that a run takes, and has a bound.
    return {where: size for where, size in sizes.items() if "._slices" not in where}


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class Traffic:
    """Requests of all kinds, with all kinds of ends."""

    def __init__(self, rig: Any, kit: Any) -> None:
        self.rig, self.kit, self.draw = rig, kit, random.Random(40)
        self.number = 0

    async def round(self) -> None:
        """Some fifty requests; at the end nothing is open."""
        kit, rig = self.kit, self.rig
        plans = [
            kit.Plan(),
            kit.Plan("close"),
            kit.Plan("status", status=500),
            kit.Plan("status", status=429, headers={"retry-after": "0"}),
            kit.Plan(cut_byte=700),
            kit.Plan(garbage_at=2),
            kit.Plan(done=False),
            kit.Plan(pause_s=0.001),
        ]
        for plan in plans:
            for stream in (True, False):
                rig.replicas[self.draw.randrange(2)].plans.append(plan)
                self.number += 1
                body = kit.chat_body(stream=stream, user=f"u{self.number}", temperature=0)
                body["messages"][0]["content"] = f"question {self.number}"
                await talk(rig, wire(rig, body, x_request_id=f"r{self.number}"))
            await self.drop()
            await talk(rig, wire(rig, kit.chat_body(model=f"unknown{self.number}")))
            await talk(rig, wire(rig, kit.chat_body(), authorization=f"Bearer x{self.number}"))
        for replica in rig.replicas:
            replica.plans.clear()
            rig.gateway.loads.answered(replica.name)
        await kit.until(lambda: not any(one.active for one in rig.replicas), PATIENCE_S)
        await kit.until(lambda: not rig.server.connections, PATIENCE_S)
        await rig.gateway.ledger.flush()
        await rig.gateway.refusals.flush()
        rig.assert_nothing_open()

    async def drop(self) -> None:
        request = wire(self.rig, self.kit.chat_body(stream=True))
        _, writer = await connect(self.rig)
        writer.write(request[: self.draw.randrange(len(request) + 1)])
        await asyncio.sleep(0)
        await close(writer)


@pytest.mark.promise(40)
@pytest.mark.known_failure("litellm#12685", "litellm#38193", "litellm#6404")
async def test_nothing_grows_with_the_number_of_requests(kit: Any) -> None:
    async with served(kit, replicas=2) as rig:
        limits = Limits(requests_per_minute=1_000_000, tokens_per_minute=10**9)
        minted = mint("long", Role.USER, kit.PEPPER, 1.0, limits=limits)
        await rig.state.put_key(minted.record)
        await rig.gateway.view.refresh()
        rig.key = minted.text
        traffic = Traffic(rig, kit)
        await traffic.round()
        await traffic.round()
        seen = [await measured(rig, traffic) for _ in range(ROUNDS)]
        first, last = seen[0], seen[-1]
        for what in ("tasks", "threads", "descriptors"):
            assert last[what] <= first[what] + SPARE, [one[what] for one in seen]
        grown = {
            where: (size, last["held"].get(where, 0))
            for where, size in first["held"].items()
            if last["held"].get(where, 0) > size + 4
        }
        grown |= {
            where: (0, size)
            for where, size in last["held"].items()
            if where not in first["held"] and size > 4
        }
        assert grown == {}


async def measured(rig: Any, traffic: Traffic) -> dict[str, Any]:
    """The process after one more round."""
    await traffic.round()
    gc.collect()
    return {
        "tasks": len(asyncio.all_tasks()),
        "threads": threading.active_count(),
        "descriptors": descriptors(),
        "held": holdings(rig.gateway),
    }


@pytest.mark.promise(40)
async def test_the_measure_sees_what_grows(kit: Any) -> None:
    async with kit.open_rig() as rig:
        before = holdings(rig.gateway)
        assert len(before) > 20
        for number in range(9):
            rig.gateway.handler.errands._budgets[f"m{number}"] = None
            rig.gateway.loads.begin(f"replica{number}")
        after = holdings(rig.gateway)
        grown = {where for where, size in after.items() if size > before.get(where, 0) + 4}
        names = {where.rpartition(".")[2] for where in grown}
        assert {"_budgets", "_loads"} <= names
