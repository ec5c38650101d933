"""Drivers and stores by name, ours and a stranger's alike: entry points of installed packages.

Groups: ``cloudlm.drivers``, ``cloudlm.stores``. A plug-in is imported when it is first asked for;
one that fails to import is an error that names it, never a plug-in that silently does not exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from cloudlm.core.errors import InvalidRequest, NotSupported


class NotInstalled(InvalidRequest):
    """There is no plug-in of that name. One that refuses its settings is there all the same."""


@dataclass(frozen=True, slots=True)
class Plugin:
    """An installed plug-in: its name, where its object is, and the package that brought it."""

    name: str
    target: str
    package: str


def installed(group: str) -> list[Plugin]:
    """The plug-ins of a group, sorted by name; nothing is imported."""
    found = [
        Plugin(point.name, point.value, point.dist.name if point.dist else "?")
        for point in entry_points(group=group)
    ]
    return sorted(found, key=lambda plugin: plugin.name)


def load(group: str, name: str) -> Any:
    """Import the plug-in ``name``. Raises NotInstalled if unknown, NotSupported if broken."""
    for point in entry_points(group=group):
        if point.name == name:
            try:
                return point.load()
            except Exception as error:  # a stranger's code: whatever it does, we name it
                reason = f"{type(error).__name__}: {error}"
                raise NotSupported(
                    f"{group} plug-in {name!r} cannot be loaded: {reason}"
                ) from error
    names = ", ".join(plugin.name for plugin in installed(group)) or "none"
    raise NotInstalled(f"unknown {group} plug-in {name!r}; installed: {names}", param="driver")
