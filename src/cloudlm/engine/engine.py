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
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from cloudlm.core.chat import Constraint, FinishReason
from cloudlm.core.clock import Clock, SystemClock
from cloudlm.core.errors import CloudlmError, InternalError, InvalidRequest, Overloaded
from cloudlm.engine.answer import Answer
from cloudlm.engine.api import EngineInfo, EngineStats, GenerateRequest, TokenEvent
from cloudlm.engine.constraint import Constrainer, TokenGuide, guide_of
from cloudlm.engine.intake import sequence_for
from cloudlm.engine.masks import MaskThread, StepMasks
from cloudlm.engine.scheduler import Advance, Limits, Scheduler
from cloudlm.engine.sequence import Sequence
from cloudlm.engine.step import Sampled, Step
from cloudlm.engine.stream import Mailbox, Outbox, TokenStream
from cloudlm.engine.tokens import Tokenizer

_logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 30.0
"""Longest wait for the step that runs while the engine is closed, seconds."""


class Runner(Protocol):
    """What computes a step. Used by the engine's thread only, ``close`` included."""

    num_blocks: int
    block_size: int
    info: EngineInfo

    def run(self, step: Step, masks: StepMasks | None = None) -> list[Sampled]:
        """One Sampled per chunk that samples or asked for prompt log probabilities. ``masks``
        are there if a sequence is constrained."""
        ...

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
    answer: Answer | None = None
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


_Command = _Submit | _CancelSequence | _CancelRequest | _Close


class LocalEngine:
    """The Engine port over a runner on this machine. Make one with ``LocalEngine.start``.

    ``tokenizer`` is the model's, for whoever has text and wants token ids; it may be used from any
    thread. ``submit``, ``cancel``, ``stats`` may be called from any thread that runs an event loop.
    When the runner fails, every sequence fails with InternalError, ``stats().alive`` turns False
    and stays so: the process must be restarted.
    """

    def __init__(
        self, runner: Runner, tokenizer: Tokenizer, limits: Limits, max_waiting: int, clock: Clock
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
        self._ids = itertools.count(1)
        # SimpleQueue.put is re-entrant: a stream may be collected, and cancel, at any point.
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards the four below
        self._incoming = 0  # submitted, but not yet in the snapshot
        self._closing = False
        self._failed = False
        self._snapshot = EngineStats(blocks_total=limits.blocks_total)
        # From here on: the engine thread's own.
        self._scheduler = Scheduler(limits)
        self._jobs: dict[int, _Job] = {}
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
        engine = cls(runner, tokenizer, limits, max_waiting, clock or SystemClock())
        engine._thread.start()
        return engine

    async def guide(
        self, constraint: Constraint, output_token_ids: tuple[int, ...] = ()
    ) -> TokenGuide:
        """See the port."""
        return await self._constrainer.guide(constraint, output_token_ids)

    def submit(self, request: GenerateRequest) -> TokenStream:
        """See the port. Must be called in a running event loop, which then gets the events."""
        sequence = sequence_for(request, next(self._ids), self.info, self._limits)
        mailbox = Mailbox(asyncio.get_running_loop())
        guide = guide_of(request)
        now = self._clock.monotonic()
        job = _Job(sequence, mailbox, now, guide, request.shown_token_ids)
        with self._lock:
            self._refuse_if_unable()
            self._incoming += 1
            self._commands.put(_Submit(job))
        cancel = partial(self._commands.put, _CancelSequence(sequence.sequence_id))
        return TokenStream(mailbox, cancel)

    def cancel(self, request_id: str) -> None:
        """See the port. Takes effect before the next step."""
        self._commands.put(_CancelRequest(request_id))

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
        """Raises InternalError when stopped, Overloaded when the queue is full.

        Sequences that the next step can start are not counted as queued, or an idle engine would
        refuse a burst that it can run at once.
        """
        if self._closing or self._failed or not self._thread.is_alive():
            raise InternalError("the engine has stopped; this replica must be restarted")
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
            try:
                command = self._commands.get(block=not self._scheduler.has_work)
            except queue.Empty:
                return True
            if isinstance(command, _Close):
                return False
            self._obey(command)
            if not self._scheduler.has_work:
                self._publish()

    def _obey(self, command: _Submit | _CancelSequence | _CancelRequest) -> None:
        if isinstance(command, _Submit):
            self._taken += 1
            self._accept(command.job)
        elif isinstance(command, _CancelSequence):
            self._abort(command.sequence_id)
        else:
            for job in list(self._jobs.values()):
                if job.sequence.request_id == command.request_id:
                    self._abort(job.sequence.sequence_id)

    def _accept(self, job: _Job) -> None:
        self._jobs[job.sequence.sequence_id] = job
        try:
            job.answer = Answer(job.sequence, self.tokenizer, job.shown_token_ids)
        except Exception:
            self._fail(job)
            return
        if job.answer.finished is not None:
            self._end(job, job.answer.finished)
        elif job.guide is not None and job.guide.finished:
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
            self._fail(job)
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
            self._fail_with(job, fault)
            return
        self._outbox.post(job.mailbox, event)
        if job.guide is not None and job.guide.finished:
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

    def _fail(self, job: _Job) -> None:
        _logger.exception("sequence_failed", extra={"fields": {"id": job.sequence.request_id}})
        self._fail_with(job, InternalError("the answer could not be decoded"))

    def _fail_with(self, job: _Job, error: CloudlmError) -> None:
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
        for job in list(self._jobs.values()):
            end(job)
        self._publish()
