"""Finding rules' matches in text that may still be arriving, the same however it is cut.

Over a whole text the result is: the leftmost match of any rule, the first rule's where several
begin; then the same again from its end. Over a stream text is let go as soon as nothing that may
come could change this: what is held back is what might be the beginning of a match (the rules'
prefix expressions say so), and not a character more.

Works on UTF-8 bytes, as the engine does. Must not know what rules are for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cloudlm.security.guardrails.patterns import Pattern, automaton

Check = Callable[[bytes, int, int], int]
"""Whether ``data[start:end]`` really is a match: its end, which may be earlier, or -1. It may look
at one character on either side."""
NO_MATCH = -1
_UNDECIDED = -2
_ROW = re.compile(rb"[0-9A-Za-z]+")
_CONTEXT_BYTES = 4
"""Kept of what was let go, for the look at one character to the left."""


@dataclass(frozen=True)
class Tail:
    """What goes on after a match, within ``longest_bytes``: until ``end`` is found, or if there is
    none, as far as ``body`` reaches. Cheaper than counting in the pattern, where it is long."""

    body: str
    longest_bytes: int
    end: str = ""


@dataclass(frozen=True)
class Rule:
    """What is looked for. Several rules may have one name. ``stands_apart``: the check refuses
    whatever has a letter or digit to its left."""

    name: str
    pattern: Pattern
    check: Check | None = None
    tail: Tail | None = None
    stands_apart: bool = False


class Match(NamedTuple):
    """A match, in bytes from the beginning of what was searched."""

    rule: Rule
    start: int
    end: int
    data: bytes

    @property
    def text(self) -> str:
        return decoded(self.data[self.start : self.end])


class _Tail:
    """A tail, ready to be looked for."""

    def __init__(self, tail: Tail) -> None:
        self._end = automaton(tail.end) if tail.end else None
        self._body = automaton(tail.body)
        self._longest = tail.longest_bytes

    def reach(self, data: bytes, start: int, final: bool) -> int:
        """Where it ends, or _UNDECIDED."""
        limit = start + self._longest
        more = len(data) < limit and not final
        if self._end is not None:
            found = self._end.search(data, start, min(len(data), limit))
            if found is not None:
                return int(found.end())
            if more:
                return _UNDECIDED
        body = self._body.match(data, start, min(len(data), limit))
        end = start if body is None else int(body.end())
        return _UNDECIDED if more and end == len(data) else end


class Scanner:
    """Rules made ready. Shared by all requests."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = tuple(rules)
        self.each = [automaton(rule.pattern.whole) for rule in rules]
        self.tails = [None if rule.tail is None else _Tail(rule.tail) for rule in rules]
        self._any = automaton("|".join(rule.pattern.whole for rule in rules))
        self._begun = automaton(f"(?:{'|'.join(rule.pattern.prefix for rule in rules)})\\z")

    def certain(self, data: bytes, start: int, final: bool) -> int:
        """Up to where what begins is certain, see ``matches``. ``final``: no more will come."""
        return len(data) if final else int(self._begun.search(data, start).start())

    def matches(self, data: bytes, start: int, certain: int, final: bool) -> Search | None:
        """The search for what begins between two offsets; None if nothing can."""
        found = self._any.search(data, start)
        if found is None or found.start() >= certain:
            return None
        return Search(self, data, certain, final)


class Search:
    """Finds one match after the other in one piece of text. Each rule is asked for its next match
    once, and again only when the text before it is done with."""

    def __init__(self, scanner: Scanner, data: bytes, certain: int, final: bool) -> None:
        self._scanner = scanner
        self._data = data
        self._certain = certain
        self._final = final
        self._spans: list[tuple[int, int]] = [(-1, -1)] * len(scanner.rules)

    def next(self, start: int) -> tuple[Match | None, int]:
        """The first match from ``start`` on, if it is certain, and the offset up to which the text
        has none."""
        for number in range(len(self._spans)):
            self._look(number, start)
        while True:
            begin, number = min((span[0], n) for n, span in enumerate(self._spans))
            if begin >= self._certain:
                return None, self._certain
            end = self._end(number)
            if end == _UNDECIDED:
                return None, begin
            if end != NO_MATCH:
                return Match(self._scanner.rules[number], begin, end, self._data), begin
            self._look(number, self._past(number, begin))

    def _past(self, number: int, begin: int) -> int:
        """From where a rule may match again that does not at ``begin``: what stands apart cannot
        within the same letters and digits, so that a long row of them is looked at once."""
        row = _ROW.match(self._data, begin) if self._scanner.rules[number].stands_apart else None
        return begin + 1 if row is None else row.end()

    def _look(self, number: int, start: int) -> None:
        """Have a rule's next span begin at ``start`` or later."""
        if self._spans[number][0] >= start:
            return
        while start < len(self._data) and self._data[start] & 0xC0 == 0x80:  # inside a character
            start += 1
        found = self._scanner.each[number].search(self._data, start)
        self._spans[number] = (len(self._data) + 1, -1) if found is None else found.span()

    def _end(self, number: int) -> int:
        """Where the match of a rule's span really ends, or NO_MATCH or _UNDECIDED."""
        rule, tail = self._scanner.rules[number], self._scanner.tails[number]
        start, end = self._spans[number]
        if tail is not None:
            end = tail.reach(self._data, end, self._final)
        if rule.check is not None and end != _UNDECIDED:
            end = rule.check(self._data, start, end)
        return end


Act = Callable[[Match], str | None]
"""What takes the place of a match; None ends the text before it."""


class Stream:
    """One text on its way through a scanner."""

    def __init__(self, scanner: Scanner, act: Act) -> None:
        self._scanner = scanner
        self._act = act
        self._data = b""
        self._at = 0
        self.stopped = False

    @property
    def held_bytes(self) -> int:
        """What is not let go yet."""
        return len(self._data) - self._at

    def feed(self, text: str) -> str:
        """More text; returns what is certain of it and of what was held back."""
        if self.stopped or not text:
            return ""
        self._data += encoded(text)
        return self._go(final=False)

    def finish(self) -> str:
        """The text is complete: the rest."""
        return "" if self.stopped or not self.held_bytes else self._go(final=True)

    def _go(self, *, final: bool) -> str:
        data, scanner = self._data, self._scanner
        certain = scanner.certain(data, self._at, final)
        search = scanner.matches(data, self._at, certain, final)
        out = []
        while search is not None:
            match, until = search.next(self._at)
            out.append(data[self._at : until])
            self._at = until
            if match is None:
                break
            instead = self._act(match)
            if instead is None:
                self.stopped = True
                break
            out.append(encoded(instead))
            self._at = match.end
            if match.end > certain:  # as far as a tail reaches
                certain = scanner.certain(data, match.end, final)
                search = scanner.matches(data, match.end, certain, final)
        else:
            out.append(data[self._at : certain])
            self._at = certain
        keep = max(self._at - _CONTEXT_BYTES, 0)
        self._data, self._at = data[keep:], self._at - keep
        return decoded(b"".join(out))


def scan(scanner: Scanner, text: str, act: Act) -> str | None:
    """A whole text with what ``act`` says in place of each match; None once it says None."""
    stream = Stream(scanner, act)
    out = stream.feed(text) + stream.finish()
    return None if stream.stopped else out


def encoded(text: str) -> bytes:
    """UTF-8, of half surrogate pairs too, which JSON can spell."""
    return text.encode("utf-8", "surrogatepass")


def decoded(data: bytes) -> str:
    """The text that was ``encoded``."""
    return data.decode("utf-8", "surrogatepass")
