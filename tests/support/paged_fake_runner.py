"""A runner without a model for the tests of scheduler and engine."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from hashlib import blake2b
from pathlib import Path

from cloudlm.core.errors import BrokenModel
from cloudlm.engine.api import EngineInfo
from cloudlm.engine.step import Chunk, Pooling, Sampled, Step


def _next_token(tokens: Iterable[int], index: int, vocab_size: int) -> int:
    raw = ",".join(map(str, [index, *tokens])).encode()
    return int.from_bytes(blake2b(raw, digest_size=8).digest(), "big") % vocab_size


def _with_drafts(chunk: Chunk) -> list[int]:
    draft = chunk.token_ids[len(chunk.token_ids) - chunk.drafts :]
    return [*chunk.prompt_token_ids, *chunk.output_token_ids, *draft]


class PagedFakeRunner:
    """A runner whose next token depends on every token before it.

    It keeps the cache: each slot remembers the token and position that were written to it. Every
    chunk must find exactly its own sequence's beginning in its blocks, written in earlier steps,
    and must still find it after the whole step was written. ``salts`` (sequence id -> salt)
    additionally demands that what is read was written under the reader's salt.

    With ``recalls`` only so many tokens before it decide about a token, but for every seventh: such
    a text soon repeats itself, with interruptions. Drafts are written and answered like tokens;
    what was written for a wrong one must be written again before it is read.
    """

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        vocab_size: int = 26,
        max_model_len: int = 128,
        eos_token_ids: tuple[int, ...] = (0,),
        recalls: int | None = None,
    ) -> None:
        self._recalls = recalls
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.info = EngineInfo(
            architecture="Fake",
            parameters=0,
            dtype="none",
            device="cpu",
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            block_size=block_size,
            blocks_total=num_blocks,
            eos_token_ids=eos_token_ids,
            hidden_size=vocab_size,
        )
        self.salts: dict[int, str] = {}
        self.steps: list[Step] = []
        self.adapters: set[str] = set()
        self.asleep = 0
        self.broken: Exception | None = None
        self.before_step: Callable[[Step], None] = lambda step: None
        self.closed = 0
        self._slots: dict[tuple[int, int], tuple[int, int, str]] = {}

    def run(self, step: Step) -> list[Sampled]:
        self.before_step(step)
        self.steps.append(step)
        assert step.chunks
        assert not self.asleep
        assert len({chunk.sequence_id for chunk in step.chunks}) == len(step.chunks)
        for chunk in step.chunks:
            self._check(chunk, chunk.start)
        written: set[tuple[int, int]] = set()
        for chunk in step.chunks:
            for position, token in enumerate(chunk.token_ids, chunk.start):
                slot = self._slot(chunk, position)
                assert slot not in written, "two tokens for one slot"
                written.add(slot)
                self._slots[slot] = (token, position, self._salt(chunk))
        for chunk in step.chunks:
            self._check(chunk, chunk.start + len(chunk.token_ids))
        return [
            self._sample(chunk, behind)
            for chunk in step.chunks
            if chunk.samples or chunk.prompt_logprobs or chunk.pooling
            for behind in range(chunk.drafts + 1)
        ]

    def read_adapter(self, folder: Path) -> str:
        if not folder.is_dir():
            raise BrokenModel(f"{folder} is no folder")
        return folder.name

    def add_adapter(self, key: str, adapter: str) -> None:
        assert key not in self.adapters
        self.adapters.add(key)

    def remove_adapter(self, key: str) -> None:
        self.adapters.remove(key)

    def sleep(self, level: int) -> None:
        assert not self.asleep
        self.asleep = level
        self._slots.clear()

    def wake(self) -> None:
        assert self.asleep
        if self.broken is not None:
            raise self.broken
        self.asleep = 0

    def close(self) -> None:
        self.closed += 1

    def answer(
        self,
        prompt: tuple[int, ...],
        count: int,
        *,
        index: int = 0,
        end_token_ids: frozenset[int] = frozenset(),
    ) -> list[int]:
        """What a sequence alone generates: at most ``count`` tokens, an end token included."""
        outputs: list[int] = []
        while len(outputs) < count and not (outputs and outputs[-1] in end_token_ids):
            outputs.append(self._next([*prompt, *outputs], index))
        return outputs

    @property
    def computed_tokens(self) -> int:
        return sum(step.tokens for step in self.steps)

    def _next(self, tokens: list[int], index: int) -> int:
        if self._recalls is not None and len(tokens) % 7:
            tokens = tokens[-self._recalls :]
        return _next_token(tokens, index, self.info.vocab_size)

    def _salt(self, chunk: Chunk) -> str:
        if chunk.adapter:
            assert chunk.adapter in self.adapters, "an adapter that is not there"
        return self.salts.get(chunk.sequence_id, "") + chunk.adapter

    def _slot(self, chunk: Chunk, position: int) -> tuple[int, int]:
        block = chunk.block_table[position // self.block_size]
        assert 0 <= block < self.num_blocks
        return block, position % self.block_size

    def _check(self, chunk: Chunk, end: int) -> None:
        known = _with_drafts(chunk)
        expected = [(known[at], at, self._salt(chunk)) for at in range(end)]
        assert [self._slots.get(self._slot(chunk, at)) for at in range(end)] == expected
        assert tuple(known[chunk.start : chunk.start + len(chunk.token_ids)]) == chunk.token_ids

    def _sample(self, chunk: Chunk, behind: int) -> Sampled:
        """The token behind the last known one and ``behind`` drafts."""
        known = [*chunk.prompt_token_ids, *chunk.output_token_ids]
        end = chunk.start + len(chunk.token_ids) - chunk.drafts + behind
        token = None
        if chunk.samples:
            assert end == len(known) + behind
            # From the cache, not from the chunk's copy: wrong blocks would give wrong tokens.
            seen = [self._slots[self._slot(chunk, at)][0] for at in range(end)]
            token = self._next(seen, chunk.index)
        wanted = chunk.sampling.logprobs is not None and token is not None
        scores = [
            (-float(known[at + 1]), ()) for at in range(chunk.start, min(end, len(known) - 1))
        ]
        return Sampled(
            sequence_id=chunk.sequence_id,
            token_id=token,
            logprob=-0.5 if wanted else None,
            prompt_logprobs=tuple(scores) if chunk.prompt_logprobs else (),
            pooled=self._pooled(chunk),
        )

    def _pooled(self, chunk: Chunk) -> array[float] | None:
        """Stands for hidden states: a token's is 1 at the token's own place."""
        last = chunk.start + len(chunk.token_ids) == len(chunk.prompt_token_ids)
        if chunk.pooling is None or (chunk.pooling is Pooling.LAST and not last):
            return None
        counted = chunk.token_ids if chunk.pooling is Pooling.MEAN else chunk.token_ids[-1:]
        return array("f", [float(counted.count(token)) for token in range(self.info.vocab_size)])
