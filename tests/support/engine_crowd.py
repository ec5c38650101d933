"""A scheduler whose model answers nonsense, for tests of who is served when."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from cloudlm.core.chat import Sampling
from cloudlm.engine.fairness import ANSWER_TOKEN_COST, PROMPT_TOKEN_COST
from cloudlm.engine.limits import Limits
from cloudlm.engine.scheduler import Scheduler
from cloudlm.engine.sequence import Sequence
from cloudlm.engine.step import Sampled, Step


@dataclass
class Crowd:
    """A scheduler whose model answers nonsense; counts what each tenant was served."""

    limits: Limits
    scheduler: Scheduler = field(init=False)
    served: Counter[str] = field(default_factory=Counter)
    finished: list[Sequence] = field(default_factory=list)
    steps: int = 0
    made: int = 0
    live: Counter[str] = field(default_factory=Counter)
    _seen: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.limits)

    def add(self, tenant: str, prompt: int, answer: int, common: int = 0, **more: Any) -> Sequence:
        """The first ``common`` tokens of the prompt are those of all that have such."""
        self.made += 1
        self.live[tenant] += 1
        sequence = Sequence(
            sequence_id=self.made,
            request_id=str(self.made),
            prompt=tuple(at if at < common else self.made * 10_000 + at for at in range(prompt)),
            sampling=Sampling(max_tokens=answer),
            token_limit=self.scheduler.limits.total_tokens(prompt, answer),
            tenant=tenant,
            **more,
        )
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> Step:
        step = self.scheduler.schedule()
        assert step.chunks, "work, but no step"
        assert step.tokens <= self.limits.max_batch_tokens
        assert len(step.chunks) <= self.limits.max_batch_sequences
        by_id = self.scheduler._sequences
        for chunk in step.chunks:
            sequence = by_id[chunk.sequence_id]
            end, seen = chunk.start + len(chunk.token_ids), self._seen.get(chunk.sequence_id, 0)
            new = max(0, min(end, sequence.given) - max(chunk.start, seen))
            self.served[sequence.tenant] += new * PROMPT_TOKEN_COST
            self.served[sequence.tenant] += chunk.samples * ANSWER_TOKEN_COST
            self._seen[chunk.sequence_id] = max(seen, end)
        sampled = [Sampled(c.sequence_id, 7) for c in step.chunks if c.samples]
        advances = self.scheduler.apply(sampled)
        self.finished += [a.sequence for a in advances if a.finish_reason is not None]
        self.live.subtract(a.sequence.tenant for a in advances if a.finish_reason is not None)
        self.steps += 1
        return step

    def finish(self, within: int) -> None:
        while self.scheduler.has_work:
            self.step()
            self.scheduler.check_integrity()
            assert self.steps <= within, "no end in sight"
        assert self.scheduler.pool.free_blocks == self.limits.blocks_total


def crowd(**given_limits: int) -> Crowd:
    values = {
        "max_model_len": 512,
        "block_size": 4,
        "blocks_total": 512,
        "max_batch_tokens": 64,
        "max_batch_sequences": 8,
    }
    return Crowd(Limits(**{**values, **given_limits}))
