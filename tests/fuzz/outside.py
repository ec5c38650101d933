"""What stands around a gateway: a state store that fails and hangs, and the death of a process.

Must not know what a run checks.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

from tests.fuzz.loop import VirtualLoop

from cloudlm.core.errors import Unavailable
from cloudlm.gateway.app import Gateway
from cloudlm.state.memory import MemoryState

_HANG_S = 30.0


class Weather:
    """How the state store is at the moment, for all who use it; times are the loop's."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self.down_until = 0.0
        self.hangs_until = 0.0
        self.forgets_until = 0.0

    def heal(self) -> None:
        """From now on the store is well."""
        self.down_until = self.hangs_until = self.forgets_until = 0.0

    @property
    def forgets(self) -> bool:
        """Whether the answer to what was just written gets lost."""
        return self._loop.time() < self.forgets_until

    async def before(self) -> None:
        now = self._loop.time()
        if now < self.hangs_until:
            await asyncio.sleep(min(self.hangs_until - now, _HANG_S))
        if self._loop.time() < self.down_until:
            raise Unavailable("the state is down", retry_after_s=1.0)

    def after(self, name: str) -> None:
        """The answer to a write may be lost though it was done."""
        if self.forgets and name in ("append_ledger", "put_demand"):
            raise Unavailable("the state broke off", retry_after_s=1.0)


class FragileState:
    """A process's connection to the state. ``cut`` ends it: the process is dead."""

    def __init__(self, state: MemoryState, weather: Weather) -> None:
        self._state = state
        self._weather = weather
        self.cut = False

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._state, name)

        async def asked(*arguments: Any, **named: Any) -> Any:
            await self._weather.before()
            if self.cut:
                raise Unavailable("this process is dead")
            result = await found(*arguments, **named)
            self._weather.after(name)
            return result

        self.__dict__[name] = asked
        return asked


def kill(gateway: Gateway, state: FragileState) -> None:
    """What a process leaves that is killed this moment: nothing it does from here on has an effect,
    and its lock on the journal is free. The files stay as they are."""
    state.cut = True
    journal: Any = gateway.ledger._journal
    for descriptor in (journal._active, journal._lock):
        if descriptor is not None and descriptor >= 0:
            os.close(descriptor)
    journal._active, journal._lock = None, -1
    journal.append = lambda row, *, is_open=False: False
    journal.seal = journal.close = lambda: None
    journal.forget = lambda segments: journal._waiting.clear()  # or it would read them for ever
