"""Which names a server on this machine answers to, and which web pages may ask it.

A browser on this machine carries any page's requests to loopback. A page that has its own name
resolve here (DNS rebinding) is told apart by ``Host``, every other page by ``Origin``; both are
looked at for every method, because the one that is forgotten is the one that is used. Servers that
listen for others have names that nobody here knows, and check neither: there, as here, nothing is
answered without a key. Pure: no I/O.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from cloudlm.core.errors import BadSetting, PermissionDenied

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_WEB = ("http", "https")
_MAX_REMEMBERED = 256
_REMEMBERED_CHARACTERS = 64


class HostGuard:
    """Checks the heads of requests to a server that listens on ``host``. ``origins`` are web pages
    that may ask besides those of this machine, as in the setting ``allowed_origins``. Raises
    BadSetting for one that is none."""

    def __init__(self, host: str, origins: str = "") -> None:
        self._names = LOCAL_NAMES | {host.lower()} if is_loopback(host) else None
        self._origins = frozenset(read_origins(origins))
        self._passed: set[str] = set()  # hosts as clients write them, looked at before

    def check(self, headers: Mapping[str, str]) -> None:
        """Raises PermissionDenied for a foreign name or page."""
        if self._names is None:
            return
        host = headers.get("host", "")
        if host not in self._passed and not self._answers_to(host):
            raise PermissionDenied(
                "this server listens on this machine only and answers to 'localhost' and "
                "'127.0.0.1'; set gateway.host (or control.host) to serve others"
            )
        origin = headers.get("origin")
        if origin is not None and not self._knows(origin.lower()):
            raise PermissionDenied(
                "this server listens on this machine only, and web pages of other places may not "
                "ask it; name this one's origin in gateway.allowed_origins (or "
                "control.allowed_origins) if it may"
            )

    def _answers_to(self, host: str) -> bool:
        if self._names is None or host_name(host) not in self._names:
            return False
        if len(host) <= _REMEMBERED_CHARACTERS and len(self._passed) < _MAX_REMEMBERED:
            self._passed.add(host)
        return True

    def _knows(self, origin: str) -> bool:
        """Whether a page may ask. ``null`` is a page that hides where it is from; what has another
        scheme is no page but a program that somebody installed here."""
        scheme, mark, rest = origin.partition("://")
        if origin in self._origins or (mark and scheme not in _WEB):
            return True
        return bool(mark) and self._names is not None and host_name(rest) in self._names


def read_origins(text: str) -> list[str]:
    """The setting ``allowed_origins``: origins with commas between. Raises BadSetting."""
    origins = [part.strip().lower().rstrip("/") for part in text.split(",") if part.strip()]
    for origin in origins:
        parts = urlsplit(origin)
        if (
            parts.scheme not in _WEB
            or not parts.netloc
            or origin != f"{parts.scheme}://{parts.netloc}"
        ):
            raise BadSetting(
                f"allowed_origins holds {origin!r}, which is no origin of a web page; expected is "
                "something like https://chat.example or http://10.0.0.5:3000",
                param="allowed_origins",
            )
    return origins


def is_loopback(host: str) -> bool:
    """Whether ``host`` is an address of this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def host_name(header: str) -> str:
    """The name in a ``Host`` header, without its port, in lower case."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()
