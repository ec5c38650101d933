"""A LoRA adapter from a PEFT folder to answers through the gateway, with real processes."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from installations import MODEL, QUESTION, Installation, wait_for
from peft_folder import write_adapter

pytestmark = pytest.mark.flow
ASKED = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 16}


def test_an_adapter_from_import_to_ledger(
    own_installation: Callable[..., Installation], tmp_path: Path
) -> None:
    running = own_installation()
    folder = write_adapter(tmp_path / "polite")
    assert (
        "--adapter polite=models:/polite/1" in running.cli("models", "import", str(folder)).stderr
    )
    shown = json.loads(running.cli("models", "show", "polite", "--json").stdout)
    assert shown["task"] == "adapter"
    alone = running.cli("deploy", "models:/polite/1", "--name", "alone", check=False)
    assert "is a LoRA adapter and cannot be deployed alone" in alone.stderr
    adapters = ("--adapter", "polite=models:/polite/1")
    taken = running.cli(
        *("deploy", "models:/bank-helper/1", "--name", "bank"),
        *("--adapter", f"{MODEL}=models:/polite/1"),
        check=False,
    )
    assert "is taken by the deployment" in taken.stderr
    running.cli("deploy", "models:/bank-helper/1", "--name", "bank", *adapters)
    with running.http() as client:

        def answer(model: str) -> Any:
            said = client.post("/v1/chat/completions", json={**ASKED, "model": model})
            return said.json() if said.status_code == 200 else None

        polite = wait_for("an answer of the adapter", lambda: answer("polite"))
        plain = answer("bank")
        assert polite["model"] == "polite"
        assert polite["choices"] != plain["choices"]
        assert plain["choices"][0]["message"] == answer(MODEL)["choices"][0]["message"]
        listed = {one["id"]: one for one in client.get("/v1/models").json()["data"]}
        assert listed["polite"]["parent"] == "bank"
        assert "parent" not in listed["bank"]

        (replica,) = running.replicas("bank")
        os.kill(replica["pid"], signal.SIGKILL)

        def answers_anew() -> bool:
            (now,) = running.replicas("bank")
            return now["pid"] != replica["pid"] and answer("polite") is not None

        wait_for("a new worker with the adapter", answers_anew, 150)
        assert answer("polite")["choices"] == polite["choices"]

    def in_ledger() -> bool:
        with sqlite3.connect(running.home / "state.db") as database:
            rows = database.execute("select replica, outcome from ledger where model = 'polite'")
            return ("bank-r1-0", "finished") in rows.fetchall()

    kept = running.cli("models", "rm", "models:/polite/1", check=False)
    assert "is used by deployment bank" in kept.stderr
    wait_for("a ledger row that names the adapter", in_ledger)
