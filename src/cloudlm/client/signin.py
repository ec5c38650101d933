"""Signing a person in at an OpenID Connect issuer: a browser on this machine, or a device code.

The browser comes back to a loopback address (RFC 8252) with a code that only the holder of the PKCE
verifier (RFC 7636) can use; state and nonce tie the answer to this very sign-in. Without a browser
the person types a code elsewhere (RFC 8628). Must not store anything or talk to the person: what to
show is handed to the caller.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cloudlm.client.access_calls import Place
from cloudlm.core.errors import (
    AuthenticationFailed,
    CloudlmError,
    Conflict,
    MissingExtra,
    NotSupported,
    UpstreamFailed,
    UpstreamTimeout,
)
from cloudlm.core.fields import Fields
from cloudlm.core.settings import OidcSettings
from cloudlm.security.issuer import (
    DISCOVERY_PATH,
    FETCH_TIMEOUT_S,
    MAX_ANSWER_BYTES,
    endpoint_of,
    expectation_of,
    read_answer,
)
from cloudlm.security.tokens import EXTRA, read_keys, verify_token

SIGN_IN_TIMEOUT_S = 300.0
_DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
_DEFAULT_INTERVAL_S = 5.0
_SLOWER_BY_S = 5.0
_CALLBACK = "/callback"


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a sign-in gave: the ID token to act with, until ``expires_at`` (Unix seconds), and
    perhaps a refresh token. No text of this object shows them."""

    id_token: str = field(repr=False)
    refresh_token: str = field(repr=False)
    expires_at: float
    subject: str


@dataclass(frozen=True, slots=True)
class DeviceCode:
    """What a person must open and type, within ``expires_in_s``."""

    address: str
    address_with_code: str
    code: str
    expires_in_s: float


class SignIn:
    """Sign-ins at one issuer. A context manager. Raises MissingExtra, BadSetting for an address
    that is not safe."""

    def __init__(
        self,
        place: Place,
        *,
        client_secret: str = "",
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        try:
            from authlib.integrations.httpx_client import OAuth2Client
        except ImportError:
            raise MissingExtra(EXTRA, "cloudlm login") from None
        self._place = place
        self._expected = expectation_of(
            OidcSettings(issuer=place.issuer, client_id=place.client_id)
        )
        self._now = now
        self._sleep = sleep
        self._http = OAuth2Client(
            place.client_id,
            client_secret or None,
            scope=place.scopes,
            code_challenge_method="S256",
            timeout=FETCH_TIMEOUT_S,
            follow_redirects=False,
            trust_env=place.issuer.startswith("https:"),  # no proxy to this machine
        )
        self._document: Any = None

    def __enter__(self) -> SignIn:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def in_browser(
        self, show: Callable[[str], None], *, port: int = 0, timeout_s: float = SIGN_IN_TIMEOUT_S
    ) -> Tokens:
        """Sign in through a browser on this machine. ``show`` is handed the address to open;
        ``port`` is that of the loopback address, 0 for any. Raises AuthenticationFailed,
        UpstreamFailed, UpstreamTimeout, Conflict (port in use)."""
        verifier, state, nonce = (secrets.token_urlsafe(48) for _ in range(3))
        endpoint = self._endpoint("authorization_endpoint")
        with _listening(port, state) as listener:
            self._http.redirect_uri = f"http://127.0.0.1:{listener.server_port}{_CALLBACK}"
            address, _ = self._http.create_authorization_url(
                endpoint, state=state, code_verifier=verifier, nonce=nonce
            )
            show(address)
            said = listener.wait(timeout_s)
        if said.get("iss", self._place.issuer) != self._place.issuer:
            raise AuthenticationFailed("another issuer answered the sign-in (RFC 9207); try again")
        if "code" not in said:
            raise _refused(said.get("error", "no code"), said.get("error_description", ""))
        answer = self._fetch_token(
            grant_type="authorization_code", code=said["code"], code_verifier=verifier
        )
        return self._tokens(answer, nonce=nonce)

    def on_device(self, show: Callable[[DeviceCode], None]) -> Tokens:
        """Sign in by a code that the person types elsewhere. Raises as ``in_browser``, and
        NotSupported if the issuer has no such way."""
        if not isinstance(self._discovered().get("device_authorization_endpoint"), str):
            raise NotSupported(
                f"the issuer {self._place.issuer} offers no device sign-in; use 'cloudlm login' "
                "on a machine with a browser"
            )
        asked = self._post(
            self._endpoint("device_authorization_endpoint"),
            {"client_id": self._place.client_id, "scope": self._place.scopes},
        )
        fields = Fields(asked, "the issuer's device answer")
        expires_in_s = fields.number("expires_in", low=1.0, high=3600.0)
        interval_s = fields.number("interval", _DEFAULT_INTERVAL_S, low=0.0, high=60.0)
        code = fields.text("device_code", low=1)
        address = fields.text("verification_uri", low=1)
        show(
            DeviceCode(
                address,
                fields.text("verification_uri_complete", address),
                fields.text("user_code", low=1, max_length=100),
                expires_in_s,
            )
        )
        return self._poll(code, interval_s, self._now() + expires_in_s)

    def _poll(self, code: str, interval_s: float, deadline: float) -> Tokens:
        while self._now() < deadline:
            self._sleep(max(interval_s, 0.05))
            try:
                answer = self._fetch_token(grant_type=_DEVICE_GRANT, device_code=code)
            except _Pending as pending:
                interval_s += _SLOWER_BY_S if pending.slower else 0.0
                continue
            return self._tokens(answer)
        raise UpstreamTimeout("nobody typed the code in time; run 'cloudlm login --device' again")

    def refresh(self, tokens: Tokens) -> Tokens:
        """Newer tokens of the same person. Raises AuthenticationFailed if there are none."""
        if not tokens.refresh_token:
            raise AuthenticationFailed("the sign-in is over; sign in again with 'cloudlm login'")
        answer = self._fetch_token(grant_type="refresh_token", refresh_token=tokens.refresh_token)
        fresh = self._tokens({"refresh_token": tokens.refresh_token, **answer})
        if fresh.subject != tokens.subject:
            raise AuthenticationFailed("the issuer answered for somebody else; sign in again")
        return fresh

    def revoke(self, tokens: Tokens) -> bool:
        """Ask the issuer to forget the refresh token (RFC 7009); whether it did."""
        endpoint = self._discovered().get("revocation_endpoint")
        if not tokens.refresh_token or not isinstance(endpoint, str):
            return False
        endpoint = self._endpoint("revocation_endpoint")
        with self._translated():
            answer = self._http.revoke_token(
                endpoint,
                token=tokens.refresh_token,
                token_type_hint="refresh_token",  # noqa: S106
            )
        return bool(answer.status_code == 200)

    # How ------------------------------------------------------------------------------------------

    def _tokens(self, answer: Mapping[str, Any], nonce: str | None = None) -> Tokens:
        """The tokens of an answer, checked as a server would. Raises AuthenticationFailed."""
        text = answer.get("id_token")
        if not isinstance(text, str):
            raise UpstreamFailed(
                f"the issuer {self._place.issuer} gave no ID token: oidc.scopes must hold 'openid'"
            )
        keys = read_keys(self._get(self._endpoint("jwks_uri")))
        claims = verify_token(text, keys, self._expected, self._now())
        if nonce is not None and not _same(claims.get("nonce"), nonce):
            raise AuthenticationFailed("the token answers another sign-in; try again")
        refresh = answer.get("refresh_token")
        return Tokens(
            text,
            refresh if isinstance(refresh, str) else "",
            float(claims["exp"]),
            str(claims["sub"]),
        )

    def _fetch_token(self, **form: str) -> Mapping[str, Any]:
        endpoint = self._endpoint("token_endpoint")
        with self._translated():
            answer: Mapping[str, Any] = self._http.fetch_token(endpoint, **form)
        return answer

    def _discovered(self) -> Any:
        if self._document is None:
            self._document = self._get(self._place.issuer.rstrip("/") + DISCOVERY_PATH)
            endpoint_of(self._document, "token_endpoint", self._place.issuer)
        return self._document

    def _endpoint(self, name: str) -> str:
        return endpoint_of(self._discovered(), name, self._place.issuer)

    def _get(self, address: str) -> Any:
        with self._translated():
            answer = self._http.request("GET", address, withhold_token=True)
        return _decoded(address, answer)

    def _post(self, address: str, form: Mapping[str, str]) -> Any:
        with self._translated():
            answer = self._http.request("POST", address, data=form, withhold_token=True)
        return _decoded(address, answer)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Errors of the libraries as ours."""
        import httpx2
        from authlib.integrations.base_client import OAuthError

        try:
            yield
        except OAuthError as error:
            if error.error in ("authorization_pending", "slow_down"):
                raise _Pending(error.error == "slow_down") from None
            raise _refused(str(error.error), str(error.description or "")) from None
        except httpx2.HTTPError as error:
            raise UpstreamFailed(
                f"the issuer {self._place.issuer} cannot be reached: {type(error).__name__}"
            ) from None
        except ValueError:  # an answer that is no JSON
            raise UpstreamFailed(f"the issuer {self._place.issuer} answers with no JSON") from None


class _Pending(CloudlmError):
    """The person has not typed the code yet."""

    def __init__(self, slower: bool) -> None:
        super().__init__("pending")
        self.slower = slower


def _decoded(address: str, answer: Any) -> Any:
    if len(answer.content) > MAX_ANSWER_BYTES:
        raise UpstreamFailed(f"{address} answers with more than {MAX_ANSWER_BYTES} B")
    return read_answer(address, answer.status_code, answer.content)


def _refused(error: str, description: str) -> AuthenticationFailed:
    said = " ".join(part[:200] for part in (error, description) if part)
    return AuthenticationFailed(f"the issuer did not sign you in: {said}")


def _same(said: Any, wanted: str) -> bool:
    return isinstance(said, str) and hmac.compare_digest(said.encode(), wanted.encode())


# The loopback address ---------------------------------------------------------------------------


class _Listener(HTTPServer):
    """Waits for the browser to come back. Only an answer with the right state counts, once."""

    def __init__(self, port: int, state: str) -> None:
        super().__init__(("127.0.0.1", port), _Visit)
        self.state = state
        self.said: dict[str, str] | None = None

    def wait(self, timeout_s: float) -> dict[str, str]:
        """What the browser brought. Raises UpstreamTimeout."""
        deadline = time.monotonic() + timeout_s
        while self.said is None:
            self.timeout = deadline - time.monotonic()
            if self.timeout <= 0:
                raise UpstreamTimeout("nobody signed in in time; run 'cloudlm login' again")
            self.handle_request()
        return self.said

    def take(self, visit: _Visit) -> int:
        """Keep what a visit brings; the status to answer with."""
        parts = urlsplit(visit.path)
        hosts = (f"127.0.0.1:{self.server_port}", f"localhost:{self.server_port}")
        if parts.path != _CALLBACK or visit.headers.get("host", "") not in hosts:
            return 404
        said = {name: values[0] for name, values in parse_qs(parts.query).items()}
        if self.said is not None or not _same(said.get("state"), self.state):
            return 400
        self.said = said
        return 200


class _Visit(BaseHTTPRequestHandler):
    """One request to the loopback address."""

    timeout = 5.0
    server: _Listener

    def do_GET(self) -> None:
        status = self.server.take(self)
        good = status == 200 and "code" in (self.server.said or {})
        text = "You are signed in. You can close this page." if good else "Nothing was signed in."
        self.send_response(status)
        for name, value in (
            ("content-type", "text/plain; charset=utf-8"),
            ("content-length", str(len(text))),
            ("cache-control", "no-store"),
            ("referrer-policy", "no-referrer"),
            ("connection", "close"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Nothing: the address holds the code."""


@contextlib.contextmanager
def _listening(port: int, state: str) -> Iterator[_Listener]:
    try:
        listener = _Listener(port, state)
    except OSError as error:
        raise Conflict(
            f"cannot listen on 127.0.0.1 port {port}: {error.strerror}; choose another with --port"
        ) from None
    try:
        yield listener
    finally:
        listener.server_close()
