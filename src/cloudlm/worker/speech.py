"""What an answer's text says: reasoning, content, and tool calls. Pure.

Readers take text in pieces of any size and give what became certain; all pieces together do not
depend on the cutting. ``tools`` reads the calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"


@dataclass(frozen=True, slots=True)
class Thought:
    """A piece of the reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class Said:
    """A piece of the answer proper."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """The model calls a tool; ``index`` counts the calls of this answer."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallGoesOn:
    """A piece of the arguments' JSON."""

    index: int
    text: str


Piece = Thought | Said | CallBegun | CallGoesOn


class Reader(Protocol):
    """Reads one choice's text."""

    def push(self, text: str) -> list[Piece]: ...

    def finish(self) -> list[Piece]:
        """What was held back, when no more text comes."""
        ...


def overlap(text: str, mark: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``mark``, but not all of it."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0


class PlainReader:
    """All text is content."""

    def push(self, text: str) -> list[Piece]:
        return [Said(text)] if text else []

    def finish(self) -> list[Piece]:
        return []


class ReasoningReader:
    """Splits the reasoning off the beginning of an answer and gives the rest to ``rest``.

    ``begun``: the prompt opened the reasoning. Blanks around the reasoning belong to neither part.
    """

    def __init__(self, rest: Reader, *, begun: bool) -> None:
        self._rest = rest
        self._held = ""
        self._place = "thinking" if begun else "before"
        self._thought = False

    def push(self, text: str) -> list[Piece]:
        if self._place == "after":
            return self._rest.push(text)
        self._held += text
        if self._place == "before" and not self._opened():
            return self._as_answer() if self._place == "after" else []
        if self._place == "thinking":
            return self._think()
        return self._behind()

    def finish(self) -> list[Piece]:
        if self._place == "thinking":
            thought = self._thoughts(self._held)
            self._held = ""
            return [*thought, *self._rest.finish()]
        given = self._rest.push(self._held) if self._place == "before" else []
        return [*given, *self._rest.finish()]

    def _opened(self) -> bool:
        known = self._held.lstrip()
        if known.startswith(THINK_OPEN):
            self._held, self._place = known[len(THINK_OPEN) :], "thinking"
            return True
        if not THINK_OPEN.startswith(known):
            self._place = "after"
        return False

    def _as_answer(self) -> list[Piece]:
        held, self._held = self._held, ""
        return self._rest.push(held)

    def _think(self) -> list[Piece]:
        before, mark, after = self._held.partition(THINK_CLOSE)
        if mark:
            self._held, self._place = after, "behind"
            return [*self._thoughts(before), *self._behind()]
        # A blank may be the last before the mark, which may have begun as well.
        certain = self._held[: len(self._held) - overlap(self._held, THINK_CLOSE)].rstrip()
        self._held = self._held[len(certain) :]
        if not self._thought and certain:
            certain = certain.lstrip()
        self._thought = self._thought or bool(certain)
        return [Thought(certain)] if certain else []

    def _thoughts(self, text: str) -> list[Piece]:
        text = text.rstrip() if self._thought else text.strip()
        return [Thought(text)] if text else []

    def _behind(self) -> list[Piece]:
        self._held = self._held.lstrip()
        if not self._held:
            return []
        self._place = "after"
        return self._as_answer()


def delta_of(pieces: Iterable[Piece]) -> dict[str, Any]:
    """The ``delta`` of a chunk that says these pieces."""
    delta: dict[str, Any] = {}
    calls: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        if isinstance(piece, Thought):
            delta["reasoning_content"] = delta.get("reasoning_content", "") + piece.text
        elif isinstance(piece, Said):
            delta["content"] = delta.get("content", "") + piece.text
        elif isinstance(piece, CallBegun):
            function = {"name": piece.name, "arguments": ""}
            head = {"index": piece.index, "id": piece.id, "type": "function"}
            calls[piece.index] = {**head, "function": function}
        else:
            known = calls.setdefault(
                piece.index, {"index": piece.index, "function": {"arguments": ""}}
            )
            known["function"]["arguments"] += piece.text
    if calls:
        delta["tool_calls"] = list(calls.values())
    return delta


class Speech:
    """A whole choice, gathered from pieces."""

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[tuple[CallBegun, list[str]]] = []

    def add(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            if isinstance(piece, Said):
                self._content.append(piece.text)
            elif isinstance(piece, Thought):
                self._reasoning.append(piece.text)
            elif isinstance(piece, CallBegun):
                self._calls.append((piece, []))
            else:
                self._calls[piece.index][1].append(piece.text)

    @property
    def calls_tools(self) -> bool:
        return bool(self._calls)

    def message(self) -> dict[str, Any]:
        """OpenAI's message object; fields that nothing was said for are left out."""
        content = "".join(self._content)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content if content or not self._calls else None,
            "refusal": None,
        }
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            message["tool_calls"] = [_call_body(call, parts) for call, parts in self._calls]
        return message


def _call_body(call: CallBegun, parts: Iterable[str]) -> Mapping[str, Any]:
    function = {"name": call.name, "arguments": "".join(parts)}
    return {"id": call.id, "type": "function", "function": function}
