"""API keys: ``clm_<env>_<id>_<secret>_<crc>``.

The prefix lets secret scanners find a leaked key, the checksum rejects a mistyped one without a
look-up, the id finds its record, and only a keyed hash of the whole key is ever stored: the pepper
lives in a file apart from the database, so a stolen database alone verifies nothing. A fast hash
is right because the secret has 160 random bits.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import zlib
from dataclasses import dataclass

from cloudlm.core.errors import AuthenticationFailed
from cloudlm.core.tenant import KeyRecord, Role

_ALPHABET = "0123456789abcdefghijkmnpqrstuvwxyz"
_FORM = re.compile(r"clm_([a-z]{2,8})_([0-9a-z]{12})_([0-9a-z]{32})_([0-9a-f]{8})", re.ASCII)
PEPPER_BYTES = 32


@dataclass(frozen=True, slots=True)
class MintedKey:
    """A new key: the text to show once, and the record to store."""

    text: str
    record: KeyRecord


def mint(
    name: str, role: Role, pepper: bytes, now: float, *, env: str = "live", tenant: str = "default"
) -> MintedKey:
    """Make a new key. ``pepper`` is PEPPER_BYTES of secret kept apart from the records."""
    key_id = "".join(secrets.choice(_ALPHABET) for _ in range(12))
    secret = "".join(secrets.choice(_ALPHABET) for _ in range(32))
    body = f"clm_{env}_{key_id}_{secret}"
    text = f"{body}_{zlib.crc32(body.encode()):08x}"
    record = KeyRecord(
        id=key_id,
        name=name,
        role=role,
        digest=digest(text, pepper),
        last4=secret[-4:],
        tenant=tenant,
        created_at=now,
    )
    return MintedKey(text, record)


def digest(text: str, pepper: bytes) -> str:
    """HMAC-SHA-256 of the whole key, lower-case hex."""
    return hmac.new(pepper, text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def key_id(text: str) -> str | None:
    """The id inside a well-formed key, None for anything else (wrong form or checksum)."""
    match = _FORM.fullmatch(text)
    if match is None:
        return None
    body = text.rpartition("_")[0]
    if not hmac.compare_digest(f"{zlib.crc32(body.encode()):08x}", match[4]):
        return None
    return match[2]


def verify(text: str, record: KeyRecord | None, pepper: bytes) -> KeyRecord:
    """Return the record if ``text`` is its key and it is not revoked.

    Does the same work whether or not a record was found. Raises AuthenticationFailed without
    saying why.
    """
    expected = record.digest if record is not None else "0" * 64
    equal = hmac.compare_digest(digest(text, pepper), expected)
    if record is None or not equal or record.revoked_at is not None:
        raise invalid_key()
    return record


def cache_salt(tenant: str, pepper: bytes, wanted: str = "") -> str:
    """What keys a tenant's prefix blocks in a worker's cache, so that no tenant can find, or time,
    what another one asked. ``wanted`` is the caller's own salt, which can only narrow further."""
    parts = f"prefix-cache\0{tenant}\0{wanted}".encode("utf-8", "surrogatepass")
    return hmac.new(pepper, parts, hashlib.sha256).hexdigest()[:32]


def tenant_mark(tenant: str, pepper: bytes) -> str:
    """What a worker knows a tenant by, to share itself fairly: never its name."""
    parts = f"tenant\0{tenant}".encode("utf-8", "surrogatepass")
    return hmac.new(pepper, parts, hashlib.sha256).hexdigest()[:32]


def invalid_key() -> AuthenticationFailed:
    """The one answer to every bad key."""
    return AuthenticationFailed(
        "invalid API key: send 'Authorization: Bearer <key>' with a key made by "
        "'cloudlm keys create'"
    )


def bearer(authorization: str | None, api_key: str | None = None) -> str:
    """The key in ``Authorization: Bearer`` or ``x-api-key``. Raises AuthenticationFailed."""
    if authorization is not None:
        scheme, _, text = authorization.partition(" ")
        if scheme.lower() == "bearer" and text.strip():
            return text.strip()
    if api_key:
        return api_key
    raise invalid_key()
