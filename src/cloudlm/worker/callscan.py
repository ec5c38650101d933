"""Reads one tool call, a JSON object with a name and arguments, character by character.

What comes out does not depend on how the text was cut into pieces. The arguments are passed on as
the model wrote them, while it writes them. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

_NAME_KEYS = ("name",)
_ARGUMENT_KEYS = ("arguments", "parameters")
_CLOSERS = {"{": "}", "[": "]"}
_BLANKS = " \t\r\n"


class State(StrEnum):
    """BROKEN: this is no tool call, or no longer."""

    OPEN = "open"
    DONE = "done"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Begun:
    """The call's name is known and its arguments begin."""

    name: str


class CallScanner:
    """``feed`` it characters while ``state`` is OPEN and ``take`` what became known: ``Begun``
    once, then pieces of the arguments.

    ``names``: only these make a call (None: any). ``name``: it is known, and only the arguments'
    object is read. ``raw`` is all that was fed.
    """

    def __init__(self, names: Collection[str] | None = None, name: str | None = None) -> None:
        self.state = State.OPEN
        self.begun = False
        self._names = names
        self._name = name
        self._alone = name is not None
        self._raw: list[str] = []
        self._ready: list[Begun | str] = []
        self._early: list[str] = []  # arguments that came before the name
        self._has_arguments = False
        self._step = self._arguments if self._alone else self._start
        self._key = ""
        self._text: list[str] = []
        self._closers: list[str] = []
        self._in_string = self._escaped = False

    @property
    def raw(self) -> str:
        return "".join(self._raw)

    def feed(self, character: str) -> None:
        assert self.state is State.OPEN
        self._raw.append(character)
        self._step(character)

    def take(self) -> list[Begun | str]:
        ready, self._ready = self._ready, []
        return ready

    # One method per place in the object

    def _start(self, character: str) -> None:
        if character == "{":
            self._step = self._key_or_end
        elif character not in _BLANKS:
            self._break()

    def _key_or_end(self, character: str) -> None:
        if character == '"':
            self._text = [character]
            self._step = self._in_key
        elif character == "}":
            self._close()
        elif character not in _BLANKS:
            self._break()

    def _in_key(self, character: str) -> None:
        if self._string_ends(character):
            key = _decoded("".join(self._text))
            self._key = key if key is not None else ""
            self._step = self._colon

    def _colon(self, character: str) -> None:
        if character == ":":
            self._step = self._arguments if self._key in _ARGUMENT_KEYS else self._value
        elif character not in _BLANKS:
            self._break()

    def _value(self, character: str) -> None:
        if character in _BLANKS:
            return
        self._text = [character]
        if self._key in _NAME_KEYS and character != '"':
            self._break()
        elif character == '"':
            self._step = self._in_text
        elif character in _CLOSERS:
            self._closers, self._in_string = [_CLOSERS[character]], False
            self._step = self._in_nested
        else:
            self._step = self._in_scalar

    def _in_text(self, character: str) -> None:
        if not self._string_ends(character):
            return
        self._step = self._after
        if self._key in _NAME_KEYS:
            self._named(_decoded("".join(self._text)))

    def _in_nested(self, character: str) -> None:
        if self._nesting_ends(character):
            self._step = self._after

    def _in_scalar(self, character: str) -> None:
        if character in ",}" or character in _BLANKS:
            self._step = self._after
            self._after(character)

    def _after(self, character: str) -> None:
        if character == ",":
            self._step = self._key_or_end
        elif character == "}":
            self._close()
        elif character not in _BLANKS:
            self._break()

    def _arguments(self, character: str) -> None:
        if character in _BLANKS:
            return
        self._text = [character]
        if self._has_arguments:
            self._break()
        elif character == "{":
            self._closers, self._in_string = ["}"], False
            self._say(character)
            self._step = self._in_arguments
        elif character == '"' and not self._alone:
            self._step = self._in_written_arguments
        elif character == "n" and not self._alone:
            self._step = self._in_null
        else:
            self._break()

    def _in_arguments(self, character: str) -> None:
        ended = self._nesting_ends(character)
        if self.state is State.OPEN:
            self._say(character)
        if ended:
            self._step = self._after
            if self._alone:
                self._close()

    def _in_written_arguments(self, character: str) -> None:
        """Some models write the arguments as a text that holds JSON."""
        if not self._string_ends(character):
            return
        text = _decoded("".join(self._text))
        if text is None:
            self._break()
            return
        self._say(text or "{}")
        self._step = self._after

    def _in_null(self, character: str) -> None:
        self._text.append(character)
        written = "".join(self._text)
        if written == "null":
            self._say("{}")
            self._step = self._after
        elif not "null".startswith(written):
            self._break()

    # What they share

    def _string_ends(self, character: str) -> bool:
        self._text.append(character)
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            return True
        return False

    def _nesting_ends(self, character: str) -> bool:
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._in_string = False
        elif character == '"':
            self._in_string = True
        elif character in _CLOSERS:
            self._closers.append(_CLOSERS[character])
        elif character in "}]":
            if self._closers.pop() != character:
                self._break()
            return not self._closers
        return False

    def _named(self, name: str | None) -> None:
        if not name or self._name is not None or not self._known(name):
            self._break()
            return
        self._name = name
        if self._has_arguments:
            self._begin(name)

    def _known(self, name: str) -> bool:
        return self._names is None or name in self._names

    def _say(self, text: str) -> None:
        self._has_arguments = True
        if self.begun:
            self._ready.append(text)
            return
        self._early.append(text)
        if self._name is not None:
            self._begin(self._name)

    def _begin(self, name: str) -> None:
        self.begun = True
        self._ready += [Begun(name), *self._early]
        self._early = []

    def _close(self) -> None:
        if self.begun:
            self.state = State.DONE
        else:
            self._break()

    def _break(self) -> None:
        self.state = State.BROKEN


def _decoded(text: str) -> str | None:
    """The JSON text that ``text`` writes; None if it writes none."""
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        return None
    return value if isinstance(value, str) and _is_unicode(value) else None


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
