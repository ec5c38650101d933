"""New revisions take over from old ones by the command line, with real processes under load."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from installations import MODEL, QUESTION, Installation, processes_of, wait_for

pytestmark = [pytest.mark.flow, pytest.mark.timeout(300), pytest.mark.promise(20)]
CLIENTS = 2
ASKED = {
    "model": MODEL,
    "messages": [{"role": "user", "content": QUESTION}],
    "stream": True,
    "ignore_eos": True,
    "max_tokens": 60,
}


class Load:
    """Clients that ask for streams one after the other until told to stop; ``failures`` are the
    answers that no client wants."""

    def __init__(self, running: Installation) -> None:
        self._running = running
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(CLIENTS)]
        self.answered: Counter[str] = Counter()
        self.failures: list[str] = []

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def revisions(self) -> set[str]:
        """The revisions that answered so far."""
        return {replica.rsplit("-", 2)[1] for replica in self.answered}

    def _ask(self) -> None:
        with self._running.http() as client:
            while not self._stop.is_set():
                try:
                    self._one(client)
                except httpx2.HTTPError as error:
                    self.failures.append(repr(error))

    def _one(self, client: httpx2.Client) -> None:
        with client.stream("POST", "/v1/chat/completions", json=ASKED) as stream:
            if stream.status_code != 200:
                stream.read()
                self.failures.append(f"{stream.status_code} {stream.text[:300]}")
                return
            data = [line[6:] for line in stream.iter_lines() if line.startswith("data: ")]
        if data[-1:] != ["[DONE]"] or any('"error"' in one for one in data):
            self.failures.append(str(data[-2:]))
        self.answered[stream.headers["x-cloudlm-replica"]] += 1


def deploy(running: Installation, *more: str, check: bool = True) -> Any:
    return running.cli("deploy", f"{MODEL}@champion", "--name", MODEL, *more, check=check)


def rollout(running: Installation) -> dict[str, Any]:
    return dict(json.loads(running.cli("rollout", "status", MODEL, "--json").stdout))


def history(running: Installation) -> list[tuple[int, str]]:
    data = json.loads(running.cli("rollout", "history", MODEL, "--json").stdout)
    return [(one["revision"], one["outcome"]) for one in data]


@pytest.mark.promise(20)
def test_rolling_there_and_back_under_load_drops_nothing(
    own_installation: Callable[..., Installation],
) -> None:
    """Promise 20."""
    running = own_installation()
    running.cli("scale", MODEL, "2")
    with Load(running) as load:
        wait_for("first answers", lambda: len(load.answered) == 2)
        deploy(running, "--replicas", "2:2", "--option", "max_model_len=480")
        wait_for("answers of the new revision", lambda: "r2" in load.revisions())
        running.cli("rollout", "undo", MODEL)
        running.cli("rollout", "status", MODEL, "--wait", "--timeout", "90")
    assert load.failures == []
    assert sum(load.answered.values()) > 2 * CLIENTS
    assert history(running) == [(2, "rolled_back"), (1, "promoted")]
    assert [one["id"] for one in running.replicas()] == [f"{MODEL}-r1-0", f"{MODEL}-r1-1"]


@pytest.mark.promise(20)
def test_blue_green_and_a_scale_down_under_load_drop_nothing(
    own_installation: Callable[..., Installation],
) -> None:
    """Promise 20."""
    running = own_installation()
    running.cli("scale", MODEL, "2")
    with Load(running) as load:
        wait_for("first answers", lambda: len(load.answered) == 2)
        running.cli("scale", MODEL, "1")
        strategy = {"strategy": "blue_green", "bake_s": 1}
        spec = {"name": MODEL, "model": f"models:/{MODEL}@champion", "rollout": strategy}
        spec["options"] = {"max_model_len": 480}
        running.cli("apply", "-f", "-", input=json.dumps(spec))
        wait_for("answers of the new revision", lambda: "r2" in load.revisions())
    assert load.failures == []
    assert sum(load.answered.values()) > 2 * CLIENTS
    assert history(running) == [(2, "promoted"), (1, "promoted")]
    assert [one["id"] for one in running.replicas()] == [f"{MODEL}-r2-0"]


@pytest.mark.promise(25)
def test_a_bad_canary_is_rolled_back_by_itself_though_control_is_killed(
    own_installation: Callable[..., Installation],
) -> None:
    """A window too small for the prompts: the new revision refuses them. Control is killed once
    the canary answers; its successor goes on where it was."""
    running = own_installation()
    spec = {
        "name": MODEL,
        "model": f"models:/{MODEL}@champion",
        "options": {"max_model_len": 16},
        "rollout": {
            "strategy": "canary",
            "steps": [{"percent": 50, "duration_s": 600}],
            "min_requests": 6,
            "max_error_rate": 0.4,
        },
    }
    running.cli("apply", "-f", "-", "--no-wait", input=json.dumps(spec))

    def split() -> bool:
        return bool(rollout(running)["percent"])

    wait_for("the canary's share", split, 150)
    for pid in control_of(running.home):
        os.kill(pid, signal.SIGKILL)
    with Load(running) as load:
        wait_for("a refused request", lambda: load.failures)

        def back() -> bool:
            done = running.cli("rollout", "status", MODEL, "--json", check=False)
            return done.returncode == 0 and json.loads(done.stdout)["target"] == 1

        wait_for("the way back", back, 150)
        wait_for("the canary's end", lambda: len(running.replicas()) == 1)
        before = len(load.failures)
        answers = sum(load.answered.values())
        wait_for("more answers", lambda: sum(load.answered.values()) > answers + 6)
        assert len(load.failures) <= before + CLIENTS  # those that were on their way
    assert all(one.startswith("400") for one in load.failures)
    found = running.cli("rollout", "history", MODEL).stdout
    assert "attempts failed" in found
    assert history(running) == [(2, "rolled_back"), (1, "promoted")]
    (replica,) = running.replicas()
    assert replica["id"] == f"{MODEL}-r1-0"
    assert replica["restarts"] == 0
    shown = running.cli("status", MODEL).stdout
    assert "revision 2 was rolled back" in shown


def test_who_waits_for_a_canary_that_never_starts_is_told(
    own_installation: Callable[..., Installation],
) -> None:
    running = own_installation()
    done = deploy(running, "--canary", "50:1", "--option", "no_such_setting=1", check=False)
    assert done.returncode == 1
    assert f"revision 2 of '{MODEL}' was rolled back" in done.stderr
    assert history(running) == [(2, "rolled_back"), (1, "promoted")]
    with running.http() as client:
        answer = client.post("/v1/chat/completions", json={**ASKED, "stream": False})
    assert answer.status_code == 200


def control_of(home: Path) -> list[int]:
    return [
        pid
        for pid, command in processes_of(home).items()
        if command.rstrip().endswith("-m cloudlm.control") and "guard" not in command
    ]
