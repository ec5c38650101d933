"""Which session a request belongs to, so that what follows each other can be kept together.

The header that the deployment names, else the body's ``prompt_cache_key``, else its ``user``. Kept
as a keyed hash under the tenant, so that tenants' sessions have nothing to do with each other.
Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b

import msgspec

SESSION_BYTES = 16


class _Named(msgspec.Struct):
    """The fields of a body that may name a session; all others are passed over."""

    prompt_cache_key: str | None = None
    user: str | None = None


_decoder = msgspec.json.Decoder(_Named)


def session_of(tenant: str, headers: Mapping[str, str], header: str, body: bytes) -> bytes:
    """The session's mark, empty if the request belongs to none. ``header`` is in lower case."""
    name = headers.get(header, "").strip()
    if not name:
        try:
            named = _decoder.decode(body)
        except (msgspec.DecodeError, ValueError, RecursionError):
            return b""  # such as a field that is no text
        name = named.prompt_cache_key or named.user or ""
        if not name:
            return b""
    salt = blake2b(tenant.encode(), digest_size=32).digest()
    text = name.encode("utf-8", "surrogatepass")
    return blake2b(text, digest_size=SESSION_BYTES, key=salt).digest()


def evenly(session: bytes) -> float:
    """A number from 0 to below 1 that stays the same for a session; all are equally likely."""
    digest = blake2b(session, digest_size=7, person=b"split").digest()
    return (int.from_bytes(digest) >> 3) / 2.0**53
