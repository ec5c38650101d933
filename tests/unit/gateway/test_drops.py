"""Clients that leave at random bytes, again and again: nobody else may feel it."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

import pytest
from served_gateway import close, connect, served, talk, wire

from cloudlm.core.access import Limits
from cloudlm.core.tenant import Role
from cloudlm.security.keys import mint

DROPS = 100
PATIENCE_S = 30.0


async def one_at_a_time(rig: Any, kit: Any) -> None:
    """Give the rig a key that may do one request at once."""
    limits = Limits(concurrent_streams=1)
    minted = mint("single", Role.USER, kit.PEPPER, 1.0, limits=limits)
    await rig.state.put_key(minted.record)
    await rig.gateway.view.refresh()
    rig.key, rig.key_id = minted.text, minted.record.id


async def drop(rig: Any, request: bytes, draw: random.Random) -> None:
    """Send a random part of a request; if it was all of it, read a random part of the answer."""
    reader, writer = await connect(rig)
    try:
        cut = draw.choice([draw.randrange(len(request)), len(request)])
        writer.write(request[:cut])
        if cut == len(request):
            with contextlib.suppress(asyncio.IncompleteReadError):
                await reader.readexactly(draw.randrange(1, 2500))
    finally:
        await close(writer)


@pytest.mark.promise(2, 3)
@pytest.mark.known_failure("litellm#27955")
async def test_a_hundred_who_drop_at_random_bytes_leave_nothing(kit: Any) -> None:
    draw = random.Random(27955)
    async with served(kit, replica_capacity=1, max_queued_requests=1) as rig:
        await one_at_a_time(rig, kit)
        (replica,) = rig.replicas
        replica.default = kit.Plan(tokens=8, pause_s=0.001)
        admission, tally = rig.gateway.admission, rig.gateway.counters._tally
        for _ in range(DROPS):
            body = kit.chat_body(stream=draw.random() < 0.7)
            await drop(rig, wire(rig, body, connection="close"), draw)
            await kit.until(lambda: not admission.total, PATIENCE_S)
        await kit.until(lambda: not replica.active and not rig.server.connections, PATIENCE_S)
        rig.assert_nothing_open()
        assert tally.ongoing(f"key:{rig.key_id}") == 0
        assert not tally._leases
        assert len(replica.requests) > DROPS / 4  # many got as far as the replica
        status, _, _ = await talk(rig, wire(rig, kit.chat_body()))
        assert status == 200  # at a limit of one, nothing may be left of all the others
        await rig.gateway.ledger.flush()
        rows = await rig.state.list_ledger(limit=10_000)
        assert len(rows) == len(replica.requests)
        assert sum(row.completion_tokens for row in rows) <= replica.tokens_sent
