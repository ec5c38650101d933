"""Decides which tokens of which sequences the next step computes.

Continuous batching: every step first takes one token of each decoding sequence, then fills the
token budget with prompts, by priority and then by what each tenant was served (``fairness``),
whether they are begun already or wait for admission. What is left may go to guesses (``drafts``).
A pure decider: it is told what arrived and what was sampled and returns data. Must not import
torch, asyncio, time, logging or threading.

Who gives way: if no block is free for a decoding token, the last by rank: least priority, then the
tenant that was served most, then the latest. Before that, one sequence per step that cannot be
admitted takes the place of others (``yielding``). What was computed is computed again later, or
found in the prefix cache.

Why it cannot stall: admission reserves blocks for all known tokens, so only decoding asks for
more. The first by rank never gives way and alone always fits (``Limits.total_tokens``); ranks
change only when tokens are computed that never were before, and generated tokens are kept, so work
is lost finitely often. A waiting sequence that does not fit is passed by at most ``MAX_BYPASSES``
later ones of its own tenant, and while it is its tenant's next one, of all tenants, for
``HOLD_STEPS`` steps. Long answers may keep it out for longer, and then to hold others up would help
nobody: they pass it, but from now on those that came after it and are not above it give way to it
as soon as it fits without them. So it starts no later than if none of them had passed it, unless
its tenant was served so much more than theirs that the place is theirs by their share.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence as Listing
from dataclasses import dataclass

from cloudlm.core.chat import FinishReason
from cloudlm.engine.admission import Admission
from cloudlm.engine.blocks import BlockPool
from cloudlm.engine.drafts import Drafts
from cloudlm.engine.fairness import ANSWER_TOKEN_COST, PROMPT_TOKEN_COST, Lines
from cloudlm.engine.limits import Limits
from cloudlm.engine.prefixes import Prefixes
from cloudlm.engine.sequence import Sequence, Status
from cloudlm.engine.speculate import Lookup
from cloudlm.engine.step import Chunk, Sampled, Step
from cloudlm.engine.yielding import FAIRNESS_LAG_STEPS, Yielding


@dataclass(frozen=True, slots=True)
class Advance:
    """What one chunk of the last step did; one for each token if drafts of it were right.
    ``sampled`` is None for a prompt's inner chunk; ``finish_reason`` is set when the sequence's
    tokens are complete (it holds no blocks then)."""

    sequence: Sequence
    chunk: Chunk
    sampled: Sampled | None
    finish_reason: FinishReason | None


class Scheduler:
    """``add`` and ``cancel`` between steps; ``schedule`` a step; ``apply`` what it sampled."""

    def __init__(self, limits: Limits, lookup: Lookup | None = None) -> None:
        self.limits = limits
        self.pool = BlockPool(limits.blocks_total, limits.block_size)
        self.prefixes = Prefixes(self.pool, limits.block_size)
        self.waiting = Lines()
        self.running: list[Sequence] = []  # in order of arrival
        self.preemptions = 0
        self.prompt_tokens = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._sequences: dict[int, Sequence] = {}
        self._arrivals = 0
        self._step = Step(())
        # Room that an admission leaves to those who run, so that it is not preempted at once.
        self._headroom_blocks = max(1, limits.blocks_total // 100)
        self.drafts = Drafts(lookup, self.pool, self._headroom_blocks)
        # No more than the budget, so that decoding always fits a step.
        self._max_running = min(limits.max_batch_sequences, limits.max_batch_tokens)
        self._yielding = Yielding(
            self.waiting,
            self.pool,
            self.prefixes,
            FAIRNESS_LAG_STEPS * limits.max_batch_tokens,
            self._max_running,
            self._headroom_blocks,
        )

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence, drafts: bool = True) -> None:
        """Queue a new sequence, whose ``token_limit`` comes from ``Limits.total_tokens``. Without
        ``drafts`` its tokens are never guessed (a mask for each would be needed)."""
        assert sequence.sequence_id not in self._sequences
        assert sequence.ended_by_tokens() is None
        assert sequence.token_limit <= self.limits.cache_tokens
        sequence.arrival = self._arrivals
        self._arrivals += 1
        sequence.level = sequence.priority
        self._sequences[sequence.sequence_id] = sequence
        self.waiting.enter(sequence)
        if drafts:
            self.drafts.begin(sequence)

    def cancel(self, sequence_id: int, reason: FinishReason = FinishReason.ABORT) -> bool:
        """End a sequence now and free its blocks. False when it is unknown or ended already."""
        sequence = self._sequences.get(sequence_id)
        if sequence is None:
            return False
        self._finish(sequence, reason)
        return True

    def schedule(self) -> Step:
        """The next step; empty only when there is no work."""
        self.waiting.tick(self.running)
        if self.waiting:
            for victim in self._yielding.victims(self.running):
                self._preempt(victim)
        decoding = self._decoding()
        chunks = [self._chunk(sequence, 1) for sequence in decoding]
        left = self._fill(self.limits.max_batch_tokens - len(chunks), chunks)
        self.drafts.lengthen(chunks, decoding, left)
        self._step = Step(tuple(chunks))
        return self._step

    def apply(self, sampled: Listing[Sampled]) -> list[Advance]:
        """Account for the step that ``schedule`` returned; at least one Advance per chunk still
        alive."""
        by_id: dict[int, list[Sampled]] = {}
        for one in sampled:
            by_id.setdefault(one.sequence_id, []).append(one)
        chunks, self._step = self._step.chunks, Step(())
        advances: list[Advance] = []
        for chunk in chunks:
            sequence = self._sequences.get(chunk.sequence_id)
            if sequence is None:
                continue  # cancelled meanwhile
            own = self.drafts.settle(chunk, by_id.get(chunk.sequence_id, []))
            advances += self._advance(sequence, chunk, own)
            reason = advances[-1].finish_reason
            if reason is not None:
                self._finish(sequence, reason)
        return advances

    def check_integrity(self) -> None:
        """Assert what must hold between steps (for tests and debugging)."""
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

    def _advance(
        self, sequence: Sequence, chunk: Chunk, sampled: Listing[Sampled]
    ) -> list[Advance]:
        """Take the tokens sampled and count as computed what was: the chunk's known tokens and
        those drafted ones that were right. Nothing behind an end token is taken."""
        count = len(chunk.token_ids) - chunk.drafts
        if chunk.start + count >= len(sequence.prompt):
            sequence.prompt_scored = True
        if not chunk.samples:
            self.prefixes.publish(sequence, count)
            reason = None if sequence.remaining > 1 else sequence.ended_by_tokens()
            return [Advance(sequence, chunk, sampled[0] if sampled else None, reason)]
        assert sampled, "the runner sampled nothing"
        advances: list[Advance] = []
        for one in sampled:
            assert one.token_id is not None, "the runner sampled nothing"
            sequence.append(one.token_id)
            self.waiting.charge(sequence, ANSWER_TOKEN_COST)
            advances.append(Advance(sequence, chunk, one, sequence.ended_by_tokens()))
            if advances[-1].finish_reason is not None:
                break
        self.prefixes.publish(sequence, count + len(advances) - 1)
        return advances

    def _decoding(self) -> list[Sequence]:
        """The sequences that decode in this step, each with a block for its token; others may have
        had to give way for them, also such as were thought to decode."""
        decoding: list[Sequence] = []
        for sequence in list(self.running):
            if sequence.status is not Status.RUNNING or sequence.remaining != 1:
                continue
            needed = self.pool.blocks_for(len(sequence.tokens))
            while len(sequence.block_table) < needed and not self.pool.append(sequence.block_table):
                victim = max(self.running, key=self._yielding.rank)
                self._preempt(victim)
                if victim is sequence:
                    break
            else:
                decoding.append(sequence)
        return [sequence for sequence in decoding if sequence.status is Status.RUNNING]

    def _preempt(self, victim: Sequence) -> None:
        """Take a running sequence's blocks; its tokens stay and are computed again later."""
        self.running.remove(victim)
        self.pool.free(victim.block_table)
        victim.computed = 0
        victim.status = Status.WAITING
        self.preemptions += 1
        self.waiting.wait(victim)

    def _fill(self, budget: int, chunks: list[Chunk]) -> int:
        """Spend the budget on prompts by rank; see the module's text for who may pass whom. What
        is left of it."""
        prefilling = [sequence for sequence in self.running if sequence.remaining > 1]
        admission = Admission(
            self.waiting,
            self.running,
            self.pool,
            self.prefixes,
            self._max_running,
            self._headroom_blocks,
            self._start,
        )
        if budget <= 0 or not (prefilling or admission.open):
            return budget  # the usual case under load: ends before anything is looked at
        for sequence in self.waiting.ranked(prefilling, admission.open):
            if sequence.status is Status.WAITING and not admission.admit(sequence):
                continue
            self.waiting.computes(sequence)
            chunks.append(self._chunk(sequence, min(sequence.remaining, budget)))
            budget -= len(chunks[-1].token_ids)
            if budget <= 0:
                break
        return budget

    def _start(self, sequence: Sequence, matched: list[int]) -> None:
        fresh = self.prefixes.fresh(sequence, matched)
        sequence.block_table = self.pool.allocate(matched, fresh)
        sequence.computed = len(matched) * self.limits.block_size
        sequence.status = Status.RUNNING
        self.waiting.start(sequence)
        insort(self.running, sequence, key=_arrival)
        if sequence.cached_tokens is None:  # only the first time: a recompute is not a query
            sequence.cached_tokens = min(sequence.computed, len(sequence.prompt))
            self.prompt_tokens += len(sequence.prompt)
            self.prefix_queries += len(sequence.tokens)
            self.prefix_hits += sequence.computed

    def _chunk(self, sequence: Sequence, count: int) -> Chunk:
        start, end = sequence.computed, sequence.computed + count
        if sequence.charged < min(end, sequence.given):  # not what is computed again
            new = min(end, sequence.given) - max(start, sequence.charged)
            self.waiting.charge(sequence, new * PROMPT_TOKEN_COST)
            sequence.charged = end
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

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        self.waiting.leave(sequence, sequence.status is Status.WAITING)
        self.pool.free(sequence.block_table)
        self.drafts.end(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason
        del self._sequences[sequence.sequence_id]


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival
