"""What the settings and the installation's folder say about TLS, as contexts that follow their
files: the gateway's own address, a worker's, and the client that gateway and control are towards
replicas. ``folder`` is home's ``tls``. Must not open a socket.
"""

from __future__ import annotations

import socket
from pathlib import Path

from cloudlm.core.errors import BadSetting
from cloudlm.core.settings import GatewaySettings, WorkerSettings
from cloudlm.security.tls import (
    LiveContext,
    Pair,
    client_context,
    pair_of,
    server_context,
)

SELF_SIGNED = "gateway-cert.pem"
"""In ``folder``: what clients trust when the gateway's certificate is a self-signed one."""
_EVERYWHERE = ("", "0.0.0.0", "::")  # noqa: S104 - compared with, not listened on


def gateway_pair(settings: GatewaySettings, folder: Path, now: float) -> Pair | None:
    """The certificate of the gateway's address, None without TLS. A self-signed one is made if it
    is asked for. Raises BadSetting and StorageFailed."""
    given = pair_of("gateway.tls", settings.tls_cert, settings.tls_key)
    if settings.tls == "self-signed":
        if given is not None:
            raise BadSetting(
                "gateway.tls is self-signed, and gateway.tls_cert names a certificate: choose one",
                param="gateway.tls",
            )
        from cloudlm.security.authority import ensure_self_signed

        return Pair("gateway.tls", str(ensure_self_signed(folder, _names(settings.host), now)))
    return given if settings.tls == "auto" else None


def _names(host: str) -> list[str]:
    """By what a gateway may be called besides localhost. Names that no certificate can bear are
    left out."""
    names = [socket.gethostname()]
    if host not in _EVERYWHERE:
        names.append(host)
    return [name for name in names if name.isascii() and " " not in name and name]


def gateway_context(settings: GatewaySettings, pair: Pair) -> LiveContext:
    """The context of the gateway's address. Raises BadSetting."""
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
