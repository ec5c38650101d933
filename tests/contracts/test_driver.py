"""The driver contract, run against every implementation.

A *bench* knows how to make a driver of its kind over the same world again and again (as a new
control process would), to crash a replica, and to let time pass.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cloudlm.core.clock import ManualClock, SystemClock
from cloudlm.core.deployment import GroupObservation, GroupSpec, ReplicaState
from cloudlm.core.errors import Conflict, InvalidRequest, NotFound, NotSupported, Superseded
from cloudlm.core.external import ExternalEndpoint
from cloudlm.core.plugins import load
from cloudlm.drivers import procfs
from cloudlm.drivers.base import Ability, Driver, DriverContext
from cloudlm.drivers.external import ExternalDriver
from cloudlm.drivers.external_look import Look
from cloudlm.drivers.launch import GuardTiming
from cloudlm.drivers.memory import MemoryDriver, MemoryWorld
from cloudlm.drivers.process import ProcessDriver

SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *args): pass
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[2])), Handler)
print(sys.argv[1], "started", flush=True)
server.serve_forever()
"""
RUNS = (ReplicaState.STARTING, ReplicaState.READY)


class MemoryBench:
    def __init__(self, home: Path) -> None:
        self.clock = ManualClock()
        self.world = MemoryWorld()
        self._context = DriverContext(home, self.clock, {}, {})

    def driver(self) -> Driver:
        return MemoryDriver(self._context, self.world)

    async def crash(self, driver: Driver, group: str, replica: str) -> None:
        MemoryDriver(self._context, self.world).crash(group, replica)

    async def until(self, check: Callable[[], Awaitable[object]]) -> None:
        for _ in range(200):
            if await check():
                return
            await self.clock.advance(0.5)
        raise AssertionError("not in 100 s of the clock")

    async def close(self) -> None:
        pass


class QuietLooks:
    """Finds every endpoint well."""

    async def look(self, endpoint: ExternalEndpoint) -> Look:
        return Look()


class ExternalBench(MemoryBench):
    """The world is files and other people's services; what these do is no part of the contract."""

    def driver(self) -> Driver:
        return ExternalDriver(self._context, QuietLooks())

    async def crash(self, driver: Driver, group: str, replica: str) -> None:
        raise AssertionError("a service of others is not ours to crash")


class ProcessBench:
    def __init__(self, home: Path) -> None:
        self.home = home
        self._read_end, self._write_end = os.pipe()
        environment = {**os.environ, "CLOUDLM_LIFELINE_FD": str(self._read_end)}
        self._context = DriverContext(
            home, SystemClock(), environment, {"CLOUDLM_HOME": str(home)}, 18500
        )
        self._drivers: list[ProcessDriver] = []

    def driver(self) -> Driver:
        driver = ProcessDriver(
            self._context,
            command_builder=lambda spec, port: [sys.executable, "-c", SERVER, spec.name, port],
            timing=GuardTiming(grace_s=1.0, backoff_first_s=0.05, backoff_longest_s=0.2),
        )
        self._drivers.append(driver)
        return driver

    async def crash(self, driver: Driver, group: str, replica: str) -> None:
        async def has_a_process() -> object:
            return (await one(driver, group, replica)).pid

        await self.until(has_a_process)
        found = procfs.identify((await one(driver, group, replica)).pid or 0)
        assert found is not None
        procfs.send(found, signal.SIGKILL)

    async def until(self, check: Callable[[], Awaitable[object]]) -> None:
        deadline = time.monotonic() + 60
        while not await check():
            assert time.monotonic() < deadline, "not in 60 s"
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        for driver in self._drivers:
            await driver.close()
        os.close(self._write_end)
        await self.until(self._nothing_runs)
        os.close(self._read_end)
        assert not list(self.home.glob("run/*/*.lock"))

    async def _nothing_runs(self) -> bool:
        return not self.processes()

    def processes(self) -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    environment = (entry / "environ").read_bytes()
                except OSError:
                    continue
                if f"CLOUDLM_HOME={self.home}".encode() in environment.split(b"\0"):
                    found.append(int(entry.name))
        return found


@pytest.fixture(
    params=[
        pytest.param(MemoryBench, id="memory"),
        pytest.param(ExternalBench, id="external"),
        pytest.param(ProcessBench, id="process", marks=pytest.mark.flow),
    ]
)
async def bench(request, tmp_path):
    made = request.param(tmp_path)
    yield made
    await made.close()


SPEC = GroupSpec(
    "bank-r1",
    "bank",
    1,
    "models:/bank/1",
    replicas=1,
    options={"max_model_len": 64},
    endpoints=tuple(ExternalEndpoint(f"https://e{n}.invalid/v1", "m") for n in range(3)),
)


def needs(driver: Driver, ability: Ability) -> None:
    """Leave out what a driver does not claim to do."""
    if ability not in driver.abilities:
        pytest.skip(f"driver {driver.name!r} does not claim {ability}")


async def one(driver: Driver, group: str, replica: str):
    return next(r for r in (await driver.observe(group)).replicas if r.id == replica)


def running(observation: GroupObservation) -> dict[str, tuple[int | None, int]]:
    return {r.id: (r.pid, r.restarts) for r in observation.replicas if r.state in RUNS and r.url}


def reach(driver: Driver, count: int, name: str = "bank-r1") -> Callable[[], Awaitable[bool]]:
    async def check() -> bool:
        seen = await driver.observe(name)
        return len(running(seen)) == len(seen.replicas) == count

    return check


def test_every_installed_driver_is_tested_here():
    assert load("cloudlm.drivers", "external") is ExternalDriver
    assert load("cloudlm.drivers", "memory") is MemoryDriver
    assert load("cloudlm.drivers", "process") is ProcessDriver


async def test_what_does_not_exist_is_an_answer_not_an_error(bench):
    driver = bench.driver()
    assert await driver.observe("none-r1") == GroupObservation("none-r1", None)
    assert await driver.groups() == []
    await driver.delete("none-r1")
    await driver.stop_replica("none-r1", "none-r1-0")
    kept = Ability.REPLICA_LOGS in driver.abilities
    with pytest.raises(NotFound if kept else NotSupported):
        [line async for line in driver.logs("none-r1")]


@pytest.mark.parametrize("name", ["", "../x", "a/b", "A", "a..b", "x" * 101, "\0"])
async def test_names_that_could_leave_the_folder_are_refused(bench, name):
    driver = bench.driver()
    for work in (driver.observe(name), driver.apply(replace(SPEC, name=name)), driver.delete(name)):
        with pytest.raises(InvalidRequest):
            await work


async def test_apply_twice_is_apply_once(bench):
    driver = bench.driver()
    await driver.apply(replace(SPEC, replicas=2))
    await bench.until(reach(driver, 2))
    before = await driver.observe("bank-r1")
    await driver.apply(replace(SPEC, replicas=2))
    after = await driver.observe("bank-r1")
    assert running(after) == running(before)
    assert before.spec == replace(SPEC, replicas=2)
    assert [r.id for r in before.replicas] == ["bank-r1-0", "bank-r1-1"]
    assert len({r.url for r in before.replicas}) == 2
    assert await driver.groups() == ["bank-r1"]


async def test_scaling_starts_and_stops_the_newest_only(bench):
    driver = bench.driver()
    await driver.apply(SPEC)
    await bench.until(reach(driver, 1))
    first = running(await driver.observe("bank-r1"))["bank-r1-0"]
    await driver.apply(replace(SPEC, replicas=3))
    await bench.until(reach(driver, 3))
    await driver.apply(replace(SPEC, replicas=1))
    await bench.until(reach(driver, 1))
    assert running(await driver.observe("bank-r1")) == {"bank-r1-0": first}


async def test_down_and_up_again_at_once_comes_right(bench):
    driver = bench.driver()
    await driver.apply(replace(SPEC, replicas=2))
    await bench.until(reach(driver, 2))
    await driver.apply(replace(SPEC, replicas=1))
    await driver.apply(replace(SPEC, replicas=2))
    await bench.until(reach(driver, 2))


async def test_a_group_never_changes_what_it_runs(bench):
    driver = bench.driver()
    await driver.apply(SPEC)
    for other in (
        replace(SPEC, model="models:/bank/2"),
        replace(SPEC, options={}),
        replace(SPEC, env={"A": "b"}),
        replace(SPEC, deployment="other"),
    ):
        with pytest.raises(Conflict):
            await driver.apply(other)
    assert (await driver.observe("bank-r1")).spec == SPEC


async def test_a_stopped_replica_is_started_anew(bench):
    driver = bench.driver()
    needs(driver, Ability.STOPS_ONE_REPLICA)
    await driver.apply(replace(SPEC, replicas=2))
    await bench.until(reach(driver, 2))
    before = running(await driver.observe("bank-r1"))
    await driver.stop_replica("bank-r1", "bank-r1-1")
    await driver.stop_replica("bank-r1", "bank-r1-9")

    async def anew() -> bool:
        return running(await driver.observe("bank-r1")).get("bank-r1-1", (0, 0))[1] == 1

    await bench.until(anew)
    assert running(await driver.observe("bank-r1"))["bank-r1-0"] == before["bank-r1-0"]


async def test_a_crash_backs_off_and_comes_back(bench):
    driver = bench.driver()
    needs(driver, Ability.RESTARTS_REPLICAS)
    await driver.apply(SPEC)
    await bench.until(reach(driver, 1))
    await bench.crash(driver, "bank-r1", "bank-r1-0")
    seen_states = set()

    async def back() -> bool:
        replica = await one(driver, "bank-r1", "bank-r1-0")
        seen_states.add(replica.state)
        return replica.restarts == 1 and replica.state in RUNS

    await bench.until(back)
    assert ReplicaState.BACKOFF in seen_states
    assert (await one(driver, "bank-r1", "bank-r1-0")).message


async def test_delete_forgets_and_may_be_repeated(bench):
    driver = bench.driver()
    await driver.apply(replace(SPEC, replicas=2))
    await bench.until(reach(driver, 2))
    await driver.delete("bank-r1")
    await driver.delete("bank-r1")

    async def gone() -> bool:
        return await driver.observe("bank-r1") == GroupObservation("bank-r1", None)

    await bench.until(gone)
    assert await driver.groups() == []
    await driver.delete("bank-r1")


async def test_a_deleted_name_may_run_something_else(bench):
    driver = bench.driver()
    await driver.apply(SPEC)
    await bench.until(reach(driver, 1))
    await driver.delete("bank-r1")
    other = replace(SPEC, model="models:/bank/2")
    await driver.apply(other)
    await bench.until(reach(driver, 1))
    assert (await driver.observe("bank-r1")).spec == other


async def test_a_new_driver_adopts_what_runs(bench):
    first = bench.driver()
    await first.apply(replace(SPEC, replicas=2))
    await bench.until(reach(first, 2))
    before = await first.observe("bank-r1")
    await first.close()
    second = bench.driver()
    assert await second.groups() == ["bank-r1"]
    after = await second.observe("bank-r1")
    assert after.spec == before.spec
    assert running(after) == running(before)
    await second.apply(replace(SPEC, replicas=1))
    await bench.until(reach(second, 1))
    await second.delete("bank-r1")

    async def gone() -> bool:
        return (await second.observe("bank-r1")).spec is None

    await bench.until(gone)


async def test_a_group_of_no_replicas_exists(bench):
    driver = bench.driver()
    await driver.apply(replace(SPEC, replicas=0))
    seen = await driver.observe("bank-r1")
    assert seen.spec == replace(SPEC, replicas=0)
    assert seen.replicas == ()
    with pytest.raises(InvalidRequest):
        await driver.apply(replace(SPEC, replicas=-1))


async def test_logs_of_one_and_of_all(bench):
    driver = bench.driver()
    needs(driver, Ability.REPLICA_LOGS)
    await driver.apply(replace(SPEC, replicas=2))

    async def both() -> bool:
        return len([line async for line in driver.logs("bank-r1")]) == 2

    await bench.until(both)
    lines = [line async for line in driver.logs("bank-r1", replica="bank-r1-1")]
    assert len(lines) == 1
    assert lines[0].startswith("bank-r1")
    assert lines[0].endswith("started")
    assert [line async for line in driver.logs("bank-r1", tail=0)] == []
    with pytest.raises(NotFound):
        [line async for line in driver.logs("bank-r1", replica="bank-r1-7")]


async def test_following_logs_sees_a_restart_and_ends_with_the_group(bench):
    driver = bench.driver()
    needs(driver, Ability.REPLICA_LOGS)
    await driver.apply(SPEC)
    await bench.until(reach(driver, 1))
    lines: list[str] = []

    async def follow() -> None:
        async for line in driver.logs("bank-r1", follow=True):
            lines.append(line)

    task = asyncio.create_task(follow())

    async def said(count: int) -> bool:
        await driver.observe("bank-r1")
        await asyncio.sleep(0)
        return len(lines) >= count

    await bench.until(lambda: said(1))
    await bench.crash(driver, "bank-r1", "bank-r1-0")
    await bench.until(lambda: said(2))
    await driver.delete("bank-r1")

    async def ended() -> bool:
        await driver.observe("bank-r1")
        return task.done()

    await bench.until(ended)
    await task


async def test_orders_of_a_control_that_was_overtaken_are_refused(bench):
    old, new = bench.driver(), bench.driver()
    old.fence(1)
    new.fence(2)
    await old.apply(SPEC)
    await bench.until(reach(new, 1))  # a look is enough
    before = await new.observe(SPEC.name)
    for order in (
        old.apply(replace(SPEC, replicas=0)),
        old.stop_replica(SPEC.name, f"{SPEC.name}-0"),
        old.delete(SPEC.name),
    ):
        with pytest.raises(Superseded, match="token 2"):
            await order
    assert [one.id for one in (await old.observe(SPEC.name)).replicas] == [
        one.id for one in before.replicas
    ]
    again = bench.driver()
    again.fence(2)  # the next control process has a token as great or greater
    await again.delete(SPEC.name)

    async def gone() -> bool:
        return await again.groups() == [] or (await again.observe(SPEC.name)).spec is None

    await bench.until(gone)
