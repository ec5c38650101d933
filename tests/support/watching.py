"""Looks again and again, beside a test, at what lives at any moment."""

from __future__ import annotations

import threading
from typing import Self


class Watch:
    """Calls ``look`` every ``every_s`` seconds, in a thread of its own, until its block ends."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def look(self) -> None:
        """What is done each time."""
        raise NotImplementedError

    def _run(self) -> None:
        while not self._ended.wait(self._every_s):
            self.look()
