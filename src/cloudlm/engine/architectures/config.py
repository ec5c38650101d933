"""A checked look into a model's ``config.json``. Knows no PyTorch and no particular network."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from cloudlm.core.errors import BrokenModel

_T = TypeVar("_T")
MAX_JSON_BYTES = 256 * 2**20


def read_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in ``path``. Raises BrokenModel naming the file and the fault."""
    try:
        if path.stat().st_size > max_bytes:
            raise BrokenModel(f"{path.name} is larger than {max_bytes} bytes")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise BrokenModel(f"{path.name} is missing in {path.parent}") from None
    except OSError as error:
        raise BrokenModel(f"{path.name} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BrokenModel(f"{path.name} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise BrokenModel(f"{path.name} holds a {type(value).__name__}, expected a JSON object")
    return value


class ModelConfig:
    """Typed access to a configuration; ``null`` counts as absent unless said otherwise. All
    methods raise BrokenModel naming the file, the field, its value and what was expected."""

    def __init__(self, values: Mapping[str, Any], source: str = "config.json") -> None:
        self._values = values
        self._source = source

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def raw(self, name: str) -> Any:
        """The unchecked value, None if absent."""
        return self._values.get(name)

    def integer(
        self, name: str, default: int | None = None, low: int = 1, high: int = 1 << 24
    ) -> int:
        """A whole number from ``low`` to ``high``; required if there is no default."""
        value = self._get(name, default)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not low <= value <= high:
            raise self.fault(name, f"a whole number from {low} to {high}")
        return int(value)

    def optional_integer(
        self, name: str, default: int | None = None, low: int = 1, high: int = 1 << 24
    ) -> int | None:
        """Like ``integer``, but ``default`` if absent and None if ``null``."""
        return (
            self.integer(name, low=low, high=high) if name in self else self._unless(name, default)
        )

    def number(self, name: str, default: float | None = None, low: float = 0.0) -> float:
        """A finite number above ``low``; required if there is no default."""
        value = self._get(name, default)
        real = isinstance(value, int | float) and not isinstance(value, bool)
        if not real or not math.isfinite(value) or value <= low:
            raise self.fault(name, f"a number above {low:g}")
        return float(value)

    def optional_number(self, name: str, default: float | None = None) -> float | None:
        """Like ``number``, but ``default`` if absent and None if ``null``."""
        return self.number(name) if name in self else self._unless(name, default)

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """A list of ``count`` finite numbers above 0."""
        values = self._values.get(name)
        items = values if isinstance(values, list) else []
        sound = all(
            isinstance(item, int | float)
            and not isinstance(item, bool)
            and math.isfinite(item)
            and item > 0
            for item in items
        )
        if len(items) != count or not sound:
            raise self.fault(name, f"a list of {count} numbers above 0")
        return tuple(float(item) for item in items)

    def indices(self, name: str, end: int) -> frozenset[int]:
        """A list of whole numbers from 0 to below ``end``; empty if absent."""
        values = self._get(name, [])
        whole = isinstance(values, list) and all(
            isinstance(item, int) and not isinstance(item, bool) and 0 <= item < end
            for item in values
        )
        if not whole:
            raise self.fault(name, f"a list of whole numbers from 0 to {end - 1}")
        return frozenset(values)

    def choices(self, name: str, count: int, choices: Collection[str]) -> tuple[str, ...]:
        """A list of ``count`` of ``choices``."""
        values = self._values.get(name)
        items = values if isinstance(values, list) else []
        if len(items) != count or not all(
            isinstance(item, str) and item in choices for item in items
        ):
            raise self.fault(name, f"a list of {count} of {', '.join(choices)}")
        return tuple(items)

    def flag(self, name: str, default: bool) -> bool:
        """``true`` or ``false``."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.fault(name, "true or false")
        return value

    def choice(self, name: str, default: str, choices: Mapping[str, Any]) -> str:
        """One of the keys of ``choices``."""
        value = self._get(name, default)
        if not isinstance(value, str) or value not in choices:
            raise self.fault(name, "one of " + ", ".join(choices))
        return value

    def section(self, name: str) -> ModelConfig:
        """An object inside the configuration; empty if absent."""
        value = self._get(name, {})
        if not isinstance(value, dict):
            raise self.fault(name, "a JSON object")
        return ModelConfig(value, f"{self._source}: {name}")

    def fault(self, name: str, expected: str) -> BrokenModel:
        """The error that says what is wrong with a field."""
        if name not in self:
            return BrokenModel(f"{self._source}: {name} is missing, expected {expected}")
        shown = repr(self._values[name])[:80]
        return BrokenModel(f"{self._source}: {name} is {shown}, expected {expected}")

    def _unless(self, name: str, default: _T) -> _T | None:
        return None if name in self._values else default

    def _get(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        return default if value is None else value
