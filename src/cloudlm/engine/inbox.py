"""What event loops ask of the engine's thread, and what it lets them know: the pendant of
``stream.Outbox``.

The one place that both sides touch; everything in it is guarded by its lock, but for the queue,
which guards itself. Must not know what the thread does with a command.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace

from cloudlm.core.errors import InternalError, Overloaded, Unavailable
from cloudlm.engine.answer import Answer
from cloudlm.engine.api import EngineStats
from cloudlm.engine.constraint import TokenGuide
from cloudlm.engine.limits import Limits
from cloudlm.engine.pooling import PooledPrompt
from cloudlm.engine.sequence import Sequence
from cloudlm.engine.stream import Mailbox


@dataclass(slots=True)
class Job:
    """A sequence with its consumer. ``answer`` is made by the engine's thread. Times are
    monotonic; ``queued_s`` is told once, with the first event after the first step."""

    sequence: Sequence
    mailbox: Mailbox
    submitted_at: float
    guide: TokenGuide | None = None
    shown_token_ids: frozenset[int] = frozenset()
    answer: Answer | PooledPrompt | None = None
    queued_s: float | None = None
    started: bool = False


@dataclass(frozen=True, slots=True)
class Submit:
    job: Job


@dataclass(frozen=True, slots=True)
class CancelSequence:
    sequence_id: int


@dataclass(frozen=True, slots=True)
class CancelRequest:
    request_id: str


@dataclass(frozen=True, slots=True)
class Close:
    pass


@dataclass(frozen=True, slots=True)
class Fail:
    reason: str


@dataclass(frozen=True, slots=True)
class Errand:
    """Something to do between two steps, as soon as ``ready``."""

    ready: Callable[[], bool]
    work: Callable[[], None]
    done: Future[None]


Command = Submit | CancelSequence | CancelRequest | Errand | Fail | Close


class Inbox:
    """Commands on their way to the engine's thread, and the snapshot that it publishes.

    ``max_waiting`` sequences may be queued; those that the next step can start are not counted.
    """

    def __init__(self, limits: Limits, max_waiting: int) -> None:
        self._limits = limits
        self._max_waiting = max_waiting
        # SimpleQueue.put is re-entrant: a stream may be collected, and cancel, at any point.
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards what is below
        self._incoming = 0  # submitted, but not yet in the snapshot
        self._stopped = False  # closing, failed or ended
        self._asleep = False  # from the wish to sleep until awake
        self._falling_asleep = 0  # wishes that are not yet done
        self._snapshot = EngineStats(blocks_total=limits.blocks_total)

    def submit(self, job: Job) -> None:
        """Raises InternalError when stopped, Unavailable when asleep, Overloaded when the queue is
        full."""
        with self._lock:
            self._refuse_if_unable()
            self._incoming += 1
            self._commands.put(Submit(job))

    def cancel_sequence(self, sequence_id: int) -> None:
        self._commands.put(CancelSequence(sequence_id))

    def cancel_request(self, request_id: str) -> None:
        self._commands.put(CancelRequest(request_id))

    def fail(self, reason: str) -> None:
        self._commands.put(Fail(reason))

    def ask(self, work: Callable[[], None], ready: Callable[[], bool] = lambda: True) -> Errand:
        """Have the engine's thread do ``work`` when ``ready``, which is asked there, too. Raises
        InternalError when stopped."""
        errand = Errand(ready, work, Future())
        with self._lock:
            if self._stopped:
                raise stopped()
            self._commands.put(errand)
        return errand

    async def between_steps(
        self, work: Callable[[], None], ready: Callable[[], bool] = lambda: True
    ) -> None:
        """``ask``, and wait until it is done. Whoever stops waiting does not stop the work. Raises
        what it raises, InternalError when stopped."""
        await asyncio.shield(asyncio.wrap_future(self.ask(work, ready).done))

    def wish_sleep(self) -> None:
        """From now on nothing is taken; what was taken is to end first."""
        with self._lock:
            self._falling_asleep += 1
            self._asleep = True

    def close(self) -> None:
        with self._lock:
            self._stopped = True
            self._commands.put(Close())

    def stats(self) -> EngineStats:
        """The snapshot; ``waiting`` includes what was submitted since."""
        with self._lock:
            snapshot = self._snapshot
            waiting, alive = snapshot.waiting + self._incoming, not self._stopped
        return replace(snapshot, waiting=waiting, alive=alive, finished=dict(snapshot.finished))

    def _refuse_if_unable(self) -> None:
        """Sequences that the next step can start are not counted as queued, or an idle engine
        would refuse a burst that it can run at once."""
        if self._stopped:
            raise stopped()
        if self._asleep:
            raise Unavailable("the model is asleep; wake it first", retry_after_s=1.0)
        snapshot = self._snapshot
        idle = 0 if snapshot.waiting else self._limits.max_batch_sequences - snapshot.running
        queued = snapshot.waiting + max(0, self._incoming - idle)
        if queued >= self._max_waiting:
            raise Overloaded(
                f"the queue is full: {queued} sequences wait and {self._max_waiting} may; "
                "try again later",
                retry_after_s=1.0,
            )

    # For the engine's thread

    def take(self, wait: bool) -> Command | None:
        """The next command; None if there is none and it is not to be waited for."""
        try:
            return self._commands.get(block=wait)
        except queue.Empty:
            return None

    def publish(self, snapshot: EngineStats, taken: int) -> None:
        """Renew the snapshot, which has ``taken`` more of what was submitted."""
        with self._lock:
            self._snapshot = snapshot
            self._incoming -= taken

    def stop(self) -> None:
        """The thread ends, for whatever reason: nothing can be submitted any more."""
        with self._lock:
            self._stopped = True

    def fell_asleep(self, asleep: bool) -> None:
        """One wish to sleep is done, or could not be."""
        with self._lock:
            self._falling_asleep -= 1
            self._asleep = asleep

    def woke(self) -> None:
        with self._lock:
            self._asleep = False

    @property
    def falling_asleep(self) -> bool:
        """Whether a wish to sleep is not yet done."""
        return self._falling_asleep > 0


def stopped() -> InternalError:
    return InternalError("the engine has stopped; this replica must be restarted")
