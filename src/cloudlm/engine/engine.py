"""Our engine: one thread that schedules, runs and relays, step after step.

Event loops reach the thread through a command queue and it reaches them through ``stream.Outbox``;
nothing else is shared but a snapshot of counters. Must not know HTTP, models or tensors.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Listing
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from cloudlm.core.chat import Constraint, FinishReason
from cloudlm.core.clock import Clock, SystemClock
from cloudlm.core.errors import (
    CloudlmError,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    Unavailable,
)
from cloudlm.engine.answer import Answer
from cloudlm.engine.api import (
    Embedding,
    EmbedRequest,
    EngineInfo,
    EngineStats,
    GenerateRequest,
    TokenEvent,
)
from cloudlm.engine.constraint import Constrainer, TokenGuide, guide_of
from cloudlm.engine.intake import sequence_for, sequence_to_embed
from cloudlm.engine.limits import Limits
from cloudlm.engine.masks import MaskThread, StepMasks
from cloudlm.engine.pooling import PooledPrompt, broken_off, embed_all
from cloudlm.engine.scheduler import Advance, Scheduler
from cloudlm.engine.sequence import Sequence
from cloudlm.engine.step import Pooling, Sampled, Step
from cloudlm.engine.stream import Mailbox, Outbox, TokenStream
from cloudlm.engine.tokens import Tokenizer

_logger = logging.getLogger(__name__)

MAX_ADAPTERS = 256
"""LoRA adapters that may be loaded at a time."""

CLOSE_TIMEOUT_S = 30.0
"""Longest wait for the step that runs while the engine is closed, seconds."""


class Runner(Protocol):
    """What computes a step. Used by the engine's thread only, ``close`` included."""

    num_blocks: int
    block_size: int
    info: EngineInfo

    def run(self, step: Step, masks: StepMasks | None = None) -> list[Sampled]:
        """One Sampled per chunk that samples or asked for prompt log probabilities or pooling.
        ``masks`` are there if a sequence is constrained."""
        ...

    def read_adapter(self, folder: Path) -> Any:
        """A LoRA adapter, checked; from any thread, the only method that is."""
        ...

    def add_adapter(self, key: str, adapter: Any) -> None: ...

    def remove_adapter(self, key: str) -> None: ...

    def sleep(self, level: int) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class _Job:
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
class _Submit:
    job: _Job


@dataclass(frozen=True, slots=True)
class _CancelSequence:
    sequence_id: int


@dataclass(frozen=True, slots=True)
class _CancelRequest:
    request_id: str


@dataclass(frozen=True, slots=True)
class _Close:
    pass


@dataclass(frozen=True, slots=True)
class _Fail:
    reason: str


@dataclass(frozen=True, slots=True)
class _Errand:
    """Something to do between two steps, as soon as ``ready``."""

    ready: Callable[[], bool]
    work: Callable[[], None]
    done: Future[None]


@dataclass(frozen=True, slots=True)
class _Loaded:
    """An adapter that requests may name. ``key`` is never used again: what the prefix cache holds
    of an adapter must not be found by another of the same name."""

    key: str
    address: str


_Command = _Submit | _CancelSequence | _CancelRequest | _Errand | _Fail | _Close


class LocalEngine:
    """The Engine port over a runner on this machine. Make one with ``LocalEngine.start``.

    ``tokenizer`` is the model's, for whoever has text and wants token ids; it may be used from any
    thread. ``submit``, ``cancel``, ``stats`` may be called from any thread that runs an event loop.
    When the runner fails, every sequence fails with InternalError, ``stats().alive`` turns False
    and stays so: the process must be restarted.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        limits: Limits,
        max_waiting: int,
        clock: Clock,
        pooling: Pooling = Pooling.LAST,
    ) -> None:
        self.info = runner.info
        self._runner = runner
        self._constrainer = Constrainer(
            tokenizer, runner.info.vocab_size, runner.info.eos_token_ids
        )
        self.tokenizer = tokenizer
        self._limits = limits
        self._max_waiting = max_waiting
        self._clock = clock
        self._pooling = pooling
        self._ids = itertools.count(1)
        # SimpleQueue.put is re-entrant: a stream may be collected, and cancel, at any point.
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._generations = itertools.count(1)
        self._embedding: set[str] = set()  # request ids of the calls of embed
        self._lock = threading.Lock()  # guards what is below
        self._adapters: dict[str, _Loaded | None] = {}  # None while it loads
        self._incoming = 0  # submitted, but not yet in the snapshot
        self._closing = False
        self._asleep = False  # from the wish to sleep until awake
        self._falling_asleep = 0  # wishes that are not yet done
        self._failed = False
        self._snapshot = EngineStats(blocks_total=limits.blocks_total)
        # From here on: the engine thread's own.
        self._scheduler = Scheduler(limits)
        self._jobs: dict[int, _Job] = {}
        self._errands: list[_Errand] = []
        self._keys = {""}
        self._released = False
        self._outbox = Outbox()
        self._masks = MaskThread()
        self._taken = 0
        self._steps = 0
        self._generated_tokens = 0
        self._finished: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._run, name="cloudlm-engine", daemon=True)

    @classmethod
    def start(
        cls,
        runner: Runner,
        tokenizer: Tokenizer,
        *,
        max_batch_tokens: int,
        max_batch_sequences: int,
        max_waiting: int,
        pooling: Pooling = Pooling.LAST,
        clock: Clock | None = None,
    ) -> LocalEngine:
        """Start the thread. Raises BadSetting for limits below 1."""
        limits = Limits(
            max_model_len=runner.info.max_model_len,
            block_size=runner.block_size,
            blocks_total=runner.num_blocks,
            max_batch_tokens=max_batch_tokens,
            max_batch_sequences=max_batch_sequences,
        )
        engine = cls(runner, tokenizer, limits, max_waiting, clock or SystemClock(), pooling)
        engine._thread.start()
        return engine

    async def guide(
        self, constraint: Constraint, output_token_ids: tuple[int, ...] = ()
    ) -> TokenGuide:
        """See the port."""
        return await self._constrainer.guide(constraint, output_token_ids)

    def submit(self, request: GenerateRequest) -> TokenStream:
        """See the port. Must be called in a running event loop, which then gets the events."""
        key = self._key_of(request.adapter)
        sequence = sequence_for(request, next(self._ids), self.info, self._limits, key)
        return self._enqueue(sequence, guide_of(request), request.shown_token_ids)

    async def embed(self, requests: Listing[EmbedRequest]) -> list[Embedding]:
        """See the port."""
        sequences = [
            sequence_to_embed(one, next(self._ids), self._pooling, self.info, self._limits, key)
            for one in requests
            for key in [self._key_of(one.adapter)]
        ]
        window = max(1, self._limits.max_batch_sequences // 2)
        ids = {one.request_id for one in requests}
        self._embedding.update(ids)
        try:
            return await embed_all(sequences, self._enqueue_input, window)
        finally:
            self._embedding -= ids

    def _enqueue_input(self, sequence: Sequence) -> TokenStream:
        """Raises Unavailable when the call was cancelled between two of its inputs."""
        if sequence.request_id not in self._embedding:
            raise broken_off()
        return self._enqueue(sequence)

    def adapters(self) -> Mapping[str, str]:
        """See the port."""
        with self._lock:
            return {name: one.address for name, one in self._adapters.items() if one is not None}

    async def load_adapter(self, name: str, folder: Path, address: str) -> None:
        """See the port."""
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
            await self._between_steps(lambda: self._add_adapter(loaded.key, adapter))
        except BaseException:
            with self._lock:
                del self._adapters[name]
            raise
        with self._lock:
            self._adapters[name] = loaded

    async def unload_adapter(self, name: str) -> None:
        """See the port."""
        with self._lock:
            loaded = self._adapters.get(name)
            if loaded is None:
                raise ModelNotFound(f"no adapter {name[:120]!r} is loaded", param="lora_name")
            del self._adapters[name]
        key = loaded.key
        await self._between_steps(
            lambda: self._remove_adapter(key),
            lambda: all(job.sequence.adapter != key for job in self._jobs.values()),
        )

    async def sleep(self, level: int) -> None:
        """See the port."""
        with self._lock:
            self._falling_asleep += 1
            self._asleep = True
        await self._between_steps(lambda: self._release(level), lambda: not self._jobs)

    async def wake(self) -> None:
        """See the port."""
        await self._between_steps(self._restore, lambda: not self._falling_asleep)

    def _key_of(self, adapter: str) -> str:
        if not adapter:
            return ""
        with self._lock:
            loaded = self._adapters.get(adapter)
        if loaded is None:
            raise ModelNotFound(f"no adapter {adapter[:120]!r} is loaded", param="model")
        return loaded.key

    async def _between_steps(
        self, work: Callable[[], None], ready: Callable[[], bool] = lambda: True
    ) -> None:
        """Let the engine's thread do ``work`` when ``ready``, which is asked there, too. Whoever
        stops waiting does not stop the work."""
        errand = _Errand(ready, work, Future())
        with self._lock:
            if self._closing or self._failed or not self._thread.is_alive():
                raise _stopped()
            self._commands.put(errand)
        await asyncio.shield(asyncio.wrap_future(errand.done))

    def _enqueue(
        self,
        sequence: Sequence,
        guide: TokenGuide | None = None,
        shown_token_ids: frozenset[int] = frozenset(),
    ) -> TokenStream:
        """Raises InternalError and Overloaded."""
        mailbox = Mailbox(asyncio.get_running_loop())
        job = _Job(sequence, mailbox, self._clock.monotonic(), guide, shown_token_ids)
        with self._lock:
            self._refuse_if_unable()
            self._incoming += 1
            self._commands.put(_Submit(job))
        cancel = partial(self._commands.put, _CancelSequence(sequence.sequence_id))
        return TokenStream(mailbox, cancel)

    def cancel(self, request_id: str) -> None:
        """See the port. Takes effect before the next step."""
        self._embedding.discard(request_id)
        self._commands.put(_CancelRequest(request_id))

    def fail(self, reason: str) -> None:
        """End as if a step had failed: what the runner needs is gone. From any thread."""
        self._commands.put(_Fail(reason))

    def stats(self) -> EngineStats:
        """The counters after the last step; ``waiting`` includes what was submitted since.

        ``prefix_queries`` and ``prefix_hits`` count tokens looked up and found.
        """
        with self._lock:
            snapshot = self._snapshot
            waiting = snapshot.waiting + self._incoming
            alive = self._thread.is_alive() and not self._failed and not self._closing
        return replace(snapshot, waiting=waiting, alive=alive, finished=dict(snapshot.finished))

    async def close(self) -> None:
        """See the port. Raises InternalError if a step does not end within CLOSE_TIMEOUT_S."""
        with self._lock:
            self._closing = True
            self._commands.put(_Close())
        self._constrainer.close()
        await asyncio.to_thread(self._thread.join, CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            raise InternalError(f"the engine's step did not end within {CLOSE_TIMEOUT_S:.0f} s")

    def _refuse_if_unable(self) -> None:
        """Raises InternalError when stopped, Unavailable when asleep, Overloaded when the queue is
        full.

        Sequences that the next step can start are not counted as queued, or an idle engine would
        refuse a burst that it can run at once.
        """
        if self._closing or self._failed or not self._thread.is_alive():
            raise _stopped()
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

    # The engine's thread

    def _run(self) -> None:
        try:
            while self._take_commands():
                self._step()
            self._end_all()
        except BaseException:  # whatever it was, nobody else would tell the consumers
            _logger.exception("engine_failed")
            self._fail_all()
        finally:
            self._masks.close()
            try:
                self._runner.close()
            except Exception:
                _logger.exception("runner_close_failed")

    def _take_commands(self) -> bool:
        """Obey what was asked; wait while there is nothing to do. False when it is time to stop."""
        while True:
            self._run_errands()
            try:
                command = self._commands.get(block=not self._scheduler.has_work)
            except queue.Empty:
                return True
            if isinstance(command, _Close):
                return False
            if isinstance(command, _Fail):
                raise InternalError(command.reason)
            self._obey(command)
            if not self._scheduler.has_work:
                self._publish()

    def _run_errands(self) -> None:
        # One may make another ready, so all are asked again after each.
        while (errand := next((one for one in self._errands if one.ready()), None)) is not None:
            self._errands.remove(errand)
            try:
                errand.work()
            except Exception as error:
                errand.done.set_exception(error)
            else:
                errand.done.set_result(None)

    def _release(self, level: int) -> None:
        try:
            if not self._released:
                self._runner.sleep(level)
                self._released = True
                self._scheduler.pool.forget()
        finally:
            with self._lock:
                self._falling_asleep -= 1
                self._asleep = self._released

    def _restore(self) -> None:
        if self._released:
            self._runner.wake()
            self._released = False
        with self._lock:
            self._asleep = False

    def _add_adapter(self, key: str, adapter: Any) -> None:
        self._runner.add_adapter(key, adapter)
        self._keys.add(key)

    def _remove_adapter(self, key: str) -> None:
        self._keys.discard(key)
        self._runner.remove_adapter(key)

    def _obey(self, command: _Submit | _CancelSequence | _CancelRequest | _Errand) -> None:
        if isinstance(command, _Submit):
            self._taken += 1
            self._accept(command.job)
        elif isinstance(command, _CancelSequence):
            self._abort(command.sequence_id)
        elif isinstance(command, _Errand):
            self._errands.append(command)
        else:
            for job in list(self._jobs.values()):
                if job.sequence.request_id == command.request_id:
                    self._abort(job.sequence.sequence_id)

    def _accept(self, job: _Job) -> None:
        self._jobs[job.sequence.sequence_id] = job
        if job.sequence.adapter not in self._keys:  # unloaded while it was on its way
            self._fail(job, ModelNotFound("the adapter was unloaded", param="model"))
            return
        try:
            if job.sequence.pooling is None:
                job.answer = Answer(job.sequence, self.tokenizer, job.shown_token_ids)
            else:
                job.answer = PooledPrompt(job.sequence)
        except Exception:
            self._fail(job, self._undecodable(job))
            return
        if job.answer.finished is not None:
            self._end(job, job.answer.finished)
        elif isinstance(job.answer, Answer) and job.guide is not None and job.guide.finished:
            self._end(job, job.answer.conclude())
        else:
            self._scheduler.add(job.sequence)

    def _step(self) -> None:
        step = self._scheduler.schedule()
        if not step.chunks:
            raise RuntimeError("the scheduler has work but found no step")
        now = self._clock.monotonic()
        for chunk in step.chunks:
            job = self._jobs[chunk.sequence_id]
            if not job.started:
                job.started, job.queued_s = True, now - job.submitted_at
        masks = self._begin_masks(step)
        self._publish(busy_since=now)
        sampled = self._runner.run(step) if masks is None else self._runner.run(step, masks)
        self._steps += 1
        for advance in self._scheduler.apply(sampled):
            self._relay(advance)
        self._publish()

    def _begin_masks(self, step: Step) -> StepMasks | None:
        """Have the masks of the constrained sequences computed during the forward pass."""
        guides: dict[int, TokenGuide] = {}
        for chunk in step.chunks:
            guide = self._jobs[chunk.sequence_id].guide
            if guide is not None and chunk.samples:
                guides[chunk.sequence_id] = guide
        return self._masks.begin(guides) if guides else None

    def _relay(self, advance: Advance) -> None:
        job = self._jobs[advance.sequence.sequence_id]
        assert job.answer is not None
        if advance.chunk.samples:
            self._generated_tokens += 1
        try:
            event = job.answer.advance(advance)
        except Exception:  # of the tokenizer: it concerns this sequence alone
            self._fail(job, self._undecodable(job))
            return
        if event is None:
            return
        if job.queued_s is not None:
            event, job.queued_s = replace(event, queued_s=job.queued_s), None
        if event.finish_reason is not None:
            self._end(job, event)
            return
        fault = self._guided(job, event.token_ids)
        if fault is not None:
            self._fail(job, fault)
            return
        self._outbox.post(job.mailbox, event)
        if isinstance(job.answer, Answer) and job.guide is not None and job.guide.finished:
            self._end(job, job.answer.conclude())

    def _guided(self, job: _Job, token_ids: tuple[int, ...]) -> CloudlmError | None:
        """Tell the guide what was sampled; what is wrong if the answer cannot go on."""
        if job.guide is None:
            return None
        if job.guide.fault is None and token_ids:
            job.guide.accept(token_ids)
        if job.guide.fault is None:
            return None
        return InvalidRequest(f"the answer cannot follow its constraint: {job.guide.fault}")

    def _abort(self, sequence_id: int) -> None:
        job = self._jobs.get(sequence_id)
        if job is not None:
            cached = job.sequence.cached_tokens or 0
            self._end(job, TokenEvent((), "", (), FinishReason.ABORT, cached_tokens=cached))

    def _end(self, job: _Job, event: TokenEvent) -> None:
        reason = event.finish_reason
        assert reason is not None
        self._forget(job, reason)
        self._finished[reason.value] += 1
        self._outbox.post(job.mailbox, event)

    def _undecodable(self, job: _Job) -> InternalError:
        """Logs the exception that is being handled."""
        _logger.exception("sequence_failed", extra={"fields": {"id": job.sequence.request_id}})
        return InternalError("the answer could not be decoded")

    def _fail(self, job: _Job, error: CloudlmError) -> None:
        self._forget(job, FinishReason.ABORT)
        self._finished["error"] += 1
        self._outbox.post(job.mailbox, error)

    def _forget(self, job: _Job, reason: FinishReason) -> None:
        del self._jobs[job.sequence.sequence_id]
        self._scheduler.cancel(job.sequence.sequence_id, reason)

    def _publish(self, busy_since: float | None = None) -> None:
        """Renew the snapshot, then wake the consumers (who so see counters that include them)."""
        scheduler = self._scheduler
        snapshot = EngineStats(
            steps=self._steps,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_usage=scheduler.pool.usage,
            blocks_total=scheduler.pool.blocks_total,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            preemptions=scheduler.preemptions,
            prompt_tokens=scheduler.prompt_tokens,
            generated_tokens=self._generated_tokens,
            finished=dict(self._finished),
            busy_since=busy_since,
        )
        with self._lock:
            self._snapshot = snapshot
            self._incoming -= self._taken
        self._taken = 0
        lost = {id(mailbox) for mailbox in self._outbox.flush()}
        orphans = [job for job in self._jobs.values() if id(job.mailbox) in lost]
        for job in orphans:
            self._forget(job, FinishReason.ABORT)
            self._finished[FinishReason.ABORT.value] += 1
        if orphans:
            self._publish(busy_since)

    def _end_all(self) -> None:
        """Closed: everything that runs or waits ends with ABORT."""
        self._drain(lambda job: self._abort(job.sequence.sequence_id))

    def _fail_all(self) -> None:
        """The runner or the loop failed: no state can be trusted, so nothing is freed."""
        with self._lock:
            self._failed = True
        error = "the engine failed and this replica must be restarted; its log says why"

        def fail(job: _Job) -> None:
            del self._jobs[job.sequence.sequence_id]
            self._finished["error"] += 1
            self._outbox.post(job.mailbox, InternalError(error))

        self._drain(fail)

    def _drain(self, end: Callable[[_Job], None]) -> None:
        """End every sequence there is. Nothing can be submitted any more, so none is missed."""
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                break
            if isinstance(command, _Submit):
                self._taken += 1
                job = command.job
                self._jobs[job.sequence.sequence_id] = job
            elif isinstance(command, _Errand):
                self._errands.append(command)
        for job in list(self._jobs.values()):
            end(job)
        for errand in self._errands:
            errand.done.set_exception(_stopped())
        self._errands.clear()
        self._publish()


def _stopped() -> InternalError:
    return InternalError("the engine has stopped; this replica must be restarted")
