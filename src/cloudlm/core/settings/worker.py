"""Settings of a replica's server. Declarations alone; ``reading`` parses, the worker acts."""

from __future__ import annotations

from dataclasses import dataclass

from cloudlm.core.settings.declare import setting


@dataclass(frozen=True)
class WorkerSettings:
    """A replica's server."""

    host: str = setting("127.0.0.1", "Address workers listen on.")
    first_port: int = setting(8100, "Workers take free ports from here upward.", low=1, high=65535)
    tls: str = setting(
        "off",
        "mutual: replicas that control starts speak TLS and demand this installation's "
        "certificate, which control makes and renews in home/tls.",
        choices=("off", "mutual"),
    )
    tls_cert: str = setting("", "PEM file of the worker's certificate; empty serves plain HTTP.")
    tls_key: str = setting("", "PEM file of its private key; empty if tls_cert holds it too.")
    tls_client_ca: str = setting(
        "",
        "PEM file of the authorities whose clients alone are let in (mTLS); empty asks for none.",
    )
    max_waiting_requests: int = setting(
        512, "Requests queued in a worker; more are refused with 503.", low=1
    )
