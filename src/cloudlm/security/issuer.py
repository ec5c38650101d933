"""An issuer of sign-in tokens as a server knows it: its public keys, fetched and kept.

Keys are fetched once and again every hour, or when a token names one that is not known; but never
sooner than ``MIN_FETCH_INTERVAL_S`` after the last try, whatever arrives, and by one request for
all who wait. While the issuer is away the last keys serve on for a day. Redirects are not followed
and answers are bounded. Must not decide who may do what.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import json
import secrets
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from cloudlm.core.clock import Clock
from cloudlm.core.errors import BadSetting, CloudlmError, Unavailable, UpstreamFailed
from cloudlm.core.settings import OidcSettings
from cloudlm.security.tokens import (
    Expectation,
    IssuerKeys,
    UnknownKey,
    bad_token,
    check_times,
    read_algorithms,
    read_keys,
    verify_token,
)
from cloudlm.telemetry.logs import get_logger

KEYS_TTL_S = 3600.0
LAST_GOOD_KEYS_S = 86_400.0
MIN_FETCH_INTERVAL_S = 30.0
FETCH_TIMEOUT_S = 5.0
MAX_ANSWER_BYTES = 512 * 1024
MAX_REMEMBERED = 10_000
PATIENCE_S = 0.5
DISCOVERY_PATH = "/.well-known/openid-configuration"

Fetch = Callable[[str], Awaitable[Any]]
_log = get_logger(__name__)


class Issuer:
    """Checks tokens of one issuer. ``fetch`` returns the JSON at an address."""

    def __init__(self, expected: Expectation, clock: Clock, fetch: Fetch) -> None:
        self._expected = expected
        self._clock = clock
        self._fetch = fetch
        self._keys: IssuerKeys | None = None
        self._fetched_at = 0.0
        self._tried_at = -MIN_FETCH_INTERVAL_S
        self._fetching = asyncio.Lock()
        self._renewal: asyncio.Task[None] | None = None
        self._renewed_at = 0.0
        self._salt = secrets.token_bytes(32)
        self._seen: dict[bytes, tuple[IssuerKeys, dict[str, Any]]] = {}

    async def claims(self, text: str) -> dict[str, Any]:
        """The claims of a good token. Raises AuthenticationFailed; Unavailable while no keys could
        be fetched at all; MissingExtra."""
        keys = await self._present_keys()
        mark = hashlib.blake2b(
            text.encode("utf-8", "surrogatepass"), digest_size=16, key=self._salt
        ).digest()
        known = self._seen.get(mark)
        if known is not None and known[0] is keys:
            check_times(known[1], self._expected, self._clock.now())
            return known[1]
        try:
            claims = self._checked(text, keys)
        except UnknownKey:
            keys = await self._newer_keys(keys)
            claims = self._checked(text, keys)
        if len(self._seen) >= MAX_REMEMBERED:
            self._seen.clear()
        self._seen[mark] = keys, claims
        return claims

    def _checked(self, text: str, keys: IssuerKeys) -> dict[str, Any]:
        try:
            return verify_token(text, keys, self._expected, self._clock.now())
        except CloudlmError as error:
            _log.debug("token_refused", extra={"fields": {"reason": str(error.__cause__)}})
            raise

    async def _present_keys(self) -> IssuerKeys:
        age_s = self._clock.monotonic() - self._fetched_at
        if self._keys is not None and KEYS_TTL_S < age_s <= LAST_GOOD_KEYS_S:
            await self._renew(self._keys)
        elif self._keys is None or age_s > KEYS_TTL_S:
            await self._refetch(self._keys)
        age_s = self._clock.monotonic() - self._fetched_at
        if self._keys is None or age_s > LAST_GOOD_KEYS_S:
            raise Unavailable(
                f"the sign-in issuer {self._expected.issuer} cannot be reached, so no token can "
                "be checked; API keys work on",
                retry_after_s=MIN_FETCH_INTERVAL_S,
            )
        return self._keys

    async def _renew(self, keys: IssuerKeys) -> None:
        """Fetch anew; nobody waits for longer than a moment while the old ones are still good."""
        now = self._clock.monotonic()
        if self._renewal is None or self._renewal.done():
            if now - self._tried_at < MIN_FETCH_INTERVAL_S:
                return
            self._renewal = asyncio.create_task(self._refetch(keys))
            self._renewed_at = now
        if now - self._renewed_at < PATIENCE_S:
            await asyncio.wait({self._renewal}, timeout=PATIENCE_S)

    async def _newer_keys(self, keys: IssuerKeys) -> IssuerKeys:
        await self._refetch(keys)
        if self._keys is None or self._keys is keys:
            raise bad_token()
        return self._keys

    async def _refetch(self, known: IssuerKeys | None) -> None:
        """Replace the keys, unless somebody did meanwhile or the last try was a moment ago."""
        async with self._fetching:
            now = self._clock.monotonic()
            if self._keys is not known or now - self._tried_at < MIN_FETCH_INTERVAL_S:
                return
            self._tried_at = now
            try:
                async with asyncio.timeout(2 * FETCH_TIMEOUT_S):
                    self._keys = read_keys(await self._fetch(await self._keys_address()))
            except (CloudlmError, OSError) as error:  # OSError holds TimeoutError
                _log.warning("issuer_keys_not_fetched", extra={"fields": {"reason": repr(error)}})
                return
            self._fetched_at = self._clock.monotonic()

    async def _keys_address(self) -> str:
        issuer = self._expected.issuer
        body = await self._fetch(issuer.rstrip("/") + DISCOVERY_PATH)
        return endpoint_of(body, "jwks_uri", issuer)


def endpoint_of(body: Any, name: str, issuer: str) -> str:
    """An address out of an issuer's discovery document. Raises UpstreamFailed if the document is
    another issuer's or the address is not safe."""
    if not isinstance(body, dict) or body.get("issuer") != issuer:
        raise UpstreamFailed(
            f"what answers at {issuer} does not call itself {issuer!r}: oidc.issuer must be "
            "exactly the 'issuer' of its discovery document"
        )
    address = body.get(name)
    if not isinstance(address, str) or not is_safe_address(address):
        raise UpstreamFailed(f"the sign-in issuer {issuer} has no {name} that could be used")
    return address


def is_safe_address(address: str) -> bool:
    """Whether secrets and keys may come from there: TLS, or this machine alone."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return False
    if parts.username or parts.fragment or not host or port == 0:
        return False
    if parts.scheme == "https":
        return True
    try:
        here = ipaddress.ip_address(host).is_loopback
    except ValueError:
        here = host == "localhost"
    return parts.scheme == "http" and here


def expectation_of(settings: OidcSettings) -> Expectation:
    """What tokens must say by these settings. Raises BadSetting."""
    if not is_safe_address(settings.issuer) or urlsplit(settings.issuer).query:
        raise BadSetting(
            f"oidc.issuer = {settings.issuer[:200]!r} must be an https:// address, as the issuer's "
            "discovery document gives it (http:// only on this machine)",
            param="oidc.issuer",
        )
    if not settings.client_id:
        raise BadSetting(
            "oidc.client_id is empty: it must be the id under which this installation is known to "
            "the issuer",
            param="oidc.client_id",
        )
    more = filter(None, (part.strip() for part in settings.audiences.split(",")))
    return Expectation(
        issuer=settings.issuer,
        client_id=settings.client_id,
        audiences=frozenset((settings.client_id, *more)),
        algorithms=read_algorithms(settings.algorithms),
        leeway_s=settings.leeway_s,
        max_age_s=settings.max_token_age_s,
    )


def open_issuer(settings: OidcSettings, clock: Clock) -> Issuer | None:
    """The issuer of the settings, None if they name none. Raises BadSetting, MissingExtra."""
    if not settings.issuer:
        return None
    expected = expectation_of(settings)
    read_keys({"keys": [{"kty": "RSA"}]})  # the extra is missing now, not at the first sign-in
    return Issuer(expected, clock, fetch_json)


async def fetch_json(address: str) -> Any:
    """The JSON at an address, at most ``MAX_ANSWER_BYTES``. Raises UpstreamFailed."""
    import httpx2

    try:
        async with (
            httpx2.AsyncClient(
                timeout=FETCH_TIMEOUT_S,
                follow_redirects=False,
                trust_env=address.startswith("https:"),  # no proxy to this machine
            ) as client,
            client.stream("GET", address, headers={"accept": "application/json"}) as answer,
        ):
            content = b""
            async for piece in answer.aiter_bytes():
                content += piece
                if len(content) > MAX_ANSWER_BYTES:
                    raise UpstreamFailed(f"{address} answers with more than {MAX_ANSWER_BYTES} B")
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise UpstreamFailed(f"{address} cannot be read: {type(error).__name__}") from None
    return read_answer(address, answer.status_code, content)


def read_answer(address: str, status: int, content: bytes) -> Any:
    """The JSON of an issuer's answer. Raises UpstreamFailed."""
    if status != 200:
        raise UpstreamFailed(f"{address} answers with status {status}")
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise UpstreamFailed(f"{address} answers with something that is no JSON") from None
