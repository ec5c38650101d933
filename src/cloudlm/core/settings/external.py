"""Settings of endpoints that others run. Declarations alone; ``security.outside`` holds to them."""

from __future__ import annotations

from dataclasses import dataclass

from cloudlm.core.settings.declare import setting


@dataclass(frozen=True)
class ExternalSettings:
    """Endpoints of services that are not this installation's (``driver: external``)."""

    networks: str = setting(
        "",
        "Where such endpoints may be besides the public internet, '127.0.0.0/8, 10.2.0.0/16, …'; "
        "link-local and metadata addresses never are.",
    )
    plaintext: str = setting(
        "loopback",
        "Where they may be reached without TLS, of what networks allows; networks trusts all of "
        "it with prompts and keys.",
        choices=("loopback", "networks"),
    )
    ca: str = setting("", "PEM file of authorities that they may have, besides the system's.")
    probe_interval_s: float = setting(
        30.0, "Pause between two looks at GET /models of such an endpoint, seconds.", low=1.0
    )
