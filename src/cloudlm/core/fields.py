"""Reads a decoded JSON object field by field, so that every fault names its field.

Used at the edges (``core.wire``). A wrong value is InvalidRequest with ``param``; a field that
nobody asked for is UnprocessableRequest, so that no caller can assign what is not offered. It
decides nothing about meaning: that is the caller's.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Any, TypeVar

from cloudlm.core.errors import InvalidRequest, UnprocessableRequest

E = TypeVar("E", bound=StrEnum)
_REQUIRED: Any = object()
_MAX_SHOWN = 80


def check_text(value: Any, param: str, *, max_length: int, low: int = 0) -> str:
    """Return ``value`` if it is a text of ``low`` to ``max_length`` characters that every store
    and protocol can carry (no NUL, no lone surrogate). Raises InvalidRequest."""
    if not isinstance(value, str):
        raise InvalidRequest(f"{param} must be a text, not {kind_of(value)}", param=param)
    if not low <= len(value) <= max_length:
        raise InvalidRequest(
            f"{param} must have {low} to {max_length} characters, not {len(value)}", param=param
        )
    if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
        raise InvalidRequest(f"{param} holds a character that is not valid Unicode", param=param)
    return value


def kind_of(value: Any) -> str:
    """The JSON name of a value's type, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


class Fields:
    """The fields of one JSON object. Ask for each, then call ``end``.

    ``path`` is put before the field's name in messages (``spec.``).
    """

    def __init__(self, body: Any, what: str, *, path: str = "") -> None:
        if not isinstance(body, dict):
            raise InvalidRequest(
                f"{what} must be a JSON object, not {kind_of(body)}", param=path.rstrip(".") or None
            )
        self._body: dict[Any, Any] = body
        self._what = what
        self._path = path
        self._asked: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._body

    def param(self, name: str) -> str:
        """The field's full name."""
        return self._path + name

    def raw(self, name: str, default: Any = _REQUIRED) -> Any:
        """The value as it is. Raises InvalidRequest if it is required and missing."""
        self._asked.add(name)
        value = self._body.get(name, default)
        if value is _REQUIRED:
            raise InvalidRequest(
                f"{self._what} needs the field {self.param(name)!r}", param=self.param(name)
            )
        return value

    def text(
        self, name: str, default: Any = _REQUIRED, *, low: int = 0, max_length: int = 4096
    ) -> str:
        value = self.raw(name, default)
        return check_text(value, self.param(name), max_length=max_length, low=low)

    def optional_text(self, name: str, *, max_length: int = 4096) -> str | None:
        value = self.raw(name, None)
        if value is None:
            return None
        return check_text(value, self.param(name), max_length=max_length)

    def integer(
        self, name: str, default: Any = _REQUIRED, *, low: int = 0, high: int = 2**53
    ) -> int:
        value = self.raw(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidRequest(
                f"{self.param(name)} must be a whole number, not {kind_of(value)}",
                param=self.param(name),
            )
        return int(self._inside(name, value, low, high))

    def number(
        self,
        name: str,
        default: Any = _REQUIRED,
        *,
        low: float = -1e15,
        high: float = 1e15,
    ) -> float:
        value = self.raw(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidRequest(
                f"{self.param(name)} must be a number, not {kind_of(value)}", param=self.param(name)
            )
        return float(self._inside(name, value, low, high))

    def optional_number(self, name: str) -> float | None:
        return None if self.raw(name, None) is None else self.number(name)

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        value = self.raw(name, default)
        if not isinstance(value, bool):
            raise InvalidRequest(
                f"{self.param(name)} must be true or false, not {kind_of(value)}",
                param=self.param(name),
            )
        return value

    def choice(self, name: str, kind: type[E], default: Any = _REQUIRED) -> E:
        value = self.raw(name, default)
        try:
            if not isinstance(value, str):
                raise ValueError
            return kind(value)
        except ValueError:
            offered = ", ".join(member.value for member in kind)
            raise InvalidRequest(
                f"{self.param(name)} = {str(value)[:_MAX_SHOWN]!r} must be one of {offered}",
                param=self.param(name),
            ) from None

    def mapping(
        self, name: str, default: Any = _REQUIRED, *, max_entries: int = 4096
    ) -> dict[str, Any]:
        value = self.raw(name, default)
        if not isinstance(value, dict):
            raise InvalidRequest(
                f"{self.param(name)} must be an object, not {kind_of(value)}",
                param=self.param(name),
            )
        self._count(name, len(value), max_entries)
        return {str(key): entry for key, entry in value.items()}

    def items(
        self, name: str, default: Any = _REQUIRED, *, max_entries: int = 100_000
    ) -> list[Any]:
        value = self.raw(name, default)
        if not isinstance(value, list | tuple):
            raise InvalidRequest(
                f"{self.param(name)} must be a list, not {kind_of(value)}", param=self.param(name)
            )
        self._count(name, len(value), max_entries)
        return list(value)

    def end(self) -> None:
        """Raise UnprocessableRequest if the object has a field that was not asked for."""
        unknown = sorted(str(name) for name in self._body if name not in self._asked)
        if unknown:
            shown = unknown[0][:_MAX_SHOWN]
            raise UnprocessableRequest(
                f"{self._what} has no field {self._path + shown!r}; it has "
                + ", ".join(sorted(self._asked)),
                param=self._path + shown,
            )

    def _inside(self, name: str, value: float, low: float, high: float) -> float:
        if not (isinstance(value, int) or math.isfinite(value)) or not low <= value <= high:
            shown = str(value) if not abs(value) > 10**18 else "a huge number"
            raise InvalidRequest(
                f"{self.param(name)} must be from {low} to {high}, not {shown}",
                param=self.param(name),
            )
        return value

    def _count(self, name: str, count: int, max_entries: int) -> None:
        if count > max_entries:
            raise InvalidRequest(
                f"{self.param(name)} has {count} entries; at most {max_entries} are allowed",
                param=self.param(name),
            )
