"""From a prompt's hidden states to its embedding: chunks come in, one vector of length 1 goes out.

``PooledPrompt`` runs in the engine's thread in the place that ``answer.Answer`` has for a sequence
that generates; ``embed_all`` runs in an event loop and sends many prompts through the engine.
"""

from __future__ import annotations

import asyncio
from array import array
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from cloudlm.core.chat import FinishReason
from cloudlm.core.errors import Overloaded, Unavailable
from cloudlm.engine.api import Embedding, TokenEvent
from cloudlm.engine.scheduler import Advance
from cloudlm.engine.sequence import Sequence as EngineSequence


class PooledPrompt:
    """The vector of one prompt in the making."""

    finished: TokenEvent | None = None

    def __init__(self, sequence: EngineSequence) -> None:
        self._sequence = sequence
        self._sum: NDArray[np.float32] | None = None

    def advance(self, advance: Advance) -> TokenEvent | None:
        """Take one chunk's share; the only event comes with the last. Raises ValueError for hidden
        states that are no numbers."""
        pooled = None if advance.sampled is None else advance.sampled.pooled
        if pooled is not None:
            share = np.frombuffer(pooled, dtype=np.float32)
            # A preempted prompt is computed again from its beginning.
            known = None if advance.chunk.start == 0 else self._sum
            self._sum = share if known is None else known + share
        if advance.finish_reason is None:
            return None
        return TokenEvent(
            (),
            "",
            finish_reason=advance.finish_reason,
            cached_tokens=self._sequence.cached_tokens or 0,
            embedding=self._embedding(),
        )

    def _embedding(self) -> array[float]:
        """Unit length makes the mean's division by the number of tokens needless."""
        assert self._sum is not None, "the runner pooled nothing"
        values = self._sum.astype(np.float64)
        length = float(np.linalg.norm(values))
        if not np.isfinite(length):
            raise ValueError("the hidden states are not finite numbers")
        return array("f", (values / (length or 1.0)).astype(np.float32).tobytes())


async def embed_all(
    prompts: Sequence[EngineSequence],
    start: Callable[[EngineSequence], AsyncIterator[TokenEvent]],
    window: int,
) -> list[Embedding]:
    """Embed all ``prompts``, at most ``window`` of them in the engine at a time.

    ``start`` may raise Overloaded: what already runs is waited for then, and only a call of which
    nothing runs fails.
    """
    found: dict[int, Embedding] = {}
    waiting = deque(enumerate(prompts))
    running: dict[asyncio.Task[TokenEvent], int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < window:
                try:
                    stream = start(waiting[0][1])
                except Overloaded:
                    if not running:
                        raise
                    break
                running[asyncio.create_task(_only_event(stream))] = waiting.popleft()[0]
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                event = task.result()
                number = running.pop(task)
                assert event.embedding is not None
                tokens = len(prompts[number].prompt)
                found[number] = Embedding(event.embedding, tokens, event.cached_tokens)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return [found[number] for number in range(len(prompts))]


async def _only_event(stream: AsyncIterator[TokenEvent]) -> TokenEvent:
    event = await anext(stream)
    if event.finish_reason is FinishReason.ABORT:
        raise broken_off()
    return event


def broken_off() -> Unavailable:
    """What a call raises that was ended by somebody else."""
    return Unavailable("the replica stopped before the answer was complete", retry_after_s=1.0)
