"""Constraints as text in llguidance's dialect of Lark.

Pure text: it compiles nothing and must not import llguidance. Rules of our own begin with
``answer``; whoever puts something around an answer names its rules otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cloudlm.core.chat import Constraint, ConstraintKind

# What a model may put between the parts of a JSON text. Without an end a model that is fond of
# blanks would write nothing else.
_BLANKS = r"[\x20\x09\x0A\x0D]{1,32}"


def lark_of(constraint: Constraint) -> str:
    """The whole grammar; its first rule is ``start``."""
    if constraint.kind is ConstraintKind.GRAMMAR:
        return constraint.text
    return f"start: answer\n{answer_rule(constraint)}"


def answer_rule(constraint: Constraint) -> str:
    """The rule ``answer``. A grammar has none, since its own rules could clash with others."""
    if constraint.kind is ConstraintKind.JSON_SCHEMA:
        return f"answer: {json_rule(json.loads(constraint.text))}\n"
    if constraint.kind is ConstraintKind.REGEX:
        return f"answer: {regex_rule(constraint.text)}\n"
    assert constraint.kind is ConstraintKind.CHOICE
    return "answer: " + " | ".join(map(quoted, json.loads(constraint.text))) + "\n"


def json_rule(schema: Mapping[str, Any]) -> str:
    """A JSON text that follows ``schema``; references in it are meant from its own root."""
    own = {**schema, "x-guidance": {"whitespace_pattern": _BLANKS}}
    return "%json " + json.dumps(own)


def regex_rule(regex: str) -> str:
    """A text that the whole of ``regex`` matches."""
    parts: list[str] = []
    characters = iter(regex)
    for one in characters:
        if one == "\\":
            following = next(characters, "")
            parts.append("/" if following == "/" else one + following)
            if following == "/":
                parts[-1] = "\\/"
        elif one == "/":
            parts.append("\\/")
        elif one in "\n\r":
            parts.append("\\n" if one == "\n" else "\\r")
        else:
            parts.append(one)
    return "/" + "".join(parts) + "/"


def quoted(text: str) -> str:
    """A rule that is just this text."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def special(token_id: int) -> str:
    """A rule that is just this special token."""
    return f"<[{token_id}]>"
