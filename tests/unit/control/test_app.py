"""The control process as a process: it starts, refuses, ends and starts again."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request

import pytest

from cloudlm.client import Client
from cloudlm.control.app import worker_environment
from cloudlm.core.errors import AuthenticationFailed, CloudlmError
from cloudlm.security.authority import ensure_self_signed
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
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=60).status
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


class TestTls:
    """The control API over TLS, as its clients meet it."""

    def test_what_it_shows_is_trusted_and_renewed(self, start, tmp_path):
        port = free_port()
        process = start(port, CLOUDLM_CONTROL_TLS="self-signed")
        trust = tmp_path / "home" / "tls" / "control-cert.pem"
        wait_until(trust.exists, process)
        shown = wait_until(lambda: peer(port, trust), process)
        url = f"https://127.0.0.1:{port}"
        with Client(api_key="clm_live_x", control_url=url, ca=str(trust)) as client:
            with pytest.raises(AuthenticationFailed):  # TLS is through; the key is not
                client.whoami()
        with Client(api_key="clm_live_x", control_url=url) as client:
            with pytest.raises(CloudlmError):
                client.whoami()
        with pytest.raises(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=60)
        ensure_self_signed(trust.parent, ["new.example"], time.time(), "control")
        wait_until(lambda: peer(port, trust) not in (None, shown), process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0

    def test_a_certificate_of_ones_own(self, start, tmp_path):
        port = free_port()
        pem = ensure_self_signed(tmp_path / "own", [], time.time(), "control")
        process = start(port, CLOUDLM_CONTROL_TLS_CERT=str(pem))
        assert wait_until(lambda: peer(port, pem.with_name("control-cert.pem")), process)

    def test_one_that_cannot_serve_is_said_in_one_line(self, start, tmp_path):
        process = start(free_port(), CLOUDLM_CONTROL_TLS_CERT=str(tmp_path / "none.pem"))
        assert process.wait(timeout=30) == 1
        (line,) = process.stderr.read().splitlines()
        assert "control.tls_cert" in line


def wait_until(check, process):
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        found = check()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"it did not happen: {process.poll()}")


def peer(port, trust):
    """The certificate that is shown, None while there is none that ``trust`` vouches for."""
    try:
        context = ssl.create_default_context(cafile=str(trust))
        with (
            socket.create_connection(("127.0.0.1", port), timeout=60) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as secured,
        ):
            return secured.getpeercert(binary_form=True)
    except OSError:
        return None
