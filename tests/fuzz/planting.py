"""How a bug is planted: for as long as a run lasts, something else takes the place of
production code. Must not know what bugs there are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

Bug = Callable[[], AbstractContextManager[Any]]


def instead(owner: Any, name: str, made: Callable[[Any], Any]) -> Bug:
    """``made`` gets what is there and gives what takes its place."""

    @contextmanager
    def planted() -> Iterator[None]:
        with mock.patch.object(owner, name, made(getattr(owner, name))):
            yield

    return planted


def nothing(owner: Any, name: str, result: Any = None) -> Bug:
    """A function that does nothing but to give ``result``."""
    return instead(owner, name, lambda _: lambda *a, **k: result)


def nothing_async(owner: Any, name: str) -> Bug:
    """A coroutine function that does nothing."""

    async def empty(*arguments: Any, **named: Any) -> None:
        return

    return instead(owner, name, lambda _: empty)


def both(*bugs: Bug) -> Bug:
    """Two lines of defence gone at once."""

    @contextmanager
    def planted() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for bug in bugs:
                stack.enter_context(bug())
            yield

    return planted
