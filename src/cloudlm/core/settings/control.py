"""Settings of control: its address and TLS, its loop, memory for models, the lease.

Declarations alone; ``reading`` parses, control acts.
"""

from __future__ import annotations

from dataclasses import dataclass

from cloudlm.core.settings.declare import setting


@dataclass(frozen=True)
class ControlSettings:
    """The process that makes what runs equal what was asked."""

    host: str = setting("127.0.0.1", "Address the control API listens on.")
    port: int = setting(8001, "Port of the control API; 0 picks a free one.", low=0, high=65535)
    allowed_origins: str = setting("", "The same as gateway.allowed_origins, for the control API.")
    tls: str = setting(
        "auto",
        "auto: TLS if tls_cert is set; self-signed: with a certificate for development, made in "
        "home/tls; off: plain HTTP.",
        choices=("auto", "self-signed", "off"),
    )
    tls_cert: str = setting(
        "", "PEM file of the control API's certificate, those of its issuers after it."
    )
    tls_key: str = setting("", "PEM file of its private key; empty if tls_cert holds it too.")
    tls_min_version: str = setting(
        "1.2", "Oldest TLS version that clients may speak.", choices=("1.2", "1.3")
    )
    reconcile_interval_s: float = setting(
        0.5, "Pause between two reconciliations, seconds.", low=0.05
    )
    probe_timeout_s: float = setting(
        2.0, "Longest wait for a replica's health answer, seconds.", low=0.05
    )
    stall_timeout_s: float = setting(
        20.0,
        "A replica with work whose step counter stands still for this long is restarted, seconds.",
        low=1.0,
    )
    drain_timeout_s: float = setting(
        30.0,
        "Longest wait for a replica's running requests before it is stopped, seconds.",
        low=0.0,
    )
    memory_budget: str = setting(
        "",
        "Memory for the models of this machine together, as '24GiB' or '75%' of it: those that do "
        "not fit are loaded when asked, in place of the least recently used; empty: no budget.",
    )
    min_residency_s: float = setting(
        5.0,
        "Under a memory budget a model that was loaded and is used stays at least this long, "
        "seconds; one that is asked all the time four times as long while others wait.",
        low=0.0,
    )
    lease_s: float = setting(
        10.0,
        "Of several controls on one state another leads when the leader was silent for so long, "
        "seconds.",
        low=0.5,
    )
