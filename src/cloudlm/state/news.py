"""Tells who waits for news in the state when to look again, so that nobody need ask many times a
second in vain.

SQLite writes every change of any process into one file, its log (``state.db-wal``); Linux tells
whoever watches that file (inotify). Where nothing tells of writes, a database server or another
system, the time to look is every ``LOOK_S``. What is told is only that something was written: the
state's own version and marks say what. Must not read the state.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import struct
from pathlib import Path
from typing import Protocol

from cloudlm.core.clock import Clock

LOOK_S = 0.05
"""How often to look where nothing tells of writes."""
SELDOM_S = 0.5
"""How often to look where something does: a system that tells nothing costs no more than this."""
SETTLE_S = 0.003
"""How long after the first sign of a write to look: it is told of before it can be read."""
APART_S = 0.02
"""How long to leave between two looks, however much is written."""
_IN_MODIFY = 0x2
_IN_IGNORED = 0x8000  # the file is gone, or another has its name
_EVENT = struct.Struct("iIII")  # watch, what happened, cookie, length of the name: inotify(7)


class News(Protocol):
    """When to look again. One task waits at a time."""

    async def wait(self, longest_s: float) -> None:
        """Return when it is time to look: something may have been written since this last returned,
        or at least so many seconds have passed."""
        ...

    def close(self) -> None:
        """Free what is held; the next ``wait`` takes it again."""
        ...


class PolledNews:
    """Of a state that tells nothing."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    async def wait(self, longest_s: float) -> None:
        await self._clock.sleep(min(longest_s, LOOK_S))

    def close(self) -> None:
        """Nothing is held."""


class FileNews:
    """Of a state in files: ``log`` is the one that every write goes through. Linux only; while the
    file cannot be watched, it is as with ``PolledNews``."""

    def __init__(self, log: Path, clock: Clock) -> None:
        self._log = log
        self._clock = clock
        self._descriptor = -1
        self._wrote = False
        self._not_before = 0.0

    async def wait(self, longest_s: float) -> None:
        if not self._watches():
            await self._clock.sleep(min(longest_s, LOOK_S))
            return
        # A write that was under way at the last look is told of no more.
        self._wrote = await self._written(min(longest_s, LOOK_S if self._wrote else SELDOM_S))
        if self._wrote:
            early_s = self._not_before - self._clock.monotonic()
            await self._clock.sleep(max(SETTLE_S, early_s))
            self._not_before = self._clock.monotonic() + APART_S
            self._forget()

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _watches(self) -> bool:
        if self._descriptor < 0:
            with contextlib.suppress(OSError):
                self._descriptor = _watch(self._log)
        return self._descriptor >= 0

    async def _written(self, longest_s: float) -> bool:
        """Wait for a write; False if there was none."""
        loop = asyncio.get_running_loop()
        told = asyncio.Event()
        loop.add_reader(self._descriptor, told.set)
        try:
            async with asyncio.timeout(longest_s):
                await told.wait()
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(self._descriptor)
        return True

    def _forget(self) -> None:
        """What was written until now is seen by the look that follows."""
        if self._descriptor < 0:  # closed meanwhile
            return
        with contextlib.suppress(BlockingIOError):
            while events := os.read(self._descriptor, 4096):
                if any(what & _IN_IGNORED for _, what, _, _ in _EVENT.iter_unpack(events)):
                    self.close()
                    return


def _watch(file: Path) -> int:
    """A descriptor that can be read when ``file`` was written. Raises OSError."""
    system = ctypes.CDLL(None, use_errno=True)
    descriptor = system.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "inotify_init1")
    if system.inotify_add_watch(descriptor, os.fsencode(file), _IN_MODIFY) < 0:
        os.close(descriptor)
        raise OSError(ctypes.get_errno(), "inotify_add_watch")
    return int(descriptor)
