"""A stream of vLLM with the notes that a gateway needs to have it gone on with elsewhere.

A chunk says which tokens it completes, so none may show a part of a character or of a stop string:
chunks wait until what they show is certain. They are decided by tokens alone, so whoever goes on
after any of them makes the same chunks. vLLM's own lists of token ids never leave. Pure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cloudlm.core.errors import UpstreamFailed
from cloudlm.core.resuming import NOTE
from cloudlm.worker.vllm.exact import prompt_check

Chunk = dict[str, Any]
_SAYS_NOTHING: tuple[Any, ...] = ("", None, [])


@dataclass(slots=True)
class _Held:
    """A chunk that waits, with the tokens that it completes."""

    chunk: Chunk
    ids: list[int]

    @property
    def text(self) -> str:
        return _text(self.chunk)


class NotedStream:
    """One stream of one choice; ``take`` is fed with its chunks. ``stops`` are the stop strings,
    which vLLM was asked to leave in the text. ``goes_on``: it has been noted from its beginning, up
    to and with the tokens ``known``, which come once more."""

    def __init__(
        self,
        fingerprint: str,
        stops: Sequence[str],
        *,
        goes_on: bool = False,
        known: Sequence[int] = (),
    ) -> None:
        self._fingerprint = fingerprint
        self._stops = frozenset(stops)
        self._back = max((len(stop) for stop in stops), default=1) - 1
        self._held: deque[_Held] = deque()
        self._chars = 0  # in what is held
        self._silent: list[int] = []  # tokens that show nothing yet
        self._known = deque(known)
        self._tells = goes_on
        self._begins = not goes_on
        self._check: int | None = None

    def take(self, chunk: Chunk) -> list[Chunk]:
        """The chunks that may be shown once ``chunk`` is here. Raises UpstreamFailed."""
        choices = chunk.get("choices")
        if not choices:
            return [self._headed(chunk)] if self._tells and "usage" in chunk else [chunk]
        choice = choices[0]
        ids = _taken_out(choice, "token_ids")
        prompt = _taken_out(chunk, "prompt_token_ids") or _taken_out(choice, "prompt_token_ids")
        if self._begins:
            self._begins, self._tells = False, bool(prompt)  # an older vLLM knows of no ids
            self._check = prompt_check(prompt) if prompt else None
        if _is_opening(choice):
            return [self._noted(chunk, [])]
        if ids is None or len(choices) > 1 or not _is_plain(choice):
            self._tells = False  # nothing that we know
        self._silent += self._unknown(ids or [])
        ends = choice.get("finish_reason") is not None
        if self._tells and not ends and not _text(chunk):
            return []
        self._hold(_Held(chunk, self._silent))
        self._silent = []
        if ends:
            self._cut(choice.get("stop_reason"))
        return self._certain(0 if ends else self._back)

    def _unknown(self, ids: list[int]) -> list[int]:
        """Those that were not noted yet."""
        again = min(len(ids), len(self._known))
        if ids[:again] != [self._known.popleft() for _ in range(again)]:
            raise UpstreamFailed("vLLM does not go on as the answer began")
        return ids[again:]

    def _hold(self, held: _Held) -> None:
        self._held.append(held)
        self._chars += len(held.text)

    def _certain(self, back: int) -> list[Chunk]:
        """What ends ``back`` characters before the text does."""
        ready: list[Chunk] = []
        while self._held and self._chars - len(self._held[0].text) >= back:
            held = self._held.popleft()
            self._chars -= len(held.text)
            ready.append(self._noted(held.chunk, held.ids))
        return ready

    def _cut(self, stop: Any) -> None:
        """Take the stop string off the end. The last chunk takes up all that it reaches into."""
        if not isinstance(stop, str) or stop not in self._stops:
            return
        last = self._held.pop()
        text, ids = last.text, last.ids
        while len(text) < len(stop) and self._held:
            before = self._held.pop()
            text, ids = before.text + text, before.ids + ids
        if not text.endswith(stop):
            raise UpstreamFailed("vLLM ended an answer with a stop string that it does not hold")
        self._chars -= len(text)
        _put(last.chunk, text[: len(text) - len(stop)])
        self._hold(_Held(last.chunk, ids))

    def _noted(self, chunk: Chunk, ids: Sequence[int]) -> Chunk:
        if not self._tells:
            return chunk
        self._headed(chunk)
        chunk[NOTE] = {"token_ids": ids}
        if self._check is not None:
            chunk[NOTE]["seed"], self._check = self._check, None
        return chunk

    def _headed(self, chunk: Chunk) -> Chunk:
        """With our fingerprint, and the usage last and without nulls, as a gateway passes it on
        best; vLLM has such nulls in chats alone."""
        chunk["system_fingerprint"] = self._fingerprint
        if "usage" in chunk:
            usage = chunk.pop("usage") or {}
            chunk["usage"] = {name: said for name, said in usage.items() if said is not None}
        return chunk


def _taken_out(holder: dict[str, Any], name: str) -> list[int] | None:
    """The ids; in their place stands what vLLM says where nobody asks for them."""
    ids = holder.get(name)
    if ids is not None:
        holder[name] = None
    return ids


def _is_opening(choice: dict[str, Any]) -> bool:
    """Whether it names the role and nothing else."""
    delta = choice.get("delta") or {}
    return bool(delta.get("role")) and not delta.get("content") and not choice.get("finish_reason")


def _is_plain(choice: dict[str, Any]) -> bool:
    """Whether it brings text and nothing else."""
    brought = {**(choice.get("delta") or {}), "logprobs": choice.get("logprobs")}
    return all(
        value in _SAYS_NOTHING for name, value in brought.items() if name not in ("role", "content")
    )


def _text(chunk: Chunk) -> str:
    choice = chunk["choices"][0]
    text = choice["delta"].get("content") if "delta" in choice else choice.get("text")
    return text or ""


def _put(chunk: Chunk, text: str) -> None:
    choice = chunk["choices"][0]
    if "delta" in choice:
        choice["delta"]["content"] = text
    else:
        choice["text"] = text
