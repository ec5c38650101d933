"""Where the SDK's requests go and what comes back means; no request is sent here.

The key is sent to the addresses given and nowhere else: redirects are not followed, and an
address of this machine is never reached through a proxy.
"""

from __future__ import annotations

import ipaddress
import json
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2

from cloudlm import __version__
from cloudlm.client.calls import Call
from cloudlm.core.errors import (
    AuthenticationFailed,
    BadSetting,
    CloudlmError,
    Unavailable,
    UpstreamFailed,
    UpstreamTimeout,
    error_from_body,
)
from cloudlm.security.tls import client_context

T = TypeVar("T")
DEFAULT_CONTROL_URL = "http://127.0.0.1:8001"
DEFAULT_GATEWAY_URL = "http://127.0.0.1:8000"
TIMEOUT = httpx2.Timeout(30.0, connect=5.0)
FOLLOW_TIMEOUT = httpx2.Timeout(30.0, connect=5.0, read=None)
_OWN_KEY_PREFIX = "clm_"


@dataclass(frozen=True, slots=True)
class Connection:
    """Addresses without a slash at the end, and the key, which no text of this object shows."""

    control_url: str
    gateway_url: str
    api_key: str | None = field(repr=False)
    ca: str | None = None
    """PEM file of a certificate, or authorities, to trust besides the usual ones."""

    @classmethod
    def read(
        cls,
        api_key: str | None,
        control_url: str | None,
        gateway_url: str | None,
        environ: Mapping[str, str] | None = None,
        *,
        ca: str | None = None,
    ) -> Connection:
        """Fill in what is not given from the environment. Raises BadSetting."""
        found = os.environ if environ is None else environ
        return cls(
            control_url=_check_url(
                control_url or found.get("CLOUDLM_CONTROL_URL") or DEFAULT_CONTROL_URL,
                "control_url",
            ),
            gateway_url=_check_url(
                gateway_url or found.get("CLOUDLM_GATEWAY_URL") or DEFAULT_GATEWAY_URL,
                "gateway_url",
            ),
            api_key=_check_key(api_key or key_of(found)),
            ca=ca or found.get("CLOUDLM_CA") or None,
        )

    @property
    def http_options(self) -> dict[str, Any]:
        """What httpx2's clients are made with."""
        return {
            "timeout": TIMEOUT,
            "follow_redirects": False,
            "trust_env": not _is_local(self.control_url),
            **self._verified(self.control_url),
        }

    @property
    def gateway_is_local(self) -> bool:
        """Whether the official clients need an HTTP client of ours."""
        return _is_local(self.gateway_url) or bool(self._verified(self.gateway_url))

    @property
    def local_options(self) -> dict[str, Any]:
        """What the HTTP client of a gateway on this machine is made with: no proxy of the
        environment, and OpenSSL's own authorities, which SSL_CERT_FILE replaces."""
        trust_env = not _is_local(self.gateway_url)
        return {"trust_env": trust_env, **self._verified(self.gateway_url)}

    def _verified(self, url: str) -> dict[str, Any]:
        """How a server is known: on this machine, or with ``ca``, by OpenSSL's authorities and
        ``ca``; else as the HTTP client knows servers. Who speaks no TLS needs to know none: to read
        all authorities takes longer than a request."""
        if not url.startswith("https:") and _is_local(url):
            return {"verify": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)}  # knows no server at all
        if not url.startswith("https:") or not (self.ca or _is_local(url)):
            return {}
        return {"verify": client_context([(self.ca, "CLOUDLM_CA")] if self.ca else [], None)}

    def openai_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What the official clients are made with; ``options`` of the caller win."""
        ours = {"base_url": f"{self.gateway_url}/v1", "api_key": self._required_key()}
        return {**ours, **options}

    def request_options(self, call: Call[Any]) -> dict[str, Any]:
        """What httpx2's ``request`` and ``stream`` take."""
        headers = {**call.headers, "User-Agent": f"cloudlm/{__version__}"}
        if call.needs_key:
            headers["Authorization"] = f"Bearer {self._required_key()}"
        options: dict[str, Any] = {
            "method": call.method,
            "url": self.control_url + call.path,
            "headers": headers,
        }
        if call.query:
            options["params"] = dict(call.query)
        if call.body is not None:
            options["content"] = json.dumps(call.body).encode()
            headers["Content-Type"] = "application/json"
        return options

    def result(self, call: Call[T], response: httpx2.Response) -> T:
        """What a call's complete answer means. Raises the error that the server sent."""
        self.check(response)
        body = _decoded(response.content) if response.content else None
        try:
            return call.read(body)
        except (CloudlmError, KeyError, TypeError, ValueError) as error:
            raise self._not_control(f"{type(error).__name__}: {error}") from error

    def check(self, response: httpx2.Response) -> None:
        """Raise for anything but success; the response must have been read."""
        if response.status_code >= 400:
            error = error_from_body(response.status_code, _decoded(response.content))
            error.retry_after_s = _seconds(response.headers.get("retry-after"))
            raise error
        if not 200 <= response.status_code < 300:
            raise self._not_control(f"status {response.status_code}")

    def failure(self, error: httpx2.HTTPError) -> CloudlmError:
        """Translate an error of the transport."""
        if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
            return Unavailable(
                f"no control API answers at {self.control_url}: start it with 'cloudlm up', or "
                "set CLOUDLM_CONTROL_URL to where it is"
            )
        if isinstance(error, httpx2.TimeoutException):
            return UpstreamTimeout(f"the control API at {self.control_url} did not answer in time")
        return UpstreamFailed(
            f"the connection to the control API at {self.control_url} failed: "
            f"{type(error).__name__}"
        )

    def _required_key(self) -> str:
        if self.api_key is None:
            raise AuthenticationFailed(
                "no API key: pass api_key or set CLOUDLM_API_KEY; 'cloudlm keys create' makes one"
            )
        return self.api_key

    def _not_control(self, detail: str) -> UpstreamFailed:
        return UpstreamFailed(
            f"what answers at {self.control_url} is not a control API of this version ({detail})"
        )


def key_of(environ: Mapping[str, str]) -> str | None:
    """CLOUDLM_API_KEY, or OPENAI_API_KEY if that holds a key of ours: another provider's secret is
    not sent to us."""
    own = environ.get("CLOUDLM_API_KEY")
    other = environ.get("OPENAI_API_KEY", "")
    return own or (other if other.startswith(_OWN_KEY_PREFIX) else None)


def _check_key(key: str | None) -> str | None:
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise BadSetting("the API key holds a character that no key has", param="api_key")
    return key


def _check_url(url: str, param: str) -> str:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good or parts.query or parts.fragment or parts.username or parts.password:
        raise BadSetting(
            f"{param} must be an address such as {DEFAULT_CONTROL_URL}, without user, query or "
            "fragment",
            param=param,
        )
    return url.rstrip("/")


def _is_local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _decoded(content: bytes) -> Any:
    """The JSON in an answer, None if it is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _seconds(text: str | None) -> float | None:
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:
        return None  # an HTTP date: the caller's own back-off will do
