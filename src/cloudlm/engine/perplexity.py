"""How well a loaded model foretells a text: its perplexity, by prompt log probabilities.

Perplexity is e to the mean negative log probability of the tokens, each given those before it. The
text is read in windows that overlap by half, so that every token but the first ones has half a
window before it (Press et al., "Train Short, Test Long", 2021, call it a sliding window). Knows
no PyTorch: it asks an engine like anybody else.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cloudlm.core.chat import Sampling
from cloudlm.core.errors import InvalidRequest
from cloudlm.engine.api import Engine, GenerateRequest

WINDOW_TOKENS = 512
_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Score:
    """``tokens`` were scored."""

    perplexity: float
    tokens: int


async def score_text(
    engine: Engine,
    token_ids: Sequence[int],
    bos_token_id: int | None = None,
    *,
    window_tokens: int = WINDOW_TOKENS,
    progress: Callable[[float], None] = lambda share: None,
) -> Score:
    """The perplexity of a text. Every window begins with ``bos_token_id`` if there is one.

    Raises InvalidRequest for a text of less than two tokens and for log probabilities that are no
    numbers.
    """
    begin = () if bos_token_id is None else (bos_token_id,)
    length = min(window_tokens, engine.info.max_model_len) - len(begin)
    if len(begin) + len(token_ids) < 2 or length < 2:
        raise InvalidRequest("the text is too short to be scored: give at least two tokens")
    windows = list(_windows(token_ids, length))
    total, count = 0.0, 0
    for place in range(0, len(windows), _AT_ONCE):
        part = windows[place : place + _AT_ONCE]
        sums = await asyncio.gather(
            *(
                _window(engine, f"perplexity-{place + i}", (*begin, *ids), len(begin) + known)
                for i, (ids, known) in enumerate(part)
            )
        )
        total += sum(found for found, _ in sums)
        count += sum(scored for _, scored in sums)
        progress(min(1.0, (place + len(part)) / len(windows)))
    if not math.isfinite(total):
        raise InvalidRequest("the model gives log probabilities that are no numbers")
    return Score(math.exp(min(-total / count, 700.0)), count)


def _windows(token_ids: Sequence[int], length: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """Stretches of at most ``length`` tokens, each with how many of its tokens are scored in the
    one before."""
    step = max(1, length // 2)
    done = 0
    for first in range(0, len(token_ids), step):
        part = tuple(token_ids[first : first + length])
        yield part, done - first
        done = first + len(part)
        if done == len(token_ids):
            return


async def _window(
    engine: Engine, request_id: str, token_ids: tuple[int, ...], known: int
) -> tuple[float, int]:
    """The sum of the log probabilities from place ``known`` on, and how many they are."""
    request = GenerateRequest(
        request_id, token_ids, Sampling(temperature=0.0, max_tokens=0), prompt_logprobs=True
    )
    scores: list[float] = []
    async for event in engine.submit(request):
        for place, one in enumerate(event.prompt_logprobs):
            if one is not None and place >= known:
                scores.append(one.logprob)
    return math.fsum(scores), len(scores)
