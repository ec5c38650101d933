"""Decides which tokens of which sequences the next step computes.

Continuous batching: every step first takes one token of each decoding sequence, then fills the
token budget with chunks of prompts, then admits waiting sequences. A pure decider: it is told what
arrived and what was sampled and returns data. Must not import torch, asyncio, time, logging or
threading.

Why it cannot stall: admission reserves blocks for all known tokens, so only decoding asks for
more; when none is free the running sequence that arrived last gives way. The running sequence that
arrived first therefore advances in every step, and alone it always fits (``Limits.total_tokens``).
A waiting sequence that does not fit is passed by at most ``MAX_BYPASSES`` later ones.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence as Listing
from dataclasses import dataclass

from cloudlm.core.chat import FinishReason
from cloudlm.core.errors import BadSetting, ContextLengthExceeded, InvalidRequest
from cloudlm.engine.blocks import BlockPool
from cloudlm.engine.sequence import Sequence, Status
from cloudlm.engine.step import Chunk, Sampled, Step

MAX_BYPASSES = 16
"""Later sequences that may be admitted while an earlier one does not fit; then all wait for it."""

_SCAN_WINDOW = 32  # sequences that do not fit and are looked past in one step: bounds its cost


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine can hold. Lengths and budgets are in tokens."""

    max_model_len: int
    block_size: int
    blocks_total: int
    max_batch_tokens: int
    max_batch_sequences: int

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value < 1:
                hint = "; raise kv_cache_mb" if name == "blocks_total" else ""
                raise BadSetting(f"{name} = {value} must be at least 1{hint}", param=name)

    @property
    def cache_tokens(self) -> int:
        return self.blocks_total * self.block_size

    def total_tokens(self, prompt_tokens: int, max_tokens: int | None) -> int:
        """The longest that a sequence may become, prompt and answer together, tokens.

        Without ``max_tokens`` it may grow until context or cache end. Raises InvalidRequest
        (``max_tokens`` is negative) and ContextLengthExceeded (the prompt leaves no room in the
        context, or prompt and answer could outgrow the whole cache).
        """
        if max_tokens is not None and max_tokens < 0:
            raise InvalidRequest(
                f"max_tokens = {max_tokens} must not be negative", param="max_tokens"
            )
        least = prompt_tokens + (0 if max_tokens == 0 else 1)
        if least > self.max_model_len:
            raise ContextLengthExceeded(
                f"this model's context is {self.max_model_len} tokens, but the prompt alone has "
                f"{prompt_tokens} and an answer needs at least {least - prompt_tokens} more; "
                "shorten the prompt"
            )
        if max_tokens is None:
            total = min(self.max_model_len, max(self.cache_tokens, least))
        else:
            total = min(self.max_model_len, prompt_tokens + max_tokens)
        if total > self.cache_tokens:
            raise ContextLengthExceeded(
                f"prompt ({prompt_tokens} tokens) and answer may need {total} tokens together, but "
                f"this server's key-value cache holds {self.cache_tokens}; shorten the prompt, "
                "lower max_tokens, or give the server a larger kv_cache_mb",
                param="max_tokens" if least <= self.cache_tokens else None,
            )
        return total


@dataclass(frozen=True, slots=True)
class Advance:
    """What one chunk of the last step did. ``sampled`` is None for a prompt's inner chunk;
    ``finish_reason`` is set when the sequence's tokens are complete (it holds no blocks then)."""

    sequence: Sequence
    chunk: Chunk
    sampled: Sampled | None
    finish_reason: FinishReason | None


class Scheduler:
    """``add`` and ``cancel`` between steps; ``schedule`` a step; ``apply`` what it sampled."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.pool = BlockPool(limits.blocks_total, limits.block_size)
        self.waiting: list[Sequence] = []  # both lists are in order of arrival
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.prompt_tokens = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._sequences: dict[int, Sequence] = {}
        self._arrivals = 0
        self._step = Step(())
        # Room that an admission leaves to those who run, so that it is not preempted at once.
        self._headroom_blocks = max(1, limits.blocks_total // 100)

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence, whose ``token_limit`` comes from ``Limits.total_tokens``."""
        assert sequence.sequence_id not in self._sequences
        assert sequence.ended_by_tokens() is None
        assert sequence.token_limit <= self.limits.cache_tokens
        sequence.arrival = self._arrivals
        self._arrivals += 1
        self._sequences[sequence.sequence_id] = sequence
        self.waiting.append(sequence)

    def cancel(self, sequence_id: int, reason: FinishReason = FinishReason.ABORT) -> bool:
        """End a sequence now and free its blocks. False when it is unknown or ended already."""
        sequence = self._sequences.get(sequence_id)
        if sequence is None:
            return False
        self._finish(sequence, reason)
        return True

    def schedule(self) -> Step:
        """The next step; empty only when there is no work."""
        budget = self.limits.max_batch_tokens
        chunks: list[Chunk] = []
        for sequence in self._decoding():
            chunks.append(self._chunk(sequence, 1))
            budget -= 1
        for sequence in self.running:
            if sequence.remaining > 1 and budget > 0:
                chunks.append(self._chunk(sequence, min(sequence.remaining, budget)))
                budget -= len(chunks[-1].token_ids)
        self._admit(budget, chunks)
        self._step = Step(tuple(chunks))
        return self._step

    def apply(self, sampled: Listing[Sampled]) -> list[Advance]:
        """Account for the step that ``schedule`` returned; one Advance per chunk still alive."""
        by_id = {one.sequence_id: one for one in sampled}
        chunks, self._step = self._step.chunks, Step(())
        advances: list[Advance] = []
        for chunk in chunks:
            sequence = self._sequences.get(chunk.sequence_id)
            if sequence is None:
                continue  # cancelled meanwhile
            one = by_id.get(chunk.sequence_id)
            self._publish(sequence, len(chunk.token_ids))
            if sequence.computed >= len(sequence.prompt):
                sequence.prompt_scored = True
            if chunk.samples:
                assert one is not None, "the runner sampled nothing"
                assert one.token_id is not None, "the runner sampled nothing"
                sequence.append(one.token_id)
            reason = None if sequence.remaining > 1 else sequence.ended_by_tokens()
            if reason is not None:
                self._finish(sequence, reason)
            advances.append(Advance(sequence, chunk, one, reason))
        return advances

    def check_integrity(self) -> None:
        """Assert what must hold between steps (for tests and debugging)."""
        assert sorted(s.arrival for s in self.waiting) == [s.arrival for s in self.waiting]
        assert sorted(s.arrival for s in self.running) == [s.arrival for s in self.running]
        assert {*map(id, self.waiting), *map(id, self.running)} == {
            id(s) for s in self._sequences.values()
        }
        for sequence in self.waiting:
            assert sequence.status is Status.WAITING
            assert sequence.computed == len(sequence.block_table) == 0
        for sequence in self.running:
            assert sequence.status is Status.RUNNING
            assert len(sequence.block_table) >= self.pool.blocks_for(sequence.computed)
        self.pool.check_integrity(s.block_table for s in self.running)

    def _decoding(self) -> list[Sequence]:
        """The sequences that decode in this step, each with a block for its token; others may have
        had to give way for them."""
        decoding: list[Sequence] = []
        for sequence in list(self.running):
            if sequence.status is not Status.RUNNING or sequence.remaining != 1:
                continue
            needed = self.pool.blocks_for(len(sequence.tokens))
            while len(sequence.block_table) < needed and not self.pool.append(sequence.block_table):
                victim = self.running[-1]
                self._preempt(victim)
                if victim is sequence:
                    break
            else:
                decoding.append(sequence)
        return decoding

    def _preempt(self, victim: Sequence) -> None:
        """Take a running sequence's blocks; its tokens stay and are computed again later."""
        self.running.remove(victim)
        self.pool.free(victim.block_table)
        victim.computed = 0
        victim.status = Status.WAITING
        self.preemptions += 1
        insort(self.waiting, victim, key=_arrival)

    def _admit(self, budget: int, chunks: list[Chunk]) -> None:
        """Start waiting sequences in order of arrival; see the module's text for who may pass."""
        full = len(self.running) >= self.limits.max_batch_sequences
        if full or not self.waiting or budget <= 0 or self.pool.free_blocks == 0:
            return  # the usual case under load: ends before anything is looked at
        underway = self._hashes_underway()
        passed: list[Sequence] = []
        for sequence in list(self.waiting):
            # A budget left over means that all running sequences had a token of it: so one more
            # cannot make them more than the budget, and decoding always fits a step.
            if budget <= 0 or len(self.running) >= self.limits.max_batch_sequences:
                return
            wanted = self._reusable_hashes(sequence)
            matched = self.pool.match_prefix(wanted)
            if len(matched) < len(wanted) and wanted[len(matched)] in underway:
                continue  # another is computing this very block: wait for it and share it
            if not self._fits(sequence, matched):
                if sequence.bypasses >= MAX_BYPASSES or len(passed) >= _SCAN_WINDOW:
                    return
                passed.append(sequence)
                continue
            for earlier in passed:
                earlier.bypasses += 1
            self._start(sequence, matched)
            underway.update(self._full_hashes(sequence)[len(matched) :])
            chunks.append(self._chunk(sequence, min(sequence.remaining, budget)))
            budget -= len(chunks[-1].token_ids)
            if any(earlier.bypasses >= MAX_BYPASSES for earlier in passed):
                return

    def _fits(self, sequence: Sequence, matched: list[int]) -> bool:
        fresh = self.pool.blocks_for(len(sequence.tokens)) - len(matched)
        headroom = self._headroom_blocks if self.running else 0
        return self.pool.cost(matched, fresh) + headroom <= self.pool.free_blocks

    def _start(self, sequence: Sequence, matched: list[int]) -> None:
        fresh = self.pool.blocks_for(len(sequence.tokens)) - len(matched)
        sequence.block_table = self.pool.allocate(matched, fresh)
        sequence.computed = len(matched) * self.limits.block_size
        sequence.status = Status.RUNNING
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_arrival)
        if sequence.cached_tokens is None:  # only the first time: a recompute is not a query
            sequence.cached_tokens = min(sequence.computed, len(sequence.prompt))
            self.prompt_tokens += len(sequence.prompt)
            self.prefix_queries += len(sequence.tokens)
            self.prefix_hits += sequence.computed

    def _reusable_hashes(self, sequence: Sequence) -> list[bytes]:
        """Hashes of the blocks that may come from the cache: all full ones, but never the one of
        the last token, whose logits are needed."""
        if sequence.needs_every_position:
            return []
        size = self.limits.block_size
        return sequence.block_hashes((len(sequence.tokens) - 1) // size, size)

    def _full_hashes(self, sequence: Sequence) -> list[bytes]:
        """Hashes of all blocks that are full of known tokens."""
        size = self.limits.block_size
        return sequence.block_hashes(len(sequence.tokens) // size, size)

    def _hashes_underway(self) -> set[bytes]:
        """Hashes of the blocks that running sequences are about to compute."""
        underway: set[bytes] = set()
        for sequence in self.running:
            if sequence.remaining > 1:
                done = sequence.computed // self.limits.block_size
                underway.update(self._full_hashes(sequence)[done:])
        return underway

    def _chunk(self, sequence: Sequence, count: int) -> Chunk:
        start, end = sequence.computed, sequence.computed + count
        return Chunk(
            sequence_id=sequence.sequence_id,
            token_ids=tuple(sequence.tokens[start:end]),
            start=start,
            block_table=tuple(sequence.block_table[: self.pool.blocks_for(end)]),
            samples=end == len(sequence.tokens) and sequence.wants_token,
            sampling=sequence.sampling,
            prompt_token_ids=sequence.prompt,
            output_token_ids=tuple(sequence.outputs),
            index=sequence.index,
            prompt_logprobs=sequence.scores_prompt,
            pooling=sequence.pooling if sequence.pools_prompt else None,
            adapter=sequence.adapter,
        )

    def _publish(self, sequence: Sequence, count: int) -> None:
        """Count the chunk's tokens as computed and make the blocks it filled findable."""
        size = self.limits.block_size
        before = sequence.computed // size
        sequence.computed += count
        after = sequence.computed // size
        if after > before:
            hashes = sequence.block_hashes(after, size)
            for position in range(before, after):
                self.pool.publish(sequence.block_table[position], hashes[position])

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        queue = self.running if sequence.status is Status.RUNNING else self.waiting
        queue.remove(sequence)
        self.pool.free(sequence.block_table)
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason
        del self._sequences[sequence.sequence_id]


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival
