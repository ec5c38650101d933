"""What several gateway processes on one port keep together, in their parent: the counts of limits,
so that they hold for all of them, each one's numbers, so that whichever is asked for metrics tells
those of all, and which replica asked one of them for time.

``Desk`` is in the parent, ``SharedCounters``, ``Numbers`` and ``Cooling`` in each process. Must not
start processes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import msgspec

from cloudlm.core.clock import Clock
from cloudlm.gateway.channel import Channel, Tell
from cloudlm.gateway.counters import LocalCounters
from cloudlm.gateway.limits import LEASE_S
from cloudlm.gateway.verdicts import Bound, Lease, Verdict

NUMBERS_INTERVAL_S = 1.0
_COOL = "cool"


class _Reserve(msgspec.Struct, array_like=True):
    lease_id: str
    bounds: list[Bound]
    tokens: int
    spend: int
    month: int


class _Settle(msgspec.Struct, array_like=True):
    lease: Lease
    tokens: int
    spend: int
    counts: bool
    month: int


class _Tend(msgspec.Struct, array_like=True):
    leases: list[str]
    spent: dict[str, int]
    month: int


class _Cool(msgspec.Struct, array_like=True):
    replica: str
    wait_s: float


class Desk:
    """Answers what processes ask, see ``hear``."""

    def __init__(self, clock: Clock, lease_s: float = LEASE_S) -> None:
        self._counters = LocalCounters(clock, lease_s)
        self._scopes: dict[int, set[str]] = {}
        self._numbers: dict[int, str] = {}
        self._tells: dict[int, Tell] = {}
        self.on_ready: Callable[[int], None] = lambda _: None

    async def hear(self, process: int, what: str, data: msgspec.Raw) -> Any:
        """One message of a process and the answer to it. Raises ValueError for nonsense."""
        if what == "reserve":
            asked = msgspec.json.decode(data, type=_Reserve)
            return await self._counters.reserve(
                asked.lease_id,
                asked.bounds,
                tokens=asked.tokens,
                spend=asked.spend,
                month=asked.month,
            )
        if what == "settle":
            used = msgspec.json.decode(data, type=_Settle)
            self._counters.settle(
                used.lease,
                tokens=used.tokens,
                spend=used.spend,
                counts=used.counts,
                month=used.month,
            )
        elif what == "tend":
            tended = msgspec.json.decode(data, type=_Tend)
            await self._counters.tend(tended.leases, tended.spent, tended.month)
        elif what == "keep":
            self._keep(process, msgspec.json.decode(data, type=set[str]))
        elif what == "numbers":
            self._numbers[process] = msgspec.json.decode(data, type=str)
            return self._numbers
        elif what == _COOL:
            cool = msgspec.json.decode(data, type=_Cool)
            for tell in [tell for other, tell in self._tells.items() if other != process]:
                tell(_COOL, cool)
        elif what == "ready":
            self.on_ready(process)
        else:
            raise ValueError(f"a process said {what[:40]!r}, which means nothing")
        return None

    def _keep(self, process: int, scopes: set[str]) -> None:
        """A holder is forgotten when no process knows it: one may have read the state before
        another."""
        self._scopes[process] = scopes
        self._counters.keep_only(set().union(*self._scopes.values()))

    def seated(self, process: int, tell: Tell) -> None:
        """A process can be told news."""
        self._tells[process] = tell

    def gone(self, process: int) -> None:
        """A process ended: its numbers with it. What it had reserved stays until the leases end."""
        self._numbers.pop(process, None)
        self._scopes.pop(process, None)
        self._tells.pop(process, None)


class SharedCounters:
    """The port ``Counters``, kept at the desk."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    async def reserve(
        self, lease_id: str, bounds: Sequence[Bound], *, tokens: int, spend: int, month: int
    ) -> Verdict:
        asked = _Reserve(lease_id, list(bounds), tokens, spend, month)
        return await self._channel.ask("reserve", asked, Verdict)

    def settle(self, lease: Lease, *, tokens: int, spend: int, counts: bool, month: int) -> None:
        self._channel.tell("settle", _Settle(lease, tokens, spend, counts, month))

    async def tend(self, leases: Collection[str], spent: Mapping[str, int], month: int) -> None:
        await self._channel.ask("tend", _Tend(list(leases), dict(spent), month), type(None))

    def keep_only(self, scopes: Collection[str]) -> None:
        self._channel.tell("keep", list(scopes))

    async def run(self) -> None:
        """Nothing is to be done."""
        await asyncio.Event().wait()


class Cooling:
    """What replicas ask of one process, they ask of all: to be left alone for a while. ``heard`` is
    given the replica and the seconds that another process was told."""

    def __init__(self, channel: Channel, heard: Callable[[str, float], None]) -> None:
        self._channel = channel
        self._heard = heard
        channel.on_news = self._take

    def tell(self, replica: str, wait_s: float) -> None:
        """Have the other processes leave ``replica`` alone too; never waits."""
        self._channel.tell(_COOL, _Cool(replica, wait_s))

    async def run(self) -> None:
        """Nothing is to be done: the channel hears by itself."""
        await asyncio.Event().wait()

    def _take(self, what: str, data: msgspec.Raw) -> None:
        if what == _COOL:
            cool = msgspec.json.decode(data, type=_Cool)
            self._heard(cool.replica, cool.wait_s)


class Numbers:
    """The metrics of all processes, told by one. ``own`` gives this one's exposition."""

    def __init__(self, channel: Channel, own: Callable[[], bytes], clock: Clock) -> None:
        self._channel = channel
        self._own = own
        self._clock = clock

    async def exposition(self) -> bytes:
        """All numbers, each with the label ``worker``; those of others up to a second old."""
        known = await self._channel.ask("numbers", self._own().decode(), dict[int, str])
        return joined(known)

    async def run(self) -> None:
        """Leave our numbers with the desk until cancelled."""
        while True:
            self._channel.tell("numbers", self._own().decode())
            await self._clock.sleep(NUMBERS_INTERVAL_S)


def joined(expositions: Mapping[int, str]) -> bytes:
    """Several texts in Prometheus' format as one: each family once, its samples with a label that
    says whose they are."""
    families: dict[str, list[str]] = {}
    for worker, text in sorted(expositions.items()):
        seen = set(families)
        family: list[str] = []
        for line in text.splitlines():
            if line.startswith("# HELP "):
                name = line.split(" ", 3)[2]
                family = families.setdefault(name, [])
            if not line.startswith("#"):
                family.append(_labelled(line, worker))
            elif name not in seen:
                family.append(line)
    return "".join(f"{line}\n" for lines in families.values() for line in lines).encode()


def _labelled(sample: str, worker: int) -> str:
    head, space, value = sample.rpartition(" ")
    name, brace, labels = head.partition("{")
    more = f",{labels}" if brace else "}"
    return f'{name}{{worker="{worker}"{more}{space}{value}'
