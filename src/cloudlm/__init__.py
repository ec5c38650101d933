"""cloudlm: from a model file to a secured, elastic service.

``Client``, ``AsyncClient``, ``DeploymentSpec`` and ``CloudlmError`` are here for users; nothing is
imported before it is asked for, ``typing`` included: every process begins here, a guard in
milliseconds. Type checkers read ``__init__.pyi``: an import written here would tie every part of
cloudlm to the SDK.
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "CloudlmError", "DeploymentSpec", "__version__"]

_HOMES = {
    "AsyncClient": "cloudlm.client.asynchronous",
    "Client": "cloudlm.client.sync",
    "CloudlmError": "cloudlm.core.errors",
    "DeploymentSpec": "cloudlm.core.deployment",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
