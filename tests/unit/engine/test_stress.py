"""Engine, scheduler, cache and network together: a crowd in a cache that is too small for it gets
what each of its members gets alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as RustTokenizer

from cloudlm.core.chat import FinishReason, Sampling
from cloudlm.engine.api import GenerateRequest, TokenEvent
from cloudlm.engine.engine import LocalEngine
from cloudlm.engine.runner import Runner, RunnerFacts
from cloudlm.engine.speculate import Lookup
from cloudlm.engine.tokens import Tokenizer

REQUESTS = 32
LONGEST = 128  # tokens
BLOCK_SIZE = 4
SMALL_CACHE = 40  # blocks: room for about four of the sequences below
LARGE_CACHE = 512
PREFIXES = [tuple((7 * n + 3 * at) % 250 for at in range(24)) for n in range(3)]


def save_tokenizer(folder: Path) -> int:
    """Tokens of one to three letters, two halves of one character, and an end token, whose id is
    returned. Larger ids have no text."""
    letters = "abcde\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"  # the byte-level space
    halves = ["\N{LATIN CAPITAL LETTER A WITH TILDE}", "\N{COPYRIGHT SIGN}"]  # e with acute
    texts = [x + y + z for x in ["", *letters] for y in ["", *letters] for z in letters]
    vocabulary = {text: number for number, text in enumerate(dict.fromkeys(halves + texts))}
    rust = RustTokenizer(models.BPE(vocabulary, []))
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens([AddedToken("<|end|>", special=True)])
    rust.save(str(folder / "tokenizer.json"))
    return int(rust.token_to_id("<|end|>"))


@pytest.fixture
def start(saved_model: Any, make_runner: Any, tmp_path: Path) -> Callable[[int], Any]:
    """``async with start(number of cache blocks) as engine``; all share one network."""
    end_token_id = save_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    network = make_runner(saved_model("llama").folder).model

    @asynccontextmanager
    async def starter(num_blocks: int, lookup: Lookup | None = None) -> AsyncIterator[LocalEngine]:
        facts = RunnerFacts("llama", LONGEST, num_blocks, BLOCK_SIZE, (end_token_id,))
        engine = LocalEngine.start(
            Runner(network, facts),
            tokenizer,
            max_batch_tokens=40,
            max_batch_sequences=12,
            max_waiting=200,
            lookup=lookup,
        )
        try:
            yield engine
            engine._loop.scheduler.check_integrity()
            assert (engine.stats().running, engine.stats().kv_usage) == (0, 0.0)
        finally:
            await engine.close()

    return starter


@dataclass(frozen=True)
class Answer:
    """What a consumer saw; ``logprobs`` are rounded to what other batches may change."""

    events: tuple[TokenEvent, ...]

    @property
    def tokens(self) -> list[int]:
        return [token for event in self.events for token in event.token_ids]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)

    @property
    def end(self) -> tuple[FinishReason | None, str | int | None]:
        return self.events[-1].finish_reason, self.events[-1].stop_match

    @property
    def logprobs(self) -> list[float]:
        return [entry.logprob for event in self.events for entry in event.logprobs]


async def read(engine: LocalEngine, request: GenerateRequest) -> Answer:
    async with asyncio.timeout(60):
        return Answer(tuple([event async for event in engine.submit(request)]))


def draw_sampling(chance: random.Random) -> Sampling:
    """Greedy or seeded, with or without penalties, biases and stop strings."""
    sampling = Sampling(
        temperature=chance.choice([0.0, 0.7, 1.3]),
        top_p=chance.choice([1.0, 0.9]),
        top_k=chance.choice([0, 20]),
        min_p=chance.choice([0.0, 0.01]),
        seed=chance.randrange(2**32),
        max_tokens=chance.randint(1, 40),
        logprobs=chance.choice([None, 0, 2]),
        ignore_eos=chance.random() < 0.5,
    )
    if chance.random() < 0.4:
        sampling = replace(sampling, repetition_penalty=1.2, frequency_penalty=0.4)
    if chance.random() < 0.3:
        sampling = replace(sampling, logit_bias={chance.randrange(260): 3.0})
    if chance.random() < 0.5:
        sampling = replace(
            sampling, stop=tuple(chance.sample(["abc", "dd", "e a", "é", "b  c"], 2))
        )
    return sampling


def draw_requests(chance: random.Random) -> list[GenerateRequest]:
    """The crowd: REQUESTS requests, every fourth with three choices."""
    requests: list[GenerateRequest] = []
    for number in range(REQUESTS):
        shared = chance.choice(PREFIXES)[: chance.choice([0, 9, 16, 24])]
        tail = [chance.randrange(260) for _ in range(chance.randint(1, 30))]
        one = GenerateRequest(
            f"r{number}",
            (*shared, *tail),
            draw_sampling(chance),
            cache_salt=chance.choice(["", "tenant"]),
        )
        requests += [replace(one, index=n) for n in range(3 if number % 4 == 0 else 1)]
    return requests


@pytest.mark.parametrize("lookup", [None, Lookup(6, 1, 3)], ids=["plain", "guessing"])
async def test_a_crowd_gets_what_each_gets_alone(start: Any, lookup: Lookup | None) -> None:
    chance = random.Random(3)
    requests = draw_requests(chance)
    alone: list[Answer] = []
    async with start(LARGE_CACHE) as engine:
        for number, request in enumerate(requests):  # a salt each: nothing is shared
            alone.append(await read(engine, replace(request, cache_salt=f"alone-{number}")))
        assert engine.stats().prefix_hits == engine.stats().preemptions == 0
    reasons = {answer.end[0] for answer in alone}
    assert reasons == {FinishReason.STOP, FinishReason.LENGTH}
    assert any(isinstance(answer.end[1], str) for answer in alone)

    leaving = {f"r{n}" for n in chance.sample(range(REQUESTS), 8)}
    async with start(SMALL_CACHE, lookup) as engine:

        async def follow(request: GenerateRequest, patience: int) -> Answer:
            """Read all, or leave after some events, by one of the two ways there are."""
            stream = engine.submit(request)
            events: list[TokenEvent] = []
            async with aclosing(stream):
                async for event in stream:
                    events.append(event)
                    if request.request_id in leaving and len(events) == patience:
                        if patience % 2:
                            break
                        engine.cancel(request.request_id)
            return Answer(tuple(events))

        async with asyncio.timeout(60):
            crowd = await asyncio.gather(
                *(follow(request, chance.randint(1, 20)) for request in requests)
            )
            while engine.stats().running or engine.stats().waiting:
                await asyncio.sleep(0.001)
        assert engine.stats().preemptions > 0
        assert engine.stats().prefix_hits > 0
        assert (engine.stats().drafted_tokens > 0) == (lookup is not None)
    for request, got, expected in zip(requests, crowd, alone, strict=True):
        if request.request_id in leaving:
            assert got.tokens == expected.tokens[: len(got.tokens)]
            assert expected.text.startswith(got.text)
        else:
            assert (got.tokens, got.text, got.end) == (expected.tokens, expected.text, expected.end)
            assert got.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


async def test_resumed_in_a_crowd_each_goes_on_exactly(start: Any) -> None:
    chance = random.Random(5)
    requests = draw_requests(chance)
    async with start(SMALL_CACHE) as engine:
        whole = await asyncio.gather(*(read(engine, request) for request in requests))
        cuts = [chance.randrange(len(answer.events)) for answer in whole]
        resumed = [
            replace(request, output_token_ids=tuple(Answer(answer.events[:cut]).tokens))
            for request, answer, cut in zip(requests, whole, cuts, strict=True)
        ]
        rest = await asyncio.gather(*(read(engine, request) for request in resumed))
        assert engine.stats().preemptions > 0
    for answer, cut, continued in zip(whole, cuts, rest, strict=True):
        missing = Answer(answer.events[cut:])
        assert (continued.tokens, continued.text) == (missing.tokens, missing.text)
        assert continued.end == missing.end
        assert continued.logprobs == pytest.approx(missing.logprobs, abs=1e-4)


async def test_what_one_tenant_computed_shows_in_no_other_answer(start: Any) -> None:
    """The same prompt under two salts at once, in a cache that both must fight for."""
    prompt = (*PREFIXES[0], 5, 6)
    sampling = Sampling(temperature=0.0, max_tokens=50, ignore_eos=True)
    async with start(SMALL_CACHE) as engine:
        answers = await asyncio.gather(
            *(
                read(engine, GenerateRequest(f"r{n}", prompt, sampling, cache_salt=f"t{n % 2}"))
                for n in range(10)
            )
        )
        assert len({tuple(answer.tokens) for answer in answers}) == 1
        assert [answer.events[0].cached_tokens for answer in answers] == [0, 0, *[24] * 8]
