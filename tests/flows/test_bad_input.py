"""Bad input over the wire: a true status in OpenAI's shape, and nothing falls over."""

from __future__ import annotations

import json
import socket
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from installations import MODEL, QUESTION, Installation

pytestmark = pytest.mark.flow

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}]}

FIELDS: list[tuple[dict[str, Any], int, str | None]] = [
    ({"max_tokens": -5}, 400, "max_tokens"),
    ({"max_tokens": 10**12}, 400, "max_tokens"),
    ({"max_tokens": 100_000}, 400, None),
    ({"n": -1}, 400, "n"),
    ({"n": 10**6}, 400, "n"),
    ({"logprobs": 5}, 400, "logprobs"),
    ({"logprobs": True, "top_logprobs": 10**6}, 400, "top_logprobs"),
    ({"stop": ["x" * 10_000]}, 400, "stop"),
    ({"stop": ["x"] * 1000}, 400, "stop"),
    ({"logit_bias": {"1": 1e9}}, 400, "logit_bias"),
    ({"logit_bias": {"99999999": 1}}, 400, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(5000)}}, 400, "logit_bias"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"role": "user", "content": "card " * 3000}]}, 400, None),
    ({"model": "nobody"}, 404, None),
    ({"model": 5}, 400, "model"),
]


@pytest.mark.parametrize(("fields", "status", "param"), FIELDS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_field(
    installation: Installation, fields: dict[str, Any], status: int, param: str | None, stream: bool
) -> None:
    with installation.http() as client:
        answer = client.post("/v1/chat/completions", json={**CHAT, "stream": stream, **fields})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    if param:
        assert error["param"] == param


def test_the_long_prompt_error_names_both_numbers(installation: Installation) -> None:
    body = {**CHAT, "messages": [{"role": "user", "content": "card " * 3000}]}
    with installation.http() as client:
        message = client.post("/v1/chat/completions", json=body).json()["error"]["message"]
    assert "512" in message
    assert any(
        number.isdigit() and int(number) > 3000 for number in message.replace(",", "").split()
    )


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"not json",
        b'{"model": "\xff\xfe"}',
        b"[" * 100_000,
        b'{"messages":' * 50_000,
        b"null",
    ],
)
def test_a_bad_body(installation: Installation, raw: bytes) -> None:
    with installation.http() as client:
        answer = client.post("/v1/chat/completions", content=raw)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.promise(18)
def test_a_body_of_ten_megabytes(installation: Installation) -> None:
    with installation.http() as client:
        answer = client.post("/v1/chat/completions", content=b"x" * 10_000_000)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "payload_too_large"


@pytest.mark.parametrize(
    "header", [None, "Bearer", "Bearer x", "Bearer clm_live_a_b_c", "Basic eA==", "' OR 1=1 --"]
)
def test_a_bad_key(installation: Installation, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header}
    answers = set()
    for url in (f"{installation.gateway}/v1/models", f"{installation.control}/api/v1/keys"):
        answer = httpx2.get(url, headers=headers, timeout=60)
        assert answer.status_code == 401
        answers.add(answer.json()["error"]["message"])
    assert len(answers) == 1


@pytest.mark.promise(33)
def test_a_revoked_key_is_refused_soon(installation: Installation) -> None:
    made = json.loads(installation.cli("keys", "create", "--name", "short", "--json").stdout)
    headers = {"authorization": f"Bearer {made['key']}"}
    from installations import wait_for

    def status() -> int:
        return httpx2.get(
            f"{installation.gateway}/v1/models", headers=headers, timeout=60
        ).status_code

    wait_for("the new key to work", lambda: status() == 200)
    installation.cli("keys", "revoke", made["record"]["id"])
    wait_for("the revoked key to be refused", lambda: status() == 401)


def test_a_user_key_may_not_administrate(installation: Installation) -> None:
    made = json.loads(installation.cli("keys", "create", "--role", "user", "--json").stdout)
    answer = httpx2.get(
        f"{installation.control}/api/v1/keys",
        headers={"authorization": f"Bearer {made['key']}"},
        timeout=60,
    )
    assert answer.status_code == 403


@pytest.mark.promise(6)
@pytest.mark.parametrize(
    "raw",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x00\x01\x02\x03\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer \xff\xfe\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
    ],
)
def test_bytes_that_are_no_request(installation: Installation, raw: bytes) -> None:
    address = urlsplit(installation.gateway)
    with socket.create_connection((str(address.hostname), int(address.port or 0)), 5) as wire:
        wire.sendall(raw)
        wire.settimeout(5)
        answer = wire.recv(4096)
    assert answer.startswith(b"HTTP/1.1 4")


def test_everything_still_answers(installation: Installation) -> None:
    with installation.openai() as client:
        answer = client.chat.completions.create(**CHAT)
    assert answer.choices[0].message.content
    assert all(replica["restarts"] == 0 for replica in installation.replicas())
