"""The lines of a deployment's replicas: those of all its groups, joined into one stream."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Sequence

from cloudlm.core.errors import NotFound, NotSupported
from cloudlm.drivers.base import Ability, Driver


async def log_lines(
    driver: Driver, deployment: str, *, replica: str | None, tail: int, follow: bool
) -> AsyncIterator[bytes]:
    """Lines with their newlines, oldest group first. Raises NotFound for an unknown replica,
    NotSupported if the driver keeps no output; both before the stream begins."""
    if Ability.REPLICA_LOGS not in driver.abilities:
        raise NotSupported(f"driver {driver.name!r} does not keep the output of replicas")
    groups = _groups_of(await driver.groups(), deployment)
    if replica is not None:
        groups = [group for group in groups if group == replica.rpartition("-")[0]]
        known = [r.id for g in groups for r in (await driver.observe(g)).replicas]
        if replica not in known:
            raise NotFound(f"deployment {deployment!r} has no replica {replica!r}")
    sources = [driver.logs(g, replica=replica, tail=tail, follow=follow) for g in groups]
    return _joined(sources) if follow else _chained(sources)


def _groups_of(names: Sequence[str], deployment: str) -> list[str]:
    form = re.compile(re.escape(deployment) + r"-r([0-9]+)")
    found = [(int(match[1]), name) for name in names if (match := form.fullmatch(name))]
    return [name for _, name in sorted(found)]


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
