"""How one model writes what is not plain text, and what follows from it for a request: the grammar
that its answer must follow and the reader that takes the answer apart. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cloudlm.core.chat import ChatRequest, Constraint, ConstraintKind, ToolChoice, ToolUse
from cloudlm.core.errors import InvalidRequest
from cloudlm.engine.lark import answer_rule, quoted, special
from cloudlm.worker.speech import THINK_CLOSE, THINK_OPEN, PlainReader, Reader, ReasoningReader
from cloudlm.worker.tools import MARKS, ToolForm, calls_rule, guess_form, make_reader


@dataclass(frozen=True, slots=True)
class Dialect:
    """``tools`` is the form of tool calls, None if the model makes none. ``reasons``: it thinks
    between ``<think>`` and ``</think>``. ``named_arguments``: Mistral's newer form. ``special``
    has the ids of those marks that are special tokens of the model."""

    tools: ToolForm | None = None
    reasons: bool = False
    named_arguments: bool = False
    special: Mapping[str, int] = field(default_factory=dict)

    def mark_rule(self, mark: str) -> str:
        """The grammar's rule of a mark."""
        token_id = self.special.get(mark)
        return quoted(mark) if token_id is None else special(token_id)

    def shown_token_ids(self, *, tools: bool) -> frozenset[int]:
        """The special tokens that a reader must see."""
        marks = MARKS[self.tools] if tools and self.tools is not None else ()
        thinking = (THINK_OPEN, THINK_CLOSE) if self.reasons else ()
        return frozenset(self.special[m] for m in (*marks, *thinking) if m in self.special)


def find_dialect(
    template: str | None,
    tool_parser: str,
    reasoning_parser: str,
    special_token_id: Callable[[str], int | None],
) -> Dialect:
    """What the options say, and where they say ``auto``, what the chat template shows."""
    known = template or ""
    if tool_parser == "auto":
        form = guess_form(known)
    else:
        form = None if tool_parser == "none" else ToolForm(tool_parser)
    reasons = THINK_CLOSE in known if reasoning_parser == "auto" else reasoning_parser == "think"
    marks = [mark for marks in MARKS.values() for mark in marks] + [THINK_OPEN, THINK_CLOSE]
    ids = {mark: special_token_id(mark) for mark in marks}
    return Dialect(
        tools=form,
        reasons=reasons,
        named_arguments="[ARGS]" in known,
        special={mark: one for mark, one in ids.items() if one is not None},
    )


def check_tools(dialect: Dialect, use: ToolUse) -> None:
    """Raise InvalidRequest if the model cannot make calls as this request wants them."""
    if use.choice is not ToolChoice.NONE and dialect.tools is None:
        raise InvalidRequest(
            "this model's chat template shows no form of tool calls that this server reads; "
            "leave out tools, send tool_choice none, or serve the model with the option "
            "tool_parser (hermes, llama3 or mistral)",
            param="tools",
        )


def opens_reasoning(dialect: Dialect, prompt: str) -> bool:
    """Whether the rendered prompt ends inside the reasoning."""
    return dialect.reasons and prompt[-64:].rstrip().endswith(THINK_OPEN)


def reader_of(dialect: Dialect, use: ToolUse, *, begun: bool) -> Callable[[], Reader]:
    """Makes the reader of each choice."""

    def make() -> Reader:
        reader: Reader = PlainReader()
        if use.choice is not ToolChoice.NONE and dialect.tools is not None:
            names = {tool.name for tool in use.tools}
            reader = make_reader(dialect.tools, names, parallel=use.parallel)
        return ReasoningReader(reader, begun=begun) if dialect.reasons else reader

    return make


def constraint_of(dialect: Dialect, request: ChatRequest, *, begun: bool) -> Constraint | None:
    """What the answer must follow: its own constraint or a tool call, after any reasoning.

    A grammar of the caller's own stands alone: no reasoning and no call come with it.
    """
    use, own = request.tool_use, request.sampling.constraint
    if own is not None and own.kind is ConstraintKind.GRAMMAR and use.choice is ToolChoice.AUTO:
        return own
    rules: list[str] = []
    parts: list[str] = []
    if own is not None and use.choice is not ToolChoice.REQUIRED:
        if own.kind is ConstraintKind.GRAMMAR:
            return own
        rules.append(answer_rule(own))
        parts.append("answer")
    if use.choice is ToolChoice.REQUIRED or (parts and use.choice is ToolChoice.AUTO):
        rules.append(_calls(dialect, use))
        parts.append("calls")
    if not parts or (parts == ["answer"] and not dialect.reasons):
        return own
    rules.append(f"body: {' | '.join(parts)}\n")
    return Constraint(ConstraintKind.GRAMMAR, _start(dialect, begun) + "".join(rules))


def _calls(dialect: Dialect, use: ToolUse) -> str:
    assert dialect.tools is not None
    return calls_rule(
        dialect.tools,
        use.offered,
        parallel=use.parallel,
        named_arguments=dialect.named_arguments,
        mark=dialect.mark_rule,
    )


def _start(dialect: Dialect, begun: bool) -> str:
    if not dialect.reasons:
        return "start: body\n"
    start = "thinking body" if begun else f"body | {dialect.mark_rule(THINK_OPEN)} thinking body"
    blanks = "blanks: /[ \\t\\r\\n]{1,8}/\n"
    thought = r"/(.|\n)*/"
    if THINK_CLOSE in dialect.special:
        close = special(dialect.special[THINK_CLOSE])
        thinking = f"thinking: thought {close} blanks?\nthought: {thought}\n"
    else:
        thinking = f"thinking: thought blanks?\nthought[suffix={quoted(THINK_CLOSE)}]: {thought}\n"
    return f"start: {start}\n{thinking}{blanks}"
