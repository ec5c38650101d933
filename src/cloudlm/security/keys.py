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
from dataclasses import dataclass, replace

from cloudlm.core.access import DEFAULT_PROJECT, DEFAULT_TENANT, ROOT, Limits
from cloudlm.core.errors import AuthenticationFailed
from cloudlm.core.tenant import KeyRecord

_ALPHABET = "0123456789abcdefghijkmnpqrstuvwxyz"
_FORM = re.compile(r"clm_([a-z]{2,8})_([0-9a-z]{12})_([0-9a-z]{32})_([0-9a-f]{8})", re.ASCII)
_ANY_KEY = re.compile(r"clm_([a-z]{2,8})_([0-9a-z]{12})_[0-9a-zA-Z_]+", re.ASCII)
PEPPER_BYTES = 32


@dataclass(frozen=True, slots=True)
class MintedKey:
    """A new key: the text to show once, and the record to store."""

    text: str
    record: KeyRecord


def mint(
    name: str,
    role: str,
    pepper: bytes,
    now: float,
    *,
    env: str = "live",
    tenant: str = DEFAULT_TENANT,
    project: str = DEFAULT_PROJECT,
    principal: str = ROOT,
    scope: str = "",
    models: tuple[str, ...] = ("*",),
    limits: Limits | None = None,
    expires_at: float | None = None,
    made_with: str = "",
) -> MintedKey:
    """Make a new key. ``pepper`` is PEPPER_BYTES of secret kept apart from the records; ``scope``
    is the tenant's if it is not given. See ``KeyRecord`` for the rest."""
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
        project=project,
        principal=principal,
        scope=scope or tenant,
        models=models,
        limits=limits or Limits(),
        expires_at=expires_at,
        made_with=made_with,
    )
    return MintedKey(text, record)


def successor(old: KeyRecord, pepper: bytes, now: float) -> MintedKey:
    """A new key with another secret and the same rights, for a rotation."""
    fresh = mint(old.name, old.role, pepper, now)
    record = replace(
        old,
        id=fresh.record.id,
        digest=fresh.record.digest,
        last4=fresh.record.last4,
        created_at=now,
        revoked_at=None,
        last_used_at=None,
    )
    return MintedKey(fresh.text, record)


def without_keys(text: str) -> str:
    """``text`` with every key in it reduced to its id, for what is logged or kept."""
    return _ANY_KEY.sub(lambda found: f"clm_{found[1]}_{found[2]}_…", text)


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


def verify(text: str, record: KeyRecord | None, pepper: bytes, now: float) -> KeyRecord:
    """Return the record if ``text`` is its key and it is neither revoked nor expired.

    Does the same work whether or not a record was found. Raises AuthenticationFailed without
    saying why.
    """
    expected = record.digest if record is not None else "0" * 64
    equal = hmac.compare_digest(digest(text, pepper), expected)
    if record is None or not equal or not record.usable(now):
        raise invalid_key()
    return record


def cache_salt(tenant: str, pepper: bytes, wanted: str = "") -> str:
    """What keys a tenant's prefix blocks in a worker's cache, so that no tenant can find, or time,
    what another one asked. ``wanted`` is the caller's own salt, which can only narrow further."""
    parts = f"prefix-cache\0{tenant}\0{wanted}".encode("utf-8", "surrogatepass")
    return hmac.new(pepper, parts, hashlib.sha256).hexdigest()[:32]


def answer_key(tenant: str, pepper: bytes) -> bytes:
    """What keys a tenant's answers in the gateway's cache, 32 bytes. It never leaves the gateway,
    as salts and marks do."""
    parts = f"answer-cache\0{tenant}".encode("utf-8", "surrogatepass")
    return hmac.new(pepper, parts, hashlib.sha256).digest()


def tenant_mark(tenant: str, pepper: bytes) -> str:
    """What a worker knows a tenant by, to share itself fairly: never its name."""
    parts = f"tenant\0{tenant}".encode("utf-8", "surrogatepass")
    return hmac.new(pepper, parts, hashlib.sha256).hexdigest()[:32]


def installation_mark(pepper: bytes) -> str:
    """What gateways of one installation know each other by where others may be: it tells nothing
    of the secret that they share."""
    return hmac.new(pepper, b"installation", hashlib.sha256).hexdigest()[:32]


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
