"""Going on with a stream that another replica began: ``POST /internal/v1/resume``.

For the gateway alone. The body:

    {"path": "/v1/chat/completions",     or "/v1/completions"
     "request": {…},                     the body that the first replica got
     "begun": {"id": "…", "created": 1, "fingerprint": "…",      the head of the stream's chunks
               "seed": 123,                                      null if nothing was drawn
               "cached_tokens": 0,                               as the first replica stated them
               "usage_shown": false,                             whether the last chunk came
               "choices": [{"index": 0, "token_ids": [7, 8], "chunks": 3},
                           {"index": 1, "finished": true, "tokens": 57}]}}

A stream is a function of its tokens: the same tokens make the same chunks. So the tokens given are
read again through detokeniser, stop strings, tool and reasoning readers, which brings each of them
to the place where the first replica lost it, and as many chunks as the client has are left out.
What follows is the stream that the first replica would have sent, ids and usage included. Tokens
whose log probabilities were not shown yet are computed again. Must not know HTTP.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cloudlm.core.chat import ChatRequest, CompletionRequest
from cloudlm.core.errors import Conflict, InvalidRequest
from cloudlm.core.requests import parse_chat, parse_completion, token_ids
from cloudlm.core.resuming import NOTE
from cloudlm.engine.api import GenerateRequest, TokenEvent, TokenLogprob
from cloudlm.engine.intake import check_token_ids
from cloudlm.engine.tokens import StopChecker
from cloudlm.worker.generate import Numbered, Tally
from cloudlm.worker.logprobs import LogprobGate
from cloudlm.worker.prepare import Prepared, cache_salt, guided
from cloudlm.worker.serving import Serving, Tokenizer
from cloudlm.worker.sharing import Share, share_of

_MAX_COUNT = 2**53
PARSERS: Mapping[str, Callable[[dict[str, Any]], ChatRequest | CompletionRequest]] = {
    "/v1/chat/completions": parse_chat,
    "/v1/completions": parse_completion,
}


@dataclass(frozen=True, slots=True)
class BegunChoice:
    """What the client has of a choice: so many ``chunks``, which hold ``token_ids`` whole; of one
    that is ``finished`` only the number of tokens matters."""

    index: int
    token_ids: tuple[int, ...] = ()
    chunks: int = 0
    finished: bool = False
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Begun:
    """What the client has of a stream."""

    id: str
    created: int
    fingerprint: str
    seed: int | None
    cached_tokens: int
    usage_shown: bool
    choices: tuple[BegunChoice, ...]


@dataclass(frozen=True, slots=True)
class ResumeRequest:
    """A validated body."""

    asked: ChatRequest | CompletionRequest
    begun: Begun
    salt: str
    share: Share


@dataclass(slots=True)
class Thread:
    """What runs through a stream from replica to replica. ``tells``: chunks carry the note that
    makes them resumable; ``shown`` counts, by choice, the chunks that are to be left out."""

    tells: bool = False
    shown: dict[int, int] = field(default_factory=dict)
    usage_shown: bool = False
    cached_tokens: int | None = None
    finished_tokens: int = 0

    def has(self, number: int) -> bool:
        """Whether the client has the next chunk of this choice; to be asked once per chunk."""
        left = self.shown.get(number, 0)
        if left:
            self.shown[number] = left - 1
        return left > 0

    def note(
        self, chunks: Sequence[dict[str, Any]], tokens: Sequence[int], seed: int | None = None
    ) -> None:
        """Tell the gateway which tokens are complete with the last of these chunks."""
        if not self.tells:
            return
        for chunk in chunks:
            chunk[NOTE] = {"token_ids": () if chunk is not chunks[-1] else tokens}
            if seed is not None:
                chunk[NOTE]["seed"] = seed

    def tally(self, prepared: Prepared) -> Tally:
        """Counts this stream's tokens from its very beginning."""
        return Tally(
            prepared.prompt_tokens,
            prepared.choices_per_prompt,
            cached_tokens=self.cached_tokens,
            completion_tokens=self.finished_tokens,
        )


def parse_resume(body: Mapping[str, Any], headers: Mapping[str, str]) -> ResumeRequest:
    """Read body and headers. Raises InvalidRequest with ``param``."""
    parse = PARSERS.get(str(body.get("path")))
    request, begun = body.get("request"), body.get("begun")
    if parse is None:
        raise InvalidRequest(f"path must be one of {', '.join(PARSERS)}", param="path")
    if not isinstance(request, dict) or not isinstance(begun, dict):
        raise InvalidRequest("request and begun must be objects", param="begun")
    asked = parse(request)
    known = read_begun(begun)
    if not asked.stream:
        raise InvalidRequest("only a stream can be resumed", param="request.stream")
    if known.seed is None and asked.sampling.temperature > 0:
        raise InvalidRequest("begun.seed is needed to resume a drawn answer", param="begun.seed")
    return ResumeRequest(asked, known, cache_salt(request), share_of(headers, request))


def read_begun(body: Mapping[str, Any]) -> Begun:
    """The part ``begun`` of a body. Raises InvalidRequest with ``param``."""
    seed, choices = body.get("seed"), body.get("choices")
    if seed is not None and (type(seed) is not int or not -(2**63) <= seed < 2**63):
        raise InvalidRequest("begun.seed must be a 64-bit number or null", param="begun.seed")
    if not isinstance(choices, list) or not all(isinstance(one, dict) for one in choices):
        raise InvalidRequest("begun.choices must be a list of objects", param="begun.choices")
    texts = [body.get("id"), body.get("fingerprint")]
    if not all(isinstance(text, str) and len(text) <= 128 for text in texts):
        raise InvalidRequest("begun.id and begun.fingerprint must be texts", param="begun.id")
    read = tuple(_choice(one) for one in choices)
    if len({one.index for one in read}) != len(read):
        raise InvalidRequest("begun.choices names a choice twice", param="begun.choices")
    return Begun(
        id=str(texts[0]),
        created=_count(body, "created"),
        fingerprint=str(texts[1]),
        seed=seed,
        cached_tokens=_count(body, "cached_tokens"),
        usage_shown=body.get("usage_shown") is True,
        choices=read,
    )


def _choice(body: Mapping[str, Any]) -> BegunChoice:
    return BegunChoice(
        index=_count(body, "index"),
        token_ids=token_ids(body.get("token_ids", []), "begun.choices.token_ids"),
        chunks=_count(body, "chunks"),
        finished=body.get("finished") is True,
        tokens=_count(body, "tokens"),
    )


def _count(body: Mapping[str, Any], name: str) -> int:
    value = body.get(name, 0)
    if type(value) is not int or not 0 <= value <= _MAX_COUNT:
        raise InvalidRequest(f"{name} must be a whole number from 0", param=f"begun.{name}")
    return value


@dataclass(frozen=True, slots=True)
class Resumed:
    """A stream ready to go on. ``prepared`` is the whole request, ``left`` holds the sequences to
    run, whose choices are ``numbers``; ``replayed`` comes before what they generate."""

    prepared: Prepared
    left: Prepared
    numbers: tuple[int, ...]
    replayed: tuple[Numbered, ...]
    thread: Thread

    async def events(
        self, live: AsyncGenerator[Numbered, None] | None
    ) -> AsyncGenerator[Numbered, None]:
        """What the first replica knew already, then what the engine makes."""
        for numbered in self.replayed:
            yield numbered
        if live is not None:
            async with contextlib.aclosing(live):
                async for place, event in live:
                    yield self.numbers[place], event


async def take_up(serving: Serving, prepared: Prepared, begun: Begun) -> Resumed:
    """Bring every choice to where it was. Raises Conflict (this replica serves another version)
    and InvalidRequest."""
    if begun.fingerprint != serving.fingerprint:
        raise Conflict(
            f"the answer was begun as {begun.fingerprint}, but this replica serves "
            f"{serving.fingerprint}; only the same version can go on with it"
        )
    known = {choice.index: choice for choice in begun.choices}
    if any(index >= len(prepared.requests) for index in known):
        raise InvalidRequest("begun.choices has more than were asked for", param="begun.choices")
    seeded = tuple(_seeded(request, begun.seed) for request in prepared.requests)
    left: list[GenerateRequest] = []
    numbers: list[int] = []
    replayed: list[Numbered] = []
    for number, request in enumerate(seeded):
        choice = known.get(number, BegunChoice(number))
        if choice.finished:
            continue
        check_token_ids(choice.token_ids, serving.info.vocab_size, "begun.choices.token_ids")
        events = replay(serving.tokenizer, request, choice.token_ids)
        replayed += [(number, event) for event in events]
        numbers.append(number)
        left.append(_after(request, choice.token_ids[: len(events)]))
    rest = await guided(serving, tuple(left)) if left else ()
    return Resumed(
        replace(prepared, requests=seeded, answer_id=begun.id),
        replace(prepared, requests=rest),
        tuple(numbers),
        tuple(replayed),
        _thread(begun),
    )


def _seeded(request: GenerateRequest, seed: int | None) -> GenerateRequest:
    if seed is None:
        return request
    return replace(request, sampling=replace(request.sampling, seed=seed))


def _after(request: GenerateRequest, outputs: tuple[int, ...]) -> GenerateRequest:
    wants_prompt = request.prompt_logprobs and not outputs
    return replace(request, output_token_ids=outputs, prompt_logprobs=wants_prompt, guide=None)


def _thread(begun: Begun) -> Thread:
    return Thread(
        tells=True,
        shown={choice.index: choice.chunks for choice in begun.choices},
        usage_shown=begun.usage_shown,
        cached_tokens=begun.cached_tokens,
        finished_tokens=sum(choice.tokens for choice in begun.choices if choice.finished),
    )


def replay(
    tokenizer: Tokenizer, request: GenerateRequest, given: tuple[int, ...]
) -> list[TokenEvent]:
    """The events that these tokens were, one per token, without log probabilities of worth. With
    log probabilities asked for, only up to the last token before which all were shown."""
    prompt, stop = list(request.prompt_token_ids), request.sampling.stop
    text_of, stops = tokenizer.detokenizer(prompt, request.shown_token_ids), StopChecker(stop)
    scored = request.sampling.logprobs is not None
    gate = LogprobGate(tokenizer, request.shown_token_ids) if scored else None
    events: list[TokenEvent] = []
    settled = 0
    for token_id in given:
        text, match = stops.push(text_of.push([token_id]))
        if match is not None:
            raise InvalidRequest(
                "a choice that is to go on holds its stop string", param="begun.choices"
            )
        entries = (TokenLogprob(token_id, 0.0),) if gate is not None else ()
        events.append(TokenEvent((token_id,), text, entries))
        if gate is None or (gate.admit(events[-1]) and not gate.holds):
            settled = len(events)
    return events[:settled]
