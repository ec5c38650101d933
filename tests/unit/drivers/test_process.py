"""What only the process driver can get wrong: orphans, stale files, foreign pids."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from cloudlm.core.deployment import GroupSpec, ReplicaState
from cloudlm.core.errors import StorageFailed
from cloudlm.core.health import is_hopeless
from cloudlm.drivers import procfs
from cloudlm.drivers.process import ProcessDriver, worker_command
from cloudlm.drivers.runfiles import read_json, write_json

pytestmark = pytest.mark.flow

SPEC = GroupSpec("bank-r1", "bank", 1, "models:/bank/1", replicas=2, env={"EXTRA": "1"})


@pytest.fixture
async def driver(context, timing, server_command):
    made = ProcessDriver(context, command_builder=lambda spec, port: server_command, timing=timing)
    yield made
    await made.close()


async def until(check, timeout_s=10.0):
    async with asyncio.timeout(timeout_s):
        while not await check():
            await asyncio.sleep(0.02)


async def running(driver, count):
    async def check():
        replicas = (await driver.observe("bank-r1")).replicas
        return sum(r.pid is not None for r in replicas) == len(replicas) == count

    await until(check)
    return (await driver.observe("bank-r1")).replicas


def guard_of(context, replica):
    body = read_json(context.home / "run" / "bank-r1" / f"{replica}.json")
    return procfs.process_id_from_body(body["guard"])


def test_the_workers_command_line():
    options = {"dtype": "float32", "max_model_len": 64, "flag": True}
    spec = replace(SPEC, options=options, adapters={"polite": "models:/polite/2"})
    assert worker_command(spec, "8100") == [
        *(sys.executable, "-m", "cloudlm.worker", "--model", "models:/bank/1"),
        *("--served-model-name", "bank", "--host", "127.0.0.1", "--port", "8100"),
        *("--engine", "cloudlm", "--adapter", "polite=models:/polite/2"),
        *("--option", "dtype=float32", "--option", "flag=true", "--option", "max_model_len=64"),
    ]


async def test_a_killed_guard_leaves_no_orphan_and_is_replaced(driver, context):
    await driver.apply(SPEC)
    before = await running(driver, 2)
    guard = guard_of(context, "bank-r1-0")
    child = procfs.identify(before[0].pid)
    procfs.send(guard, signal.SIGKILL)

    async def replaced():
        replica = (await driver.observe("bank-r1")).replicas[0]
        return replica.restarts == 1 and replica.pid not in (None, before[0].pid)

    await until(replaced)
    assert not procfs.alive(child)
    assert (await driver.observe("bank-r1")).replicas[1].pid == before[1].pid


async def test_what_a_killed_guard_started_elsewhere_is_killed_too(context, timing, processes_of):
    script = "setsid sleep 1000 & exec sleep 1000"
    driver = ProcessDriver(
        context, command_builder=lambda spec, port: ["sh", "-c", script], timing=timing
    )
    await driver.apply(replace(SPEC, replicas=1))

    async def three():
        return len(processes_of(context.home)) == 3  # guard, command, and the one in its session

    await until(three)
    before = processes_of(context.home)
    procfs.send(guard_of(context, "bank-r1-0"), signal.SIGKILL)

    async def replaced():
        await driver.observe("bank-r1")
        now = processes_of(context.home)
        return len(now) == 3 and not set(now) & set(before)

    await until(replaced)
    await driver.close()


async def test_the_owners_death_ends_every_process_within_two_seconds(
    driver, context, lifeline, processes_of
):
    await driver.apply(SPEC)
    await running(driver, 2)
    assert len(processes_of(context.home)) == 4
    lifeline.cut()

    async def none_left():
        return not processes_of(context.home)

    await until(none_left, timeout_s=2.0)
    assert [p.name for p in (context.home / "run" / "bank-r1").iterdir()] == ["group.json"]


async def test_a_pid_that_was_reused_is_never_killed(driver, context):
    """A state file of long ago names a pid that is somebody else's by now."""
    with subprocess.Popen(["sleep", "1000"]) as stranger:
        found = procfs.identify(stranger.pid).body()
        old = {**found, "start": found["start"] - 1}
        folder = context.home / "run" / "bank-r1"
        folder.mkdir(parents=True)
        spec = {**{f: getattr(SPEC, f) for f in SPEC.__dataclass_fields__}}
        write_json(folder / "group.json", {"spec": spec, "deleting": False})
        body = {"guard": old, "child": old, "token": "x" * 32, "phase": "running", "restarts": 4}
        write_json(folder / "bank-r1-0.json", body)
        await driver.stop_replica("bank-r1", "bank-r1-0")
        await driver.observe("bank-r1")
        assert (await driver.observe("bank-r1")).replicas[0].restarts == 5
        await driver.delete("bank-r1")
        assert stranger.poll() is None
        stranger.kill()


async def test_a_new_driver_starts_nothing_that_was_not_asked_of_it(driver, context):
    """After the owner's death only the wish is left; whether it still holds is control's to say."""
    folder = context.home / "run" / "bank-r1"
    folder.mkdir(parents=True)
    spec = {**{f: getattr(SPEC, f) for f in SPEC.__dataclass_fields__}}
    write_json(folder / "group.json", {"spec": spec, "deleting": False})
    assert (await driver.observe("bank-r1")).replicas == ()
    await driver.apply(SPEC)
    await running(driver, 2)


async def test_an_unreadable_group_belongs_to_nobody_and_can_be_deleted(driver, context):
    folder = context.home / "run" / "bank-r1"
    folder.mkdir(parents=True)
    (folder / "group.json").write_text("{ half")
    assert await driver.groups() == ["bank-r1"]
    assert (await driver.observe("bank-r1")).spec.deployment == ""
    await driver.delete("bank-r1")
    assert not folder.exists()


async def test_a_frozen_guard_does_not_hold_up_a_deletion_for_ever(
    context, server_command, timing, monkeypatch
):
    monkeypatch.setattr("cloudlm.drivers.guarded._GUARD_STOP_MARGIN_S", 0.2)
    timing = replace(timing, grace_s=0.1)
    driver = ProcessDriver(
        context, command_builder=lambda spec, port: server_command, timing=timing
    )
    await driver.apply(replace(SPEC, replicas=1))
    await running(driver, 1)
    procfs.send(guard_of(context, "bank-r1-0"), signal.SIGSTOP)
    await driver.delete("bank-r1")

    async def gone():
        return (await driver.observe("bank-r1")).spec is None

    await until(gone, timeout_s=15)
    await driver.close()


async def test_a_worker_gets_its_environment_and_no_other_secrets(context, timing):
    context.environment.update(
        CLOUDLM_STATE_URL="postgresql://secret", CLOUDLM_ENGINE_THREADS="3", EXTRA="0"
    )
    context.worker_environment["CLOUDLM_WORKER_TOKEN"] = "token"
    look = (
        "import os, json, time; print(json.dumps(dict(os.environ)), flush=True); time.sleep(1000)"
    )
    driver = ProcessDriver(
        context, command_builder=lambda spec, port: [sys.executable, "-c", look], timing=timing
    )
    await driver.apply(replace(SPEC, replicas=1, env={"EXTRA": "1", "CLOUDLM_WORKER_TOKEN": "no"}))

    async def said():
        return [line async for line in driver.logs("bank-r1")]

    await until(said)
    seen = json.loads((await said())[0])
    assert seen["EXTRA"] == "1"
    assert seen["CLOUDLM_WORKER_TOKEN"] == "token"
    assert seen["CLOUDLM_ENGINE_THREADS"] == "3"
    assert "CLOUDLM_STATE_URL" not in seen
    assert "CLOUDLM_LIFELINE_FD" not in seen
    await driver.close()


async def test_an_unwritable_home_is_a_clear_error(driver, context):
    (context.home / "run").write_text("a file where a folder should be")
    with pytest.raises(StorageFailed, match="free space or make"):
        await driver.apply(SPEC)


async def test_a_guard_that_cannot_start_is_a_failed_replica_not_an_exception(driver, context):
    (context.home / "logs").write_text("a file where a folder should be")
    await driver.apply(replace(SPEC, replicas=1))
    (replica,) = (await driver.observe("bank-r1")).replicas
    assert (replica.state, replica.misses) == (ReplicaState.FAILED, 1)
    assert "cannot start a guard" in replica.message
    assert not is_hopeless(replica)
    (context.home / "logs").unlink()
    await running(driver, 1)


async def test_without_a_given_lifeline_replicas_live_as_long_as_we(context, processes_of):
    """A control that nobody watches: its own death, however it comes, ends its replicas."""
    script = (
        "import asyncio, os, sys, pathlib\n"
        "from cloudlm.core.clock import SystemClock\n"
        "from cloudlm.core.deployment import GroupSpec\n"
        "from cloudlm.drivers.base import DriverContext\n"
        "from cloudlm.drivers.process import ProcessDriver\n"
        "async def main():\n"
        "    home = pathlib.Path(sys.argv[1])\n"
        "    env = {k: v for k, v in os.environ.items() if k != 'CLOUDLM_LIFELINE_FD'}\n"
        "    c = DriverContext(home, SystemClock(), env, {'CLOUDLM_HOME': str(home)}, 18700)\n"
        "    d = ProcessDriver(c, command_builder=lambda s, p: ['sleep', '1000'])\n"
        "    await d.apply(GroupSpec('a-r1', 'a', 1, 'models:/a/1', replicas=2))\n"
        "    await d.close()\n"
        "    print('up', flush=True)\n"
        "    await asyncio.sleep(1000)\n"
        "asyncio.run(main())\n"
    )
    command = [sys.executable, "-c", script, str(context.home)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=dict(os.environ)) as control:
        assert control.stdout.readline() == b"up\n"
        assert len(processes_of(context.home)) == 5
        control.kill()
        control.wait()

        async def none_left():
            return not processes_of(context.home)

        await until(none_left, timeout_s=2.0)
