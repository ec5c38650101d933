"""Processes are told apart by pid and start time."""

from __future__ import annotations

import os
import signal
import subprocess

from cloudlm.drivers import procfs
from cloudlm.drivers.ports import PortReservation, port_is_free


def test_another_start_time_is_another_process():
    with subprocess.Popen(["sleep", "1000"]) as process:
        found = procfs.identify(process.pid)
        assert procfs.alive(found)
        stranger = found._replace(start=found.start + 1)
        assert not procfs.alive(stranger)
        assert not procfs.send(stranger, signal.SIGKILL)
        assert not procfs.send(found._replace(boot="another boot"), signal.SIGKILL)
        assert process.poll() is None
        assert procfs.send(found, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not procfs.send(found, signal.SIGKILL)


def test_a_zombie_is_not_alive(eventually):
    process = subprocess.Popen(["true"])
    eventually(lambda: procfs.identify(process.pid) is None)
    process.wait()


def test_bodies_are_read_back_and_nonsense_is_none():
    own = procfs.identify(os.getpid())
    assert procfs.process_id_from_body(own.body()) == own
    for nonsense in (None, {}, [], "x", {"pid": "x", "start": 1, "boot": "b"}):
        assert procfs.process_id_from_body(nonsense) is None


def test_the_token_finds_processes_in_other_sessions():
    environment = {**os.environ, procfs.TOKEN_VARIABLE: "t" * 32}
    with subprocess.Popen(["sleep", "1000"], env=environment, start_new_session=True) as process:
        assert [one.pid for one in procfs.with_token("t" * 32)] == [process.pid]
        assert procfs.with_token("t" * 31) == []
        assert procfs.kill_all_with_token("t" * 32) >= 1
        assert process.wait() == -signal.SIGKILL


def test_two_reservations_never_share_a_port():
    reservations = [PortReservation("127.0.0.1", 18400) for _ in range(5)]
    ports = [one.take() for one in reservations]
    assert len(set(ports)) == 5
    assert all(port_is_free("127.0.0.1", port) for port in ports)
    assert reservations[0].take() == ports[0]
    reservations[0].skip()
    assert reservations[0].take() > ports[0]
    for one in reservations:
        one.skip()
