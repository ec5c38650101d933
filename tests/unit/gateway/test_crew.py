"""Several gateway processes on one port: real ones, killed, stopped, counted together."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cloudlm.core.access import Limits
from cloudlm.core.clock import ManualClock
from cloudlm.core.deployment import DeploymentSpec, Endpoint
from cloudlm.core.tenant import LedgerRow, Outcome, Role
from cloudlm.gateway.channel import Channel, attend
from cloudlm.gateway.crew import LONGEST_PAUSE_S, Seat, pause_s
from cloudlm.gateway.desk import Cooling, Desk, joined
from cloudlm.security.keys import mint
from cloudlm.state.home import Home, load_settings
from cloudlm.state.open import open_state

BODY = b'{"model":"tiny","messages":[{"role":"user","content":"hi"}]}'
STREAM = BODY.replace(b"{", b'{"stream":true,', 1)


def test_numbers_of_all_processes_are_one_text() -> None:
    one = '# HELP a_total Of a.\n# TYPE a_total counter\na_total{m="x{ y"} 1.0\n'
    other = one.replace(" 1.0", " 2.0") + "# HELP b Of b.\n# TYPE b gauge\nb 3.0\n"
    text = joined({1: other, 0: one}).decode()
    assert text.splitlines() == [
        "# HELP a_total Of a.",
        "# TYPE a_total counter",
        'a_total{worker="0",m="x{ y"} 1.0',
        'a_total{worker="1",m="x{ y"} 2.0',
        "# HELP b Of b.",
        "# TYPE b gauge",
        'b{worker="1"} 3.0',
    ]
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert [sample.value for sample in families["a"].samples] == [1.0, 2.0]


def test_pauses_grow_and_are_bounded() -> None:
    pauses = [pause_s(failures) for failures in range(1, 40)]
    assert pauses[0] <= 0.1
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE_S


def test_a_seat_survives_the_command_line() -> None:
    seat = Seat(3, 7, 9)
    assert Seat.read(seat.arguments[1]) == seat
    for text in ("", "1,2", "a,b,c", "1,2,3,4"):
        with pytest.raises(ValueError):
            Seat.read(text)


@pytest.mark.promise(28)
async def test_what_a_replica_asks_of_one_process_all_do() -> None:
    """Promise 28: a time to be left alone holds at once in every process."""
    desk = Desk(ManualClock())
    heard: dict[int, list[tuple[str, float]]] = {0: [], 1: [], 2: []}
    attending, channels = [], []
    for number in heard:
        ours, theirs = socket.socketpair()
        attending.append(
            asyncio.create_task(
                attend(
                    ours,
                    lambda what, data, number=number: desk.hear(number, what, data),
                    lambda tell, number=number: desk.seated(number, tell),
                )
            )
        )
        channels.append(await Channel.open(theirs))
    cooling = [
        Cooling(channel, lambda replica, wait_s, n=number: heard[n].append((replica, wait_s)))
        for number, channel in enumerate(channels)
    ]
    for channel in channels:  # all are seated once the parent has answered each
        await channel.ask("numbers", "", dict[int, str])
    try:
        cooling[0].tell("chat-r1-0", 17.5)
        for channel in channels:
            await channel.ask("numbers", "", dict[int, str])
        async with asyncio.timeout(60):
            while not (heard[1] and heard[2]):
                await asyncio.sleep(0.01)
        assert heard == {0: [], 1: [("chat-r1-0", 17.5)], 2: [("chat-r1-0", 17.5)]}
        desk.gone(1)
        cooling[2].tell("chat-r1-1", 1.0)
        async with asyncio.timeout(60):
            while not heard[0]:
                await asyncio.sleep(0.01)
        assert len(heard[1]) == 1
    finally:
        for channel in channels:
            await channel.close()
        await asyncio.gather(*attending)


@dataclass
class Crew:
    """A parent with its processes, in front of a scriptable replica."""

    home: Path
    port: int
    process: subprocess.Popen[str]
    replica: Any
    free_key: str
    limited_key: str

    def workers(self) -> list[int]:
        """The processes' ids."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()]

    async def ask(self, key: str = "", body: bytes = BODY) -> tuple[int, bytes]:
        """One request on a connection of its own: status, and all that came."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
            + f"authorization: Bearer {key or self.free_key}\r\n".encode()
            + b"content-length: %d\r\n\r\n%s" % (len(body), body)
        )
        said = b""
        try:
            with contextlib.suppress(ConnectionError):
                said = await asyncio.wait_for(reader.read(), 60)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        return int(said.split()[1]) if said else 0, said

    async def numbers(self) -> dict[tuple[str, str], float]:
        """Metrics by name and process, whatever their other labels."""

        def read() -> str:
            url = f"http://127.0.0.1:{self.port}/metrics"
            return str(urllib.request.urlopen(url, timeout=60).read().decode())

        found: dict[tuple[str, str], float] = {}
        for family in text_string_to_metric_families(await asyncio.to_thread(read)):
            for sample in family.samples:
                key = (sample.name, sample.labels["worker"])
                found[key] = found.get(key, 0.0) + sample.value
        return found

    async def rows(self) -> list[LedgerRow]:
        settings, _ = load_settings({"home": str(self.home)}, {})
        state = await open_state(Home(self.home).state_url(settings))
        try:
            return await state.list_ledger()
        finally:
            await state.close()

    async def until(self, check: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + 90
        while True:
            found = check()
            if await found if asyncio.iscoroutine(found) else found:
                return
            assert time.monotonic() < deadline, what
            await asyncio.sleep(0.05)


def start(home: Path, port: int, **settings: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "CLOUDLM_HOME": str(home),
        "CLOUDLM_GATEWAY_PORT": str(port),
        "CLOUDLM_GATEWAY_WORKERS": "2",
        "CLOUDLM_GATEWAY_DRAIN_TIMEOUT_S": "2",
        **settings,
    }
    command = [sys.executable, "-m", "cloudlm.gateway"]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
async def crew(kit: Any, tmp_path: Path, free_port: int) -> AsyncIterator[Crew]:
    replica = kit.MockReplica("tiny-r1-0")
    await replica.start()
    home = Home(tmp_path).ensure()
    settings, _ = load_settings({"home": str(tmp_path)}, {})
    state = await open_state(home.state_url(settings))
    keys = []
    for limits in (Limits(), Limits(requests_per_minute=7)):
        minted = mint("k", Role.USER, home.pepper(), 1.0, limits=limits)
        await state.put_key(minted.record)
        keys.append(minted.text)
    await state.put_deployment(DeploymentSpec("tiny", "models:/m/1"), now=1.0)
    await state.put_endpoints("tiny", [Endpoint("tiny", replica.name, replica.url, 1)])
    await state.close()
    process = start(tmp_path, free_port)
    running = Crew(tmp_path, free_port, process, replica, *keys)
    try:
        await running.until(lambda: len(running.workers()) == 2, "two processes")

        async def both() -> bool:
            with contextlib.suppress(OSError):
                return len({worker for _, worker in await running.numbers()}) == 2
            return False

        await running.until(both, "both processes answer")
        yield running
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
        await replica.stop()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.promise(22)
@pytest.mark.flow
async def test_both_answer_count_and_account_together(crew: Crew) -> None:
    answers = await asyncio.gather(*(crew.ask() for _ in range(64)))
    assert {status for status, _ in answers} == {200}
    limited = await asyncio.gather(*(crew.ask(crew.limited_key) for _ in range(30)))
    assert sorted(status for status, _ in limited) == [200] * 7 + [429] * 23

    async def told() -> bool:
        numbers = await crew.numbers()
        name = "cloudlm_gateway_requests_total"
        served = [numbers.get((name, worker), 0.0) for worker in ("0", "1")]
        assert sum(served) <= 94
        return sum(served) == 94 and min(served) > 0

    await crew.until(told, "both processes served, and either tells of both")

    async def written() -> bool:
        return len(await crew.rows()) == 71

    await crew.until(written, "one ledger row for each attempt")
    workers = crew.workers()
    crew.process.send_signal(signal.SIGTERM)
    _, said = await asyncio.to_thread(crew.process.communicate, timeout=60)
    assert crew.process.returncode == 0, said
    assert not any(alive(pid) for pid in workers)
    assert list((crew.home / "ledger").iterdir()) == []


@pytest.mark.promise(3)
@pytest.mark.flow
async def test_one_is_killed_and_service_goes_on(crew: Crew, kit: Any) -> None:
    """kill -9 of one process: the other answers, a new one takes its place, no row is lost."""
    crew.replica.default = kit.Plan(tokens=10, stall_at=6)
    streams = [asyncio.create_task(crew.ask(body=STREAM)) for _ in range(12)]
    await crew.until(lambda: crew.replica.active == 12, "all streams run")
    await asyncio.sleep(4.0)  # by now what they got so far is noted
    crew.replica.default = kit.Plan()
    victim, *others = crew.workers()
    os.kill(victim, signal.SIGKILL)
    await crew.until(lambda: not alive(victim), "its end")
    lost = 0
    for _ in range(20):
        status, _ = await crew.ask()
        lost += status != 200
    assert lost == 0
    await crew.until(lambda: len(crew.workers()) == 2, "a new process takes the place")
    assert set(others) < set(crew.workers())
    for stream in streams:
        stream.cancel()
    await asyncio.gather(*streams, return_exceptions=True)

    async def written() -> bool:
        rows = await crew.rows()
        assert len({row.id for row in rows}) == len(rows) <= 32
        return len(rows) == 32

    await crew.until(written, "a row for every attempt, those of the killed process too")
    rows = await crew.rows()
    ended = [row.outcome for row in rows]
    assert ended.count(Outcome.FINISHED) == 20
    failed = [row for row in rows if row.outcome is Outcome.FAILED]
    assert {row.completion_tokens for row in failed} == {5}  # the killed one's
    assert len(failed) + ended.count(Outcome.CANCELLED) == 12


@pytest.mark.flow
async def test_a_killed_parent_leaves_nothing(crew: Crew) -> None:
    workers = crew.workers()
    crew.process.kill()
    await asyncio.to_thread(crew.process.communicate, timeout=60)
    await crew.until(lambda: not any(alive(pid) for pid in workers), "the processes end too")


@pytest.mark.flow
@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("CLOUDLM_GATEWAY_TLS_CERT", "/none.pem", "gateway.tls_cert names /none.pem"),
        ("CLOUDLM_GATEWAY_WORKERS", "0", "gateway.workers"),
    ],
)
async def test_a_bad_setting_is_told_once(
    tmp_path: Path, free_port: int, name: str, value: str, match: str
) -> None:
    process = start(tmp_path, free_port, **{name: value})
    _, said = await asyncio.to_thread(process.communicate, timeout=30)
    assert process.returncode == 1
    assert [match in line for line in said.splitlines()] == [True]
