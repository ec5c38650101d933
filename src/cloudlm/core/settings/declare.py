"""How a setting is declared: a dataclass field with its documentation and its bounds.

What declares settings imports this; it reads nothing and knows no setting.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any


def setting(
    default: Any,
    doc: str,
    *,
    secret: bool = False,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A dataclass field with its documentation (unit and reason) and its bounds."""
    metadata = {"doc": doc, "secret": secret, "low": low, "high": high, "choices": choices}
    return field(default=default, metadata=metadata)
