"""Settings that a running gateway follows: when their file changes, routes and prices are read
again beside the running requests, and hold for those that come after.

A file that cannot be used is logged, and the last good one goes on; of other settings that changed
the log says that they want a restart. Must not know what routes and prices are for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from cloudlm.core.errors import CloudlmError, StorageFailed
from cloudlm.core.price import Price, read_prices
from cloudlm.core.settings import GatewaySettings
from cloudlm.gateway.model_routes import ModelRoute, read_routes
from cloudlm.telemetry.logs import get_logger

LIVE = ("routes", "prices")
"""The settings that need no restart."""
FOLLOW_INTERVAL_S = 1.0

_log = get_logger(__name__)
_Mark = tuple[int, int, int] | None
_UNREAD: _Mark = (0, 0, 0)  # of no file: none has the number 0


class Source(NamedTuple):
    """Where the settings come from: the file that may change, and how all of them are read."""

    path: Path
    read: Callable[[], GatewaySettings]


class LiveSettings:
    """Keeps ``routes`` and ``prices``, which others hold, as the settings say now; ``changed`` is
    awaited after each change of them. ``running`` is what the gateway was started with."""

    def __init__(
        self,
        source: Source,
        running: GatewaySettings,
        routes: dict[str, ModelRoute],
        prices: dict[str, Price],
        changed: Callable[[], Awaitable[None]],
    ) -> None:
        self._source = source
        self._running = running
        self._routes = routes
        self._prices = prices
        self._changed = changed
        self._seen = mark_of(source.path)
        # The settings were read some time ago and may be of an earlier content.
        self._mark = _UNREAD if self._seen is not None else None
        self._fault = ""
        self._waiting: tuple[str, ...] = ()

    @property
    def refused(self) -> bool:
        """Whether the file changed and what it says now cannot be used."""
        return bool(self._fault)

    @property
    def notes(self) -> list[str]:
        """What an operator should know, without values of settings."""
        notes = []
        if self._fault:
            notes.append(
                f"the settings file changed and was refused ({self._fault}): the last good one "
                "holds; the gateway's log says why"
            )
        if self._waiting:
            names = ", ".join(f"gateway.{name}" for name in self._waiting)
            notes.append(f"changed settings that want a restart of the gateway: {names}")
        return notes

    async def renew(self) -> bool:
        """Read the file again if it changed and has been left alone since the last look, so that
        none is read while it is written; whether routes or prices are others now."""
        mark = await asyncio.to_thread(mark_of, self._source.path)
        if mark == self._mark:
            return False
        if mark != self._seen:
            self._seen = mark
            return False
        before, self._mark = self._mark, mark
        found = await self._read(mark)
        if await asyncio.to_thread(mark_of, self._source.path) != mark:
            # What was read belongs to no mark: of a file that vanished in between, for one, the
            # settings are those of an installation without a file.
            self._mark = before
            return False
        try:
            if isinstance(found, CloudlmError):
                raise found
            return await self._take(found)
        except CloudlmError as error:
            self._fault = error.param or "it cannot be read"
            self._tell("error", "settings_not_renewed", reason=error.message)
            return False

    async def follow(self, interval_s: float = FOLLOW_INTERVAL_S) -> None:
        """Renew until cancelled: a fault that nobody thought of is told and ends nothing."""
        while True:
            await asyncio.sleep(interval_s)
            try:
                await self.renew()
            except Exception as error:
                self._fault = f"unexpected {type(error).__name__}"
                self._tell("exception", "settings_not_renewed", reason=self._fault)

    async def _read(self, mark: _Mark) -> GatewaySettings | CloudlmError:
        if mark is None:
            return StorageFailed(f"the settings file {self._source.path} is gone")
        try:
            return await asyncio.to_thread(self._source.read)
        except CloudlmError as error:
            return error

    async def _take(self, wanted: GatewaySettings) -> bool:
        routes, prices = read_routes(wanted.routes), read_prices(wanted.prices)
        self._fault = ""
        self._compare(wanted)
        named = [
            name
            for name, before, now in (
                ("routes", self._routes, routes),
                ("prices", self._prices, prices),
            )
            if before != now
        ]
        if not named:
            return False
        # The same objects, which view, handler and limits hold; nothing is awaited in between.
        self._routes.clear()
        self._routes.update(routes)
        self._prices.clear()
        self._prices.update(prices)
        await self._changed()
        self._tell("info", "settings_renewed", settings=", ".join(named))
        return True

    def _compare(self, wanted: GatewaySettings) -> None:
        """Note which settings would need a restart to hold."""
        self._waiting = tuple(
            one.name
            for one in fields(wanted)
            if one.name not in LIVE
            and getattr(wanted, one.name) != getattr(self._running, one.name)
        )
        if self._waiting:
            self._tell("warning", "settings_want_a_restart", settings=", ".join(self._waiting))

    def _tell(self, level: str, event: str, **more: str) -> None:
        fields_ = {"file": str(self._source.path), **more}
        getattr(_log, level)(event, extra={"fields": fields_})


def mark_of(path: Path) -> _Mark:
    """What tells one content of a file from the next; None if there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
