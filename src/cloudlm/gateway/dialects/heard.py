"""What a replica said, out of OpenAI's answers and chunks, for dialects that say it in other words.

Also the few steps that all such dialects share on the way in. Tolerant of fields that a replica
leaves out or fills with nonsense: they count as not said. Must not write any dialect.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cloudlm.core.errors import CloudlmError, InvalidRequest, NotSupported
from cloudlm.core.fields import Fields, kind_of, shown


@dataclass(frozen=True, slots=True)
class CallPart:
    """A tool call, or the part of one that a chunk brings. ``id`` and ``name`` are empty but in the
    first part."""

    index: int
    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Heard:
    """What an answer or a chunk says. ``finish`` is OpenAI's ``finish_reason``, ``stop`` the stop
    text that was met, each None if it is not said."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[CallPart, ...] = ()
    finish: str | None = None
    stop: str | None = None


def heard(body: Mapping[str, Any]) -> Heard:
    """The first choice of a chat or completion, whole or a chunk."""
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    return heard_choice(choice) if isinstance(choice, dict) else Heard()


def heard_choice(choice: Mapping[str, Any]) -> Heard:
    """One choice."""
    said = choice.get("delta", choice.get("message"))
    said = said if isinstance(said, dict) else choice
    finish, stop = choice.get("finish_reason"), choice.get("stop_reason")
    calls = said.get("tool_calls")
    return Heard(
        _text(said.get("content")) or _text(said.get("text")),
        _text(said.get("reasoning_content")),
        tuple(_calls(calls)) if isinstance(calls, list) else (),
        finish if isinstance(finish, str) else None,
        stop if isinstance(stop, str) else None,
    )


def choices_of(body: Mapping[str, Any]) -> list[Heard]:
    """All choices of a whole answer, by their index."""
    choices = [c for c in body.get("choices") or () if isinstance(c, dict)]
    ordered = sorted(choices, key=lambda c: c["index"] if type(c.get("index")) is int else 0)
    return [heard_choice(choice) for choice in ordered]


def _calls(calls: list[Any]) -> Iterator[CallPart]:
    for place, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            index = call.get("index")
            yield CallPart(
                index if type(index) is int else place,
                _text(call.get("id")),
                _text(function.get("name")),
                _text(function.get("arguments")),
            )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def rfc3339(seconds: Any) -> str:
    """Unix seconds as ``2026-01-31T12:00:00Z``; nonsense is the epoch."""
    good = isinstance(seconds, int | float) and 0 <= seconds < 2**34
    moment = datetime.fromtimestamp(seconds if good else 0, UTC)
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")


@contextlib.contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Let errors about a field of OpenAI's name the client's own. ``names`` maps one to the
    other."""
    try:
        yield
    except CloudlmError as error:
        name = names.get(error.param or "")
        if name is None or error.param is None:
            raise
        told = error.message.replace(error.param, name, 1)
        raise type(error)(told, param=name) from None


def refuse(fields: Fields, reasons: Mapping[str, str]) -> None:
    """Raise NotSupported for the first of these fields that the client set; ``reasons`` ends the
    sentence."""
    for name, reason in reasons.items():
        if fields.raw(name, None) not in (None, False, [], {}):
            param = fields.param(name)
            raise NotSupported(f"{param} is not supported: {reason}", param=param)


def ignore(fields: Fields, *names: str) -> None:
    """These fields change nothing here; they may be there."""
    for name in names:
        fields.raw(name, None)


def copied(fields: Fields, names: Mapping[str, str]) -> dict[str, Any]:
    """The fields that were given and only have another name, by OpenAI's. Their values are checked
    with the whole request."""
    found = {theirs: fields.raw(own, None) for own, theirs in names.items()}
    return {name: value for name, value in found.items() if value is not None}


def objects(value: Any, param: str) -> list[dict[str, Any]]:
    """``value`` if it is a list of JSON objects. Raises InvalidRequest."""
    if not isinstance(value, list):
        raise InvalidRequest(f"{param} must be a list, not {kind_of(value)}", param=param)
    for number, item in enumerate(value):
        if not isinstance(item, dict):
            where = f"{param}[{number}]"
            raise InvalidRequest(f"{where} must be an object, not {kind_of(item)}", param=where)
    return value


def text_of(value: Any, param: str, kinds: tuple[str, ...] = ("text",)) -> str:
    """A text, or the texts of a list of parts of these types, joined. Raises NotSupported for other
    parts."""
    if isinstance(value, str):
        return value
    return "".join(
        part_text(part, f"{param}[{number}]", kinds)
        for number, part in enumerate(objects(value, param))
    )


def part_text(part: Mapping[str, Any], param: str, kinds: tuple[str, ...]) -> str:
    """The text of one part. Raises NotSupported if it is none."""
    if part.get("type") not in kinds:
        raise NotSupported(
            f"{param} is of type {shown(part.get('type'))}; only {' and '.join(kinds)} can be read "
            "here",
            param=param,
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise InvalidRequest(f"{param}.text must be a text", param=f"{param}.text")
    return text
