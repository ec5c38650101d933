"""An answer on its way through guardrails, before its dialect says it: whole or chunk by chunk.

Every text of a choice (content, reasoning, the arguments of each tool call) goes through a pipe of
its own, which may hold back its end, change it, or stop. A choice whose text was stopped ends with
``finish_reason: content_filter`` and says nothing more; when every choice has ended so, or by
itself, the answer is over, with the usage so far, and the replica need not go on. Must not know
rules.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Protocol

from cloudlm.core.errors import CloudlmError
from cloudlm.gateway.dialects.base import AnswerEnded, Rendering

BLOCKED = "content_filter"
_NO_TEXTS = frozenset({"role"})
_BARE = frozenset({"index", "message", "delta", "text", "finish_reason", "stop_reason"})


class TextPipe(Protocol):
    """Where one text goes through."""

    stopped: bool

    def feed(self, text: str) -> str: ...

    def finish(self) -> str: ...


MakePipe = Callable[[Callable[[str], str]], TextPipe]
"""Makes a pipe; it is given what makes a text fit where it is put."""
_Place = tuple[str, int]
"""A field's name and, for tool calls, the call's number."""
_CALLS = "tool_calls"


class _Choice:
    """One choice on its way. At one time one of its texts is being written."""

    def __init__(self, make: MakePipe) -> None:
        self._make = make
        self._place: _Place | None = None
        self._pipe: TextPipe | None = None
        self.stopped = False
        self.ended = False

    def take(self, holder: dict[str, Any], *, last: bool) -> None:
        """What a chunk brings, in ``holder`` (a delta, a message or a completion's choice), becomes
        what may be sent. ``last``: nothing more will come."""
        out: dict[_Place, str] = {}
        for place, text in self._texts(holder):
            if place != self._place:
                self._end(out)
                self._place = place
                self._pipe = self._make(_in_json if place[0] == _CALLS else str)
            assert self._pipe is not None
            self._add(out, self._pipe.feed(text))
            if self.stopped:
                break
        if last:
            self._end(out)
        if self.stopped and not any(name == _CALLS for name, _ in out):
            holder.pop(_CALLS, None)
        self._write(holder, out)

    def _texts(self, holder: dict[str, Any]) -> list[tuple[_Place, str]]:
        """What is written, reasoning first, calls last; taken out of ``holder``."""
        found: list[tuple[_Place, str]] = []
        for name in sorted(holder, key=lambda name: name == "content"):
            value = holder[name]
            if isinstance(value, str) and value and name not in _NO_TEXTS:
                found.append(((name, 0), value))
                holder[name] = ""
        calls = holder.get(_CALLS)
        for number, call in enumerate(calls if isinstance(calls, list) else ()):
            function = call.get("function") if isinstance(call, dict) else None
            if isinstance(function, dict) and isinstance(function.get("arguments"), str):
                found.append(((_CALLS, _number(call, number)), function["arguments"]))
                function["arguments"] = ""
        return found

    def _add(self, out: dict[_Place, str], text: str) -> None:
        assert self._place is not None and self._pipe is not None
        if text:
            out[self._place] = out.get(self._place, "") + text
        self.stopped = self.stopped or self._pipe.stopped

    def _end(self, out: dict[_Place, str]) -> None:
        """The text that is being written is complete."""
        if self._pipe is not None and not self.stopped:
            self._add(out, self._pipe.finish())

    def _write(self, holder: dict[str, Any], out: dict[_Place, str]) -> None:
        calls = holder.get(_CALLS)
        for (name, number), text in out.items():
            if name != _CALLS:
                holder[name] = text
                continue
            calls = holder.setdefault(_CALLS, []) if not isinstance(calls, list) else calls
            own = [c for n, c in enumerate(calls) if _number(c, n) == number]
            if own:
                own[0]["function"]["arguments"] = text
            else:
                calls.append({"index": number, "function": {"arguments": text}})


class FilteredRendering:
    """Says what guardrails let through of an answer in ``inner``'s dialect. ``bare``: nothing but
    texts and their ends is passed on, for the rest could tell what was taken out."""

    def __init__(self, inner: Rendering, make: MakePipe, choices: int, *, bare: bool) -> None:
        self._inner = inner
        self._make = make
        self._count = choices
        self._bare = bare
        self._choices: dict[int, _Choice] = {}
        self._head: dict[str, Any] = {}

    @property
    def stream_type(self) -> str:
        return self._inner.stream_type

    def whole(self, body: dict[str, Any]) -> bytes:
        for choice in body.get("choices") or ():
            if isinstance(choice, dict):
                state = _Choice(self._make)
                message = choice.get("message")
                holder = message if isinstance(message, dict) else choice
                self._pass(state, choice, holder, last=True)
        return self._inner.whole(body)

    def chunk(self, chunk: dict[str, Any]) -> bytes:
        choices = chunk.get("choices")
        if not isinstance(choices, list) or not choices:
            return self._inner.chunk(chunk)
        self._head = {name: value for name, value in chunk.items() if name != "choices"}
        chunk["choices"] = [
            choice for choice in choices if isinstance(choice, dict) and self._take(choice)
        ]
        out = self._inner.chunk(chunk) if chunk["choices"] else b""
        states = self._choices.values()
        over = len(states) >= self._count and all(state.ended for state in states)
        if not (over and any(state.stopped for state in states)):
            return out
        if self._head.get("usage"):
            out += self._inner.chunk({**self._head, "choices": []})
        raise AnswerEnded(out + self._inner.done())

    def done(self) -> bytes:
        return self._inner.done()

    def error(self, error: CloudlmError) -> bytes:
        return self._inner.error(error)

    def _take(self, choice: dict[str, Any]) -> bool:
        """Put a choice's chunk through; whether anything of it is to be said."""
        index = choice.get("index")
        number = index if type(index) is int else 0
        state = self._choices.get(number)
        if state is None:
            state = self._choices[number] = _Choice(self._make)
        if state.ended:
            return False
        delta = choice.get("delta")
        holder = delta if isinstance(delta, dict) else choice
        last = choice.get("finish_reason") is not None
        empty = not any(name != "role" and value for name, value in holder.items())
        self._pass(state, choice, holder, last=last)
        state.ended = last or state.stopped
        return state.ended or empty or _says(holder)

    def _pass(
        self, state: _Choice, choice: dict[str, Any], holder: dict[str, Any], *, last: bool
    ) -> None:
        ends: dict[str, Any] = {
            name: choice.pop(name) for name in ("finish_reason", "stop_reason") if name in choice
        }
        if self._bare:
            for name in [name for name in choice if name not in _BARE]:
                del choice[name]
        state.take(holder, last=last)
        choice |= ends
        if state.stopped:
            choice["finish_reason"] = BLOCKED
            if "stop_reason" in choice:
                choice["stop_reason"] = None


def _says(holder: dict[str, Any]) -> bool:
    """Whether there is anything in it besides who speaks."""
    if "role" in holder:
        return True
    calls = holder.get(_CALLS)
    if isinstance(calls, list):
        for call in calls:
            function = call.get("function") if isinstance(call, dict) else None
            if (function and call.get("id")) or (
                isinstance(function, dict) and any(function.values())
            ):
                return True
    return any(v for k, v in holder.items() if k not in (_CALLS, "index"))


def _number(call: Any, place: int) -> int:
    """A tool call's number, by its place in the list if it does not say; -1 if it is none."""
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
        return -1
    index = call.get("index")
    return index if type(index) is int else place


def _in_json(text: str) -> str:
    """A text as it stands inside a JSON string."""
    return json.dumps(text)[1:-1]
