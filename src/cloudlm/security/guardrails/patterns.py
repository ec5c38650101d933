"""Expressions that take linear time over any text and can say how a match might begin.

They run in RE2 (automata, no backtracking), so no expression and no text can hold up a gateway. An
expression is parsed here, because two things must be known of it that an engine does not tell: how
long a match can get, and the *prefix expression*, which matches whatever could still become a match
when more text comes. With it a stream holds back exactly the text that is undecided. Unbounded
repetition stands for at most ``MOST_REPEATS``, so that what is held back is bounded too.

The prefix expression is made by the rules: of a character, the character or nothing; of ``ab``,
prefix of ``a``, or ``a`` and prefix of ``b``; of alternatives, their prefixes; of ``x{m,n}``,
``x{0,n-1}`` and prefix of ``x``. Must not search.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cloudlm.core.errors import BadSetting

MOST_REPEATS = 256
LONGEST_MATCH_CHARACTERS = 4096
_MEMORY_BYTES = 64 << 20
_DEPTH = 20
_SPECIAL = frozenset("\\.+*?()|[]{}^$-")
_CLASS_LETTERS = frozenset("dDwWsS")
_CONTROL_LETTERS = frozenset("ntrfva")
_COUNT = re.compile(r"\{(\d{1,4})(,(\d{0,4}))?\}")
_FLAGS = re.compile(r"\(\?([is]+)\)")
_PROPERTY = re.compile(r"[pP](?:[A-Z]|\{\^?[A-Za-z_]+\})")
_HEXADECIMAL = re.compile(r"x(?:[0-9A-Fa-f]{2}|\{[0-9A-Fa-f]{1,6}\})")


@dataclass(frozen=True, slots=True)
class One:
    """One character: as written for the engine."""

    text: str
    longest = 1
    may_be_empty = False

    def whole(self) -> str:
        return self.text

    def prefix(self) -> str:
        return f"(?:{self.text})?"


@dataclass(frozen=True, slots=True)
class Edge:
    """The edge of a word of ASCII letters, digits and ``_``: ``\\b``."""

    longest = 0
    may_be_empty = True

    def whole(self) -> str:
        return r"\b"

    def prefix(self) -> str:
        return ""


@dataclass(frozen=True)
class Row:
    """One after the other."""

    parts: tuple[Node, ...]

    @property
    def longest(self) -> int:
        return sum(part.longest for part in self.parts)

    @property
    def may_be_empty(self) -> bool:
        return all(part.may_be_empty for part in self.parts)

    def whole(self) -> str:
        return "".join(part.whole() for part in self.parts)

    def prefix(self) -> str:
        found = ""
        for part in reversed(self.parts):
            found = f"(?:{part.whole()}{found}|{part.prefix()})" if found else part.prefix()
        return found


@dataclass(frozen=True)
class Either:
    """One of several, the first that fits."""

    options: tuple[Node, ...]

    @property
    def longest(self) -> int:
        return max(option.longest for option in self.options)

    @property
    def may_be_empty(self) -> bool:
        return any(option.may_be_empty for option in self.options)

    def whole(self) -> str:
        return f"(?:{'|'.join(option.whole() for option in self.options)})"

    def prefix(self) -> str:
        return f"(?:{'|'.join(option.prefix() for option in self.options)})"


@dataclass(frozen=True)
class Times:
    """The same ``low`` to ``high`` times."""

    node: Node
    low: int
    high: int
    lazy: bool = False

    @property
    def longest(self) -> int:
        return self.node.longest * self.high

    @property
    def may_be_empty(self) -> bool:
        return self.low == 0 or self.node.may_be_empty

    def whole(self) -> str:
        return f"(?:{self.node.whole()}){{{self.low},{self.high}}}" + "?" * self.lazy

    def prefix(self) -> str:
        last = self.node.prefix()
        return f"(?:{self.node.whole()}){{0,{self.high - 1}}}{last}" if self.high > 1 else last


Node = One | Edge | Row | Either | Times


@dataclass(frozen=True)
class Pattern:
    """A parsed expression. ``flags`` are those that hold for all of it, of ``i`` and ``s``."""

    node: Node
    flags: str = ""

    @cached_property
    def whole(self) -> str:
        """What matches, for the engine."""
        return f"(?{self.flags}:{self.node.whole()})"

    @cached_property
    def prefix(self) -> str:
        """What could become a match, for the engine: the empty text too."""
        return f"(?{self.flags}:{self.node.prefix()})"


def parse(source: str, flags: str = "") -> Pattern:
    """Read an expression in RE2's and Python's common syntax: characters, classes, groups, ``|``,
    ``* + ? {m,n}``, ``\\b``, ``(?i)`` and ``(?s)`` at its beginning.

    Raises BadSetting that says what it cannot have: references, looking around, anchors, a match
    that may be empty or longer than LONGEST_MATCH_CHARACTERS.
    """
    found = _FLAGS.match(source)
    at = found.end() if found is not None else 0
    flags = "".join(sorted({*flags, *(found[1] if found is not None else "")}))
    pattern = Pattern(_Reader(source, at).read(), flags)
    if pattern.node.may_be_empty:
        raise _fault(source, "it matches the empty text, so it would match everywhere")
    if pattern.node.longest > LONGEST_MATCH_CHARACTERS:
        raise _fault(
            source,
            f"a match could have {pattern.node.longest} characters, and at most "
            f"{LONGEST_MATCH_CHARACTERS} can be held back in a stream; * and + stand for at most "
            f"{MOST_REPEATS} times, so write how many you need: {{1,20}}",
        )
    return pattern


def checked(source: str) -> Pattern:
    """``parse``, and a look whether the engine takes it. Raises BadSetting if it does not."""
    pattern = parse(source)
    automaton(pattern.prefix, source)
    automaton(pattern.whole, source)
    return pattern


def phrase(text: str) -> Pattern:
    """The pattern of a word or phrase, whatever its case; any blanks between its words."""
    parts: list[Node] = []
    for word in text.split():
        if parts:
            parts.append(Times(One(r"\s"), 1, 8))
        parts.extend(One(literal(character)) for character in word)
    if not parts:
        raise BadSetting("a blocked word is empty; write it without, or leave it out")
    return Pattern(Row(tuple(parts)), "i")


def literal(character: str) -> str:
    """A character that stands for itself."""
    if character.isalnum() or character == "_" or not character.isascii():
        return character
    return f"\\x{ord(character):02x}"


def automaton(expression: str, source: str = "") -> Any:
    """The engine's form of an expression, over UTF-8 bytes. Raises BadSetting if it is too large
    or not one."""
    import re2

    options = re2.Options()
    options.max_mem = _MEMORY_BYTES
    options.log_errors = False
    options.never_capture = True
    try:
        return re2.compile(expression.encode(), options)
    except (re2.error, UnicodeEncodeError) as error:
        why = str(error.args[0] if error.args else error)[:120]
        raise _fault(source or expression[:80], f"RE2 does not take it: {why}") from None


def _fault(source: str, why: str) -> BadSetting:
    return BadSetting(f"the expression {source[:200]!r} cannot be used: {why}")


class _Reader:
    """Reads an expression by recursive descent."""

    def __init__(self, source: str, at: int) -> None:
        self._source = source
        self._at = at
        self._depth = 0

    def read(self) -> Node:
        node = self._either()
        if self._at < len(self._source):
            raise self._fault("a ')' closes nothing")
        return node

    def _fault(self, why: str) -> BadSetting:
        return _fault(self._source, f"{why} (character {self._at + 1})")

    def _peek(self, ahead: int = 0) -> str:
        at = self._at + ahead
        return self._source[at] if at < len(self._source) else ""

    def _either(self) -> Node:
        self._depth += 1
        if self._depth > _DEPTH:
            raise self._fault(f"groups are nested deeper than {_DEPTH}")
        options = [self._row()]
        while self._peek() == "|":
            self._at += 1
            options.append(self._row())
        self._depth -= 1
        return options[0] if len(options) == 1 else Either(tuple(options))

    def _row(self) -> Node:
        parts: list[Node] = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._times(self._one()))
        return parts[0] if len(parts) == 1 else Row(tuple(parts))

    def _times(self, node: Node) -> Node:
        bounds = self._bounds()
        if bounds is None:
            return node
        low, high = bounds
        if node.longest == 0:
            raise self._fault("what is repeated has no length")
        if high < max(low, 1):
            raise self._fault(f"{{{low},{high}}} is no count")
        lazy = self._peek() == "?"
        self._at += lazy
        if self._bounds() is not None:
            raise self._fault("a repetition is repeated; put the first into a group")
        return Times(node, low, high, lazy)

    def _bounds(self) -> tuple[int, int] | None:
        sign = self._peek()
        simple = {"*": (0, MOST_REPEATS), "+": (1, MOST_REPEATS), "?": (0, 1)}.get(sign)
        if simple is not None:
            self._at += 1
            return simple
        found = _COUNT.match(self._source, self._at) if sign == "{" else None
        if found is None:
            return None
        self._at = found.end()
        low = int(found[1])
        if found[2] is None:
            return low, low
        return low, int(found[3]) if found[3] else max(low, MOST_REPEATS)

    def _one(self) -> Node:
        sign = self._peek()
        if sign == "(":
            return self._group()
        if sign == "[":
            return self._class()
        if sign == "\\":
            return self._escape()
        if sign in "^$":
            raise self._fault(f"{sign} has no place in it: texts are searched everywhere")
        if sign in "*+?":
            raise self._fault(f"{sign} repeats nothing")
        self._at += 1
        return One("." if sign == "." else literal(sign))

    def _group(self) -> Node:
        self._at += 1
        if self._source.startswith("?:", self._at):
            self._at += 2
        elif self._peek() == "?":
            raise self._fault("only (…) and (?:…) are known, and (?i) or (?s) at the beginning")
        node = self._either()
        if self._peek() != ")":
            raise self._fault("a ')' is missing")
        self._at += 1
        return node

    def _class(self) -> Node:
        start = self._at
        self._at += 1
        self._at += self._peek() == "^"
        self._at += self._peek() == "]"
        while (sign := self._peek()) != "]":
            if not sign:
                raise self._fault("a ']' is missing")
            if sign == "[" and self._peek(1) == ":":
                self._at = max(self._source.find(":]", self._at), self._at) + 1
            self._at += 2 if sign == "\\" else 1
        self._at += 1
        return One(self._source[start : self._at])

    def _escape(self) -> Node:
        letter = self._peek(1)
        if letter == "b":
            self._at += 2
            return Edge()
        found = _PROPERTY.match(self._source, self._at + 1)
        found = found or _HEXADECIMAL.match(self._source, self._at + 1)
        if found is not None:
            text = self._source[self._at : found.end()]
        elif letter in _CLASS_LETTERS or letter in _CONTROL_LETTERS or letter in _SPECIAL:
            text = self._source[self._at : self._at + 2]
        elif letter and not letter.isalnum():
            text = literal(letter)
            self._at += 2 - len(text)
        else:
            raise self._fault(f"\\{letter} is not known here")
        self._at += len(text)
        return One(text)
