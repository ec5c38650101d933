"""The real engine under constraints: whatever random weights prefer, answers follow them."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tiny_chat_model import save_tiny_chat_model

from cloudlm.core.chat import Constraint, ConstraintKind, FinishReason, Sampling
from cloudlm.core.errors import CloudlmError, InvalidRequest
from cloudlm.core.settings import EngineSettings
from cloudlm.engine.api import GenerateRequest

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "é"]}, "maxItems": 3},
        "sure": {"type": "boolean"},
    },
    "required": ["name", "age", "tags", "sure"],
    "additionalProperties": False,
}
BY_SCHEMA = Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(SCHEMA))
BY_REGEX = Constraint(ConstraintKind.REGEX, r"[a-f]{3,5}-\d{2}(é|ü)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat_model(tmp_path_factory.mktemp("tiny-chat"))


@pytest.fixture
async def engine(folder: Path) -> AsyncIterator[Any]:
    from cloudlm.engine.load import load_engine

    settings = EngineSettings(
        dtype="float32", device="cpu", kv_cache_mb=1, block_size=4, max_batch_sequences=8, threads=1
    )
    made = await asyncio.to_thread(load_engine, folder, settings, max_waiting=200)
    yield made
    await made.close()


async def ask(engine: Any, sampling: Sampling, **fields: Any) -> Any:
    """All events of one answer to the same prompt."""
    request = GenerateRequest("r", (5, 6, 7), sampling, **fields)
    assert sampling.constraint is not None
    guide = await engine.guide(sampling.constraint, request.output_token_ids)
    return [event async for event in engine.submit(replace(request, guide=guide))]


def text_of(events: Any) -> str:
    return "".join(event.text for event in events)


def tokens_of(events: Any) -> tuple[int, ...]:
    return tuple(token for event in events for token in event.token_ids)


def drawn(seed: int, constraint: Constraint = BY_SCHEMA, **more: Any) -> Sampling:
    return Sampling(seed=seed, max_tokens=400, constraint=constraint, **more)


async def test_fifty_answers_follow_the_schema(engine: Any) -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"temperature": 2.0},
        {"temperature": 0.0},
        {"top_k": 3, "top_p": 0.5, "min_p": 0.1},
        {"repetition_penalty": 5.0, "presence_penalty": 2.0, "frequency_penalty": 2.0},
        {"logit_bias": dict.fromkeys(range(40, 60), 100.0)},
    ]
    answers = await asyncio.gather(
        *(ask(engine, drawn(seed, **variants[seed % len(variants)])) for seed in range(50))
    )
    for events in answers:
        assert events[-1].finish_reason is FinishReason.STOP
        jsonschema.validate(json.loads(text_of(events)), SCHEMA)
    assert len({text_of(events) for events in answers}) > 20


async def test_the_answer_ends_with_its_last_token_and_all_of_its_text(engine: Any) -> None:
    events = await ask(engine, drawn(1, BY_REGEX, logprobs=2))
    assert re.fullmatch(BY_REGEX.text, text_of(events))
    assert events[-1].token_ids == ()
    assert events[-1].finish_reason is FinishReason.STOP
    entries = [entry for event in events for entry in event.logprobs]
    assert [entry.token_id for entry in entries] == list(tokens_of(events))
    assert engine.tokenizer.decode(tokens_of(events)) == text_of(events)


async def test_choices_differ_by_index_and_not_by_company(engine: Any) -> None:
    alone = [tokens_of(await ask(engine, drawn(7), index=index)) for index in range(4)]
    crowd = await asyncio.gather(
        *(ask(engine, drawn(7), index=index) for index in range(4)),
        *(ask(engine, drawn(seed, BY_REGEX)) for seed in range(20)),
    )
    assert [tokens_of(events) for events in crowd[:4]] == alone
    assert len(set(alone)) > 1


@pytest.mark.parametrize("sampling", [drawn(3), drawn(4, BY_REGEX), drawn(5, temperature=0.0)])
async def test_resumed_anywhere_it_goes_on_exactly(engine: Any, sampling: Sampling) -> None:
    whole = await ask(engine, sampling)
    tokens, text = tokens_of(whole), text_of(whole)
    cuts = sorted({1, 2, len(tokens), *range(3, len(tokens), max(1, len(tokens) // 8))})
    for cut in cuts:
        rest = await ask(engine, sampling, output_token_ids=tokens[:cut])
        assert tokens[:cut] + tokens_of(rest) == tokens
        assert text.endswith(text_of(rest))
        assert rest[-1].finish_reason is FinishReason.STOP


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (2, 2)])
async def test_over_several_ranks_masks_hold_and_answers_are_the_same(
    folder: Path, engine: Any, tensor: int, pipeline: int
) -> None:
    """Beside answers without a constraint that are guessed ahead."""
    from thread_ranks import thread_runner

    from cloudlm.engine.engine import LocalEngine
    from cloudlm.engine.speculate import Lookup

    samplings = [drawn(1), drawn(2, BY_REGEX), drawn(3, temperature=0.0)]
    alone = [tokens_of(await ask(engine, one)) for one in samplings]
    runner = await asyncio.to_thread(thread_runner, folder, tensor, pipeline, max_model_len=512)
    parted = LocalEngine.start(
        runner,
        engine.tokenizer,
        max_batch_tokens=64,
        max_batch_sequences=8,
        max_waiting=50,
        lookup=Lookup(8, 1, 3),
    )
    free = GenerateRequest("free", (5, 6, 7), Sampling(max_tokens=200, ignore_eos=True, seed=1))

    async def unbound() -> tuple[int, ...]:
        return tokens_of([event async for event in parted.submit(free)])

    try:
        *crowd, open_answer = await asyncio.gather(
            *(ask(parted, one) for one in samplings), unbound()
        )
        assert len(open_answer) == 200
    finally:
        await parted.close()
    assert [tokens_of(events) for events in crowd] == alone
    jsonschema.validate(json.loads(text_of(crowd[0])), SCHEMA)


async def test_preempted_answers_are_the_same(folder: Path, engine: Any) -> None:
    from cloudlm.engine.engine import LocalEngine
    from cloudlm.engine.load import load_runner
    from cloudlm.engine.speculate import Lookup

    alone = [tokens_of(await ask(engine, drawn(seed))) for seed in range(6)]
    settings = EngineSettings(
        dtype="float32", device="cpu", kv_cache_mb=1, block_size=4, threads=1, max_model_len=64
    )
    runner = await asyncio.to_thread(
        load_runner, folder, settings, engine.info.eos_token_ids, lambda share, what: None
    )
    runner.num_blocks = 40
    narrow = LocalEngine.start(
        runner,
        engine.tokenizer,
        max_batch_tokens=64,
        max_batch_sequences=8,
        max_waiting=50,
        lookup=Lookup(8, 1, 3),  # not for constrained answers: each token needs its mask
    )
    try:
        short = [replace(drawn(seed), max_tokens=None) for seed in range(6)]
        crowd = await asyncio.gather(*(ask(narrow, one) for one in short))
        assert narrow.stats().preemptions > 0
        assert narrow.stats().drafts == 0
    finally:
        await narrow.close()
    for found, expected in zip(crowd, alone, strict=True):
        assert tokens_of(found) == expected[: len(tokens_of(found))]


async def test_stop_strings_and_limits_still_end_an_answer(engine: Any) -> None:
    stopped = await ask(engine, drawn(1, BY_REGEX, stop=("-",)))
    assert stopped[-1].stop_match == "-"
    assert re.fullmatch("[a-f]{3,5}", text_of(stopped))
    cut = await ask(engine, replace(drawn(1, BY_REGEX), max_tokens=2))
    assert cut[-1].finish_reason is FinishReason.LENGTH


async def test_an_end_token_is_not_needed_nor_obeyed_early(engine: Any) -> None:
    bias = dict.fromkeys(engine.info.eos_token_ids, 100.0)
    events = await ask(engine, drawn(2, BY_REGEX, logit_bias=bias, ignore_eos=True))
    assert re.fullmatch(BY_REGEX.text, text_of(events))


async def test_what_turns_out_too_complex_ends_that_answer_alone(engine: Any) -> None:
    hostile = Constraint(ConstraintKind.REGEX, "((a{0,100}){0,100}){0,100}")
    sampling = drawn(1, hostile, logit_bias=dict.fromkeys(engine.info.eos_token_ids, -100.0))
    good = asyncio.gather(*(ask(engine, drawn(seed)) for seed in range(4)))
    try:
        events = await ask(engine, sampling)
        assert set(text_of(events)) <= {"a"}
    except CloudlmError as error:
        assert isinstance(error, InvalidRequest)
        assert "constraint" in error.message
    for answer in await good:
        jsonschema.validate(json.loads(text_of(answer)), SCHEMA)
    assert engine.stats().alive


TOO_COMPLEX_SOON = 'start: "x" A "z"\nA: /[a-z]*/ & ' + " & ".join(
    f"~/(.*){'a' * count}b(.*)/" for count in range(1, 60)
)


@pytest.mark.parametrize("end", ["end token", "stop string", "limit"])
async def test_what_the_constraint_gave_up_on_is_no_answer_whatever_ends_it(
    engine: Any, end: str
) -> None:
    """The token behind the last mask is free, and may be one that ends the answer."""
    (a,) = engine.tokenizer.encode("a")
    constraint = Constraint(ConstraintKind.GRAMMAR, TOO_COMPLEX_SOON)
    tokens = await allowed_before_the_fault(engine, constraint)
    sampling = Sampling(
        temperature=0.0, max_tokens=100, constraint=constraint, logit_bias={a: 1000.0}
    )
    if end == "end token":
        ends = dict.fromkeys(engine.info.eos_token_ids, 2000.0)
        sampling = replace(sampling, logit_bias={a: 1000.0, **ends})
    elif end == "stop string":
        sampling = replace(sampling, stop=("a" * tokens,))
    else:
        sampling = replace(sampling, max_tokens=tokens + 1)
    with pytest.raises(InvalidRequest, match="cannot follow its constraint: lexer error"):
        await ask(engine, sampling)
    assert engine.stats().finished == {"error": 1}


async def allowed_before_the_fault(engine: Any, constraint: Constraint) -> int:
    """Tokens of "xaaa…" that have a mask; found apart, since one constraint's guides share work."""
    from cloudlm.engine.constraint import Constrainer

    (x,), (a,) = engine.tokenizer.encode("x"), engine.tokenizer.encode("a")
    apart = Constrainer(engine.tokenizer, engine.info.vocab_size, engine.info.eos_token_ids)
    try:
        guide = await apart.guide(constraint, ())
    finally:
        apart.close()
    tokens = 0
    while guide.mask().any() and guide.fault is None:
        guide.accept([a if tokens else x])
        assert guide.fault is None
        tokens += 1
    assert tokens
    return tokens
