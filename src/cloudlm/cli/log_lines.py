"""Log lines for people: the JSON of our own processes as time, level, event and fields.

What others print (vLLM, a traceback) stays as it is. Pure; must not print.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

_HEAD = ("time", "level", "event")
# The same in every line of a replica; --json has them.
_LEFT_OUT = ("process", "logger")
_LEVEL_WIDE = 7


def event_of(line: str) -> dict[str, Any] | None:
    """The event that a line of ``telemetry.logs`` is; None if it is something else."""
    if not line.startswith("{"):
        return None
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    known = isinstance(event, dict) and all(isinstance(event.get(name), str) for name in _HEAD)
    return event if known else None


def readable(line: str) -> str:
    """A line as people read it, in this machine's time; lines of others unchanged. A field of
    several lines, such as a traceback, stands below, each line indented: no text of a field can
    look like an event."""
    event = event_of(line)
    if event is None:
        return line
    stamp, level, name = (_in_one_line(event[part]) for part in _HEAD)
    text = f"{_clock(stamp)} {level:{_LEVEL_WIDE}} {name}"
    below = ""
    for name, value in event.items():
        if name in _HEAD or name in _LEFT_OUT:
            continue
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if "\n" in shown:
            lines = [f"{_in_one_line(name)}:", *shown.split("\n")]
            below += "".join(f"\n    {one}" for one in lines)
        else:
            text += f" {_in_one_line(name)}={_quoted(shown)}"
    return text + below


def _clock(stamp: str) -> str:
    """``2026-01-31 14:03:01`` of a stamp in UTC; the stamp itself if it is none."""
    try:
        return datetime.fromisoformat(stamp).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError):
        return stamp


def _in_one_line(text: str) -> str:
    return text.replace("\n", " ")


def _quoted(text: str) -> str:
    """A value in quotes where a reader could not see where it ends."""
    plain = text and not any(letter.isspace() or letter in '="' for letter in text)
    return text if plain else json.dumps(text, ensure_ascii=False)
