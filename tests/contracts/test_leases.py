"""The part of the state contract that says who leads, for every implementation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from cloudlm.core.deployment import (
    DeploymentPhase,
    DeploymentSpec,
    DeploymentStatus,
    Endpoint,
)
from cloudlm.core.errors import Conflict, Superseded
from cloudlm.core.job import Job
from cloudlm.core.lease import Lease
from cloudlm.core.rollout import Outcome, Rollout
from cloudlm.state.base import State
from cloudlm.state.leases import only_reads
from cloudlm.state.open import open_state

SPEC = DeploymentSpec("bank", "models:/bank/1")
ODD = "host \0 \ud800 ü 猫 '; DROP TABLE leases; --"


@pytest.fixture
async def state(state_url: str) -> AsyncIterator[State]:
    opened = await open_state(state_url)
    yield opened
    await opened.close()


def status(wanted: int = 1) -> DeploymentStatus:
    return DeploymentStatus("bank", DeploymentPhase.STARTING, 1, wanted, 0)


async def take(state: State, holder: str = "a", lasts_s: float = 10.0) -> Lease:
    found = await state.get_lease("control")
    return await state.take_lease("control", holder, lasts_s=lasts_s, replaces=found)


async def test_each_holder_gets_a_greater_token(state: State) -> None:
    assert await state.get_lease("control") == Lease("control")
    first = await take(state, ODD)
    assert first == Lease("control", ODD, 1, 0, 10.0) == await state.get_lease("control")
    second = await take(state, "b", lasts_s=0.5)
    assert (second.token, second.holder, second.lasts_s) == (2, "b", 0.5)
    await state.give_back_lease(second)
    assert await state.get_lease("control") == Lease("control", "", 2, 0, 0.5)
    assert (await take(state, "b")).token == 3
    assert await state.get_lease("other") == Lease("other")


async def test_what_moved_since_it_was_read_is_not_taken(state: State) -> None:
    free = await state.get_lease("control")
    held = await state.take_lease("control", "a", lasts_s=10.0, replaces=free)
    with pytest.raises(Conflict):
        await state.take_lease("control", "b", lasts_s=10.0, replaces=free)
    await state.renew_lease(held)
    with pytest.raises(Conflict):  # its holder lives
        await state.take_lease("control", "b", lasts_s=10.0, replaces=held)
    assert (await state.get_lease("control")).holder == "a"


@pytest.mark.promise(25)
async def test_of_many_one_gets_it(state: State) -> None:
    free = await state.get_lease("control")

    async def attempt(holder: str) -> Lease | None:
        try:
            return await state.take_lease("control", holder, lasts_s=1.0, replaces=free)
        except Conflict:
            return None

    held = [one for one in await asyncio.gather(*map(attempt, "abcdef")) if one is not None]
    assert held == [await state.get_lease("control")]
    assert held[0].token == 1


async def test_renewals_count_and_end_with_the_holding(state: State) -> None:
    held = await take(state)
    assert (await state.renew_lease(held)).renewals == 1
    assert (await state.renew_lease(held)).renewals == 2  # whatever the caller had read
    await take(state, "b")
    with pytest.raises(Superseded, match="'b' leads"):
        await state.renew_lease(held)
    await state.give_back_lease(held)  # not its own any more
    assert (await state.get_lease("control")).holder == "b"


async def test_the_same_holder_with_another_token_is_another(state: State) -> None:
    """A control that was killed, and the one that its guard started."""
    before = await take(state, "a")
    after = await take(state, "a")
    with pytest.raises(Superseded):
        await state.renew_lease(before)
    assert (await state.renew_lease(after)).token == 2


@pytest.mark.promise(25)
async def test_writes_of_a_stale_holder_are_refused(state: State) -> None:
    deployment = await state.put_deployment(SPEC, now=1.0)
    old = state.fenced(await take(state, "a"))
    endpoint = Endpoint("bank", "bank-r1-0", "http://a", 1)
    await old.put_endpoints("bank", [endpoint])
    new = state.fenced(await take(state, "b"))
    before = await state.version()
    job = Job("job-1", "import", {}, created_at=1.0, updated_at=1.0)
    for write in (
        lambda on: on.put_endpoints("bank", []),
        lambda on: on.put_status(status()),
        lambda on: on.put_rollout(Rollout("bank", target=1), replaces=None),
        lambda on: on.fix_revision("bank", 1, model="models:/bank/1", adapters={}),
        lambda on: on.end_revision("bank", 1, Outcome.PROMOTED, reason="", now=2.0),
        lambda on: on.put_job(job),
        lambda on: on.append_audit([]),
        lambda on: on.put_deployment(SPEC, now=9.0),
        lambda on: on.remove_deployment("bank", generation=deployment.generation),
    ):
        with pytest.raises(Superseded, match="token 1 is over"):
            await write(old)
        assert await state.version() == before
    assert await old.list_endpoints() == [endpoint]  # reading goes on
    assert await state.get_status("bank") is None
    assert await state.list_jobs() == []
    await new.put_endpoints("bank", [])
    await new.put_job(job)
    await state.put_endpoints("bank", [endpoint])  # who asks nobody is refused nothing


async def test_a_lease_that_was_given_back_writes_nothing(state: State) -> None:
    lease = await take(state)
    await state.give_back_lease(lease)
    with pytest.raises(Superseded, match="nobody leads"):
        await state.fenced(lease).put_status(status())


async def test_two_processes_see_one_lease(shared_state_url: str) -> None:
    one, other = await open_state(shared_state_url), await open_state(shared_state_url)
    try:
        held = await take(one, "a")
        stale = one.fenced(held)
        await one.put_deployment(SPEC, now=1.0)

        async def write() -> int:
            written = 0
            while True:
                try:
                    await stale.put_status(status(written))
                except Superseded:
                    return written
                written += 1

        writing = asyncio.create_task(write())
        while await other.get_status("bank") is None and not writing.done():
            await asyncio.sleep(0)
        await take(other, "b")
        # From the moment it is taken nothing of the old holder arrives any more.
        before = await other.get_status("bank")
        await writing
        assert await other.get_status("bank") == before
    finally:
        await one.close()
        await other.close()


def test_what_only_reads_is_known_by_name() -> None:
    """A method that is not known to read is fenced: forgetting one refuses, it never lets in."""
    methods = {name for name in dir(State) if not name.startswith("_")}
    reads = {name for name in methods if only_reads(name)}
    assert {name.partition("_")[0] for name in methods - reads} <= {
        *("put", "add", "append", "change", "end", "fix", "give", "mark", "remove", "renew"),
        *("return", "revoke", "take", "touch", "bootstrap", "drop"),
    }
    assert not {name for name in reads if name.startswith(("put", "take", "remove"))}
