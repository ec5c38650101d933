"""Typed access to a GGUF file's settings; every fault names file, setting, value and remedy."""

from __future__ import annotations

import math
from typing import TypeGuard

from cloudlm.core.errors import BrokenModel
from cloudlm.registry.gguf.header import GgufHeader


class Settings:
    """The settings below ``prefix``. All methods raise BrokenModel."""

    def __init__(self, header: GgufHeader, prefix: str = "") -> None:
        self._header = header
        self._prefix = prefix

    def __contains__(self, key: str) -> bool:
        return self._prefix + key in self._header.settings

    def integer(
        self, key: str, default: int | None = None, low: int = 1, high: int = 1 << 24
    ) -> int:
        """A whole number from ``low`` to ``high``; required if there is no default."""
        value = self._get(key, default)
        if type(value) is not int or not low <= value <= high:
            raise self.fault(key, f"a whole number from {low} to {high}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0; required if there is no default."""
        value = self._get(key, default)
        if not _is_number(value) or value <= 0:
            raise self.fault(key, "a number above 0")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        """A text; required if there is no default."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.fault(key, "a text")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.fault(key, "true or false")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of texts; required."""
        value = self._get(key, None)
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self.fault(key, "a list of texts")
        return value

    def numbers(self, key: str, count: int) -> list[float]:
        """A list of ``count`` finite numbers; required."""
        value = self._get(key, None)
        items = value if isinstance(value, list) else []
        if len(items) != count or not all(map(_is_number, items)):
            raise self.fault(key, f"a list of {count} numbers")
        return items

    def fault(self, key: str, expected: str) -> BrokenModel:
        """The error that says what is wrong with a setting."""
        where = f"{self._header.name}: {self._prefix}{key}"
        if key not in self:
            return BrokenModel(f"{where} is missing, expected {expected}")
        shown = repr(self._header.settings[self._prefix + key])[:80]
        return BrokenModel(f"{where} is {shown}, expected {expected}")

    def _get(self, key: str, default: object) -> object:
        return self._header.settings.get(self._prefix + key, default)


def _is_number(value: object) -> TypeGuard[int | float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)
