"""A whole installation over TLS: clients to gateway, gateway to workers, two gateway processes."""

from __future__ import annotations

import os
import signal
import ssl
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from installations import MODEL, QUESTION, Installation, processes_of, wait_for
from openai import DefaultHttpx2Client, OpenAI

from cloudlm.client import Client

pytestmark = pytest.mark.flow
SAID: Any = [{"role": "user", "content": QUESTION}]


def pids(home: Path, part: str) -> set[int]:
    return {pid for pid, command in processes_of(home).items() if part in command}


def test_everything_over_tls(
    own_installation: Callable[..., Installation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUDLM_WORKER_TLS", "mutual")
    one = own_installation("--tls", "self-signed", "--workers", "2")
    assert one.gateway.startswith("https://127.0.0.1:")
    trust = str(one.facts["certificate"])
    secure = ssl.create_default_context(cafile=trust)
    keys = [path for path in (one.home / "tls").iterdir() if b"PRIVATE" in path.read_bytes()]
    assert len(keys) == 4  # of the gateway's address, the authority, gateway and worker
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}

    with OpenAI(
        base_url=f"{one.gateway}/v1",
        api_key=one.key,
        max_retries=0,
        http_client=DefaultHttpx2Client(verify=secure, trust_env=False),
    ) as client:
        answer = client.chat.completions.create(model=MODEL, messages=SAID, temperature=0)
        text = answer.choices[0].message.content
        assert text
        stream = client.chat.completions.create(
            model=MODEL, messages=SAID, temperature=0, stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        assert "".join(pieces) == text

        (replica,) = one.replicas()
        assert replica["url"].startswith("https://")
        authority = ssl.create_default_context(cafile=str(one.home / "tls" / "ca.pem"))
        with pytest.raises(httpx2.HTTPError):  # the worker asks for a certificate
            httpx2.get(f"{replica['url']}/livez", verify=authority, trust_env=False, timeout=60)

        gateways = pids(one.home, "cloudlm.gateway --seat")
        assert len(gateways) == 2
        os.kill(min(gateways), signal.SIGKILL)
        for _ in range(5):  # a fresh connection each: the other process takes them
            with httpx2.Client(
                verify=secure, trust_env=False, base_url=one.gateway, timeout=60
            ) as fresh:
                assert fresh.get("/readyz").status_code == 200
        wait_for(
            "the killed process is replaced",
            lambda: len(pids(one.home, "cloudlm.gateway --seat") - {min(gateways)}) == 2,
        )

    monkeypatch.setenv("SSL_CERT_FILE", trust)
    with (
        Client(api_key=one.key, control_url=one.control, gateway_url=one.gateway) as sdk,
        sdk.openai() as inference,
    ):
        assert [model.id for model in inference.models.list()] == [MODEL]
    listed = one.cli("certificates", "list").stdout
    assert "worker-identity.pem" in listed
    out = one.home.parent / "out"
    one.cli("certificates", "issue", "worker", "--name", "10.0.0.5", "--to", str(out))
    assert sorted(path.name for path in out.iterdir()) == ["ca.pem", "worker.pem"]
    refused = one.cli("certificates", "issue", "printer", "--to", str(out), check=False)
    assert (refused.returncode, "'worker' nor 'gateway'" in refused.stderr) == (1, True)


def test_the_control_api_over_tls(
    own_installation: Callable[..., Installation], tmp_path: Path
) -> None:
    one = own_installation("--control-tls", "self-signed", "--no-starter")
    assert one.control.startswith("https://127.0.0.1:")
    # Commands of this home trust it by themselves.
    assert "no deployments" in one.cli("status").stderr
    elsewhere = {**one.environment, "CLOUDLM_HOME": str(tmp_path / "elsewhere")}
    refused = one.cli("status", check=False, env=elsewhere)
    assert refused.returncode == 1
    trusted = {**elsewhere, "CLOUDLM_CA": str(one.facts["control_certificate"])}
    assert "no deployments" in one.cli("status", env=trusted).stderr
