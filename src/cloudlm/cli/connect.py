"""How commands reach what they speak to: the control API, the local registry, the local state."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from cloudlm.cli.stack import Addresses, running_addresses
from cloudlm.core.clock import SystemClock
from cloudlm.core.errors import AuthenticationFailed
from cloudlm.core.settings import ControlSettings, GatewaySettings, Settings
from cloudlm.security.transport import CONTROL_SELF_SIGNED
from cloudlm.state.home import Home, load_settings

if TYPE_CHECKING:
    from cloudlm.client import Client
    from cloudlm.client.connection import Connection
    from cloudlm.registry.registry import Registry
    from cloudlm.state.base import State

_NOTES_TIMEOUT_S = 2.0


def local_url(host: str, port: int, *, tls: bool = False) -> str:
    """Where a process of this machine answers that listens on ``host``."""
    reachable = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host  # noqa: S104
    place = f"[{reachable}]" if ":" in reachable else reachable
    return f"{'https' if tls else 'http'}://{place}:{port}"


def gateway_url(settings: GatewaySettings, port: int) -> str:
    """Where the gateway of these settings answers on ``port``."""
    given = settings.tls == "auto" and bool(settings.tls_cert)
    return local_url(settings.host, port, tls=given or settings.tls == "self-signed")


def control_url(settings: ControlSettings, port: int) -> str:
    """Where the control API of these settings answers on ``port``."""
    given = settings.tls == "auto" and bool(settings.tls_cert)
    return local_url(settings.host, port, tls=given or settings.tls == "self-signed")


def trusted(home: Home) -> str | None:
    """What clients of this home's control API trust besides the usual authorities: CLOUDLM_CA,
    else the certificate for development, if one was made."""
    made = home.tls / CONTROL_SELF_SIGNED
    return os.environ.get("CLOUDLM_CA") or (str(made) if made.exists() else None)


def control_client() -> Client:
    """A client of the control API at ``addresses``, with the key of the environment, else with the
    sign-in of 'cloudlm login' there. Raises AuthenticationFailed when there is neither."""
    from cloudlm.cli.session import token_for
    from cloudlm.client import Client
    from cloudlm.client.connection import key_of

    settings, _ = load_settings()
    where = addresses(settings)
    key = key_of(os.environ) or token_for(where.control_url, Home(settings.home).path, settings)
    if not key:
        raise AuthenticationFailed(
            "no API key: set CLOUDLM_API_KEY to the key that 'cloudlm up' showed at its "
            "first start, sign in with 'cloudlm login', or make a key with 'cloudlm keys create "
            "--local --role owner'"
        )
    return Client(
        api_key=key,
        control_url=where.control_url,
        gateway_url=where.gateway_url,
        ca=trusted(Home(settings.home)),
    )


def gateway_notes(connection: Connection) -> list[str]:
    """What the gateway has to tell its operator, as ``/readyz`` says it; nothing if it cannot be
    asked: commands that need it say so themselves."""
    import httpx2

    try:
        with httpx2.Client(timeout=_NOTES_TIMEOUT_S, **connection.local_options) as http:
            notes = http.get(f"{connection.gateway_url}/readyz").json()["notes"]
        return [str(note) for note in notes]
    except (httpx2.HTTPError, ValueError, KeyError, TypeError):
        return []


def gateway_log(gateway_url: str) -> Path | None:
    """Where the gateway at that address logs, if it is the one that 'cloudlm up' runs in this home;
    others log where whoever started them said."""
    settings, _ = load_settings()
    home = Home(settings.home)
    running = running_addresses(home)
    if running is None or running.gateway_url != gateway_url:
        return None
    return home.logs / "gateway.log"


def addresses(settings: Settings) -> Addresses:
    """Where control and gateway are: what CLOUDLM_CONTROL_URL and CLOUDLM_GATEWAY_URL name, else
    the installation running in this home, else what the settings say."""
    running = running_addresses(Home(settings.home))
    if running is None:
        running = Addresses(
            gateway_url=gateway_url(settings.gateway, settings.gateway.port),
            control_url=control_url(settings.control, settings.control.port),
        )
    control = os.environ.get("CLOUDLM_CONTROL_URL") or running.control_url
    return Addresses(
        gateway_url=os.environ.get("CLOUDLM_GATEWAY_URL") or running.gateway_url,
        control_url=control.rstrip("/"),
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
