"""Settings of what the planes share: registry, access, sign-in, state, log.

Declarations alone; ``reading`` parses, the rooms of those names act.
"""

from __future__ import annotations

from dataclasses import dataclass

from cloudlm.core.settings.declare import setting


@dataclass(frozen=True)
class RegistrySettings:
    """Model versions and their local copies."""

    url: str = setting(
        "",
        "Where versions are kept; empty is the folder 'registry' in home. "
        "s3://, gs://, az:// for an object store.",
    )
    cache_mb: int = setting(
        51_200, "Largest local copy of versions fetched from a store, MiB.", low=1
    )


@dataclass(frozen=True)
class AccessSettings:
    """Who may do what, besides the roles that are granted."""

    policies: str = setting(
        "", "Files of Cedar policies that hold beside roles, separated by commas."
    )


@dataclass(frozen=True)
class OidcSettings:
    """People who sign in through an OpenID Connect issuer."""

    issuer: str = setting(
        "", "The issuer, exactly as its discovery document calls itself; empty: no sign-in."
    )
    client_id: str = setting("", "The id of this installation at the issuer.")
    client_secret: str = setting(
        "",
        "What 'cloudlm login' sends besides, for issuers that demand it of programs too.",
        secret=True,
    )
    audiences: str = setting("", "Audiences of good tokens besides client_id, separated by commas.")
    algorithms: str = setting(
        "RS256, ES256, PS256, Ed25519", "Algorithms of good tokens, separated by commas."
    )
    scopes: str = setting("openid email profile", "What 'cloudlm login' asks the issuer for.")
    mapping: str = setting(
        "",
        "YAML file of rules: which claims give which role where. Without one nobody is let in "
        "who was not made with 'cloudlm principals create --subject'.",
    )
    leeway_s: float = setting(
        30.0, "How far the issuer's clock may be off, seconds.", low=0.0, high=600.0
    )
    max_token_age_s: float = setting(
        86_400.0, "Tokens older than this are refused, whatever they say, seconds.", low=60.0
    )


@dataclass(frozen=True)
class StateSettings:
    """Facts: what is asked and what runs."""

    url: str = setting(
        "",
        "SQLAlchemy address; empty is SQLite in home. postgresql+psycopg://… for several nodes.",
        secret=True,
    )


@dataclass(frozen=True)
class LogSettings:
    """What the processes say."""

    level: str = setting(
        "info", "Least level that is logged.", choices=("debug", "info", "warning", "error")
    )
    format: str = setting(
        "auto", "auto is text on a terminal and JSON otherwise.", choices=("auto", "json", "text")
    )
