"""One replica's state: starting, ready, sleeping, stopping; what handlers share and probes ask.

Holds no route and starts no server. All methods are called from the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from typing import Any, Generic, TypeVar

from cloudlm.core.clock import Clock
from cloudlm.core.errors import Unavailable
from cloudlm.engine.api import EngineInfo, EngineStats
from cloudlm.telemetry.logs import get_logger
from cloudlm.worker.config import WorkerConfig
from cloudlm.worker.health import OBSERVE_INTERVAL_S, Health, Progress
from cloudlm.worker.metrics import Metrics
from cloudlm.worker.prepare import Offload
from cloudlm.worker.serving import Served

logger = get_logger(__name__)
SLEEP_RETRY_AFTER_S = 5.0
S = TypeVar("S", bound=Served)


class Phase(StrEnum):
    """Where a replica is in its life."""

    LOADING = "loading"
    READY = "ready"
    SLEEPING = "sleeping"
    STOPPING = "stopping"


class Replica(Generic[S]):
    """The state of one worker process. ``S`` is what it serves with, by its engine."""

    def __init__(self, config: WorkerConfig, clock: Clock) -> None:
        self.config = config
        self.clock = clock
        self.phase = Phase.LOADING
        self.loading = "starting"
        self.offload = Offload()
        self.metrics = Metrics(config.served_model_name, clock, self._facts)
        self._serving: S | None = None
        self._progress = Progress(config.settings.control.stall_timeout_s)
        self._running: set[str] = set()
        self._loaded = asyncio.Event()  # or it never will be
        self._turning = asyncio.Lock()  # one at a time falls asleep or wakes up

    @property
    def serving(self) -> S:
        """The loaded model. Raises Unavailable before it is ready, asleep and while stopping."""
        if self.phase is Phase.STOPPING:
            raise Unavailable("this replica is stopping", retry_after_s=1.0)
        if self._serving is None:
            raise Unavailable(
                f"the model {self.config.served_model_name!r} is still loading ({self.loading})",
                retry_after_s=1.0,
            )
        if self.phase is Phase.SLEEPING:
            raise Unavailable(
                f"the model {self.config.served_model_name!r} is asleep; POST /wake_up wakes it",
                retry_after_s=SLEEP_RETRY_AFTER_S,
            )
        return self._serving

    async def sleep(self, level: int) -> None:
        """Refuse new requests from now on; returns when those that ran are finished and the memory
        is given back. Raises Unavailable (still loading, or stopping)."""
        async with self._turning:
            if self.phase is Phase.SLEEPING:
                return
            engine = self.serving.engine
            self.phase = Phase.SLEEPING
            try:
                await engine.sleep(level)
            except Exception:  # not cancellation: the engine falls asleep all the same
                self._leave_sleep()
                raise

    async def wake(self) -> None:
        """Load the model again; returns when requests are answered. Raises what loading raises, and
        Unavailable (still loading, or stopping)."""
        async with self._turning:
            if self.phase is not Phase.SLEEPING:
                _ = self.serving
                return
            assert self._serving is not None
            await self._serving.engine.wake()
            self._leave_sleep()

    def _leave_sleep(self) -> None:
        if self.phase is Phase.SLEEPING:  # it may be stopping by now
            self.phase = Phase.READY

    def become_ready(self, serving: S) -> None:
        """From now on requests are answered."""
        self._serving = serving
        if self.phase is Phase.LOADING:
            self.phase = Phase.READY
        self._loaded.set()

    async def until_loaded(self, longest_s: float) -> None:
        """Return when the model is loaded or the replica stops, at the latest after so many
        seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(longest_s):
                await self._loaded.wait()

    def stop_accepting(self) -> None:
        """New requests get 503; running ones go on."""
        self.phase = Phase.STOPPING
        self._loaded.set()

    @contextmanager
    def running(self, request_id: str) -> Iterator[None]:
        """Marks a request as running, so that it can be ended with the process."""
        self._running.add(request_id)
        try:
            yield
        finally:
            self._running.discard(request_id)

    def end_running(self) -> int:
        """Abort what still runs; returns how many requests that were."""
        for request_id in self._running:
            if self._serving is not None:
                self._serving.engine.cancel(request_id)
        return len(self._running)

    def health(self) -> Health:
        """The verdict now. A model that is still loading is healthy, if not ready."""
        if self._serving is None:
            return Health(None)
        return self._progress.observe(self._serving.engine.stats(), self.clock.monotonic())

    def report(self) -> dict[str, Any]:
        """``/health?verbose=1``."""
        health, serving = self.health(), self._serving
        stats = EngineStats() if serving is None else serving.engine.stats()
        return {
            "steps": stats.steps,
            "running": stats.running,
            "waiting": stats.waiting,
            "alive": stats.alive,
            "healthy": health.good,
            "fault": health.fault,
            "ready": self.phase is Phase.READY,
            "phase": self.phase.value,
            "model": self.config.served_model_name,
            "tensor_parallel": 1 if serving is None else serving.engine.info.tensor_parallel,
            "pipeline_parallel": 1 if serving is None else serving.engine.info.pipeline_parallel,
        }

    async def watch(self) -> str:
        """Observe the engine and the event loop until the engine is dead; returns what is wrong."""
        while True:
            before = self.clock.monotonic()
            await self.clock.sleep(OBSERVE_INTERVAL_S)
            self.metrics.note_lag(self.clock.monotonic() - before - OBSERVE_INTERVAL_S)
            health = self.health()
            serving = self._serving
            if serving is not None and not serving.engine.stats().alive:
                return health.fault or "the engine has stopped"

    async def close(self) -> None:
        """Free everything; running sequences end."""
        self.stop_accepting()
        self.offload.close()
        if self._serving is not None:
            await self._serving.close()

    def _facts(self) -> tuple[EngineInfo, EngineStats] | None:
        if self._serving is None:
            return None
        return self._serving.engine.info, self._serving.engine.stats()
