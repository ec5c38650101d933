"""Two controls on one state: one leads, a paused one does nothing when it wakes, nobody is doubled.

Promise 25."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import httpx2
import pytest
from rolling_world import Killed, Kills, MortalState, mortal_driver

from cloudlm.control.api.app import build_api
from cloudlm.control.drivers import Drivers
from cloudlm.control.first_key import ensure_admin_key
from cloudlm.control.jobs import Jobs
from cloudlm.control.leading import LEASE, Leadership, holder_of
from cloudlm.control.observe import Observer
from cloudlm.control.standby import Standby
from cloudlm.control.terms import CheckedDrivers, Terms
from cloudlm.core.errors import Superseded, Unavailable
from cloudlm.drivers.base import Ability, DriverContext
from cloudlm.drivers.memory import MemoryDriver, MemoryWorld

LASTS_S = 10.0
PEPPER = b"p" * 32


class Control:
    """One of several controls of a plane, stepped by hand. ``world`` is what its driver runs: the
    plane's, as on a cluster, unless it has a machine of its own."""

    def __init__(self, plane, holder, kills=None):
        self.plane, self.holder, self.kills = plane, holder, kills or Kills()
        self.start()

    def start(self):
        """As a process that has just begun."""
        outside = self.plane.state
        self.plane.state = MortalState(outside, self.kills)
        self.plane.restart()
        self.mortal, self.plane.state = self.plane.state, outside
        self.drivers, self.metrics = self.plane.drivers, self.plane.metrics
        mortal_driver(self.drivers.get("process"), outside, self.kills)
        self.leadership = Leadership(
            self.mortal, self.plane.clock, self.metrics, self.holder, LASTS_S
        )
        self.reconciler = self.term = None

    async def step(self):
        try:
            await self.leadership.beat()
            await self.act()
        except Killed:
            self.start()

    async def act(self):
        """A pass of whoever believes to lead."""
        term = self.leadership.term
        if term is None or term.over.is_set():
            return
        if term is not self.term:
            self.term = term
            self.drivers.fence(term.lease.token)
            self.plane.state, outside = MortalState(term.state, self.kills), self.plane.state
            drivers = CheckedDrivers(self.drivers, term.check)
            self.reconciler = self.plane.reconciler_of(self.plane.state, drivers)
            self.plane.state = outside
        try:
            await self.reconciler.step()
        except Superseded:
            term.over.set()


async def leader(plane):
    return (await plane.state.get_lease(LEASE)).holder


@pytest.mark.promise(25)
async def test_one_leads_and_another_takes_over_after_a_silence(plane):
    one, other = Control(plane, "one"), Control(plane, "other")
    await plane.ask()
    for _ in range(12):  # however long both live, it stays
        await one.step()
        await other.step()
        await plane.clock.advance(2.0)
    assert await leader(plane) == "one"
    assert other.leadership.another_leads
    assert plane.world.started == ["bank-r1-0"]
    for _ in range(3):  # one is silent, but not for long enough
        await plane.clock.advance(2.0)
        await other.step()
    assert await leader(plane) == "one"
    await plane.clock.advance(2.1)
    await other.step()
    assert await leader(plane) == "other"
    assert plane.world.started == ["bank-r1-0"], "what runs is taken over as it is"
    assert b"cloudlm_control_leads 1.0" in other.metrics.exposition()


async def test_one_that_was_given_back_is_taken_at_once(plane):
    one, other = Control(plane, "one"), Control(plane, "other")
    await one.step()
    await other.step()
    await one.leadership.give_back()
    await other.step()
    assert await leader(plane) == "other"
    assert b"cloudlm_control_leads 0.0" in one.metrics.exposition()


async def test_the_next_control_of_the_same_home_goes_on_at_once(plane):
    one = Control(plane, "one")
    await one.step()
    again = Control(plane, "one")
    await again.step()
    assert (await plane.state.get_lease(LEASE)).token == 2
    await one.leadership.beat()  # the one before it, if it should live after all
    assert one.leadership.term is None or one.leadership.term.lease.token == 3


@pytest.mark.promise(25)
async def test_a_paused_one_can_neither_write_nor_order_when_it_wakes(plane):
    one, other = Control(plane, "one"), Control(plane, "other")
    await plane.ask(min_replicas=2, max_replicas=2)
    for _ in range(3):
        await one.step()
        await other.step()
        await plane.clock.advance(0.5)
    for _ in range(30):
        await other.step()
        await plane.clock.advance(0.5)
    assert await leader(plane) == "other"
    await plane.ask(min_replicas=1, max_replicas=1)
    before = await plane.state.list_endpoints(), plane.running(), plane.world.token
    await one.act()  # it goes on in the middle of a pass
    assert one.term.over.is_set()
    assert (await plane.state.list_endpoints(), plane.running(), plane.world.token) == before
    # Past control's own look, the driver refuses.
    stale = MemoryDriver(DriverContext(plane.home, plane.clock, {}, {}), plane.world)
    stale.fence(1)
    with pytest.raises(Superseded, match="token 2 gives the orders"):
        await stale.delete("bank-r1")
    with pytest.raises(Superseded):
        await stale.stop_replica("bank-r1", "bank-r1-0")
    with pytest.raises(Superseded):
        await stale.apply(plane.world.groups["bank-r1"].spec)
    assert plane.running() == before[1]
    await one.step()
    assert one.leadership.term is None


async def test_a_state_that_is_away_orders_nothing_and_ends_no_term(plane, monkeypatch):
    one = Control(plane, "one")
    await plane.ask()
    await one.leadership.beat()
    term = one.leadership.term

    async def away(*_):
        raise Unavailable("the state is away")

    monkeypatch.setattr(plane.state, "get_lease", away)
    with pytest.raises(Unavailable):
        await term.check()
    assert not term.over.is_set()


@pytest.mark.promise(25)
@pytest.mark.parametrize("seed", range(2))
async def test_killed_after_every_write_another_ends_what_it_began(plane_at, seed):
    """One control is killed at its n-th write or order and comes back later; the other goes on."""

    async def tell(name, kills):
        plane = plane_at(f"{seed}-{name}")
        one, other = Control(plane, "one", kills), Control(plane, "other")
        await plane.ask(min_replicas=2, max_replicas=2)
        for turn in range(110):
            if turn == 30:
                await plane.ask(model="models:/bank/2", min_replicas=2, max_replicas=2)
            away = 0 < kills.at <= kills.count and turn % 7 < 3 + seed
            if not away:
                await one.step()
            if turn % (2 + seed) == 0:
                await other.step()
            await plane.clock.advance(0.5)
        return plane, kills

    whole, kills = await tell("whole", Kills())
    assert whole.running() == ["bank-r2-0", "bank-r2-1"]
    for at in range(1, kills.count + 1):
        plane, _ = await tell(f"{at}", Kills(at))
        assert plane.running() == whole.running(), at
        assert sorted(plane.world.groups) == ["bank-r2"]
        assert await plane.serving() == ["bank-r2-0", "bank-r2-1"]
        started = plane.world.started
        assert len(set(started)) == len(started), f"started twice: {started}"


class HereDriver(MemoryDriver):
    """Replicas that only this machine knows."""

    abilities = MemoryDriver.abilities | {Ability.ONLY_HERE}


async def test_who_stands_by_gives_up_what_only_its_machine_knows(plane):
    await plane.ask()
    await plane.steps(2)
    here = MemoryWorld(groups=dict(plane.world.groups), token=1)
    build = {
        "process": lambda context: HereDriver(context, here),
        "memory": lambda context: MemoryDriver(context, plane.elsewhere),
    }
    drivers = Drivers(DriverContext(plane.home, plane.clock, {}, {}), build)
    drivers.get("memory")
    observer = Observer(drivers, plane.prober, plane.clock, 20.0)
    standby = Standby(plane.state, drivers, observer, plane.clock, 30.0)
    one = Leadership(plane.state, plane.clock, plane.metrics, "elsewhere", LASTS_S)
    await one.beat()
    await standby.step(one.term.lease)
    assert here.groups, "gateways need a moment to notice"
    standby.forget()
    await plane.clock.advance(2.0)
    await standby.step(one.term.lease)
    assert here.groups, "nobody led meanwhile: the wait begins anew"
    for _ in range(70):
        await plane.clock.advance(0.5)
        await standby.step(one.term.lease)
    assert not here.groups


async def test_a_control_leads_follows_and_leads_again(plane, services):
    leadership = Leadership(plane.state, plane.clock, plane.metrics, "one", LASTS_S)
    observer = Observer(plane.drivers, plane.prober, plane.clock, 20.0)
    standby = Standby(plane.state, plane.drivers, observer, plane.clock, 30.0)
    jobs = Jobs(plane.state, plane.clock, {}, alone=False)
    terms = Terms(leadership, plane.drivers, jobs, standby, 0.01, plane.reconciler_of)
    other = Leadership(plane.state, plane.clock, plane.metrics, "other", LASTS_S)
    services = replace(services, reconciler=terms, jobs=jobs, leadership=leadership)
    key = await ensure_admin_key(plane.state, PEPPER, plane.clock)
    headers = {"authorization": f"Bearer {key}"}
    transport = httpx2.ASGITransport(app=build_api(services))

    async def until(check):
        async with asyncio.timeout(60):
            while not await check():
                await plane.clock.advance(0.5)
                await asyncio.sleep(0.001)

    async def looked():
        return terms.has_looked

    async def serves():
        return await plane.serving() == ["bank-r1-0"]

    running = asyncio.create_task(terms.run())
    await plane.ask()
    async with httpx2.AsyncClient(transport=transport, base_url="http://x") as client:
        unknown = await client.get("/api/v1/leader", headers=headers)
        assert unknown.status_code == 503
        await leadership.beat()
        await until(looked)
        await until(serves)
        assert terms.models_in_use() == {"models:/bank/1"}
        told = (await client.get("/api/v1/leader", headers=headers)).json()
        assert told == {"holder": "one", "token": 1, "here": True}
        await other.beat()
        await plane.clock.advance(LASTS_S + 1)
        await other.beat()
        await leadership.beat()  # overtaken
        assert leadership.term is None

        async def ended():
            return not terms.has_looked

        await until(ended)
        assert (await client.get("/readyz")).status_code == 503, "nobody was seen leading"
        await other.beat()
        await leadership.beat()
        assert (await client.get("/readyz")).status_code == 200
        told = (await client.get("/api/v1/leader", headers=headers)).json()
        assert told == {"holder": "other", "token": 2, "here": False}
        await plane.ask(model="models:/bank/2")
        for _ in range(20):
            terms.nudge()
            await plane.clock.advance(0.5)
            await asyncio.sleep(0.001)
        assert plane.world.started == ["bank-r1-0"], "who follows starts nothing"
        await other.give_back()
        await leadership.beat()

        async def changed():
            return await plane.serving() == ["bank-r2-0"]

        await until(changed)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await jobs.close()
    assert len(set(plane.world.started)) == len(plane.world.started)


def test_homes_differ_and_one_home_is_one_holder(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    assert holder_of(one) == holder_of(one) != holder_of(other)
    assert f":{one}#" in holder_of(one)


class AskedHereDriver(HereDriver):
    """Those that can be asked whether requests are at them, as the process driver's."""

    abilities = HereDriver.abilities | {Ability.PER_REPLICA_ADDRESS}


async def standing_by(plane):
    """A machine whose replica had an endpoint when another began to lead, and what runs there."""
    await plane.ask()
    await plane.steps(3)
    here = MemoryWorld(groups=dict(plane.world.groups), token=1)
    build = {"process": lambda context: AskedHereDriver(context, here)}
    drivers = Drivers(DriverContext(plane.home, plane.clock, {}, {}), build)
    observer = Observer(drivers, plane.prober, plane.clock, 20.0)
    standby = Standby(plane.state, drivers, observer, plane.clock, 30.0)
    one = Leadership(plane.state, plane.clock, plane.metrics, "elsewhere", LASTS_S)
    await one.beat()

    async def steps(count):
        for _ in range(count):
            await standby.step(one.term.lease)
            await plane.clock.advance(0.5)

    return here, drivers, steps


async def test_who_stands_by_stops_no_replica_to_which_gateways_may_still_send(plane):
    here, _, steps = await standing_by(plane)
    await steps(20)
    assert here.groups, "its endpoint is not withdrawn yet"
    (endpoint,) = await plane.state.list_endpoints()
    await plane.state.put_endpoints("bank", [replace(endpoint, url="http://10.0.0.2:9")])
    await steps(1)
    assert here.groups, "gateways need a moment to notice"
    await steps(3)
    assert not here.groups, "another replica of this name is the leader's"


@pytest.mark.parametrize("silent", [False, True])
async def test_who_stands_by_waits_no_longer_than_the_time_to_drain(plane, monkeypatch, silent):
    here, _, steps = await standing_by(plane)

    async def away():
        raise Unavailable("the database is away")

    if silent:
        monkeypatch.setattr(plane.state, "list_endpoints", away)
    await steps(60)
    assert here.groups
    await steps(2)
    assert not here.groups


async def test_one_group_that_cannot_be_ended_keeps_no_other_running(plane, monkeypatch):
    await plane.ask("another")
    here, drivers, steps = await standing_by(plane)
    await plane.state.put_endpoints("bank", [])
    await plane.state.put_endpoints("another", [])
    driver = drivers.get("process")
    done = driver.delete

    async def fails(name):
        if name == "another-r1":
            raise RuntimeError("a bug")
        await done(name)

    monkeypatch.setattr(driver, "delete", fails)
    await steps(5)
    assert list(here.groups) == ["another-r1"]
