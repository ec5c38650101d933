"""Settings that a running gateway follows: when their file changes, routes, prices and tenants'
weights are read again, and of others that changed the log says that they want a restart. Must not
know what they are for.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from cloudlm.core.price import read_prices
from cloudlm.core.settings import GatewaySettings
from cloudlm.core.tenant import read_weights
from cloudlm.gateway.live_file import LiveFile
from cloudlm.gateway.model_routes import read_routes

LIVE: Mapping[str, Callable[[str], dict[Any, Any]]] = {
    "routes": read_routes,
    "prices": read_prices,
    "tenant_weights": read_weights,
}
"""The settings that need no restart, and how each is read. Raise BadSetting."""


class Source(NamedTuple):
    """Where the settings come from: the file that may change, and how all of them are read."""

    path: Path
    read: Callable[[], GatewaySettings]


class LiveSettings(LiveFile[GatewaySettings]):
    """Keeps ``held``, what each of LIVE came to, which others hold too, as the settings say now;
    ``changed`` is awaited after each change of it. ``running`` is what the gateway was started
    with."""

    def __init__(
        self,
        source: Source,
        running: GatewaySettings,
        held: Mapping[str, dict[Any, Any]],
        changed: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(source.path, "settings file", "settings")
        self._source = source
        self._running = running
        self._held = held
        self._changed = changed
        self._waiting: tuple[str, ...] = ()

    @property
    def notes(self) -> list[str]:
        """What an operator should know, without values of settings."""
        notes = super().notes
        if self._waiting:
            names = ", ".join(f"gateway.{name}" for name in self._waiting)
            notes.append(f"changed settings that want a restart of the gateway: {names}")
        return notes

    def _read(self) -> GatewaySettings:
        return self._source.read()

    async def _take(self, found: GatewaySettings) -> str:
        wanted = read_live(found)
        self._compare(found)
        changed = [name for name, now in wanted.items() if self._held[name] != now]
        if not changed:
            return ""
        # The same objects, which others hold; nothing is awaited in between.
        for name in changed:
            self._held[name].clear()
            self._held[name].update(wanted[name])
        await self._changed()
        return ", ".join(changed)

    def _compare(self, wanted: GatewaySettings) -> None:
        """Note which settings would need a restart to hold."""
        self._waiting = tuple(
            one.name
            for one in fields(wanted)
            if one.name not in LIVE
            and getattr(wanted, one.name) != getattr(self._running, one.name)
        )
        if self._waiting:
            self._tell("warning", "want_a_restart", settings=", ".join(self._waiting))


def read_live(settings: GatewaySettings) -> dict[str, dict[Any, Any]]:
    """What each of LIVE comes to. Raises BadSetting."""
    return {name: read(getattr(settings, name)) for name, read in LIVE.items()}
