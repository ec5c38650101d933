"""The lines of several groups in one stream."""

from __future__ import annotations

import asyncio

import pytest

from cloudlm.control.api.logs import log_lines
from cloudlm.core.deployment import GroupObservation, Replica, ReplicaState
from cloudlm.core.errors import NotFound, NotSupported, Unavailable, UpstreamFailed
from cloudlm.drivers.base import Ability


class TalkingDriver:
    """A driver of which only the output matters; following never ends by itself."""

    name = "talking"
    abilities = frozenset({Ability.REPLICA_LOGS})

    def __init__(self):
        self.reading = set()

    async def groups(self):
        return ["bank-r10", "bank-r2", "bank-extra-r1", "bankrupt-r1"]

    async def observe(self, name):
        replica = Replica(f"{name}-0", ReplicaState.READY)
        return GroupObservation(name, None, (replica,))

    async def logs(self, name, *, replica=None, tail=100, follow=False):
        self.reading.add(name)
        try:
            yield f"{name} says ü"
            if follow:
                await asyncio.Event().wait()
        finally:
            self.reading.discard(name)


async def test_groups_in_the_order_of_their_revisions_and_of_no_other_deployment():
    lines = await log_lines([TalkingDriver()], "bank", replica=None, tail=5, follow=False)
    assert b"".join([line async for line in lines]).decode() == "bank-r2 says ü\nbank-r10 says ü\n"


async def test_following_hears_all_and_lets_go_of_all():
    driver = TalkingDriver()
    lines = await log_lines([driver], "bank", replica=None, tail=5, follow=True)
    heard = {await anext(lines), await anext(lines)}
    assert heard == {"bank-r2 says ü\n".encode(), "bank-r10 says ü\n".encode()}
    assert driver.reading == {"bank-r2", "bank-r10"}
    await lines.aclose()
    assert driver.reading == set()


async def test_a_driver_without_output_says_so():
    driver = TalkingDriver()
    driver.abilities = frozenset()
    with pytest.raises(NotSupported, match="talking"):
        await log_lines([driver], "bank", replica=None, tail=5, follow=False)


async def test_a_replica_of_another_deployment_is_not_found():
    with pytest.raises(NotFound):
        await log_lines([TalkingDriver()], "bank", replica="bankrupt-r1-0", tail=5, follow=False)


class SilentDriver(TalkingDriver):
    """Endpoints of others: what they say is theirs."""

    name = "silent"
    abilities = frozenset()

    async def groups(self):
        return ["bank-r3"]


@pytest.mark.parametrize("first", [TalkingDriver, SilentDriver])
async def test_a_deployment_that_moves_is_heard_wherever_it_runs(first):
    """Towards endpoints of others, the old replicas still have much to say, and the other way."""
    second = SilentDriver if first is TalkingDriver else TalkingDriver
    drivers = [first(), second()]
    lines = await log_lines(drivers, "bank", replica=None, tail=5, follow=False)
    assert b"".join([line async for line in lines]).decode() == "bank-r2 says ü\nbank-r10 says ü\n"
    lines = await log_lines(drivers, "bank", replica="bank-r2-0", tail=5, follow=False)
    assert [line async for line in lines] == ["bank-r2 says ü\n".encode()]
    with pytest.raises(NotSupported, match="silent"):
        await log_lines(drivers, "bank", replica="bank-r3-0", tail=5, follow=False)


class BrokenDriver(TalkingDriver):
    """Another driver that raises, or hangs, when it is asked what runs there, or for output."""

    name = "broken"

    def __init__(self, how, at):
        super().__init__()
        self._how, self._at = how, at

    async def _fail(self, at):
        if self._at == at and self._how is None:
            await asyncio.Event().wait()
        elif self._at == at:
            raise self._how

    async def groups(self):
        await self._fail("groups")
        return ["bank-r3"]

    async def logs(self, name, *, replica=None, tail=100, follow=False):
        yield f"{name} begins"
        await self._fail("logs")


HOW = pytest.mark.parametrize(
    ("how", "said"),
    [
        (UpstreamFailed("the cluster is away"), "the cluster is away"),
        (ConnectionError("10.0.0.7:22"), "ConnectionError"),
        (None, "no answer in 0.05 s"),
    ],
)


async def read(drivers, replica=None):
    lines = await log_lines(drivers, "bank", replica=replica, tail=5, follow=False, timeout_s=0.05)
    return [line.decode() async for line in lines]


@HOW
async def test_a_driver_that_is_ill_is_left_out_and_named(how, said):
    first, *lines = await read([TalkingDriver(), BrokenDriver(how, "groups")])
    assert first.startswith("cloudlm: driver 'broken' is left out: ")
    assert said in first
    assert "10.0.0.7" not in first
    assert lines == ["bank-r2 says ü\n", "bank-r10 says ü\n"]


@HOW
async def test_a_driver_that_breaks_off_ends_only_its_own_lines(how, said):
    lines = await read([TalkingDriver(), BrokenDriver(how, "logs")])
    assert (lines[0], lines[1], lines[-1]) == (
        "bank-r2 says ü\n",
        "bank-r3 begins\n",
        "bank-r10 says ü\n",
    )
    assert "driver 'broken' broke off" in lines[2] and said in lines[2]


async def test_followed_beside_a_driver_that_is_ill():
    drivers = [TalkingDriver(), BrokenDriver(UpstreamFailed("away"), "groups")]
    lines = await log_lines(drivers, "bank", replica=None, tail=5, follow=True)
    assert b"left out" in await anext(lines)
    heard = {await anext(lines), await anext(lines)}
    assert heard == {"bank-r2 says ü\n".encode(), "bank-r10 says ü\n".encode()}
    await lines.aclose()
    assert drivers[0].reading == set()


async def test_the_deployments_own_driver_must_answer():
    for how, error in ((UpstreamFailed("away"), UpstreamFailed), (None, Unavailable)):
        with pytest.raises(error):
            await read([BrokenDriver(how, "groups"), TalkingDriver()])


async def test_a_replica_may_be_where_nobody_answers():
    drivers = [TalkingDriver(), BrokenDriver(UpstreamFailed("away"), "groups")]
    with pytest.raises(NotFound, match="no replica 'bank-r3-0'; driver 'broken' is left out: away"):
        await read(drivers, "bank-r3-0")
