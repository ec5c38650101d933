"""``--option key=value`` to EngineSettings, with the errors that a person can act on.

Pure. The names and bounds are those of ``core.settings``; nothing is invented here.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from cloudlm.core.errors import BadSetting
from cloudlm.core.settings import EngineSettings, read_settings

_VLLM_NAMES = {
    "tensor_parallel_size": "tensor_parallel",
    "pipeline_parallel_size": "pipeline_parallel",
}


def split_options(pairs: Sequence[str]) -> dict[str, str]:
    """``["dtype=float32"]`` to ``{"dtype": "float32"}``. Raises BadSetting."""
    options: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise BadSetting(f"--option {pair!r} is not of the form key=value", param="option")
        options[name.strip()] = value.strip()
    return options


def engine_settings(options: Mapping[str, Any], base: EngineSettings) -> EngineSettings:
    """``base`` with ``options`` applied.

    vLLM's names for a partition are taken as ours. Raises BadSetting for an unknown name (naming
    the nearest one) and for a bad value.
    """
    options = {_VLLM_NAMES.get(name, name): value for name, value in options.items()}
    known = [one.name for one in fields(EngineSettings)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise BadSetting(
                f"unknown option {name!r}{hint}; known options: {', '.join(known)}", param=name
            )
    values = {**asdict(base), **options}
    settings, _ = read_settings({"engine": values}, file_name="--option")
    return settings.engine


def named_adapters(setting: str, source: str = "adapters") -> list[tuple[str, str]]:
    """The option ``adapters``, ``name=address,name=address``. Raises BadSetting."""
    found: list[tuple[str, str]] = []
    for part in filter(None, (part.strip() for part in setting.split(","))):
        name, _, address = part.partition("=")
        if not name.strip() or not address.strip():
            raise BadSetting(
                f"{source}: {part[:120]!r} is not of the form name=address", param="adapters"
            )
        found.append((name.strip(), address.strip()))
    return found
