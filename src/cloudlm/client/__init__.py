"""The Python SDK: ``Client`` and ``AsyncClient`` for the control API, and the official ``openai``
client ready-made for the gateway. Nothing is imported before it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cloudlm.client.asynchronous import AsyncClient
    from cloudlm.client.sync import Client

__all__ = ["AsyncClient", "Client"]


def __getattr__(name: str) -> Any:
    if name == "Client":
        from cloudlm.client.sync import Client

        return Client
    if name == "AsyncClient":
        from cloudlm.client.asynchronous import AsyncClient

        return AsyncClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
