"""Tool calls as models write them: Hermes and Qwen, Llama 3, Mistral. Pure.

Each form has a reader, which finds the calls in an answer's text, and a grammar, which an answer
follows that must be a call. A text that only looks like a call stays content.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Callable, Collection, Sequence
from enum import StrEnum

from cloudlm.core.chat import Tool
from cloudlm.engine.lark import json_rule, quoted
from cloudlm.worker.callscan import Begun, CallScanner, State
from cloudlm.worker.speech import CallBegun, CallGoesOn, Piece, Said, overlap

MAX_FORCED_CALLS = 16
_NAME = re.compile(r"[a-zA-Z0-9_.-]+")
_MISTRAL_ID = string.ascii_letters + string.digits


class ToolForm(StrEnum):
    """How a model writes tool calls."""

    HERMES = "hermes"
    LLAMA3 = "llama3"
    MISTRAL = "mistral"


MARKS = {
    ToolForm.HERMES: ("<tool_call>", "</tool_call>"),
    ToolForm.LLAMA3: ("<|python_tag|>",),
    ToolForm.MISTRAL: ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
}


def guess_form(template: str) -> ToolForm | None:
    """The form that a chat template teaches; None if it knows no tools, or none that we read."""
    if "tools" not in template:
        return None
    if "[TOOL_CALLS]" in template:
        return ToolForm.MISTRAL
    if "<tool_call>" in template:
        return None if "<function=" in template or "<arg_key>" in template else ToolForm.HERMES
    if "<|python_tag|>" in template or '"parameters": dictionary of argument' in template:
        return ToolForm.LLAMA3
    return None


class ToolReader:
    """What the readers of all forms share: content, calls, and the blanks between them.

    ``names`` are the tools that were offered. Calls beyond ``limit`` are left out. Blanks before
    and after calls are not content.
    """

    def __init__(self, names: Collection[str], limit: int | None = None) -> None:
        self._names = names
        self._limit = limit
        self._buffer = ""
        self._blanks = ""
        self._calls = 0
        self._pieces: list[Piece] = []
        self._scanner: CallScanner | None = None
        self._mark = ""
        self._advance: Callable[[], bool] = self._text

    def push(self, text: str) -> list[Piece]:
        self._buffer += text
        while self._buffer and self._advance():
            pass
        return self._taken()

    def finish(self) -> list[Piece]:
        if self._scanner is not None:
            if not self._scanner.begun:
                self._say(self._mark + self._scanner.raw)
        else:
            self._end()
        if not self._calls and self._blanks:
            self._pieces.append(Said(self._blanks))
        self._blanks = self._buffer = ""
        return self._taken()

    # Each form has its own

    def _text(self) -> bool:
        """Use up what is certain of the buffer; False when more text is needed."""
        raise NotImplementedError

    def _after_call(self) -> bool:
        raise NotImplementedError

    def _end(self) -> None:
        """Nothing more comes, and no call is under way."""
        if self._advance == self._text:
            self._say(self._buffer)

    def _new_id(self) -> str:
        return f"call_{secrets.token_hex(12)}"

    # What they share

    def _taken(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def _say(self, text: str) -> None:
        text = self._blanks + text
        solid = text.rstrip()
        self._blanks = text[len(solid) :]
        if solid:
            self._pieces.append(Said(solid))

    def _text_before(self, mark: str) -> bool:
        """Say the text before ``mark`` and use the mark up; False if there is none yet."""
        before, found, after = self._buffer.partition(mark)
        if found:
            self._say(before)
            self._buffer = after
            return True
        certain = len(self._buffer) - overlap(self._buffer, mark)
        self._say(self._buffer[:certain])
        self._buffer = self._buffer[certain:]
        return False

    def _expect_call(self, mark: str, scanner: CallScanner | None = None) -> None:
        """Read a call from here on; ``mark`` goes before its text if it turns out to be none."""
        self._mark = mark
        self._scanner = scanner or CallScanner()
        self._advance = self._call

    def _call(self) -> bool:
        scanner = self._scanner
        assert scanner is not None
        used = 0
        while used < len(self._buffer) and scanner.state is State.OPEN:
            scanner.feed(self._buffer[used])
            used += 1
        self._buffer = self._buffer[used:]
        for one in scanner.take():
            self._heard(one)
        if scanner.state is State.OPEN:
            return False
        self._scanner = None
        if scanner.begun:
            self._advance = self._after_call
        else:
            self._say(self._mark + scanner.raw)
            self._advance = self._text
        return True

    def _heard(self, one: Begun | str) -> None:
        if isinstance(one, Begun):
            self._blanks = ""
            self._calls += 1
        index = self._calls - 1
        if self._limit is not None and index >= self._limit:
            return
        if isinstance(one, Begun):
            self._pieces.append(CallBegun(index, self._new_id(), one.name))
        else:
            self._pieces.append(CallGoesOn(index, one))


class HermesReader(ToolReader):
    """``<tool_call>{"name": …, "arguments": {…}}</tool_call>``, anywhere, any number of times."""

    def _text(self) -> bool:
        opening, _ = MARKS[ToolForm.HERMES]
        if not self._text_before(opening):
            return False
        self._expect_call(opening)
        return True

    def _after_call(self) -> bool:
        _, closing = MARKS[ToolForm.HERMES]
        self._buffer = self._buffer.lstrip()
        if not self._buffer or (closing.startswith(self._buffer) and self._buffer != closing):
            return False
        self._buffer = self._buffer.removeprefix(closing)
        self._advance = self._text
        return True


class Llama3Reader(ToolReader):
    """The whole answer is calls: ``{"name": …, "parameters": {…}}``, several with ``;`` between,
    each perhaps after ``<|python_tag|>``."""

    def _text(self) -> bool:
        return self._next_call("")

    def _after_call(self) -> bool:
        return self._next_call("; \t\r\n")

    def _plain(self) -> bool:
        self._say(self._buffer)
        self._buffer = ""
        return False

    def _next_call(self, between: str) -> bool:
        (tag,) = MARKS[ToolForm.LLAMA3]
        known = self._buffer.lstrip(between or None)
        if between:
            self._buffer = known
        if not known or (tag.startswith(known) and known != tag):
            return False
        if known.startswith(tag):
            self._buffer = known.removeprefix(tag)
            self._expect_call("")
        elif known.startswith("{"):
            blanks = self._buffer[: len(self._buffer) - len(known)]
            self._buffer = known
            self._expect_call(blanks, CallScanner(self._names))
        else:
            self._advance = self._plain
        return True

    def _call(self) -> bool:
        goes_on = super()._call()
        if self._scanner is None and self._advance == self._text:
            self._advance = self._plain  # it was no call: what follows is none either
        return goes_on

    def _end(self) -> None:
        if self._advance != self._after_call:
            self._say(self._buffer)


class MistralReader(ToolReader):
    """``[TOOL_CALLS]`` and then a list of objects, or a name, perhaps ``[ARGS]``, and arguments."""

    _in_list = False

    def _text(self) -> bool:
        mark, _, _ = MARKS[ToolForm.MISTRAL]
        if not self._text_before(mark):
            return False
        self._in_list = False
        self._advance = self._calls_begin
        return True

    def _calls_begin(self) -> bool:
        mark, id_mark, arguments_mark = MARKS[ToolForm.MISTRAL]
        known = self._buffer.lstrip()
        if not known:
            return False
        if known[0] in "[{":
            self._in_list = known[0] == "["
            self._buffer = known[1:] if self._in_list else known
            if self._in_list:
                self._advance = self._after_call
            else:
                self._expect_call(mark)
            return True
        named = _NAME.match(known)
        if named is None:
            self._say(mark)
            self._advance = self._text
            return True
        rest = known[named.end() :]
        behind = _behind_name(rest, id_mark, arguments_mark)
        if behind is None:
            return False
        self._buffer = rest[behind:]
        self._expect_call(mark + known[: len(known) - len(self._buffer)], _arguments(named[0]))
        return True

    def _after_call(self) -> bool:
        if not self._in_list:
            self._advance = self._text
            return True
        self._buffer = self._buffer.lstrip(", \t\r\n")
        if self._buffer.startswith("{"):
            self._expect_call("")
            return True
        if self._buffer:
            self._buffer = self._buffer.removeprefix("]")
            self._in_list = False
            self._advance = self._text
        return bool(self._buffer)

    def _end(self) -> None:
        if self._advance == self._calls_begin:
            self._say(MARKS[ToolForm.MISTRAL][0])
        if self._advance != self._after_call:
            self._say(self._buffer)

    def _new_id(self) -> str:
        return "".join(secrets.choice(_MISTRAL_ID) for _ in range(9))  # its templates demand 9


def _arguments(name: str) -> CallScanner:
    return CallScanner(name=name)


def _behind_name(rest: str, id_mark: str, arguments_mark: str) -> int | None:
    """Where the arguments begin in the text after a call's name; None if that is not known yet."""
    if not rest:
        return None
    for mark in (id_mark, arguments_mark):
        if mark.startswith(rest) and mark != rest:
            return None
    if rest.startswith(id_mark):
        end = rest.find(arguments_mark)
        return None if end < 0 else end + len(arguments_mark)
    return len(arguments_mark) if rest.startswith(arguments_mark) else 0


_READERS: dict[ToolForm, type[ToolReader]] = {
    ToolForm.HERMES: HermesReader,
    ToolForm.LLAMA3: Llama3Reader,
    ToolForm.MISTRAL: MistralReader,
}


def make_reader(form: ToolForm, names: Collection[str], *, parallel: bool) -> ToolReader:
    """A reader for one choice."""
    return _READERS[form](names, None if parallel else 1)


def calls_rule(
    form: ToolForm,
    tools: Sequence[Tool],
    *,
    parallel: bool,
    named_arguments: bool,
    mark: Callable[[str], str],
) -> str:
    """Rules of which ``calls`` is one or more calls of these ``tools``.

    ``mark`` gives the rule of a mark, which may be a special token. ``named_arguments``: Mistral's
    newer form, with ``[ARGS]``.
    """
    more = f"{{0,{MAX_FORCED_CALLS - 1}}}" if parallel else None
    key = "parameters" if form is ToolForm.LLAMA3 else "arguments"
    rules = [f"arguments_{at}: {json_rule(tool.parameters)}" for at, tool in enumerate(tools)]
    plain = [
        quoted(f'{{"name": "{tool.name}", "{key}": ') + f' arguments_{at} "}}"'
        for at, tool in enumerate(tools)
    ]
    call = " | ".join(plain)
    if form is ToolForm.HERMES:
        opening, closing = map(mark, MARKS[form])
        call = f'{opening} "\\n" one "\\n" {closing}'
        rules.append("one: " + " | ".join(plain))
    elif form is ToolForm.MISTRAL and named_arguments:
        begin, _, arguments = map(mark, MARKS[form])
        call = " | ".join(
            f"{begin} {quoted(tool.name)} {arguments} arguments_{at}"
            for at, tool in enumerate(tools)
        )
    separator = {ToolForm.HERMES: '"\\n"', ToolForm.MISTRAL: '", "'}.get(form)
    if form is ToolForm.LLAMA3:
        more = None  # its templates show one call only
    several = "call" if more is None else f"call ({separator} call){more}"
    if form is ToolForm.MISTRAL and named_arguments:
        several = "call" if more is None else f"call (call){more}"
    elif form is ToolForm.MISTRAL:
        several = f'{mark(MARKS[form][0])} "[" {several} "]"'
    return "\n".join([f"calls: {several}", f"call: {call}", *rules, ""])
