"""One cloudlm in front of another, as real processes: its model is an endpoint of the first's."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from installations import (
    MODEL,
    QUESTION,
    Installation,
    processes_of,
    start_installation,
    stop_installation,
    wait_for,
)
from openai import APIStatusError

pytestmark = pytest.mark.flow
MESSAGES: Any = [{"role": "user", "content": QUESTION}]
SECRET = "next-door"


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """The installation that serves the model."""
    running = start_installation(tmp_path_factory.mktemp("behind") / "home")
    yield running
    stop_installation(running)


@pytest.fixture(scope="module")
def key(behind: Installation) -> str:
    """A key of the one behind, which the one in front is given."""
    made = behind.cli("keys", "create", "--name", "front", "--role", "user", "--json")
    return str(json.loads(made.stdout)["key"])


@pytest.fixture(scope="module")
def front(
    tmp_path_factory: pytest.TempPathFactory, behind: Installation, key: str
) -> Iterator[Installation]:
    """The installation in front, with a replica of its own too."""
    home = tmp_path_factory.mktemp("front") / "home"
    home.mkdir(mode=0o700)
    (home / "config.yaml").write_text(
        "external: {networks: 127.0.0.0/8, probe_interval_s: 1}\n"
        f"gateway: {{routes: 'both = far > {MODEL}'}}\n"
        "log: {level: debug}\n"
    )
    running = start_installation(home)
    running.cli("secrets", "set", SECRET, "--for", behind.gateway, input=key)
    running.cli(
        *("deploy", MODEL, "--name", "far", "--endpoint", f"{behind.gateway}/v1"),
        *("--secret", SECRET),
    )
    yield running
    code = stop_installation(running)
    assert code == 0
    assert processes_of(home) == {}


def test_the_answer_is_the_one_behind(front: Installation, behind: Installation) -> None:
    with front.openai() as ours, behind.openai() as theirs:
        far = ours.chat.completions.create(model="far", messages=MESSAGES, temperature=0)
        near = theirs.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0)
    assert far.choices[0].message.content == near.choices[0].message.content
    assert far.model == "far"
    assert far.usage is not None
    assert near.usage is not None
    assert far.usage.completion_tokens == near.usage.completion_tokens


def test_a_stream_comes_through(front: Installation) -> None:
    with front.openai() as client:
        chunks = list(
            client.chat.completions.create(
                model="far",
                messages=MESSAGES,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    assert {chunk.model for chunk in chunks} == {"far"}
    assert sum(bool(chunk.choices and chunk.choices[0].delta.content) for chunk in chunks) > 1
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 1


def test_it_is_shown_and_accounted(front: Installation, behind: Installation) -> None:
    (shown,) = json.loads(front.cli("status", "far", "--json").stdout)
    assert shown["status"]["phase"] == "ready"
    (replica,) = shown["status"]["replicas"]
    assert (replica["state"], replica["url"]) == ("ready", f"{behind.gateway}/v1")
    assert "external" in front.cli("drivers").stdout

    def booked() -> bool:
        rows = json.loads(front.cli("usage", "--by", "model", "--json").stdout)
        found = rows["data"] if isinstance(rows, dict) else rows
        return any(row.get("model") == "far" for row in found)

    wait_for("a row of the ledger", booked)


def test_a_key_that_is_revoked_there_is_our_trouble(
    front: Installation, behind: Installation, key: str
) -> None:
    front.cli("secrets", "set", SECRET, "--for", behind.gateway, input="clm_live_wrong")
    try:
        with front.openai() as client, pytest.raises(APIStatusError) as refused:
            client.chat.completions.create(model="far", messages=MESSAGES)
        assert refused.value.status_code in (502, 503)

        def failing() -> bool:
            return "does not accept the key" in front.cli("status").stdout

        wait_for("the look at the endpoint", failing)
    finally:
        front.cli("secrets", "set", SECRET, "--for", behind.gateway, input=key)
    wait_for("a good look", lambda: " ready " in front.cli("status", "far").stdout, 150)


def test_the_key_is_kept_in_one_place(front: Installation, key: str) -> None:
    """Promise 32: the key is in no file of the home but its own, nor in what the servers say."""
    secret = key.split("_")[3].encode()
    (own,) = (front.home / "secrets" / "endpoints").iterdir()
    assert secret in own.read_bytes()
    files = [path for path in front.home.rglob("*") if path.is_file() and path != own]
    assert len(files) > 10
    assert not [str(path) for path in files if secret in path.read_bytes()]
    for address in (front.gateway, front.control):
        assert secret not in httpx2.get(f"{address}/metrics", timeout=60).content
    for pid in processes_of(front.home):
        assert secret not in Path(f"/proc/{pid}/environ").read_bytes()


def test_own_replicas_stand_in_when_it_is_gone(front: Installation, behind: Installation) -> None:
    with front.openai() as client:
        asked = client.chat.completions.with_raw_response.create(model="both", messages=MESSAGES)
        assert asked.headers["x-cloudlm-model"] == "far"
        for pid in processes_of(behind.home):
            os.kill(pid, signal.SIGKILL)
        for _ in range(3):
            asked = client.chat.completions.with_raw_response.create(
                model="both", messages=MESSAGES
            )
            assert asked.headers["x-cloudlm-model"] == MODEL
    wait_for("the endpoint's failure", lambda: "cannot be reached" in front.cli("status").stdout)
