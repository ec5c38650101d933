"""The engine's thread: takes commands, schedules, runs and relays, step after step.

Everything here belongs to that one thread; event loops reach it through ``Inbox`` and it reaches
them through ``stream.Outbox``. Must not know HTTP, models or tensors.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from cloudlm.core.chat import FinishReason
from cloudlm.core.clock import Clock
from cloudlm.core.errors import CloudlmError, InternalError, InvalidRequest, ModelNotFound
from cloudlm.engine.answer import Answer, Tokenizer
from cloudlm.engine.api import EngineInfo, EngineStats, TokenEvent
from cloudlm.engine.constraint import TokenGuide
from cloudlm.engine.errands import Errands, Resident
from cloudlm.engine.inbox import (
    CancelRequest,
    CancelSequence,
    Close,
    Errand,
    Fail,
    Inbox,
    Job,
    Submit,
)
from cloudlm.engine.limits import Limits
from cloudlm.engine.masks import MaskThread, StepMasks
from cloudlm.engine.pooling import PooledPrompt
from cloudlm.engine.scheduler import Advance, Scheduler
from cloudlm.engine.speculate import Lookup
from cloudlm.engine.step import Sampled, Step
from cloudlm.engine.stream import Outbox

_logger = logging.getLogger(__name__)


class Runner(Resident, Protocol):
    """What computes a step. Used by the engine's thread only, ``close`` included."""

    num_blocks: int
    block_size: int
    info: EngineInfo

    def run(self, step: Step, masks: StepMasks | None = None) -> list[Sampled]:
        """One Sampled per chunk that samples, and per draft of it, or asked for prompt log
        probabilities or pooling.
        ``masks`` are there if a sequence is constrained."""
        ...

    def close(self) -> None: ...


class EngineLoop:
    """``run`` is the thread. When the runner fails, every sequence fails with InternalError and
    nothing is taken any more."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        limits: Limits,
        inbox: Inbox,
        clock: Clock,
        lookup: Lookup | None = None,
    ) -> None:
        self._runner = runner
        self._tokenizer = tokenizer
        self._inbox = inbox
        self._clock = clock
        self.scheduler = Scheduler(limits, lookup)
        self._jobs: dict[int, Job] = {}
        self.errands = Errands(runner, inbox, self._jobs, self.scheduler.pool)
        self._outbox = Outbox()
        self._masks = MaskThread()
        self._taken = 0
        self._steps = 0
        self._generated_tokens = 0
        self._finished: Counter[str] = Counter()

    def run(self) -> None:
        try:
            while self._take_commands():
                self._step()
            self._end_all()
        except BaseException:  # whatever it was, nobody else would tell the consumers
            _logger.exception("engine_failed")
            self._fail_all()
        finally:
            self._inbox.stop()
            self._masks.close()
            try:
                self._runner.close()
            except Exception:
                _logger.exception("runner_close_failed")

    def _take_commands(self) -> bool:
        """Obey what was asked; wait while there is nothing to do. False when it is time to stop."""
        while True:
            self.errands.run_ready()
            command = self._inbox.take(wait=not self.scheduler.has_work)
            if command is None:
                return True
            if isinstance(command, Close):
                return False
            if isinstance(command, Fail):
                raise InternalError(command.reason)
            self._obey(command)
            if not self.scheduler.has_work:
                self._publish()

    def _obey(self, command: Submit | CancelSequence | CancelRequest | Errand) -> None:
        if isinstance(command, Submit):
            self._taken += 1
            self._accept(command.job)
        elif isinstance(command, CancelSequence):
            self._abort(command.sequence_id)
        elif isinstance(command, Errand):
            self.errands.add(command)
        else:
            for job in list(self._jobs.values()):
                if job.sequence.request_id == command.request_id:
                    self._abort(job.sequence.sequence_id)

    def _accept(self, job: Job) -> None:
        self._jobs[job.sequence.sequence_id] = job
        if not self.errands.knows(job.sequence.adapter):  # unloaded while it was on its way
            self._fail(job, ModelNotFound("the adapter was unloaded", param="model"))
            return
        try:
            if job.sequence.pooling is None:
                job.answer = Answer(job.sequence, self._tokenizer, job.shown_token_ids)
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
            self.scheduler.add(job.sequence, drafts=job.guide is None)

    def _step(self) -> None:
        step = self.scheduler.schedule()
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
        for advance in self.scheduler.apply(sampled):
            if advance.sequence.sequence_id in self._jobs:  # else a stop string has ended it
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
        fault = self._guided(job, event)  # first: behind a fault any token may have ended it
        if fault is not None:
            self._fail(job, fault)
            return
        if event.finish_reason is not None:
            self._end(job, event)
            return
        self._outbox.post(job.mailbox, event)
        if isinstance(job.answer, Answer) and job.guide is not None and job.guide.finished:
            self._end(job, job.answer.conclude())

    def _guided(self, job: Job, event: TokenEvent) -> CloudlmError | None:
        """Tell the guide what was sampled, if the answer goes on; what is wrong if it is none."""
        if job.guide is None:
            return None
        if job.guide.fault is None and event.token_ids and event.finish_reason is None:
            job.guide.accept(event.token_ids)
        if job.guide.fault is None:
            return None
        return InvalidRequest(f"the answer cannot follow its constraint: {job.guide.fault}")

    def _abort(self, sequence_id: int) -> None:
        job = self._jobs.get(sequence_id)
        if job is not None:
            cached = job.sequence.cached_tokens or 0
            self._end(job, TokenEvent((), "", (), FinishReason.ABORT, cached_tokens=cached))

    def _end(self, job: Job, event: TokenEvent) -> None:
        reason = event.finish_reason
        assert reason is not None
        self._forget(job, reason)
        self._finished[reason.value] += 1
        self._outbox.post(job.mailbox, event)

    def _undecodable(self, job: Job) -> InternalError:
        """Logs the exception that is being handled."""
        _logger.exception("sequence_failed", extra={"fields": {"id": job.sequence.request_id}})
        return InternalError("the answer could not be decoded")

    def _fail(self, job: Job, error: CloudlmError) -> None:
        self._forget(job, FinishReason.ABORT)
        self._finished["error"] += 1
        self._outbox.post(job.mailbox, error)

    def _forget(self, job: Job, reason: FinishReason) -> None:
        del self._jobs[job.sequence.sequence_id]
        self.scheduler.cancel(job.sequence.sequence_id, reason)

    def _publish(self, busy_since: float | None = None) -> None:
        """Renew the snapshot, then wake the consumers (who so see counters that include them)."""
        scheduler = self.scheduler
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
            drafts=scheduler.drafts.drafts,
            drafted_tokens=scheduler.drafts.drafted_tokens,
            accepted_tokens=scheduler.drafts.accepted_tokens,
            generated_tokens=self._generated_tokens,
            finished=dict(self._finished),
            busy_since=busy_since,
        )
        self._inbox.publish(snapshot, self._taken)
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
        self._inbox.stop()
        error = "the engine failed and this replica must be restarted; its log says why"

        def fail(job: Job) -> None:
            del self._jobs[job.sequence.sequence_id]
            self._finished["error"] += 1
            self._outbox.post(job.mailbox, InternalError(error))

        self._drain(fail)

    def _drain(self, end: Callable[[Job], None]) -> None:
        """End every sequence there is. Nothing can be submitted any more, so none is missed."""
        while (command := self._inbox.take(wait=False)) is not None:
            if isinstance(command, Submit):
                self._taken += 1
                job = command.job
                self._jobs[job.sequence.sequence_id] = job
            elif isinstance(command, Errand):
                self.errands.add(command)
        for job in list(self._jobs.values()):
            end(job)
        self.errands.break_off()
        self._publish()
