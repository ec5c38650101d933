"""One replica in virtual time: continuous batching, a step at a time or many steps at once.

Every step gives each decoding sequence one token and fills the rest of its budget with prompts, in
the order of their arrival. While nobody's prompt is computed the steps to the next end of a
sequence are taken together: their time is a sum that can be written down, so that a request costs a
handful of events however long its answer is. What comes meanwhile joins at the next step's
boundary, as in the engine. Must not choose, retry or account: it tells its ``Listener``.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from typing import Protocol

from cloudlm.sim.cache import BlockCache
from cloudlm.sim.figures import Figures
from cloudlm.sim.timeline import Timeline


class Work:
    """One attempt's sequence at a replica. ``prompt_tokens`` and ``output_tokens`` as asked;
    ``begun_at`` is when it got its slot (negative: it waits)."""

    __slots__ = (
        "at_step",
        "begun_at",
        "block_tokens",
        "blocks",
        "cached_tokens",
        "held",
        "left",
        "output_tokens",
        "own_tokens",
        "prompt_tokens",
        "state",
    )

    def __init__(
        self,
        prompt_tokens: int,
        output_tokens: int,
        blocks: tuple[int, ...] = (),
        block_tokens: int = 0,
    ) -> None:
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.blocks = blocks
        self.block_tokens = block_tokens
        self.begun_at = -1.0
        self.cached_tokens = 0
        self.left = -1  # prompt tokens to be computed; -1: its beginning was not looked up yet
        self.at_step = 0  # the replica's step that gave its first token
        self.held: list[int] = []
        self.own_tokens = 0
        self.state = WAITING


WAITING, PREFILL, DECODING, ENDED, COMING = range(5)


class Listener(Protocol):
    """Who is told what becomes of an attempt; it is the ``Work`` that it handed in."""

    def first_token(self, work: Work) -> None: ...

    def finished(self, work: Work) -> None: ...


class SimReplica:
    """``steps`` counts as the engine's step counter does. Times are the timeline's."""

    def __init__(
        self, timeline: Timeline, figures: Figures, listener: Listener, *, slots: int = 0
    ) -> None:
        self._timeline = timeline
        self._figures = figures
        self._listener = listener
        self._step = figures.step
        self._slots = slots or figures.slots
        self._cache = BlockCache(figures.cache_tokens)
        self._waiting: deque[Work] = deque()
        self._coming = 0  # handed in, and not yet before the engine
        self._prefill: deque[Work] = deque()
        self._ends: list[tuple[int, int, Work]] = []  # decoding, by the step that ends them
        self._decoding = 0
        self._context = 0  # tokens that the decoding sequences attend to
        self._order = 0
        self._computing: dict[int, int] = {}  # blocks of prompts under way
        self._gone: dict[Work, None] = {}
        self._turn = 0  # the run under way; what was asked for an older one is passed over
        self._run_at = -1.0  # when it began; negative: there is none
        self._run_steps = 0
        self.steps = 0
        self._pauses = 0
        self.busy_s = 0.0
        self.prompt_tokens = 0
        self.cached_tokens = 0

    # What others ask -----------------------------------------------------------------------------

    @property
    def running(self) -> int:
        return len(self._prefill) + self._decoding

    @property
    def waiting(self) -> int:
        return len(self._waiting) + self._coming

    def submit(self, work: Work) -> bool:
        """Take a request, which the engine sees ``request_s`` later; False if too many wait."""
        if self.waiting >= self._figures.max_waiting:
            return False
        if self._step.request_s > 0:
            work.state = COMING
            self._coming += 1
            self._timeline.after(self._step.request_s, self._arrive, work)
        else:
            self._enter(work)
        return True

    def _arrive(self, work: Work) -> None:
        self._coming -= 1
        if work.state == COMING:  # else nobody wants it any more
            work.state = WAITING
            self._enter(work)

    def _enter(self, work: Work) -> None:
        self._waiting.append(work)
        if self._run_at < 0:
            self._begin()
        elif self._run_steps > 1 and self._may_admit(work):
            self._cut()

    def cancel(self, work: Work) -> None:
        """Nobody wants it any more: it leaves at the next step's boundary."""
        if work.state == COMING:
            work.state = ENDED
        elif work.state != ENDED:
            self._gone[work] = None
            if self._run_steps > 1:
                self._cut()

    def produced(self, work: Work) -> int:
        """Tokens of the answer until now."""
        if work.state != DECODING:
            return work.output_tokens if work.state == ENDED else 0
        return min(self.steps + self._steps_done() - work.at_step + 1, work.output_tokens)

    @property
    def paused(self) -> bool:
        """Whether it stands still."""
        return self._pauses > 0

    def pause(self) -> None:
        """Stand still: the step under way and all later ones wait until each ``pause`` has had its
        ``resume``."""
        if not self._pauses:
            self._give_up()
        self._pauses += 1

    def _give_up(self) -> None:
        """Forget the step under way; those before it count."""
        if self._run_at >= 0:
            done = self._steps_done() if self._run_steps > 1 else 0
            self._turn += 1
            self._run_at = -1.0
            if done:
                self._advance(done)

    def resume(self) -> None:
        self._pauses -= 1
        if not self._pauses:
            self._begin()

    # Steps ---------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Begin the next step, or several, if there is work."""
        if self._pauses:
            return
        if self._gone:
            self._clear()
        if self._waiting:
            self._admit()
        if self._prefill:
            tokens = self._fill()
            self._run(1, self._seconds(1, tokens))
        elif self._ends:
            count = self._ends[0][0] - self.steps
            self._run(count, self._seconds(count, 0))
        else:
            self._run_at = -1.0

    def _run(self, steps: int, seconds: float) -> None:
        self._turn += 1
        self._run_at = self._timeline.now
        self._run_steps = steps
        self._timeline.at(self._run_at + seconds, self._end, self._turn)

    def _seconds(self, steps: int, prompt_tokens: int) -> float:
        """How long so many steps take, the contexts growing by a token each."""
        base_s, prefill_token_s, sequence_s, context_token_s, _ = self._step
        count = self._decoding
        context = steps * self._context + count * (steps * (steps - 1) // 2)
        return (
            steps * (base_s + sequence_s * count)
            + prefill_token_s * prompt_tokens
            + context_token_s * context
        )

    def _steps_done(self) -> int:
        """Whole steps of the run under way."""
        if self._run_at < 0 or self._run_steps < 2:
            return 0
        elapsed_s = self._timeline.now - self._run_at
        count = self._decoding
        # seconds(n) = a n + b n (n - 1) / 2, solved for n
        b = self._step.context_token_s * count
        a = (
            self._step.base_s
            + self._step.sequence_s * count
            + self._step.context_token_s * self._context
        )
        if b <= 0:
            found = elapsed_s / a
        else:
            c = a - b / 2
            found = (math.sqrt(c * c + 2 * b * elapsed_s) - c) / b
        return min(max(int(found + 1e-9), 0), self._run_steps)

    def _cut(self) -> None:
        """Somebody waits to join or leave: the run ends with the step that is under way."""
        steps = min(self._steps_done() + 1, self._run_steps)
        if steps == self._run_steps:
            return
        began = self._run_at
        self._turn += 1
        self._run_steps = steps
        self._timeline.at(began + self._seconds(steps, 0), self._end, self._turn)

    def _end(self, turn: int) -> None:
        if turn != self._turn:
            return
        self.busy_s += self._timeline.now - self._run_at
        self._run_at = -1.0
        self._advance(self._run_steps)
        if self._run_at < 0:  # else what was told began the next one
            self._begin()

    def _advance(self, steps: int) -> None:
        """Everybody has so many tokens more."""
        self.steps += steps
        self._context += self._decoding * steps
        turn = self._turn
        ended: list[Work] = []
        while self._ends and self._ends[0][0] <= self.steps:
            work = heapq.heappop(self._ends)[2]
            if work.state == DECODING:
                self._leave(work)
                ended.append(work)
        first = []
        while self._prefill and self._prefill[0].left == 0:
            work = self._prefill.popleft()
            first.append(work)
            self._decode(work)
            if work.output_tokens <= 1:
                self._leave(work)
                ended.append(work)
        # Nobody who is told now begins or cuts a step before all are told.
        self._run_at, self._run_steps = self._timeline.now, 1
        for work in first:
            self._listener.first_token(work)
        for work in ended:
            self._listener.finished(work)
        if self._turn == turn:
            self._run_at = -1.0

    # Sequences -----------------------------------------------------------------------------------

    def _may_admit(self, work: Work) -> bool:
        """Whether a newcomer would get a place at the next step (the cache may be full)."""
        return self.running < self._slots and len(self._waiting) == 1

    def _admit(self) -> None:
        while self._waiting and len(self._prefill) + self._decoding < self._slots:
            work = self._waiting[0]
            if work.blocks and self._figures.prefix_cache:
                work.held = list(work.blocks[: self._cache.known(work.blocks)])
                self._cache.hold(work.held, work.block_tokens)
            work.own_tokens = (
                work.prompt_tokens + work.output_tokens - len(work.held) * work.block_tokens
            )
            if not self._cache.reserve(work.own_tokens):
                if self.running:
                    self._cache.release(work.held, work.block_tokens)
                    work.held = []
                    return
                work.own_tokens = 0  # what never fits is for the worker to refuse, not for us
            self._waiting.popleft()
            work.state = PREFILL
            work.begun_at = self._timeline.now
            self._prefill.append(work)

    def _fill(self) -> int:
        """Put prompts into the step's budget; returns how many tokens of them."""
        budget = max(self._figures.batch_tokens - self._decoding, 1)
        left = budget
        for work in self._prefill:
            if work.left < 0:
                if left < budget and self._awaits(work):
                    break  # its beginning is just being computed: it will be there next step
                self._look_up(work)
            taken = min(work.left, left)
            work.left -= taken
            left -= taken
            if left <= 0:
                break
        return budget - left

    def _awaits(self, work: Work) -> bool:
        known = self._cache.known(work.blocks)
        return known < len(work.blocks) and work.blocks[known] in self._computing

    def _look_up(self, work: Work) -> None:
        """Find what of its prompt is cached; it begins to be computed now."""
        blocks, size = work.blocks, work.block_tokens
        work.left = work.prompt_tokens
        self.prompt_tokens += work.prompt_tokens
        if not blocks or not self._figures.prefix_cache:
            return
        known = self._cache.known(blocks)
        more = blocks[len(work.held) : known]  # others computed these since it came in
        if more:
            self._cache.hold(more, size)
            spare = min(len(more) * size, work.own_tokens)
            self._cache.give_back(spare)
            work.own_tokens -= spare
            work.held += more
        work.cached_tokens = known * size
        work.left -= work.cached_tokens
        self.cached_tokens += work.cached_tokens
        for block in blocks[known:]:
            self._computing[block] = self._computing.get(block, 0) + 1

    def _decode(self, work: Work) -> None:
        """Its prompt is computed, and with it came its first token."""
        work.state = DECODING
        work.at_step = self.steps
        if work.blocks and self._figures.prefix_cache:
            self._keep(work)
        self._decoding += 1
        self._context += work.prompt_tokens + 1
        self._order += 1
        if work.output_tokens > 1:
            heapq.heappush(self._ends, (self.steps + work.output_tokens - 1, self._order, work))

    def _keep(self, work: Work) -> None:
        """What it computed is there for others from now on."""
        self._forget(work)
        computed = work.blocks[len(work.held) :]
        room = work.own_tokens // work.block_tokens
        added = self._cache.add(computed[:room], work.block_tokens)
        work.own_tokens -= len(added) * work.block_tokens
        work.held += added

    def _forget(self, work: Work) -> None:
        """Its blocks are no longer being computed."""
        for block in work.blocks[len(work.held) :]:
            count = self._computing[block] - 1
            if count:
                self._computing[block] = count
            else:
                del self._computing[block]

    def _leave(self, work: Work) -> None:
        """It decodes no longer."""
        self._decoding -= 1
        self._context -= work.prompt_tokens + 1 + (self.steps - work.at_step)
        self._free(work)

    def _free(self, work: Work) -> None:
        work.state = ENDED
        self._cache.give_back(work.own_tokens)
        work.own_tokens = 0
        if work.held:
            self._cache.release(work.held, work.block_tokens)
            work.held = []

    def _clear(self) -> None:
        """Those who were cancelled leave."""
        for work in self._gone:
            if work.state == DECODING:
                self._leave(work)
            elif work.state == PREFILL:
                if work.left >= 0 and work.blocks and self._figures.prefix_cache:
                    self._forget(work)
                self._prefill.remove(work)
                self._free(work)
            elif work.state == WAITING:
                self._waiting.remove(work)
                work.state = ENDED
        self._gone.clear()
        self._ends = [one for one in self._ends if one[2].state == DECODING]
        heapq.heapify(self._ends)
