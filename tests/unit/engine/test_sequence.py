"""A sequence knows its own length, end and block hashes."""

from __future__ import annotations

from typing import Any

import pytest

from cloudlm.core.chat import FinishReason, Sampling
from cloudlm.engine.blocks import chain_root, next_block_hash
from cloudlm.engine.sequence import Sequence


def sequence(prompt: tuple[int, ...] = (1, 2, 3), limit: int = 6, **fields: Any) -> Sequence:
    return Sequence(1, "r", prompt, Sampling(), limit, **fields)


def test_grows_to_its_limit() -> None:
    one = sequence()
    assert (one.remaining, one.wants_token, one.ended_by_tokens()) == (3, True, None)
    one.computed = 3
    for token in (4, 5, 6):
        one.append(token)
    assert one.tokens == [1, 2, 3, 4, 5, 6]
    assert one.outputs == [4, 5, 6]
    assert one.remaining == 3
    assert one.ended_by_tokens() is FinishReason.LENGTH


def test_an_end_token_stops_it_even_at_the_limit() -> None:
    one = sequence(end_token_ids=frozenset({9}))
    for token in (4, 5, 9):
        one.append(token)
    assert one.ended_by_tokens() is FinishReason.STOP


def test_an_end_token_in_the_prompt_is_only_a_token() -> None:
    assert sequence((1, 9), end_token_ids=frozenset({9})).ended_by_tokens() is None


def test_without_an_answer_it_lives_until_its_prompt_is_scored() -> None:
    one = sequence(limit=3, prompt_logprobs=True)
    assert not one.wants_token
    assert one.ended_by_tokens() is None
    one.prompt_scored = True
    assert one.ended_by_tokens() is FinishReason.LENGTH


def test_block_hashes_cover_prompt_and_answer() -> None:
    one = sequence(outputs=[4], salt="s")
    first = next_block_hash(chain_root("s"), [1, 2])
    assert one.block_hashes(1, 2) == [first]
    assert one.block_hashes(2, 2) == [first, next_block_hash(first, [3, 4])]
    assert one.block_hashes(0, 2) == []
    with pytest.raises(AssertionError):
        one.block_hashes(3, 2)
