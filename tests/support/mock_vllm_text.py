"""What the mock of vLLM writes: its tokens, its detokeniser and its chunks, as vLLM's are.

Tokens are numbers; each depends on all before it, so that an answer that was resumed can be
compared with the one that was not. ``HEAD`` and ``TAIL`` are the two halves of one character. The
form of the chunks and the handling of stop strings are those of vLLM 0.32: a detokeniser that is
begun in the middle of a character repeats the prompt, and token ids are told where they are asked.
"""

from __future__ import annotations

from typing import Any

END, HEAD, TAIL = 0, 1001, 1002
BROKEN = "\N{REPLACEMENT CHARACTER}"
_BYTES = {END: b"", HEAD: b"\xe2\x82", TAIL: b"\xac"}


def next_token(tokens: list[int]) -> int:
    if tokens and tokens[-1] == HEAD:
        return TAIL
    mixed = 17
    for token in tokens:
        mixed = (mixed * 31 + token + 1) % 1009
    if mixed % 7 == 3:
        return HEAD
    return END if mixed % 41 == 0 or mixed in (HEAD, TAIL) else mixed


def answer_tokens(prompt: list[int], limit: int, ignore_eos: bool = False) -> list[int]:
    """What is generated after ``prompt``: at most ``limit`` tokens, the end token included."""
    found: list[int] = []
    while len(found) < limit:
        token = next_token([*prompt, *found])
        found.append(token or (7 if ignore_eos else END))
        if found[-1] == END:
            break
    return found


def tokenise(text: str) -> list[int]:
    return [len(word) + 1 for word in text.split()]


def text_of(tokens: list[int]) -> str:
    return b"".join(_BYTES.get(one, b"t%d " % one) for one in tokens).decode(errors="replace")


class Detokenizer:
    """As vLLM's: whole characters only, stop strings held back unless they are to be seen."""

    def __init__(self, prompt: list[int], body: dict[str, Any]) -> None:
        stop = body.get("stop") or []
        self._stop = [stop] if isinstance(stop, str) else stop
        self._seen = bool(body.get("include_stop_str_in_output"))
        self._tokens = list(prompt)
        self._known = text_of(prompt)
        if self._known.endswith(BROKEN):
            self._known = ""
        self._text = ""
        self._shown = 0
        self.stopped: str | None = None

    def push(self, tokens: list[int], *, last: bool) -> tuple[str, list[int]]:
        """The text that may be shown now, and the tokens that count."""
        for place, token in enumerate(tokens, 1):
            before = len(self._text)
            self._tokens.append(token)
            text = text_of(self._tokens)
            if len(text) > len(self._known) and not text.endswith(BROKEN):
                self._text += text[len(self._known) :]
                self._known = text
            if self._find(before):
                tokens, last = tokens[:place], True
                break
        back = max((len(one) for one in self._stop), default=1) - 1
        end = len(self._text) - (0 if last or self._seen else back)
        shown = self._text[self._shown : end] if end > self._shown else ""
        self._shown = max(self._shown, end)
        return shown, tokens

    def _find(self, before: int) -> bool:
        found: list[tuple[int, int, str]] = []
        for stop in self._stop if len(self._text) > before else ():
            at = self._text.find(stop, max(before - len(stop) + 1, 0))
            if at >= 0:
                found.append((at + len(stop), at, stop))
        if found:
            end, at, self.stopped = min(found, key=lambda one: one[0])
            self._text = self._text[: end if self._seen else at]
        return bool(found)


class Speech:
    """The chunks of one stream."""

    def __init__(
        self, body: dict[str, Any], prompt: list[int], knows_token_ids: bool, cached: int
    ) -> None:
        self._body = body
        self._prompt = prompt
        self._knows = knows_token_ids
        self._told = knows_token_ids and bool(body.get("return_token_ids"))
        self._chat = "messages" in body
        self._cached = cached
        self._text = Detokenizer(prompt, body)
        self._count = 0
        self.ended = False

    def opening(self) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        chunk = self._around([choice])
        if self._knows:
            chunk["prompt_token_ids"] = self._prompt if self._told else None
        return chunk

    def chunk(self, tokens: list[int], *, last: bool) -> dict[str, Any]:
        text, tokens = self._text.push(tokens, last=last)
        first, self._count = self._count == 0, self._count + len(tokens)
        self.ended = last or self._text.stopped is not None
        reason = None
        if self.ended:
            reason = "stop" if self._text.stopped or tokens[-1] == END else "length"
        choice: dict[str, Any] = {"index": 0}
        choice |= {"delta": {"content": text}} if self._chat else {"text": text}
        choice |= {"logprobs": self._logprobs(tokens), "finish_reason": reason}
        if self.ended or not self._chat:
            choice["stop_reason"] = self._text.stopped
        if self._knows and not self._chat:
            choice["prompt_token_ids"] = self._prompt if self._told and first else None
        if self._knows:
            choice["token_ids"] = tokens if self._told else None
        return self._around([choice])

    def usage(self) -> dict[str, Any]:
        chunk = self._around([])
        chunk["usage"] = self._usage()
        chunk["usage"]["prompt_tokens_details"] = {"cached_tokens": self._cached}
        return chunk | {"system_fingerprint": "vllm-0.32.0"}

    def _logprobs(self, tokens: list[int]) -> dict[str, Any] | None:
        if self._body.get("logprobs") is None:
            return None
        names = [f"token_id:{token}" for token in tokens]
        tops = [{name: -0.5} for name in names]
        return {"tokens": names, "token_logprobs": [-0.5] * len(tokens), "top_logprobs": tops}

    def _around(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk: dict[str, Any] = {
            "id": "chatcmpl-mock" if self._chat else "cmpl-mock",
            "object": "chat.completion.chunk" if self._chat else "text_completion",
            "created": 1,
            "model": self._body["model"],
            "choices": choices,
        }
        if (self._body.get("stream_options") or {}).get("continuous_usage_stats"):
            chunk["usage"] = self._usage()
            if self._chat:
                chunk["usage"]["completion_tokens_details"] = None
        return chunk

    def _usage(self) -> dict[str, Any]:
        prompt = len(self._prompt)
        return {
            "prompt_tokens": prompt,
            "total_tokens": prompt + self._count,
            "completion_tokens": self._count,
        }
