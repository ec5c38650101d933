"""The lines of a deployment's replicas: those of all its groups, joined into one stream."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from typing import NamedTuple, TypeVar

from cloudlm.core.errors import CloudlmError, NotFound, NotSupported, Unavailable
from cloudlm.drivers.base import Ability, Driver

T = TypeVar("T")

LOOK_TIMEOUT_S = 5.0
"""How long a driver may take to say what runs there, and for each line that it has already."""


async def log_lines(
    drivers: Sequence[Driver],
    deployment: str,
    *,
    replica: str | None,
    tail: int,
    follow: bool,
    timeout_s: float = LOOK_TIMEOUT_S,
) -> AsyncIterator[bytes]:
    """Lines with their newlines, oldest group first, of all groups wherever they run: while a
    deployment moves, old ones run on another driver. ``drivers`` begin with the deployment's own;
    another one that fails or says nothing for ``timeout_s`` is left out, and a line says so.
    Raises NotFound for an unknown replica, NotSupported if no driver of a group keeps output, and
    what the deployment's own driver raises (Unavailable if it says nothing); all before the stream
    begins."""
    groups, left_out = await _look(drivers, deployment, timeout_s)
    if replica is not None:
        groups = [one for one in groups if one.name == replica.rpartition("-")[0]]
        seen = [await _in_time(g.driver, g.driver.observe(g.name), timeout_s) for g in groups]
        if replica not in [one.id for group in seen for one in group.replicas]:
            missing = f"deployment {deployment!r} has no replica {replica!r}"
            raise NotFound("; ".join([missing, *left_out]))
    talking = [one for one in groups if Ability.REPLICA_LOGS in one.driver.abilities]
    silent = groups[0].driver if groups else drivers[0]
    if not talking and Ability.REPLICA_LOGS not in silent.abilities:
        raise NotSupported(f"driver {silent.name!r} does not keep the output of replicas")
    sources = [
        _read(
            one.driver,
            one.driver.logs(one.name, replica=replica, tail=tail, follow=follow),
            None if follow else timeout_s,
        )
        for one in sorted(talking, key=lambda one: one.revision)
    ]
    lines = _joined(sources) if follow else _chained(sources)
    return _after(left_out, lines) if left_out else lines


class _Group(NamedTuple):
    revision: int
    name: str
    driver: Driver


async def _look(
    drivers: Sequence[Driver], deployment: str, timeout_s: float
) -> tuple[list[_Group], list[str]]:
    """The deployment's groups, and who cannot say what it has of them."""
    looks = await asyncio.gather(
        *(_in_time(one, _groups_of(one, deployment), timeout_s) for one in drivers),
        return_exceptions=True,
    )
    groups: list[_Group] = []
    left_out: list[str] = []
    for number, (driver, found) in enumerate(zip(drivers, looks, strict=True)):
        if not isinstance(found, BaseException):
            groups += found
        elif number and isinstance(found, Exception):
            left_out.append(f"driver {driver.name!r} is left out: {_reason(found)}")
        else:
            raise found
    return groups, left_out


async def _groups_of(driver: Driver, deployment: str) -> list[_Group]:
    form = re.compile(re.escape(deployment) + r"-r([0-9]+)")
    names = await driver.groups()
    found = [(match, name) for name in names if (match := form.fullmatch(name))]
    return [_Group(int(match[1]), name, driver) for match, name in found]


async def _in_time(driver: Driver, work: Awaitable[T], timeout_s: float | None) -> T:
    """What ``work`` of the driver gives. Raises Unavailable if it takes longer."""
    try:
        async with asyncio.timeout(timeout_s):
            return await work
    except TimeoutError:
        waited = "in time" if timeout_s is None else f"in {timeout_s:g} s"
        raise Unavailable(f"driver {driver.name!r} gave no answer {waited}") from None


def _reason(error: Exception) -> str:
    """Why a driver failed; what is not ours may say what is nobody's business."""
    return error.message if isinstance(error, CloudlmError) else type(error).__name__


async def _read(
    driver: Driver, source: AsyncIterator[str], timeout_s: float | None
) -> AsyncIterator[str]:
    """The lines of one group, and why there are no more, should its driver fail."""
    try:
        while True:
            yield await _in_time(driver, anext(source), timeout_s)
    except (StopAsyncIteration, NotFound):
        return  # read to its end, or it ended between the look and the reading
    except Exception as error:
        fault = f"driver {driver.name!r} broke off: {_reason(error)}"
    yield f"cloudlm: {fault}"


async def _after(said: Sequence[str], lines: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(lines):
        for one in said:
            yield f"cloudlm: {one}\n".encode()
        async for line in lines:
            yield line


async def _chained(sources: Sequence[AsyncIterator[str]]) -> AsyncGenerator[bytes, None]:
    for source in sources:
        async for line in source:
            yield f"{line}\n".encode()


async def _joined(sources: Sequence[AsyncIterator[str]]) -> AsyncGenerator[bytes, None]:
    """All sources at once, in the order in which lines come."""
    lines: asyncio.Queue[str | None] = asyncio.Queue(maxsize=1000)

    async def pour(source: AsyncIterator[str]) -> None:
        try:
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
