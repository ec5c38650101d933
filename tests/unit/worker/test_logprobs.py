"""Log probabilities stay in step with the text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cloudlm.core.chat import FinishReason
from cloudlm.engine.api import TokenEvent, TokenLogprob
from cloudlm.worker.logprobs import CompletionLogprobs, LogprobGate, chat_logprobs, printable
from cloudlm.worker.serving import Tokenizer


@pytest.fixture
def tokenizer(serving_of: Callable[..., Any], echo_engine: type[Any]) -> Tokenizer:
    found: Tokenizer = serving_of(echo_engine()).tokenizer
    return found


def event(text: str, *ids: int, **more: Any) -> TokenEvent:
    return TokenEvent(ids, text, tuple(TokenLogprob(i, -1.0) for i in ids), **more)


def ids_of(entries: list[TokenLogprob]) -> list[int]:
    return [entry.token_id for entry in entries]


def test_an_entry_waits_for_its_text(tokenizer: Tokenizer) -> None:
    gate = LogprobGate(tokenizer)
    first, second = "é".encode()
    assert ids_of(gate.admit(event("", first))) == []
    assert ids_of(gate.admit(event("é", second))) == [first, second]
    assert ids_of(gate.admit(event("a", 97))) == [97]


@pytest.mark.parametrize("match", [257, None])  # asked for in stop_token_ids, or the model's own
def test_the_stop_token_has_no_entry(tokenizer: Tokenizer, match: int | None) -> None:
    gate = LogprobGate(tokenizer)
    last = event("", 257, finish_reason=FinishReason.STOP, stop_match=match)
    assert ids_of(gate.admit(last)) == []


def test_a_token_without_text_holds_up_nothing_behind_it(tokenizer: Tokenizer) -> None:
    gate = LogprobGate(tokenizer)
    assert ids_of(gate.admit(event("a", 97))) == [97]
    assert ids_of(gate.admit(event("", 256))) == []
    assert ids_of(gate.admit(event("b", 98))) == [256, 98]


def test_a_stop_string_takes_its_entries_along(tokenizer: Tokenizer) -> None:
    gate = LogprobGate(tokenizer)
    assert ids_of(gate.admit(event("a", 97))) == [97]
    assert ids_of(gate.admit(event("", 98))) == []  # held: "b" may begin the stop string "bc"
    end = event("", 99, finish_reason=FinishReason.STOP, stop_match="bc")
    assert ids_of(gate.admit(end)) == []


def test_nothing_comes_early_behind_a_special_token_that_is_shown(tokenizer: Tokenizer) -> None:
    gate = LogprobGate(tokenizer, frozenset({256}))
    assert ids_of(gate.admit(event("<|start|>", 256))) == [256]
    assert ids_of(gate.admit(event("", 97))) == []  # held: "a" may begin the stop string "ab"
    assert ids_of(gate.admit(event("ac", 99))) == [97, 99]


def test_held_entries_come_out_when_the_limit_ends_the_answer(tokenizer: Tokenizer) -> None:
    gate = LogprobGate(tokenizer)
    assert ids_of(gate.admit(event("", 98))) == []
    end = event("b\N{REPLACEMENT CHARACTER}", 0xC3, finish_reason=FinishReason.LENGTH)
    assert ids_of(gate.admit(end)) == [98, 0xC3]


def test_chat_shape(tokenizer: Tokenizer) -> None:
    entry = TokenLogprob(97, -0.25, ((97, -0.25), (0xC3, float("-inf"))))
    assert chat_logprobs([entry], tokenizer) == {
        "content": [
            {
                "token": "a",
                "logprob": -0.25,
                "bytes": [97],
                "top_logprobs": [
                    {"token": "a", "logprob": -0.25, "bytes": [97]},
                    {"token": "\N{REPLACEMENT CHARACTER}", "logprob": -9999.0, "bytes": [0xC3]},
                ],
            }
        ],
        "refusal": None,
    }


def test_completion_shape_counts_offsets_over_all_parts(tokenizer: Tokenizer) -> None:
    shape = CompletionLogprobs(tokenizer)
    echo = shape.echo([104, 105], [None, TokenLogprob(105, -1.0)])
    assert echo == {
        "tokens": ["h", "i"],
        "token_logprobs": [None, -1.0],
        "top_logprobs": [None, {"i": -1.0}],
        "text_offset": [0, 1],
    }
    assert shape.shape([TokenLogprob(33, -2.0, ((34, -1.0),))]) == {
        "tokens": ["!"],
        "token_logprobs": [-2.0],
        "top_logprobs": [{'"': -1.0, "!": -2.0}],
        "text_offset": [2],
    }


def test_half_characters_stay_distinct(tokenizer: Tokenizer) -> None:
    assert printable(0xC3, tokenizer) == "bytes:\\xc3"
    assert printable(97, tokenizer) == "a"
