"""Where the texts of a request in OpenAI's form are, and changing them. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

_NAMES = frozenset({"role", "type", "id", "tool_call_id", "format"})
_ADDRESSES = frozenset({"url", "image_url", "file_data"})  # hold bytes of pictures and files too
_TOP_NAMES = frozenset({"model", "cache_salt", "encoding_format", "reasoning_effort"})
_PROMPTS = ("prompt", "input")


class Text(NamedTuple):
    """One text: what holds it under which key, how a person would name the place, and the role of
    its message, empty outside of one."""

    holder: Any
    key: str | int
    place: str
    role: str

    @property
    def value(self) -> str:
        return str(self.holder[self.key])

    def put(self, value: str) -> None:
        """Change it."""
        self.holder[self.key] = value


def texts_of(body: dict[str, Any]) -> list[Text]:
    """Every text that a client wrote, but for names that a server must understand."""
    return [
        text
        for key in body
        if key not in _TOP_NAMES
        for text in _under(body, key, key, "user" if key in _PROMPTS else "")
    ]


def _under(holder: Any, key: str | int, place: str, role: str) -> Iterator[Text]:
    value = holder[key]
    if isinstance(value, str):
        if value and not (key in _ADDRESSES and value.startswith("data:")):
            yield Text(holder, key, place, role)
    elif isinstance(value, list):
        for number in range(len(value)):
            yield from _under(value, number, f"{place}[{number}]", role)
    elif isinstance(value, dict):
        own = value.get("role")
        for name in value:
            if name not in _NAMES or not isinstance(value[name], str):
                yield from _under(
                    value, name, f"{place}.{name}", own if isinstance(own, str) else role
                )


def token_ids_in(body: dict[str, Any]) -> str | None:
    """The field that holds a prompt as numbers, which nobody here can read; None if none does."""
    for name in _PROMPTS:
        prompt = body.get(name)
        if isinstance(prompt, list) and any(not isinstance(one, str) for one in prompt):
            return name
    return None
