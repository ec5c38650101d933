"""Endpoints of services that are not this installation's: what a deployment may say of them.

An *external endpoint* is the base address of any service that speaks OpenAI's API (a cloud's, vLLM,
Ollama, another cloudlm), the name that it gives the model, and the name of the *secret* (the
provider's key) that it is asked with. Words and bounds alone: no key, no I/O. Where an address may
lead is for ``security.outside`` to say, when it is known.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from cloudlm.core.errors import InvalidRequest
from cloudlm.core.fields import Fields, check_integer, check_number, check_text

EXTERNAL = "external"
"""The driver of such endpoints."""
MAX_ENDPOINTS = 64
MAX_URL_LENGTH = 512
MAX_WEIGHT = 1e6
MAX_PRIORITY = 100
_SECRET_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}", re.ASCII)
_HOST_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?", re.ASCII)
_LAST_LABEL_IS_NUMBER = re.compile(r"(.*\.)?([0-9]+|0x[0-9a-f]*)", re.ASCII)
_BREAKS_OUT = re.compile(r"[^\x21-\x7e]")
_OPERATIONS = ("/completions", "/embeddings", "/models", "/messages")


@dataclass(frozen=True, slots=True)
class ExternalEndpoint:
    """One such endpoint. ``url`` is what a client of OpenAI's calls its base URL, without a slash
    at the end; ``model`` the service's own name for the model; ``secret`` names the key to ask
    with (empty: none). Of those with the lowest ``priority`` each gets a share of requests by its
    ``weight``; the next ones get what these cannot take."""

    url: str
    model: str
    secret: str = ""
    weight: float = 1.0
    priority: int = 0


def check_endpoints(endpoints: Sequence[ExternalEndpoint]) -> None:
    """Raise InvalidRequest, naming the field, unless all may be used."""
    if not 1 <= len(endpoints) <= MAX_ENDPOINTS:
        raise InvalidRequest(
            f"a deployment of driver {EXTERNAL!r} needs 1 to {MAX_ENDPOINTS} endpoints, each with "
            f"a url such as https://api.example.com/v1, not {len(endpoints)}",
            param="endpoints",
        )
    for number, one in enumerate(endpoints):
        param = f"endpoints.{number}"
        check_url(one.url, f"{param}.url")
        check_text(one.model, f"{param}.model", low=1, max_length=256)
        if one.secret:
            check_secret_name(one.secret, f"{param}.secret")
        check_number(one.weight, f"{param}.weight", 0.0, MAX_WEIGHT, above=True)
        check_integer(one.priority, f"{param}.priority", 0, MAX_PRIORITY)


def check_secret_name(name: str, param: str = "name") -> str:
    """Return ``name`` if a secret may bear it. Raises InvalidRequest."""
    if not _SECRET_NAME.fullmatch(name):
        raise InvalidRequest(
            f"{param} {name[:80]!r} cannot name a secret: use at most 63 of a-z, 0-9 and '-'; the "
            "key itself is never written here, 'cloudlm secrets set NAME' keeps it",
            param=param,
        )
    return name


def check_url(url: str, param: str = "url") -> str:
    """Return ``url`` if it may be an endpoint's base address. Raises InvalidRequest."""
    check_text(url, param, low=1, max_length=MAX_URL_LENGTH)
    why = _fault(url)
    if why:
        raise InvalidRequest(
            f"{param} {url[:80]!r} {why}; it must be a base address such as "
            "https://api.example.com/v1, to which /chat/completions is added",
            param=param,
        )
    return url


def origin_of(url: str) -> str:
    """Scheme, host and port of a checked URL, always in the same form: ``https://host:443``. A
    secret belongs to one of these."""
    parts = urlsplit(url)
    host = (parts.hostname or "").lower()
    shown = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{shown}:{parts.port or (443 if parts.scheme == 'https' else 80)}"


def _fault(url: str) -> str:
    """What is wrong with an address, empty if nothing is."""
    if _BREAKS_OUT.search(url):
        return "holds a space, a control character or one that is not ASCII"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return "is no address"
    if parts.scheme not in ("http", "https"):
        return "must begin with https:// or http://"
    if parts.username is not None or parts.password is not None:
        return "holds a user; a key is kept as a secret and named in 'secret'"
    if parts.query or parts.fragment or url.endswith(("?", "#", "/")):
        return "must end with its path, without '/', '?' and '#'"
    if port == 0 or parts.netloc.endswith(":"):
        return "has no usable port"
    if parts.path.endswith(_OPERATIONS):
        return "names one operation"
    if "\\" in url or "/../" in f"{parts.path}/":
        return "has a path that is not plain"
    return _host_fault(parts)


def _host_fault(parts: SplitResult) -> str:
    host = (parts.hostname or "").lower()
    try:
        if ":" in host:
            ipaddress.IPv6Address(host)
            return "" if "%" not in host else "has a zone in its host"
        if _LAST_LABEL_IS_NUMBER.fullmatch(host):  # 127.1, 0x7f.1 and 2130706433 mean 127.0.0.1
            ipaddress.IPv4Address(host)
            return ""
    except ValueError:
        return "has a host that is neither a name nor a plain IP address"
    return "" if _HOST_NAME.fullmatch(host) and ".." not in host else "has no usable host"


# On the wire --------------------------------------------------------------------------------------


def endpoints_body(endpoints: Sequence[ExternalEndpoint]) -> list[dict[str, Any]]:
    """Endpoints as JSON; ``endpoints_from_body`` reads them back."""
    return [
        {
            "url": one.url,
            "model": one.model,
            "secret": one.secret,
            "weight": one.weight,
            "priority": one.priority,
        }
        for one in endpoints
    ]


def endpoints_from_body(entries: Sequence[Any], model: str) -> tuple[ExternalEndpoint, ...]:
    """Read endpoints by type; ``check_endpoints`` looks at the values. ``model`` is what those
    call it that do not say. Raises InvalidRequest and UnprocessableRequest naming the field."""
    found = []
    for number, entry in enumerate(entries):
        fields = Fields(entry, "an endpoint", path=f"endpoints.{number}.")
        found.append(
            ExternalEndpoint(
                url=fields.text("url", max_length=MAX_URL_LENGTH).rstrip("/"),
                model=fields.text("model", model, max_length=256),
                secret=fields.text("secret", "", max_length=256),
                weight=fields.number("weight", 1.0),
                priority=fields.integer("priority", 0),
            )
        )
        fields.end()
    return tuple(found)
