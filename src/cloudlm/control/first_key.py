"""The first owner key of an installation. Whoever starts it (``cloudlm up``) shows the key once;
control itself never makes one."""

from __future__ import annotations

from cloudlm.core.access import EVERYWHERE, ROOT
from cloudlm.core.clock import Clock
from cloudlm.core.tenant import Role
from cloudlm.security.keys import mint
from cloudlm.state.base import State

FIRST_KEY_NAME = "first owner key"


async def ensure_admin_key(state: State, pepper: bytes, clock: Clock) -> str | None:
    """Make an owner key of the whole installation if no usable one exists; returns its text, else
    None. The text is stored nowhere: only its digest is."""
    now = clock.now()
    for record in await state.list_keys():
        everywhere = record.scope == EVERYWHERE and record.principal == ROOT
        if record.role == Role.OWNER and everywhere and record.usable(now):
            return None
    minted = mint(FIRST_KEY_NAME, Role.OWNER, pepper, now, scope=EVERYWHERE)
    await state.put_key(minted.record)
    return minted.text
