"""SIGKILL of the replica in the middle of a stream: the answer is, byte for byte, the one that
would have come."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from installations import (
    MODEL,
    QUESTION,
    Installation,
    start_installation,
    stop_installation,
    wait_for,
)

pytestmark = [pytest.mark.flow, pytest.mark.timeout(240)]

CHAT = {"messages": [{"role": "user", "content": QUESTION}]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": ("chat/completions", {**CHAT, "temperature": 0, "max_tokens": 70}),
    "seeded": ("chat/completions", {**CHAT, "temperature": 1.0, "seed": 5, "max_tokens": 70}),
    "logprobs": (
        "chat/completions",
        {**CHAT, "seed": 6, "max_tokens": 70, "logprobs": True, "top_logprobs": 2},
    ),
    "several": ("chat/completions", {**CHAT, "seed": 7, "max_tokens": 50, "n": 2}),
    "text": ("completions", {"prompt": QUESTION, "seed": 8, "max_tokens": 70, "echo": True}),
    "schema": (
        "chat/completions",
        {**CHAT, "seed": 9, "max_tokens": 70, "structured_outputs": {"regex": "[a-z ]{80}"}},
    ),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    running = start_installation(tmp_path_factory.mktemp("resume") / "home")
    try:
        running.cli("scale", MODEL, "2")
        ready(running)
        yield running
    finally:
        stop_installation(running)


def ready(running: Installation) -> list[dict[str, Any]]:
    def both() -> list[dict[str, Any]]:
        found = [one for one in running.replicas() if one["state"] == "ready"]
        return found if len(found) == 2 else []

    return list(wait_for("two ready replicas", both, 60))


def stream(
    running: Installation, path: str, fields: dict[str, Any], kill_after: int | None
) -> tuple[list[Any], str]:
    """The events of a stream, and its request id. After so many, its replica is killed."""
    victims = {one["id"]: one["pid"] for one in ready(running)}
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"model": MODEL, "ignore_eos": True, **fields, "stream": True, "stream_options": options}
    found: list[Any] = []
    with running.http() as client, client.stream("POST", f"/v1/{path}", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if not line.startswith("data: "):
                continue
            data = line.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
            if len(found) == kill_after:
                os.kill(victims[answer.headers["x-cloudlm-replica"]], signal.SIGKILL)
    return found, answer.headers["x-request-id"]


def plain(events: list[Any]) -> Any:
    """Events without what differs from request to request; several choices apart."""
    found: dict[Any, list[Any]] = {}
    for event in events:
        if isinstance(event, str):
            found.setdefault("end", []).append(event)
            continue
        assert "error" not in event, event
        usage = event.pop("usage")
        event.pop("id"), event.pop("created")
        choice = event["choices"][0]["index"] if event["choices"] else "end"
        found.setdefault(choice, []).append(rounded(event))
        if choice == "end":
            found["usage"] = [usage["prompt_tokens"], usage["completion_tokens"]]
    return found


def rounded(value: Any) -> Any:
    """Log probabilities as far as a sum in another order is the same."""
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list) else value


@pytest.mark.promise(1, 3)
@pytest.mark.parametrize("case", CASES)
def test_kill_in_the_stream(two: Installation, case: str) -> None:
    path, fields = CASES[case]
    events, _ = stream(two, path, fields, None)
    assert events[-1] == "[DONE]"
    total = events[-2]["usage"]
    whole = plain(events)
    for cut in (2, 45) if case == "greedy" else (45,):
        events, request_id = stream(two, path, fields, cut)
        assert len({event["id"] for event in events[:-1]}) == 1
        assert plain(events) == whole, cut

        def rows(request_id: str = request_id) -> list[dict[str, Any]]:
            found = [row for row in ledger(two.home) if row["request_id"] == request_id]
            return found if any(row["outcome"] == "finished" for row in found) else []

        mine = wait_for("the ledger's rows", rows)
        assert sum(row["completion_tokens"] for row in mine) == total["completion_tokens"]
        assert sum(row["prompt_tokens"] for row in mine) == total["prompt_tokens"]


@pytest.mark.promise(1, 11)
def test_a_stopped_replica_is_a_stall(tmp_path: Path) -> None:
    """SIGSTOP: the connection stays open, and nothing comes."""
    os.environ["CLOUDLM_GATEWAY_IDLE_TIMEOUT_S"] = "1"
    try:
        running = start_installation(tmp_path / "home")
    finally:
        del os.environ["CLOUDLM_GATEWAY_IDLE_TIMEOUT_S"]
    try:
        running.cli("scale", MODEL, "2")
        pids = {one["id"]: one["pid"] for one in ready(running)}
        fields = {**CHAT, "model": MODEL, "stream": True, "temperature": 0, "ignore_eos": True}
        fields["max_tokens"] = 300
        with running.http() as client:
            whole = text_of(client, fields, None)
            assert text_of(client, fields, pids) == whole
    finally:
        stop_installation(running)


def text_of(client: httpx2.Client, fields: Any, pids: dict[str, int] | None) -> str:
    text = ""
    stopped = 0
    with client.stream("POST", "/v1/chat/completions", json=fields) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                text += event["choices"][0]["delta"].get("content") or ""
                if pids and not stopped and len(text) > 40:
                    stopped = pids[answer.headers["x-cloudlm-replica"]]
                    os.kill(stopped, signal.SIGSTOP)
    if stopped:
        os.kill(stopped, signal.SIGKILL)
    return text


def ledger(home: Path) -> list[dict[str, Any]]:
    with sqlite3.connect(home / "state.db") as database:
        database.row_factory = sqlite3.Row
        return [dict(row) for row in database.execute("select * from ledger")]
