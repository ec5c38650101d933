"""A file that a running gateway follows: when it changes it is read again beside the running
requests, and what it says holds for those that come after.

One that cannot be used is logged, and the last good one goes on. Must not know what the file is
for.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Generic, TypeVar

from cloudlm.core.errors import CloudlmError, StorageFailed
from cloudlm.telemetry.logs import get_logger

FOLLOW_INTERVAL_S = 1.0

T = TypeVar("T")
_log = get_logger(__name__)
_Mark = tuple[int, int, int] | None
_UNREAD: _Mark = (0, 0, 0)  # of no file: none has the number 0


class LiveFile(ABC, Generic[T]):
    """Looks at ``path`` now and then. ``named`` is how its owner calls it, in messages and, with
    ``event``, in the log: ``<event>_renewed`` and ``<event>_not_renewed``."""

    def __init__(self, path: Path, named: str, event: str) -> None:
        self._path = path
        self._named = named
        self._event = event
        self._seen = _mark_of(path)
        # What holds was read some time ago and may be of an earlier content.
        self._mark = _UNREAD if self._seen is not None else None
        self._fault = ""

    @abstractmethod
    def _read(self) -> T:
        """What the file says, for a thread to find out. Raises CloudlmError."""

    @abstractmethod
    async def _take(self, found: T) -> str:
        """Let what was read hold, on the loop; what is another now, in words for the log, empty if
        nothing is. Raises CloudlmError, and then nothing is."""

    def _left(self, found: T) -> None:
        """What was read is not used after all."""

    @property
    def refused(self) -> bool:
        """Whether the file changed and what it says now cannot be used."""
        return bool(self._fault)

    @property
    def notes(self) -> list[str]:
        """What an operator should know, without what the file says."""
        if not self._fault:
            return []
        return [
            f"the {self._named} changed and was refused ({self._fault}): the last good one holds; "
            f"the gateway's log says why ({self._event}_not_renewed)"
        ]

    async def renew(self) -> bool:
        """Read the file again if it changed and has been left alone since the last look, so that
        none is read while it is written; whether something else holds now."""
        mark = await asyncio.to_thread(_mark_of, self._path)
        if mark == self._mark:
            return False
        if mark != self._seen:
            self._seen = mark
            return False
        before, self._mark = self._mark, mark
        found = await self._find(mark)
        if await asyncio.to_thread(_mark_of, self._path) != mark:
            # What was read belongs to no mark: of a file that vanished in between, for one, it may
            # be what an installation without a file has.
            self._mark = before
            if not isinstance(found, CloudlmError):
                self._left(found)
            return False
        try:
            if isinstance(found, CloudlmError):
                raise found
            changed = await self._take(found)
        except CloudlmError as error:
            self._fault = error.param or "it cannot be used"
            self._tell("error", "not_renewed", reason=error.message)
            return False
        self._fault = ""
        if changed:
            self._tell("info", "renewed", changed=changed)
        return bool(changed)

    async def follow(self, interval_s: float = FOLLOW_INTERVAL_S) -> None:
        """Renew until cancelled: a fault that nobody thought of is told and ends nothing."""
        while True:
            await asyncio.sleep(interval_s)
            try:
                await self.renew()
            except Exception as error:
                self._fault = f"unexpected {type(error).__name__}"
                self._tell("exception", "not_renewed", reason=self._fault)

    async def _find(self, mark: _Mark) -> T | CloudlmError:
        if mark is None:
            return StorageFailed(f"the {self._named} {self._path} is gone")
        try:
            return await asyncio.to_thread(self._read)
        except CloudlmError as error:
            return error

    def _tell(self, level: str, how: str, **more: str) -> None:
        fields = {"file": str(self._path), **more}
        getattr(_log, level)(f"{self._event}_{how}", extra={"fields": fields})


def _mark_of(path: Path) -> _Mark:
    """What tells one content of a file from the next; None if there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
