"""Ending an exchange early, from outside: the client went away, its key was revoked, we stop.

Cancelling a task is how a wait is broken off, but it does not say why and it must not leak out of
the exchange. An ``Interrupt`` is entered around each wait; ``cut`` breaks the wait off and the
``with`` block raises the given error instead of ``CancelledError``. Must not know HTTP.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from cloudlm.core.errors import CloudlmError


class Interrupt:
    """One per exchange, for one task at a time. Not reentrant."""

    __slots__ = ("_cancelled", "_task", "error")

    def __init__(self) -> None:
        self.error: CloudlmError | None = None
        self._task: asyncio.Task[object] | None = None
        self._cancelled = False

    def cut(self, error: CloudlmError) -> None:
        """End the exchange with ``error``; the first reason wins. Never call it from the task that
        is inside the ``with`` block."""
        if self.error is not None:
            return
        self.error = error
        if self._task is not None:
            self._cancelled = self._task.cancel()

    def __enter__(self) -> Self:
        """Raises the error at once if the exchange was cut between two waits."""
        if self.error is not None:
            raise self.error
        self._task = asyncio.current_task()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        task, self._task = self._task, None
        if self._cancelled and task is not None:
            self._cancelled = False
            task.uncancel()
            if self.error is not None:
                raise self.error from None
