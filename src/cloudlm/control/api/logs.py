"""The lines of a deployment's replicas: those of all its groups, joined into one stream."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from cloudlm.core.errors import NotFound, NotSupported
from cloudlm.drivers.base import Ability, Driver


async def log_lines(
    drivers: Sequence[Driver], deployment: str, *, replica: str | None, tail: int, follow: bool
) -> AsyncIterator[bytes]:
    """Lines with their newlines, oldest group first, of all groups wherever they run: while a
    deployment moves, old ones run on another driver. ``drivers`` begin with the deployment's own.
    Raises NotFound for an unknown replica, NotSupported if no driver of a group keeps output; both
    before the stream begins."""
    groups = [one for driver in drivers for one in await _groups_of(driver, deployment)]
    if replica is not None:
        groups = [one for one in groups if one.name == replica.rpartition("-")[0]]
        known = [r.id for g in groups for r in (await g.driver.observe(g.name)).replicas]
        if replica not in known:
            raise NotFound(f"deployment {deployment!r} has no replica {replica!r}")
    talking = [one for one in groups if Ability.REPLICA_LOGS in one.driver.abilities]
    silent = groups[0].driver if groups else drivers[0]
    if not talking and Ability.REPLICA_LOGS not in silent.abilities:
        raise NotSupported(f"driver {silent.name!r} does not keep the output of replicas")
    sources = [
        one.driver.logs(one.name, replica=replica, tail=tail, follow=follow)
        for one in sorted(talking, key=lambda one: one.revision)
    ]
    return _joined(sources) if follow else _chained(sources)


class _Group(NamedTuple):
    revision: int
    name: str
    driver: Driver


async def _groups_of(driver: Driver, deployment: str) -> list[_Group]:
    form = re.compile(re.escape(deployment) + r"-r([0-9]+)")
    names = await driver.groups()
    found = [(match, name) for name in names if (match := form.fullmatch(name))]
    return [_Group(int(match[1]), name, driver) for match, name in found]


async def _chained(sources: Sequence[AsyncIterator[str]]) -> AsyncIterator[bytes]:
    for source in sources:
        with contextlib.suppress(NotFound):  # it ended between the look and the reading
            async for line in source:
                yield f"{line}\n".encode()


async def _joined(sources: Sequence[AsyncIterator[str]]) -> AsyncIterator[bytes]:
    """All sources at once, in the order in which lines come."""
    lines: asyncio.Queue[str | None] = asyncio.Queue(maxsize=1000)

    async def pour(source: AsyncIterator[str]) -> None:
        try:
            with contextlib.suppress(NotFound):
                async for line in source:
                    await lines.put(line)
        finally:
            await lines.put(None)

    pouring = [asyncio.create_task(pour(source)) for source in sources]
    open_sources = len(pouring)
    try:
        while open_sources:
            line = await lines.get()
            if line is None:
                open_sources -= 1
            else:
                yield f"{line}\n".encode()
    finally:
        for task in pouring:
            task.cancel()
        lines = asyncio.Queue()  # nobody reads any more: let the last puts pass
        await asyncio.gather(*pouring, return_exceptions=True)
