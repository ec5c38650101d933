"""Our engine: the port, over one thread that schedules, runs and relays.

What event loops call is here; the thread is ``loop``, what both share ``inbox``, what is done
between steps ``errands``. Must not know HTTP, models or tensors.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Mapping
from collections.abc import Sequence as Listing
from functools import partial
from pathlib import Path

from cloudlm.core.chat import Constraint
from cloudlm.core.clock import Clock, SystemClock
from cloudlm.core.errors import InternalError
from cloudlm.engine.api import Embedding, EmbedRequest, EngineStats, GenerateRequest
from cloudlm.engine.constraint import Constrainer, TokenGuide, guide_of
from cloudlm.engine.inbox import Inbox, Job
from cloudlm.engine.intake import sequence_for, sequence_to_embed
from cloudlm.engine.limits import Limits
from cloudlm.engine.loop import EngineLoop, Runner
from cloudlm.engine.pooling import broken_off, embed_all
from cloudlm.engine.sequence import Sequence
from cloudlm.engine.speculate import Lookup
from cloudlm.engine.step import Pooling
from cloudlm.engine.stream import Mailbox, TokenStream
from cloudlm.engine.tokens import Tokenizer

CLOSE_TIMEOUT_S = 30.0
"""Longest wait for the step that runs while the engine is closed, seconds."""


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
        lookup: Lookup | None = None,
    ) -> None:
        self.info = runner.info
        self._constrainer = Constrainer(
            tokenizer, runner.info.vocab_size, runner.info.eos_token_ids
        )
        self.tokenizer = tokenizer
        self._limits = limits
        self._clock = clock
        self._pooling = pooling
        self._ids = itertools.count(1)
        self._embedding: set[str] = set()  # request ids of the calls of embed
        self._inbox = Inbox(limits, max_waiting)
        self._loop = EngineLoop(runner, tokenizer, limits, self._inbox, clock, lookup)
        self._errands = self._loop.errands
        self._thread = threading.Thread(target=self._loop.run, name="cloudlm-engine", daemon=True)

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
        lookup: Lookup | None = None,
    ) -> LocalEngine:
        """Start the thread; with ``lookup`` tokens are guessed. Raises BadSetting for limits below
        1."""
        limits = Limits(
            max_model_len=runner.info.max_model_len,
            block_size=runner.block_size,
            blocks_total=runner.num_blocks,
            max_batch_tokens=max_batch_tokens,
            max_batch_sequences=max_batch_sequences,
        )
        timer = clock or SystemClock()
        engine = cls(runner, tokenizer, limits, max_waiting, timer, pooling, lookup)
        engine._thread.start()
        return engine

    async def guide(
        self, constraint: Constraint, output_token_ids: tuple[int, ...] = ()
    ) -> TokenGuide:
        """See the port."""
        return await self._constrainer.guide(constraint, output_token_ids)

    def submit(self, request: GenerateRequest) -> TokenStream:
        """See the port. Must be called in a running event loop, which then gets the events."""
        key = self._errands.key_of(request.adapter)
        sequence = sequence_for(request, next(self._ids), self.info, self._limits, key)
        return self._enqueue(sequence, guide_of(request), request.shown_token_ids)

    async def embed(self, requests: Listing[EmbedRequest]) -> list[Embedding]:
        """See the port."""
        sequences = [
            sequence_to_embed(one, next(self._ids), self._pooling, self.info, self._limits, key)
            for one in requests
            for key in [self._errands.key_of(one.adapter)]
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
        return self._errands.adapters()

    async def load_adapter(self, name: str, folder: Path, address: str) -> None:
        """See the port."""
        await self._errands.load_adapter(name, folder, address)

    async def unload_adapter(self, name: str) -> None:
        """See the port."""
        await self._errands.unload_adapter(name)

    async def sleep(self, level: int) -> None:
        """See the port."""
        await self._errands.sleep(level)

    async def wake(self) -> None:
        """See the port."""
        await self._errands.wake()

    def _enqueue(
        self,
        sequence: Sequence,
        guide: TokenGuide | None = None,
        shown_token_ids: frozenset[int] = frozenset(),
    ) -> TokenStream:
        """Raises as ``Inbox.submit``."""
        mailbox = Mailbox(asyncio.get_running_loop())
        now = self._clock.monotonic()
        self._inbox.submit(Job(sequence, mailbox, now, guide, shown_token_ids))
        return TokenStream(mailbox, partial(self._inbox.cancel_sequence, sequence.sequence_id))

    def cancel(self, request_id: str) -> None:
        """See the port. Takes effect before the next step."""
        self._embedding.discard(request_id)
        self._inbox.cancel_request(request_id)

    def fail(self, reason: str) -> None:
        """End as if a step had failed: what the runner needs is gone. From any thread."""
        self._inbox.fail(reason)

    def stats(self) -> EngineStats:
        """The counters after the last step; ``waiting`` includes what was submitted since.

        ``prefix_queries`` and ``prefix_hits`` count tokens looked up and found.
        """
        return self._inbox.stats()

    async def close(self) -> None:
        """See the port. Raises InternalError if a step does not end within CLOSE_TIMEOUT_S."""
        self._inbox.close()
        self._constrainer.close()
        await asyncio.to_thread(self._thread.join, CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            raise InternalError(f"the engine's step did not end within {CLOSE_TIMEOUT_S:.0f} s")
