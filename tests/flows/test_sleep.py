"""A deployment is put to sleep and woken by the command line, with real processes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from installations import MODEL, QUESTION, Installation, wait_for

pytestmark = pytest.mark.flow
ASKED = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}


def status(running: Installation) -> dict[str, Any]:
    shown = json.loads(running.cli("status", MODEL, "--json").stdout)
    return dict(shown[0]["status"])


def test_asleep_it_refuses_survives_a_crash_and_answers_as_before(
    own_installation: Callable[..., Installation],
) -> None:
    running = own_installation()
    with running.http() as client:
        before = client.post("/v1/chat/completions", json=ASKED).json()["choices"]
        running.cli("sleep", MODEL)
        found = status(running)
        assert found["phase"] == "sleeping"
        (replica,) = found["replicas"]
        assert (replica["state"], replica["restarts"]) == ("sleeping", 0)
        refused = client.post("/v1/chat/completions", json=ASKED)
        assert refused.status_code == 503
        assert "retry-after" not in refused.headers  # only a person can wake it
        assert refused.json()["error"]["code"] == "model_asleep"
        assert "cloudlm wake" in refused.json()["error"]["message"]

        os.kill(replica["pid"], signal.SIGKILL)

        def asleep_again() -> bool:
            (now,) = running.replicas()
            return now["pid"] not in (None, replica["pid"]) and now["state"] == "sleeping"

        wait_for("a new worker that sleeps", asleep_again, 150)
        assert client.post("/v1/chat/completions", json=ASKED).status_code == 503

        running.cli("wake", MODEL)
        assert status(running)["phase"] == "ready"

        def answers() -> bool:
            return client.post("/v1/chat/completions", json=ASKED).status_code == 200

        wait_for("an answer", answers)
        assert client.post("/v1/chat/completions", json=ASKED).json()["choices"] == before
