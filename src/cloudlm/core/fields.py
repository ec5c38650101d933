"""Checks values of decoded JSON and reads objects field by field, so that every fault names its
field.

Used at the edges: the checks by ``core.requests`` and ``core.wire``, the reader by ``core.wire``. A
wrong value is InvalidRequest with ``param``; a field that nobody asked for is UnprocessableRequest,
so that no caller can assign what is not offered. It decides nothing about meaning: that is the
caller's.
"""

from __future__ import annotations

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


def check_integer(value: Any, param: str, low: int, high: int) -> int:
    """Return ``value`` if it is a whole number from ``low`` to ``high``. Raises InvalidRequest."""
    if type(value) is not int or not low <= value <= high:
        raise InvalidRequest(
            f"{param} must be a whole number from {low} to {high}, not {shown(value)}", param=param
        )
    return value


def check_number(value: Any, param: str, low: float, high: float, *, above: bool = False) -> float:
    """Return ``value`` if it is a finite number from ``low`` (or with ``above``: greater) to
    ``high``. Raises InvalidRequest."""
    fits = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and low <= value <= high  # not-a-number fails here
        and not (above and value == low)
    )
    if not fits:
        span = f"above {low:g}, at most {high:g}" if above else f"from {low:g} to {high:g}"
        raise InvalidRequest(f"{param} must be a number {span}, not {shown(value)}", param=param)
    return float(value)


def check_flag(value: Any, param: str) -> bool:
    """Return ``value`` if it is true or false. Raises InvalidRequest."""
    if not isinstance(value, bool):
        raise InvalidRequest(f"{param} must be true or false, not {shown(value)}", param=param)
    return value


def shown(value: Any) -> str:
    """A value as an error message may show it: short, on one line."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = "a huge number"
    return text if len(text) <= 60 else text[:57] + "..."


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
        return check_integer(self.raw(name, default), self.param(name), low, high)

    def number(
        self,
        name: str,
        default: Any = _REQUIRED,
        *,
        low: float = -1e15,
        high: float = 1e15,
    ) -> float:
        return check_number(self.raw(name, default), self.param(name), low, high)

    def optional_number(self, name: str) -> float | None:
        return None if self.raw(name, None) is None else self.number(name)

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        return check_flag(self.raw(name, default), self.param(name))

    def choice(self, name: str, kind: type[E], default: Any = _REQUIRED) -> E:
        value = self.raw(name, default)
        try:
            if not isinstance(value, str):
                raise ValueError
            return kind(value)
        except ValueError:
            offered = ", ".join(member.value for member in kind)
            raise InvalidRequest(
                f"{self.param(name)} must be one of {offered}, not {shown(value)}",
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
            first = self._path + unknown[0][:_MAX_SHOWN]
            raise UnprocessableRequest(
                f"{self._what} has no field {first!r}; it has " + ", ".join(sorted(self._asked)),
                param=first,
            )

    def _count(self, name: str, count: int, max_entries: int) -> None:
        if count > max_entries:
            raise InvalidRequest(
                f"{self.param(name)} has {count} entries; at most {max_entries} are allowed",
                param=self.param(name),
            )
