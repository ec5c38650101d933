"""What is done between two steps: adapters come and go, the model sleeps and wakes up.

``Errands`` is asked by event loops and works in the engine's thread, whose sequences it waits for.
Must not know HTTP, models or tensors.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cloudlm.core.errors import InternalError, InvalidRequest, ModelNotFound
from cloudlm.engine.blocks import BlockPool
from cloudlm.engine.inbox import Errand, Inbox, Job, stopped

MAX_ADAPTERS = 256
"""LoRA adapters that may be loaded at a time."""


class Resident(Protocol):
    """What of the runner is changed between steps. In the engine's thread, but for
    ``read_adapter``."""

    def read_adapter(self, folder: Path) -> Any:
        """A LoRA adapter, checked; from any thread, the only method that is."""
        ...

    def add_adapter(self, key: str, adapter: Any) -> None: ...

    def remove_adapter(self, key: str) -> None: ...

    def sleep(self, level: int) -> None: ...

    def wake(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Loaded:
    """An adapter that requests may name. ``key`` is never used again: what the prefix cache holds
    of an adapter must not be found by another of the same name."""

    key: str
    address: str


class Errands:
    """``jobs`` and ``pool`` are the engine thread's; they are looked at in it alone."""

    def __init__(
        self, runner: Resident, inbox: Inbox, jobs: Mapping[int, Job], pool: BlockPool
    ) -> None:
        self._runner = runner
        self._inbox = inbox
        self._generations = itertools.count(1)
        self._lock = threading.Lock()  # guards what is below
        self._adapters: dict[str, _Loaded | None] = {}  # None while it loads
        # From here on: the engine thread's own.
        self._jobs = jobs
        self._pool = pool
        self._waiting: list[Errand] = []
        self._keys = {""}
        self._released = False

    def key_of(self, adapter: str) -> str:
        """The runner's key of a loaded adapter; empty for the base. Raises ModelNotFound."""
        if not adapter:
            return ""
        with self._lock:
            loaded = self._adapters.get(adapter)
        if loaded is None:
            raise ModelNotFound(f"no adapter {adapter[:120]!r} is loaded", param="model")
        return loaded.key

    def adapters(self) -> Mapping[str, str]:
        """See the engine's port, for all of these."""
        with self._lock:
            return {name: one.address for name, one in self._adapters.items() if one is not None}

    async def load_adapter(self, name: str, folder: Path, address: str) -> None:
        with self._lock:
            if name in self._adapters:
                raise InvalidRequest(
                    f"an adapter {name!r} is loaded already; unload it first", param="lora_name"
                )
            if len(self._adapters) >= MAX_ADAPTERS:
                raise InvalidRequest(
                    f"{MAX_ADAPTERS} adapters are loaded, which is the limit; unload one first",
                    param="lora_name",
                )
            self._adapters[name] = None
        loaded = _Loaded(f"{name}/{next(self._generations)}", address)
        try:
            adapter = await asyncio.to_thread(self._runner.read_adapter, folder)
            await self._inbox.between_steps(lambda: self._add_adapter(loaded.key, adapter))
        except BaseException:
            with self._lock:
                del self._adapters[name]
            with contextlib.suppress(InternalError):
                # Who was cancelled has not stopped the work: what it adds nobody could name.
                self._inbox.ask(lambda: self._remove_adapter(loaded.key))
            raise
        with self._lock:
            self._adapters[name] = loaded

    async def unload_adapter(self, name: str) -> None:
        with self._lock:
            loaded = self._adapters.get(name)
            if loaded is None:
                raise ModelNotFound(f"no adapter {name[:120]!r} is loaded", param="lora_name")
            del self._adapters[name]
        key = loaded.key
        await self._inbox.between_steps(
            lambda: self._remove_adapter(key),
            lambda: all(job.sequence.adapter != key for job in self._jobs.values()),
        )

    async def sleep(self, level: int) -> None:
        self._inbox.wish_sleep()
        await self._inbox.between_steps(lambda: self._release(level), lambda: not self._jobs)

    async def wake(self) -> None:
        await self._inbox.between_steps(self._restore, lambda: not self._inbox.falling_asleep)

    # The engine's thread

    def knows(self, key: str) -> bool:
        """Whether the runner has this adapter."""
        return key in self._keys

    def add(self, errand: Errand) -> None:
        self._waiting.append(errand)

    def run_ready(self) -> None:
        # One may make another ready, so all are asked again after each.
        while (errand := next((one for one in self._waiting if one.ready()), None)) is not None:
            self._waiting.remove(errand)
            try:
                errand.work()
            except Exception as error:
                errand.done.set_exception(error)
            else:
                errand.done.set_result(None)

    def break_off(self) -> None:
        """The engine has stopped: nothing is done any more."""
        for errand in self._waiting:
            errand.done.set_exception(stopped())
        self._waiting.clear()

    def _release(self, level: int) -> None:
        try:
            if not self._released:
                self._runner.sleep(level)
                self._released = True
                self._pool.forget()
        finally:
            self._inbox.fell_asleep(self._released)

    def _restore(self) -> None:
        if self._released:
            self._runner.wake()
            self._released = False
        self._inbox.woke()

    def _add_adapter(self, key: str, adapter: Any) -> None:
        self._runner.add_adapter(key, adapter)
        self._keys.add(key)

    def _remove_adapter(self, key: str) -> None:
        if key in self._keys:
            self._keys.remove(key)
            self._runner.remove_adapter(key)
