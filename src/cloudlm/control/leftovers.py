"""Which drivers may still run something of a deployment, though nothing is asked of them any more:
those of its earlier revisions that could not be heard since.

A deletion waits for them, for nobody would look for what they run once the deployment is forgotten.
Remembers what it was told; all of it may be lost with the process. Must not ask a driver.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from cloudlm.control.observe import Seen
from cloudlm.core.plugins import NotInstalled


class Leftovers:
    """The drivers of every deployment that may run replicas of it."""

    def __init__(self) -> None:
        self._asked: Mapping[str, Collection[str]] = {}
        self._may: dict[str, frozenset[str]] = {}

    def expect(
        self, asked: Mapping[str, Collection[str]], ran: Mapping[str, Collection[str]]
    ) -> frozenset[str]:
        """Before a look: by deployment the drivers that something is ``asked`` of, and those on
        which its revisions ``ran``, of which nothing is known where it is seen for the first time.
        Returns the drivers to look at."""
        self._asked = asked
        self._may = {
            name: self._may.get(name, frozenset(ran.get(name, ()))) | frozenset(drivers)
            for name, drivers in asked.items()
        }
        return frozenset[str]().union(*self._may.values())

    def note(self, seen: Seen) -> None:
        """After it: who was heard and runs nothing is done with, and so is who is not installed."""
        unknown = {k for k, fault in seen.faults.items() if not isinstance(fault, NotInstalled)}
        here: dict[str, set[str]] = {}
        for group in seen.groups:
            here.setdefault(group.deployment, set()).add(group.driver)
        for name, may in self._may.items():
            asked, runs = self._asked.get(name, ()), here.get(name, set())
            unheard = {one for one in may if one in asked or one in unknown}
            self._may[name] = frozenset(unheard | runs)

    def of(self, name: str) -> frozenset[str]:
        """The drivers that may run replicas of this deployment."""
        return self._may.get(name, frozenset())
