"""What is killed is noticed, named and replaced; what is left leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from installations import MODEL, QUESTION, Installation, processes_of, wait_for

pytestmark = pytest.mark.flow

LONG = {
    "model": MODEL,
    "messages": [{"role": "user", "content": QUESTION}],
    "stream": True,
    "ignore_eos": True,
    "max_tokens": 400,
}


def ledger(home: Path) -> list[dict[str, Any]]:
    """The ledger rows as any reader of the database sees them."""
    with sqlite3.connect(home / "state.db") as database:
        database.row_factory = sqlite3.Row
        return [dict(row) for row in database.execute("select * from ledger")]


def events_of(body: str) -> list[str]:
    return [line[6:] for line in body.splitlines() if line.startswith("data: ")]


@pytest.mark.promise(11)
def test_a_killed_worker_ends_its_streams_with_an_error_and_is_replaced(
    own_installation: Callable[..., Installation],
) -> None:
    running = own_installation()
    (before,) = running.replicas()
    with running.http() as client:
        with client.stream("POST", "/v1/chat/completions", json=LONG) as stream:
            assert stream.status_code == 200
            lines = stream.iter_lines()
            read = [next(lines) for _ in range(20)]
            os.kill(before["pid"], signal.SIGKILL)
            read.extend(lines)
        events = events_of("\n".join(read))
        assert "error" in json.loads(events[-1])
        assert "[DONE]" not in events
        assert not any('"finish_reason": "stop"' in event.replace(":", ": ") for event in events)

        def answered() -> bool:
            body = {**LONG, "stream": False, "ignore_eos": False}
            return client.post("/v1/chat/completions", json=body).status_code == 200

        wait_for("an answer of a new worker", answered, 150)
    (after,) = running.replicas()
    assert after["pid"] != before["pid"]
    rows = wait_for("ledger rows", lambda: ledger(running.home))
    failed = [row for row in rows if row["outcome"] == "failed" and row["completion_tokens"] > 0]
    assert len(failed) == 1
    content = [e for e in events[:-1] if json.loads(e)["choices"][0]["delta"].get("content")]
    assert failed[0]["completion_tokens"] >= len(content) - 1


@pytest.mark.promise(26)
def test_gateway_and_other_streams_do_not_notice_a_killed_control(
    own_installation: Callable[..., Installation],
) -> None:
    running = own_installation()
    control = [
        pid
        for pid, command in processes_of(running.home).items()
        if command.rstrip().endswith("-m cloudlm.control") and "guard" not in command
    ]
    (before,) = running.replicas()
    with running.http() as client, client.stream("POST", "/v1/chat/completions", json=LONG) as s:
        lines = s.iter_lines()
        read = [next(lines) for _ in range(10)]
        os.kill(control[0], signal.SIGKILL)
        read.extend(lines)
    assert events_of("\n".join(read))[-1] == "[DONE]"

    def adopted() -> bool:
        try:
            return [replica["pid"] for replica in running.replicas()] == [before["pid"]]
        except OSError:
            return False
        except Exception as error:  # control is not up again yet
            return "Connect" not in type(error).__name__ and False

    wait_for("a new control that adopts the worker", adopted, 150)


@pytest.mark.promise(2)
@pytest.mark.known_failure("vllm#54947", "vllm#24584")
def test_a_client_that_leaves_frees_the_worker(
    own_installation: Callable[..., Installation],
) -> None:
    running = own_installation()
    (replica,) = running.replicas()
    token = (running.home / "secrets" / "worker-token").read_text().strip()

    def busy() -> int:
        import httpx2

        answer = httpx2.get(
            f"{replica['url']}/health?verbose=1",
            headers={"authorization": f"Bearer {token}"},
            timeout=60,
        )
        return int(answer.json()["running"]) + int(answer.json()["waiting"])

    with running.http() as client:
        for stream in (True, False):
            body = {**LONG, "stream": stream, "n": 8, "max_tokens": 450}
            abandoned = threading.Thread(target=_send_and_leave, args=(running, body), daemon=True)
            abandoned.start()
            wait_for("the worker to be busy", busy)
            abandoned.join(30)
            wait_for("the worker to be free", lambda: busy() == 0)
        assert client.get("/v1/models").status_code == 200


def _send_and_leave(running: Installation, body: dict[str, Any]) -> None:
    """Send a request over a bare socket, and close it half a second later."""
    import socket
    from urllib.parse import urlsplit

    address = urlsplit(running.gateway)
    payload = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {address.netloc}\r\n"
        f"authorization: Bearer {running.key}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(payload)}\r\n\r\n"
    ).encode()
    with socket.create_connection((str(address.hostname), int(address.port or 0))) as connection:
        connection.sendall(head + payload)
        time.sleep(0.5)


@pytest.mark.parametrize("whom", ["parent", "everything"])
def test_after_kill_9_nothing_is_left_and_all_starts_again(
    own_installation: Callable[..., Installation], whom: str
) -> None:
    running = own_installation()
    with running.http() as client:
        with client.stream("POST", "/v1/chat/completions", json=LONG) as stream:
            next(stream.iter_lines())
            if whom == "parent":
                running.process.kill()
            else:
                for pid in processes_of(running.home):
                    os.kill(pid, signal.SIGKILL)
            running.process.wait(60)
            wait_for("the end of every process", lambda: not processes_of(running.home))
    assert not any(path.suffix == ".tmp" for path in running.home.rglob("*"))
    if whom == "parent":  # everybody else could still clean up
        assert [path for path in running.home.rglob("*") if path.suffix == ".lock"] == []
        assert [path for path in running.home.glob("run/*/*") if path.name != "group.json"] == []
    with sqlite3.connect(running.home / "state.db") as database:
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)
    again = own_installation(home=running.home)
    again.facts["admin_key"] = running.key
    with again.openai() as client2:
        answer = client2.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": QUESTION}]
        )
    assert answer.choices[0].message.content
