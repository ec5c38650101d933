"""How commands reach what they speak to: the control API, the local registry, the local state."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cloudlm.core.clock import SystemClock
from cloudlm.core.errors import AuthenticationFailed
from cloudlm.state.home import Home, load_settings

if TYPE_CHECKING:
    from cloudlm.client import Client
    from cloudlm.registry.registry import Registry
    from cloudlm.state.base import State


def api_key() -> str | None:
    """The caller's key: CLOUDLM_API_KEY, or OPENAI_API_KEY if it is one of ours, so that a key of
    another service is never sent to this one."""
    other = os.environ.get("OPENAI_API_KEY", "")
    return os.environ.get("CLOUDLM_API_KEY") or (other if other.startswith("clm_") else None)


def local_url(host: str, port: int) -> str:
    """Where a process of this machine answers that listens on ``host``."""
    reachable = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host  # noqa: S104
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def control_client() -> Client:
    """A client of the control API. Raises AuthenticationFailed when no key is set."""
    from cloudlm.client import Client

    key = api_key()
    if not key:
        raise AuthenticationFailed(
            "no API key: set CLOUDLM_API_KEY to the admin key that 'cloudlm up' showed at its "
            "first start, or make one with 'cloudlm keys create --local --role admin'"
        )
    settings, _ = load_settings()
    control = local_url(settings.control.host, settings.control.port)
    gateway = local_url(settings.gateway.host, settings.gateway.port)
    return Client(
        api_key=key,
        control_url=os.environ.get("CLOUDLM_CONTROL_URL", control),
        gateway_url=os.environ.get("CLOUDLM_GATEWAY_URL", gateway),
    )


def local_registry() -> Registry:
    """The registry that this machine's settings name."""
    from cloudlm.registry.registry import open_registry

    settings, _ = load_settings()
    home = Home(settings.home).ensure()
    return open_registry(
        home.registry_url(settings), home=home.path, settings=settings.registry, clock=SystemClock()
    )


async def open_local_state() -> tuple[State, Home]:
    """The state that this machine's settings name; the caller closes it."""
    from cloudlm.state.open import open_state

    settings, _ = load_settings()
    home = Home(settings.home).ensure()
    return await open_state(home.state_url(settings)), home
