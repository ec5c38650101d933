"""Models below a folder that is none itself, so that an import can say where they are. Must not
import them: which one is meant is for people to say."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cloudlm.core.errors import BrokenModel

_CONFIGURATIONS = frozenset(("config.json", "adapter_config.json"))
_NAMED = 3


def models_below(paths: Iterable[str]) -> list[str]:
    """Folders with a model's or an adapter's configuration, and GGUF files, those least deep first;
    ``paths`` are relative, those at the top are of no matter."""
    found: set[str] = set()
    for path in paths:
        above, _, name = path.rpartition("/")
        if above and name in _CONFIGURATIONS:
            found.add(above)
        elif above and name.lower().endswith(".gguf"):
            found.add(path)
    return sorted(found, key=lambda one: (one.count("/"), one))


def lies_below(folder: Path, models: list[str]) -> BrokenModel:
    """The refusal of a folder that only has models below it, which it names."""
    named = ", ".join(str(folder / one) for one in models[:_NAMED])
    if len(models) == 1:
        return BrokenModel(
            f"config.json is missing in {folder}, but a model lies below it: import {named}"
        )
    more = f" or another of {len(models)}" if len(models) > _NAMED else ""
    return BrokenModel(
        f"config.json is missing in {folder}, but models lie below it: import one of them, "
        f"{named}{more}"
    )
