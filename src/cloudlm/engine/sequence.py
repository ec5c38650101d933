"""One sequence on its way from prompt to answer: its tokens, its cache blocks, where it stands.

Plain state that the scheduler moves; it decides nothing but when its own tokens are complete. Must
not import torch, asyncio, time, logging or threading.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from cloudlm.core.chat import FinishReason, Sampling
from cloudlm.engine.blocks import chain_root, next_block_hash
from cloudlm.engine.step import Pooling


class Status(StrEnum):
    """Where a sequence stands. A preempted sequence is WAITING again."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and what was generated from it.

    ``token_limit`` is the longest the whole sequence may become (prompt and answer, tokens).
    ``tokens`` are prompt and answer together; the first ``computed`` of them have keys and values
    in the blocks of ``block_table``. ``end_token_ids`` end the sequence when they are generated.
    ``arrival`` orders sequences (set by the scheduler; a preempted one keeps its own).
    Sequences of a higher ``priority`` go first; ``level`` is the priority that the scheduler goes
    by, which grows with long waiting: nothing was computed for it since step ``idle_since``, unless
    it decodes. ``tenant`` shares the engine with others by ``weight``.
    One that is ``resumed`` came with the beginning of its answer, from another engine, or waited
    for long behind such.
    ``given`` tokens came with the request; those before ``charged`` were counted for the tenant.
    ``bypasses`` counts the later sequences of the same tenant that were admitted while this one did
    not fit, ``overtaken`` those of all tenants while it was its tenant's first such one.
    ``cached_tokens`` are the prompt tokens that the prefix cache held at first admission.
    """

    sequence_id: int
    request_id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    token_limit: int
    outputs: list[int] = field(default_factory=list)
    end_token_ids: frozenset[int] = frozenset()
    salt: str = ""
    index: int = 0
    prompt_logprobs: bool = False
    pooling: Pooling | None = None
    adapter: str = ""
    tenant: str = ""
    priority: int = 0
    weight: float = 1.0
    prompt_scored: bool = False
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    arrival: int = -1
    computed: int = 0
    level: int = 0
    idle_since: int = 0
    charged: int = 0
    bypasses: int = 0
    overtaken: int = 0
    cached_tokens: int | None = None
    block_table: list[int] = field(default_factory=list)
    tokens: list[int] = field(init=False)
    given: int = field(init=False)
    resumed: bool = field(init=False)
    _block_hashes: list[bytes] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.tokens = [*self.prompt, *self.outputs]
        self.given = len(self.tokens)
        self.resumed = bool(self.outputs)

    @property
    def remaining(self) -> int:
        """Known tokens that have no keys and values yet; 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def wants_token(self) -> bool:
        """Whether the answer may still grow."""
        return len(self.tokens) < self.token_limit

    @property
    def scores_prompt(self) -> bool:
        """Whether prompt log probabilities are still to be computed.

        They need every prompt position's logits, so such a sequence takes nothing from the prefix
        cache until it has them.
        """
        return self.prompt_logprobs and not self.prompt_scored

    @property
    def pools_prompt(self) -> bool:
        """Whether the prompt's hidden states are still to be computed."""
        return self.pooling is not None and not self.prompt_scored

    @property
    def needs_every_position(self) -> bool:
        """Whether nothing may be taken from the prefix cache, which holds no results."""
        return self.scores_prompt or (self.pools_prompt and self.pooling is Pooling.MEAN)

    def append(self, token_id: int) -> None:
        self.outputs.append(token_id)
        self.tokens.append(token_id)

    def ended_by_tokens(self) -> FinishReason | None:
        """Why nothing is left to do, or None: an end token, or neither room nor scores wanted."""
        if self.outputs and self.outputs[-1] in self.end_token_ids:
            return FinishReason.STOP
        if self.wants_token or self.scores_prompt or self.pools_prompt:
            return None
        return FinishReason.LENGTH if self.pooling is None else FinishReason.STOP

    def block_hashes(self, count: int, block_size: int) -> list[bytes]:
        """The chained hashes of the first ``count`` blocks, which must be full of known tokens."""
        assert count * block_size <= len(self.tokens)
        hashes = self._block_hashes
        while len(hashes) < count:
            start = len(hashes) * block_size
            parent = hashes[-1] if hashes else chain_root(self.salt, self.adapter)
            hashes.append(next_block_hash(parent, self.tokens[start : start + block_size]))
        return hashes[:count]
