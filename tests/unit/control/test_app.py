"""The control process as a process: it starts, refuses, ends and starts again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from cloudlm.control.app import worker_environment
from cloudlm.state.home import Home, load_settings

pytestmark = pytest.mark.flow


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def start(tmp_path):
    """Start control processes with one home; end them afterwards."""
    started = []

    def run(port, **environment):
        process = subprocess.Popen(
            [sys.executable, "-m", "cloudlm.control"],
            env={
                **os.environ,
                "CLOUDLM_HOME": str(tmp_path / "home"),
                "CLOUDLM_CONTROL_PORT": str(port),
                **environment,
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()
        process.stderr.close()


def wait_ready(port, process):
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2).status
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"control did not start: {process.poll()} {process.stderr.read()}")


def test_start_stop_and_start_again_after_a_kill(start, tmp_path):
    port = free_port()
    first = start(port)
    assert wait_ready(port, first) == 200
    lock = tmp_path / "home" / "run" / "control.lock"
    assert lock.exists()

    second = start(free_port())
    assert second.wait(timeout=30) == 1
    assert "another control runs already" in second.stderr.read()

    first.kill()
    first.wait()
    third = start(port)
    assert wait_ready(port, third) == 200
    third.send_signal(signal.SIGTERM)
    assert third.wait(timeout=30) == 0
    assert not lock.exists()


def test_a_port_in_use_is_said_in_one_line(start):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start(port)
        assert process.wait(timeout=30) == 1
        (line,) = process.stderr.read().splitlines()
        assert f"cannot listen on 127.0.0.1 port {port}" in line
        assert "CLOUDLM_CONTROL_PORT" in line


def test_a_bad_setting_and_a_bad_host_are_said_in_one_line(start):
    for environment in ({"CLOUDLM_CONTROL_PORT": "many"}, {"CLOUDLM_CONTROL_HOST": "no such"}):
        process = start(0, **environment)
        assert process.wait(timeout=30) == 1
        assert len(process.stderr.read().splitlines()) == 1


def test_workers_are_given_what_they_need_and_no_more(tmp_path):
    home = Home(tmp_path / "home").ensure()
    flags = {"home": str(home.path), "engine.threads": 3, "state.url": "sqlite:///x.db"}
    settings, rows = load_settings(flags, {})
    given = worker_environment(settings, rows, home)
    assert given == {
        "CLOUDLM_HOME": str(home.path),
        "CLOUDLM_WORKER_TOKEN": home.worker_token(),
        "CLOUDLM_REGISTRY_URL": str(home.path / "registry"),
        "CLOUDLM_ENGINE_THREADS": "3",
    }
