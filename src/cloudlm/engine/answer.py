"""Turns one sequence's new tokens into the events that its consumer sees.

Detokenises incrementally, finds stop strings, pairs tokens with their log probabilities. Runs in
the engine's thread; knows neither the scheduler's queues nor asyncio.
"""

from __future__ import annotations

from typing import Protocol

from cloudlm.core.chat import FinishReason
from cloudlm.engine.api import TokenEvent, TokenLogprob
from cloudlm.engine.scheduler import Advance
from cloudlm.engine.sequence import Sequence
from cloudlm.engine.step import Sampled
from cloudlm.engine.tokens import Detokenizer, StopChecker


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer."""

    def detokenizer(
        self, prompt_ids: list[int], shown: frozenset[int] = frozenset()
    ) -> Detokenizer: ...


class Answer:
    """The visible side of one sequence.

    Tokens that the sequence starts with (resume) pass through here once, so that a character or
    stop string that began in them goes on; their text is not sent again. If a stop string is
    complete in them already, ``finished`` is an event that ends the sequence.
    """

    def __init__(
        self, sequence: Sequence, tokenizer: Tokenizer, shown: frozenset[int] = frozenset()
    ) -> None:
        self._sequence = sequence
        prompt = list(sequence.prompt)
        self._detokenizer = (
            tokenizer.detokenizer(prompt, shown) if shown else tokenizer.detokenizer(prompt)
        )
        self._stops = StopChecker(sequence.sampling.stop)
        self._prompt_logprobs: list[TokenLogprob | None] = []
        if sequence.prompt_logprobs:
            self._prompt_logprobs = [None] * len(sequence.prompt)
        self.finished: TokenEvent | None = None
        if sequence.outputs:
            self._replay()
        elif (reason := sequence.ended_by_tokens()) is not None:
            self.finished = self._event((), "", reason)

    def _replay(self) -> None:
        sequence = self._sequence
        reason = sequence.ended_by_tokens()
        shown = sequence.outputs[:-1] if reason is FinishReason.STOP else sequence.outputs
        _, match = self._stops.push(self._detokenizer.push(list(shown)))
        if match is not None:
            self.finished = self._event((), "", FinishReason.STOP, match)
        elif reason is not None:
            text, match = self._rest()
            stop = self._stop_token(sequence.outputs[-1]) if match is None else match
            reason = FinishReason.STOP if match is not None else reason
            self.finished = self._event((), text, reason, stop)

    def advance(self, advance: Advance) -> TokenEvent | None:
        """The event for one chunk, or None when it shows nothing. A ``finish_reason`` in the event
        may come from a stop string: the caller then ends the sequence in the scheduler."""
        sampled, reason = advance.sampled, advance.finish_reason
        if sampled is not None:
            self._note_prompt_logprobs(advance.chunk.start, sampled)
        if not advance.chunk.samples or sampled is None or sampled.token_id is None:
            return self._event((), "", reason) if reason is not None else None
        token = sampled.token_id
        ends = reason is FinishReason.STOP
        text, match = ("", None) if ends else self._stops.push(self._detokenizer.push([token]))
        stop = match if match is not None else self._stop_token(token)
        if match is not None:
            reason = FinishReason.STOP
        elif reason is not None:
            rest, match = self._rest()
            text += rest
            if match is not None:
                reason, stop = FinishReason.STOP, match
        return self._event((token,), text, reason, stop, self._logprobs(sampled))

    def conclude(self) -> TokenEvent:
        """The event that ends the sequence after the token that completed its constraint."""
        text, match = self._rest()
        return self._event((), text, FinishReason.STOP, match)

    def _rest(self) -> tuple[str, str | None]:
        """What was held back, at the end: it may still turn out to hold a stop string."""
        text, match = self._stops.push(self._detokenizer.flush())
        return (text, match) if match is not None else (text + self._stops.flush(), None)

    def _stop_token(self, token: int) -> int | None:
        return token if token in self._sequence.sampling.stop_token_ids else None

    def _logprobs(self, sampled: Sampled) -> tuple[TokenLogprob, ...]:
        if sampled.logprob is None or sampled.token_id is None:
            return ()
        return (TokenLogprob(sampled.token_id, sampled.logprob, sampled.top),)

    def _note_prompt_logprobs(self, start: int, sampled: Sampled) -> None:
        prompt = self._sequence.prompt
        for position, (logprob, top) in enumerate(sampled.prompt_logprobs, start + 1):
            if position < len(self._prompt_logprobs):
                self._prompt_logprobs[position] = TokenLogprob(prompt[position], logprob, top)

    def _event(
        self,
        token_ids: tuple[int, ...],
        text: str,
        reason: FinishReason | None,
        stop: str | int | None = None,
        logprobs: tuple[TokenLogprob, ...] = (),
    ) -> TokenEvent:
        prompt_logprobs, self._prompt_logprobs = tuple(self._prompt_logprobs), []
        return TokenEvent(
            token_ids=token_ids,
            text=text,
            logprobs=logprobs,
            finish_reason=reason,
            stop_match=stop if reason is FinishReason.STOP else None,
            cached_tokens=self._sequence.cached_tokens or 0,
            prompt_logprobs=prompt_logprobs,
        )
