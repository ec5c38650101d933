"""The drivers that this control uses: installed plug-ins, built when they are first needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cloudlm.core.errors import CloudlmError, NotSupported
from cloudlm.core.plugins import installed, load
from cloudlm.core.wire import DriverEntry
from cloudlm.drivers.base import Driver, DriverContext

GROUP = "cloudlm.drivers"
DEFAULT = "process"


class Drivers:
    """Drivers by name. ``build`` makes one: by default the entry point of that name."""

    def __init__(
        self,
        context: DriverContext,
        build: Mapping[str, Callable[[DriverContext], Driver]] | None = None,
    ) -> None:
        self._context = context
        self._build = build
        self._built: dict[str, Driver] = {}
        self._token = 0

    def get(self, name: str) -> Driver:
        """The driver. Raises NotInstalled if there is none of that name, NotSupported if it cannot
        be loaded or begin, and what it says itself of its settings."""
        if name not in self._built:
            builders = self._build or {}
            builder = builders[name] if name in builders else load(GROUP, name)
            self._built[name] = _begun(name, builder, self._context)
            _fence(self._built[name], self._token)
        return self._built[name]

    def fence(self, token: int) -> None:
        """Every driver's orders carry this token from now on."""
        self._token = token
        for driver in self._built.values():
            _fence(driver, token)

    def in_use(self) -> dict[str, Driver]:
        """Those built so far, by name."""
        return dict(self._built)

    def entries(self) -> list[DriverEntry]:
        """All installed drivers with their abilities; one that cannot be loaded has none."""
        found = []
        for plugin in installed(GROUP):
            try:
                abilities = tuple(sorted(a.value for a in load(GROUP, plugin.name).abilities))
            except Exception:
                abilities = ()
            found.append(DriverEntry(plugin.name, plugin.package, abilities))
        return found

    async def close(self) -> None:
        for driver in self._built.values():
            await driver.close()
        self._built.clear()


def _begun(name: str, builder: Callable[[DriverContext], Driver], context: DriverContext) -> Driver:
    try:
        return builder(context)
    except CloudlmError:
        raise
    except Exception as error:  # a stranger's code: whatever it does, we name it
        reason = f"{type(error).__name__}: {error}"
        raise NotSupported(f"driver {name!r} cannot begin: {reason}") from error


def _fence(driver: Driver, token: int) -> None:
    """A plug-in older than tokens notes none; control looks at its lease before orders anyway."""
    fence = getattr(driver, "fence", None)
    if fence is not None:
        fence(token)
