"""Whether a signed token of an issuer is good: JWTs of OpenID Connect, checked against its keys.

Only signatures of the algorithms that were allowed, by a key of the issuer that is made for that
algorithm: no ``none``, and no HMAC, so that a public key can never serve as a shared secret. Keys
or addresses inside a token are never looked at. Pure: keys and ``now`` in, claims or a verdict
out; must not fetch anything. RFC 7515, 7517, 7519, 8725; OpenID Connect Core 1.0, 3.1.3.7.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cloudlm.core.errors import AuthenticationFailed, BadSetting, MissingExtra, UpstreamFailed

EXTRA = "oidc"
MAX_TOKEN_CHARACTERS = 16_384
MAX_KEYS = 100
MIN_RSA_BITS = 2048
_MAX_SUBJECT = 255
# Which key an algorithm takes: its type and, where there are several, its curve.
_KINDS: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"), ("RSA", "")),
    "ES256": ("EC", "P-256"),
    "ES384": ("EC", "P-384"),
    "ES512": ("EC", "P-521"),
    "Ed25519": ("OKP", "Ed25519"),
}
_TYPES = frozenset(("", "jwt", "at+jwt", "application/at+jwt"))


class UnknownKey(AuthenticationFailed):
    """Signed with a key that the issuer has not told of; it may have made a new one."""


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a good token says. Times are seconds; ``algorithms`` are names of RFC 7518."""

    issuer: str
    client_id: str
    audiences: frozenset[str]
    algorithms: frozenset[str]
    leeway_s: float = 30.0
    max_age_s: float = 86_400.0


@dataclass(frozen=True, slots=True)
class IssuerKeys:
    """The public keys of an issuer that can sign something, each with its kind and id."""

    entries: tuple[tuple[str, str, str, Any], ...]
    """(key id, kind as in ``_KINDS``, the one algorithm it is for or empty, the key)."""


def looks_signed(text: str) -> bool:
    """Whether a text has the form of a signed token; an API key never has."""
    return text.count(".") == 2 and text.startswith("ey")


def read_algorithms(text: str) -> frozenset[str]:
    """Algorithms out of ``RS256, ES256``. Raises BadSetting; ``none`` and HMAC never pass."""
    names = frozenset(filter(None, (part.strip() for part in text.split(","))))
    wrong = sorted(names - _KINDS.keys())
    if wrong or not names:
        raise BadSetting(
            f"oidc.algorithms: {', '.join(wrong) or 'nothing'!r:.80} is not allowed; choose from "
            f"{', '.join(_KINDS)}",
            param="oidc.algorithms",
        )
    return names


def read_keys(body: Any) -> IssuerKeys:
    """The keys in a JWK set (RFC 7517). Symmetric, encryption and weak RSA keys, and those that
    cannot be read, are passed over. Raises UpstreamFailed if it is no JWK set."""
    found = body.get("keys") if isinstance(body, dict) else None
    if not isinstance(found, list):
        raise UpstreamFailed("the sign-in issuer's key document is no JWK set")
    entries = (_read_key(one) for one in found[:MAX_KEYS] if isinstance(one, dict))
    return IssuerKeys(tuple(one for one in entries if one is not None))


def _read_key(body: dict[str, Any]) -> tuple[str, str, str, Any] | None:
    kind = body.get("kty")
    if kind not in ("RSA", "EC", "OKP") or body.get("use", "sig") != "sig":
        return None
    jwk = _library("joserfc.jwk")
    public = {name: body[name] for name in ("kty", "n", "e", "crv", "x", "y") if name in body}
    try:
        key = jwk.import_key(public)
        if kind == "RSA" and key.raw_value.key_size < MIN_RSA_BITS:
            return None
    except Exception:  # whatever the library makes of a key that is none
        return None
    curve = "" if kind == "RSA" else str(body.get("crv", ""))
    return str(body.get("kid", "")), f"{kind}/{curve}", str(body.get("alg", "")), key


def verify_token(text: str, keys: IssuerKeys, expected: Expectation, now: float) -> dict[str, Any]:
    """The claims of a good token. ``now`` is Unix seconds. Raises UnknownKey, AuthenticationFailed
    (one answer to every other fault; its cause says which), MissingExtra."""
    try:
        return _verified(text, keys, expected, now)
    except _Refused as refusal:
        raise bad_token() from refusal


def _verified(text: str, keys: IssuerKeys, expected: Expectation, now: float) -> dict[str, Any]:
    if len(text) > MAX_TOKEN_CHARACTERS or not looks_signed(text):
        raise _Refused("is no signed token")
    algorithm, key_id = _read_header(text, expected)
    claims = _signed_claims(text, algorithm, _key_for(algorithm, key_id, keys))
    _check_addressed(claims, expected)
    _check_times(claims, expected, now)
    return claims


def check_times(claims: Mapping[str, Any], expected: Expectation, now: float) -> None:
    """Whether claims that were good are so still. Raises AuthenticationFailed."""
    try:
        _check_times(claims, expected, now)
    except _Refused as refusal:
        raise bad_token() from refusal


class _Refused(Exception):
    """Why a token is not good, for the log."""


def bad_token() -> AuthenticationFailed:
    """The one answer to every bad token."""
    return AuthenticationFailed(
        "the sign-in token is not accepted: it is not of this installation's issuer, not for it, "
        "or over; sign in again with 'cloudlm login'"
    )


def _read_header(text: str, expected: Expectation) -> tuple[str, str]:
    head = text.partition(".")[0]
    try:
        header = json.loads(base64.urlsafe_b64decode(head + "=" * (-len(head) % 4)))
    except (ValueError, RecursionError):
        raise _Refused("has a header that cannot be read") from None
    if not isinstance(header, dict):
        raise _Refused("has a header that is no object")
    algorithm, key_id, kind = header.get("alg"), header.get("kid", ""), header.get("typ", "")
    if not isinstance(algorithm, str) or algorithm not in expected.algorithms:
        raise _Refused("is signed with an algorithm that is not allowed")
    if not isinstance(key_id, str) or not isinstance(kind, str) or kind.lower() not in _TYPES:
        raise _Refused("has a header of another kind of token")
    if "crit" in header or "b64" in header:
        raise _Refused("demands an extension that is not known")
    return algorithm, key_id


def _key_for(algorithm: str, key_id: str, keys: IssuerKeys) -> Any:
    kind = "/".join(_KINDS[algorithm])
    fitting = [
        (found, key)
        for found, its_kind, only, key in keys.entries
        if its_kind == kind and only in ("", algorithm)
    ]
    if key_id:
        fitting = [one for one in fitting if one[0] == key_id]
    if not fitting:
        raise UnknownKey(bad_token().message)
    if len(fitting) > 1:
        raise _Refused("does not say which key signed it")
    return fitting[0][1]


def _signed_claims(text: str, algorithm: str, key: Any) -> dict[str, Any]:
    jws = _library("joserfc.jws")
    try:
        payload = jws.deserialize_compact(text, key, algorithms=[algorithm]).payload
        claims = json.loads(payload)
    except Exception:  # the library has one class per fault, and others for broken Base64
        raise _Refused("has a signature that does not fit, or claims that cannot be read") from None
    if not isinstance(claims, dict):
        raise _Refused("has claims that are no object")
    return claims


def _check_addressed(claims: Mapping[str, Any], expected: Expectation) -> None:
    if claims.get("iss") != expected.issuer:
        raise _Refused("is of another issuer")
    audience = claims.get("aud")
    audiences: Sequence[Any] = audience if isinstance(audience, list) else [audience]
    if not any(isinstance(one, str) and one in expected.audiences for one in audiences):
        raise _Refused("is for another audience")
    party = claims.get("azp")
    if len(audiences) > 1 and party is None:
        raise _Refused("has several audiences and does not say whom it was made for")
    if party is not None and party not in (expected.client_id, *expected.audiences):
        raise _Refused("was made for another client")
    subject = claims.get("sub")
    if not isinstance(subject, str) or not 0 < len(subject) <= _MAX_SUBJECT:
        raise _Refused("does not say who signed in")
    if not subject.isprintable():
        raise _Refused("does not say who signed in")


def _check_times(claims: Mapping[str, Any], expected: Expectation, now: float) -> None:
    expires, issued = _seconds(claims, "exp"), _seconds(claims, "iat")
    if now >= expires + expected.leeway_s:
        raise _Refused("is over")
    if issued > now + expected.leeway_s:
        raise _Refused("is of the future")
    if now - issued > expected.max_age_s + expected.leeway_s:
        raise _Refused("is too old")
    if "nbf" in claims and _seconds(claims, "nbf") > now + expected.leeway_s:
        raise _Refused("is not good yet")


def _seconds(claims: Mapping[str, Any], name: str) -> float:
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _Refused(f"has no {name}")
    return float(value)


def _library(name: str) -> Any:
    """A part of joserfc. Raises MissingExtra."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingExtra(EXTRA, "signing in through an issuer (oidc.issuer)") from None
