"""Log probabilities in the shapes of both OpenAI APIs, in step with the text that was sent.

Tokens become known before their text is certain (half a UTF-8 character, a stop string that may be
beginning), and some never get a text (the stop token, a stop string). ``LogprobGate`` holds each
entry back until its token's text is out, so that entries and text always agree. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cloudlm.core.chat import FinishReason
from cloudlm.engine.api import TokenEvent, TokenLogprob
from cloudlm.worker.serving import Tokenizer


class LogprobGate:
    """The entries of one choice on their way out. ``shown`` are the special tokens that have a text
    in it (``GenerateRequest.shown_token_ids``)."""

    def __init__(self, tokenizer: Tokenizer, shown: frozenset[int] = frozenset()) -> None:
        self._tokenizer = tokenizer
        self._shown = shown
        self._held: list[tuple[int, TokenLogprob]] = []
        self._token_bytes = 0
        self._text_bytes = 0

    @property
    def holds(self) -> bool:
        """Whether an entry waits for its token's text."""
        return bool(self._held)

    def admit(self, event: TokenEvent) -> list[TokenLogprob]:
        """Take one event, return the entries whose text has been sent with it or before."""
        self._text_bytes += len(event.text.encode("utf-8", "replace"))
        entries = list(event.logprobs)
        cut_by_text = isinstance(event.stop_match, str)
        if event.finish_reason is FinishReason.STOP and not cut_by_text and entries:
            entries.pop()  # the token that ended the answer has no text
        for entry in entries:
            self._held.append((self._token_bytes, entry))
            self._token_bytes += len(self._tokenizer.visible_bytes(entry.token_id, self._shown))
        if event.finish_reason is not None and not cut_by_text:
            ready, self._held = self._held, []
        else:
            ready = [held for held in self._held if held[0] < self._text_bytes]
            self._held = self._held[len(ready) :]
        return [entry for _, entry in ready]


def chat_logprobs(entries: Sequence[TokenLogprob], tokenizer: Tokenizer) -> dict[str, Any]:
    """``choices[].logprobs`` of ``/v1/chat/completions``."""
    return {"content": [_chat_entry(entry, tokenizer) for entry in entries], "refusal": None}


def _chat_entry(entry: TokenLogprob, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        **_chat_token(entry.token_id, entry.logprob, tokenizer),
        "top_logprobs": [_chat_token(one, logprob, tokenizer) for one, logprob in entry.top],
    }


def _chat_token(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": finite(logprob),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


class CompletionLogprobs:
    """``choices[].logprobs`` of ``/v1/completions``; ``text_offset`` counts characters of the
    choice's text from its beginning, over all chunks of a stream."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0

    def shape(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The next entries."""
        return self._shape([(entry.token_id, entry) for entry in entries])

    def echo(
        self, prompt_token_ids: Sequence[int], entries: Sequence[TokenLogprob | None]
    ) -> dict[str, Any]:
        """The prompt's own entries; the first token has none, nothing comes before it."""
        known = [*entries, *[None] * (len(prompt_token_ids) - len(entries))]
        return self._shape(list(zip(prompt_token_ids, known, strict=True)))

    def _shape(self, pairs: Sequence[tuple[int, TokenLogprob | None]]) -> dict[str, Any]:
        shaped: dict[str, Any] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token_id, entry in pairs:
            text = printable(token_id, self._tokenizer)
            shaped["tokens"].append(text)
            shaped["token_logprobs"].append(None if entry is None else finite(entry.logprob))
            shaped["top_logprobs"].append(None if entry is None else self._top(entry))
            shaped["text_offset"].append(self._offset)
            self._offset += len(self._tokenizer.token_text(token_id))
        return shaped

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """The likeliest tokens and always the chosen one, as OpenAI's API has it."""
        top = {printable(one, self._tokenizer): finite(logprob) for one, logprob in entry.top}
        top.setdefault(printable(entry.token_id, self._tokenizer), finite(entry.logprob))
        return top


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two shapes of the same choice, one after the other."""
    return {name: first[name] + second[name] for name in first}


def printable(token_id: int, tokenizer: Tokenizer) -> str:
    """A token's text, or ``bytes:\\xe2\\x82`` where its bytes are no whole UTF-8 character, so that
    two such tokens stay distinct as keys."""
    raw = tokenizer.token_bytes(token_id)
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
    return tokenizer.token_text(token_id)


def finite(logprob: float) -> float:
    """JSON has no minus infinity; OpenAI and vLLM write -9999 for an impossible token."""
    return logprob if logprob >= -9999.0 else -9999.0
