"""The first admin key of an installation. Whoever starts it (``cloudlm up``) shows the key once;
control itself never makes one."""

from __future__ import annotations

from cloudlm.core.clock import Clock
from cloudlm.core.tenant import Role
from cloudlm.security.keys import mint
from cloudlm.state.base import State

FIRST_KEY_NAME = "first admin key"


async def ensure_admin_key(state: State, pepper: bytes, clock: Clock) -> str | None:
    """Make an admin key if no usable one exists; returns its text, else None.

    The text is stored nowhere: only its digest is.
    """
    records = await state.list_keys()
    if any(record.role is Role.ADMIN and record.revoked_at is None for record in records):
        return None
    minted = mint(FIRST_KEY_NAME, Role.ADMIN, pepper, clock.now())
    await state.put_key(minted.record)
    return minted.text
