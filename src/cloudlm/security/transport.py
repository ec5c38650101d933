"""What the settings and the installation's folder say about TLS, as contexts that follow their
files: the gateway's own address, a worker's, and the client that gateway and control are towards
replicas. ``folder`` is home's ``tls``. Must not open a socket.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Protocol

from cloudlm.core.errors import BadSetting
from cloudlm.core.settings import ExternalSettings, GatewaySettings, WorkerSettings
from cloudlm.security.tls import (
    LiveContext,
    Pair,
    client_context,
    pair_of,
    server_context,
)

SELF_SIGNED = "gateway-cert.pem"
CONTROL_SELF_SIGNED = "control-cert.pem"
"""In ``folder``: what clients trust when the certificate of either is a self-signed one."""
_EVERYWHERE = ("", "0.0.0.0", "::")  # noqa: S104 - compared with, not listened on


class Spoken(Protocol):
    """What the settings of a server say about its own address: those of gateway and control."""

    @property
    def host(self) -> str: ...
    @property
    def tls(self) -> str: ...
    @property
    def tls_cert(self) -> str: ...
    @property
    def tls_key(self) -> str: ...
    @property
    def tls_min_version(self) -> str: ...


def own_pair(server: str, settings: Spoken, folder: Path, now: float) -> Pair | None:
    """The certificate of a server's address (``gateway``, ``control``), None without TLS. A
    self-signed one is made if it is asked for. Raises BadSetting and StorageFailed."""
    name = f"{server}.tls"
    given = pair_of(name, settings.tls_cert, settings.tls_key)
    if settings.tls == "self-signed":
        if given is not None:
            raise BadSetting(
                f"{name} is self-signed, and {name}_cert names a certificate: choose one",
                param=name,
            )
        from cloudlm.security.authority import ensure_self_signed

        names = _names(settings.host)
        return Pair(name, str(ensure_self_signed(folder, names, now, server)))
    return given if settings.tls == "auto" else None


def gateway_pair(settings: GatewaySettings, folder: Path, now: float) -> Pair | None:
    """``own_pair`` of the gateway."""
    return own_pair("gateway", settings, folder, now)


def _names(host: str) -> list[str]:
    """By what a server may be called besides localhost. Names that no certificate can bear are
    left out."""
    names = [socket.gethostname()]
    if host not in _EVERYWHERE:
        names.append(host)
    return [name for name in names if name.isascii() and " " not in name and name]


def own_context(settings: Spoken, pair: Pair) -> LiveContext:
    """The context of a server's own address. Raises BadSetting."""
    context = LiveContext(
        lambda: server_context(pair, minimum=settings.tls_min_version), pair.files
    )
    _ = context.current
    return context


def worker_context(settings: WorkerSettings) -> LiveContext | None:
    """The context of a worker's address, None without TLS. Raises BadSetting."""
    pair = pair_of("worker.tls", settings.tls_cert, settings.tls_key)
    authorities = settings.tls_client_ca
    if pair is None:
        if authorities:
            raise BadSetting(
                "worker.tls_client_ca is set and worker.tls_cert is not: a worker that asks "
                "clients for a certificate needs one itself",
                param="worker.tls_cert",
            )
        return None
    files = [*pair.files, *([Path(authorities).expanduser()] if authorities else [])]
    context = LiveContext(
        lambda: server_context(pair, client_ca=authorities, ca_setting="worker.tls_client_ca"),
        files,
    )
    _ = context.current
    return context


def replica_context(settings: GatewaySettings, folder: Path) -> LiveContext:
    """The context towards replicas: the system's authorities, those of ``upstream_ca`` and the
    installation's own, and the certificate that is shown to a replica that asks. Raises BadSetting
    if what the settings name cannot be used."""
    own_ca, own_identity = folder / "ca.pem", folder / "gateway-identity.pem"
    given = pair_of("gateway.upstream", settings.upstream_cert, settings.upstream_key)
    own = Pair("gateway.upstream", str(own_identity))
    authorities = [(settings.upstream_ca, "gateway.upstream_ca")] if settings.upstream_ca else []

    def trusted() -> list[tuple[str, str]]:
        return [*authorities, *([(str(own_ca), "home/tls/ca.pem")] if own_ca.exists() else [])]

    files = [own_ca, *(given or own).files, *(Path(path).expanduser() for path, _ in authorities)]
    context = LiveContext(
        lambda: client_context(trusted(), given or (own if own_identity.exists() else None)),
        files,
    )
    if given is not None or authorities:
        _ = context.current
    return context


def external_context(settings: ExternalSettings) -> LiveContext:
    """The context towards services that are not ours: the system's authorities and those of
    ``external.ca``. No certificate of ours is shown to them. Raises BadSetting."""
    authorities = [(settings.ca, "external.ca")] if settings.ca else []
    context = LiveContext(
        lambda: client_context(authorities, None),
        [Path(path).expanduser() for path, _ in authorities],
    )
    if authorities:
        _ = context.current
    return context
