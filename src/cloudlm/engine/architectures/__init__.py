"""The networks that the engine runs, by the name in ``config.json``; imported when asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cloudlm.core.architectures import ARCHITECTURES, own_architecture
from cloudlm.core.errors import UnsupportedModel

if TYPE_CHECKING:
    from cloudlm.engine.architectures.base import Decoder

SUPPORTED = tuple(sorted(ARCHITECTURES))


def find_architecture(names: Any) -> tuple[str, type[Decoder]]:
    """The first architecture of a configuration's list ``architectures`` that the engine runs.

    Raises UnsupportedModel naming what was asked for and what there is.
    """
    name = own_architecture(names)
    if name is not None:
        module = import_module(f"{__name__}.{ARCHITECTURES[name]}")
        return name, getattr(module, name)
    listed = [one for one in names if isinstance(one, str)] if isinstance(names, list) else []
    asked = ", ".join(listed)[:200] or "none"
    raise UnsupportedModel(
        f"config.json: architectures is {asked}, which the engine does not run; "
        f"supported: {', '.join(SUPPORTED)}"
    )
