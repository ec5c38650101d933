"""Two controls with real processes on one state: the leader is stopped, the other takes over, and
the stopped one does no harm when it goes on. Promise 25."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from installations import MODEL, Installation, processes_of, wait_for
from postgres_server import running_postgres

from cloudlm.core.lease import Lease
from cloudlm.state.open import open_state

pytestmark = [pytest.mark.flow, pytest.mark.timeout(300)]
LEASE_S = "6"


def lease_at(state_url: str) -> Lease:
    async def read() -> Lease:
        state = await open_state(state_url)
        try:
            return await state.get_lease("control")
        finally:
            await state.close()

    return asyncio.run(read())


def running_in(home: Path, what: str) -> list[int]:
    """The processes of a home that run a module themselves; their guards name it too."""
    return [
        pid for pid, command in processes_of(home).items() if command.split()[1:3] == ["-m", what]
    ]


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def state_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The state of both controls; PostgreSQL where its binaries are found."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'shared.db'}"
        return
    with running_postgres() as server:
        yield server.url(server.new_database())


@pytest.fixture
def second(
    tmp_path: Path, state_url: str
) -> Iterator[Callable[[Installation], subprocess.Popen[bytes]]]:
    """Start a control with a home of its own on an installation's state and registry."""
    home = tmp_path / "second"
    reading, writing = os.pipe()
    started: list[subprocess.Popen[bytes]] = []

    def start(first: Installation) -> subprocess.Popen[bytes]:
        environment = {
            **first.environment,
            "CLOUDLM_HOME": str(home),
            "CLOUDLM_STATE_URL": state_url,
            "CLOUDLM_REGISTRY_URL": str(first.home / "registry"),
            "CLOUDLM_WORKER_FIRST_PORT": "18700",
            "CLOUDLM_LIFELINE_FD": str(reading),
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "cloudlm.control"],
            env=environment,
            pass_fds=[reading],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
    os.close(writing)  # its replicas end with the lifeline
    wait_for("no process of the second home", lambda: not processes_of(home))
    os.close(reading)


@pytest.mark.promise(25)
def test_a_stopped_leader_is_followed_and_does_no_harm_when_it_goes_on(
    own_installation: Callable[..., Installation],
    second: Callable[[Installation], subprocess.Popen[bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    state_url: str,
) -> None:
    monkeypatch.setenv("CLOUDLM_CONTROL_LEASE_S", LEASE_S)
    monkeypatch.setenv("CLOUDLM_STATE_URL", state_url)
    first = own_installation()
    there = tmp_path / "second"
    other = second(first)
    assert f":{first.home}#" in lease_at(state_url).holder
    (leader,) = running_in(first.home, "cloudlm.control")
    assert len(running_in(first.home, "cloudlm.worker")) == 1
    os.kill(leader, signal.SIGSTOP)
    try:
        wait_for("the other to lead", lambda: f":{there}#" in lease_at(state_url).holder)
        wait_for("its replica", lambda: running_in(there, "cloudlm.worker"))
        token = lease_at(state_url).token
    finally:
        os.kill(leader, signal.SIGCONT)
    # It finds itself overtaken: its replica goes, since the leader elsewhere cannot see it.
    wait_for("one replica", lambda: not running_in(first.home, "cloudlm.worker"), 150)
    assert len(running_in(there, "cloudlm.worker")) == 1
    assert lease_at(state_url).token == token
    assert "this control stands by" in first.cli("status").stdout
    other.send_signal(signal.SIGTERM)  # a clean end gives the lease back
    assert other.wait(60) == 0
    wait_for("the first to lead", lambda: f":{first.home}#" in lease_at(state_url).holder)
    wait_for("its replica", lambda: running_in(first.home, "cloudlm.worker"))
    wait_for("an answer", lambda: [one["state"] for one in first.replicas()] == ["ready"], 150)
    assert MODEL in first.cli("status").stdout
