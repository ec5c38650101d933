"""A worker that demands a certificate, asked by those that have one and those that have none."""

from __future__ import annotations

import json
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cloudlm.control.naps import HttpTurner
from cloudlm.control.probe import HttpProber
from cloudlm.core.errors import CloudlmError
from cloudlm.core.settings import GatewaySettings, Settings, WorkerSettings
from cloudlm.engine.api import EngineStats
from cloudlm.security.authority import Authority, Purpose
from cloudlm.security.tls import client_context
from cloudlm.security.transport import replica_context
from cloudlm.worker.__main__ import read_config
from cloudlm.worker.app import EXIT_FAILED, run_worker
from cloudlm.worker.config import WorkerConfig


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    made = Authority(tmp_path / "tls")
    made.ensure(Purpose.GATEWAY, (), time.time())
    return made


@pytest.fixture
def url(
    config: WorkerConfig, authority: Authority, serving_of: Any, echo_engine: Any
) -> Iterator[str]:
    """The address of a worker in a thread, which serves over mutual TLS."""
    engine, ready, urls = echo_engine(), threading.Event(), list[str]()
    identity = authority.ensure(Purpose.WORKER, (), time.time())
    tls = WorkerSettings(tls_cert=str(identity), tls_client_ca=str(authority.certificate))

    async def load(_: WorkerConfig, tell: Callable[[float, str], None]) -> Any:
        return serving_of(engine)

    def on_ready(address: str) -> None:
        urls.append(address)
        ready.set()

    told = replace(config, token="secret", port=0, settings=Settings(worker=tls), on_ready=on_ready)
    thread = threading.Thread(target=lambda: run_worker(told, load=load))
    thread.start()
    assert ready.wait(20)
    yield urls[0]
    engine.now = EngineStats(alive=False)  # it notices, and ends by itself
    thread.join(20)


def ask(url: str, context: ssl.SSLContext, token: str = "secret") -> Any:
    headers = {"authorization": f"Bearer {token}"}
    request = urllib.request.Request(f"{url}/v1/models", headers=headers)
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
    with opener.open(request, timeout=60) as answer:
        return json.loads(answer.read())


async def test_only_the_installations_gateway_gets_through(url: str, authority: Authority) -> None:
    assert url.startswith("https://127.0.0.1:")
    own = replica_context(GatewaySettings(), authority.folder)
    assert ask(url, own)["data"][0]["id"] == "echo"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        ask(url, own, token="wrong")  # a certificate is no key
    nobody = client_context([(str(authority.certificate), "x")], None)
    with pytest.raises(OSError, match=r"(?i)certificate required|reset|EOF|without response"):
        ask(url, nobody)
    with pytest.raises(OSError):
        ask(url.replace("https", "http"), own)

    async with HttpProber(2.0, own) as prober, HttpProber(2.0, nobody) as stranger:
        assert (await prober.probe(url)).ready
        assert not (await stranger.probe(url)).reachable
    async with HttpTurner("secret", own) as turner, HttpTurner("secret") as other:
        with pytest.raises(CloudlmError, match="did not answer"):
            await other.turn(url, asleep=True)
        await turner.turn(url, asleep=True)
        await turner.turn(url, asleep=False)


def test_flags_and_bad_files(
    tmp_path: Path, config: WorkerConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", "m", "--ssl-certfile", "c.pem", "--tls-key", "k.pem", "--ssl-ca-certs", "a"]
    worker = read_config(flags, {"CLOUDLM_WORKER_TLS_CERT": "other"}).settings.worker
    assert (worker.tls_cert, worker.tls_key, worker.tls_client_ca) == ("c.pem", "k.pem", "a")
    bad = WorkerSettings(tls_cert=str(tmp_path / "none.pem"))
    assert run_worker(replace(config, port=0, settings=Settings(worker=bad))) == EXIT_FAILED
    said = capsys.readouterr().err
    assert said.startswith("cloudlm worker: worker.tls_cert names")
    assert len(said.splitlines()) == 1
