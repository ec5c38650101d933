"""``cloudlm audit`` on this machine's own state."""

from __future__ import annotations

import asyncio
import io
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from cloudlm.cli.connect import open_local_state

Ok = Callable[..., Any]


def database() -> Path:
    async def where() -> Path:
        state, home = await open_local_state()
        await state.close()
        return home.path / "state.db"

    return asyncio.run(where())


@pytest.mark.promise(31)
def test_a_changed_record_and_a_cut_tail_are_named(ok: Ok, cli: Ok, tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        ok("keys", "create", "--local", "--name", name)
    assert "whole: 3 records" in ok("audit", "verify").stdout
    mark = tmp_path / "mark.jsonl"
    mark.write_text(ok("audit", "checkpoint").stdout)
    assert len(json.loads(ok("audit", "key", "--json").stdout)["public_key"]) == 64
    with sqlite3.connect(database()) as connection:
        connection.execute("UPDATE audit SET actor = 'nobody' WHERE seq = 2")
    connection.close()
    changed = cli("audit", "verify", "--json")
    assert changed.exit_code == 1
    assert json.loads(changed.stdout)["problem"]["seq"] == 2
    with sqlite3.connect(database()) as connection:
        connection.execute("DELETE FROM audit WHERE seq > 1")
        connection.execute(
            "UPDATE audit_head SET seq = 1, hash = (SELECT hash FROM audit WHERE seq = 1)"
        )
    connection.close()
    assert ok("audit", "verify").exit_code == 0  # nothing on this machine knows better
    cut = cli("audit", "verify", "--checkpoint", str(mark))
    assert cut.exit_code == 1
    assert "record 2: the tail is cut" in cut.stdout


def record(seq: int, detail: str = "") -> dict[str, Any]:
    return {
        "seq": seq, "at": 1.7e9 + seq, "actor": "principal-of-acme", "key_id": "d4e5f6a7b8c9",
        "target": "PUT /api/v1/deployments/helper-of-the-bank", "outcome": "done", "status": 200,
        "source": "127.0.0.1", "detail": detail,
    }  # fmt: skip


class TestList:
    def pages(self, control: Any, monkeypatch: pytest.MonkeyPatch, count: int) -> list[int]:
        """Control with so many records; gives back what was asked after."""
        asked: list[int] = []

        def handle(request: httpx2.Request) -> httpx2.Response:
            after, limit = (int(request.url.params[name]) for name in ("after", "limit"))
            asked.append(after)
            seqs = range(after + 1, min(count, after + limit) + 1)
            return httpx2.Response(200, json={"data": [record(seq) for seq in seqs]})

        monkeypatch.setattr(control, "handle", handle)
        return asked

    def test_the_newest_are_shown_in_order(
        self, control: Any, ok: Ok, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = self.pages(control, monkeypatch, 2500)
        shown = json.loads(ok("audit", "list", "--limit", "2", "--json").stdout)
        assert [one["seq"] for one in shown] == [2499, 2500]
        assert asked == [0, 1000, 2000, 2500]

    def test_after_a_number_pages_forward(
        self, control: Any, ok: Ok, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = self.pages(control, monkeypatch, 2500)
        for after in (0, 7):
            arguments = ("--after", str(after), "--limit", "2", "--json")
            shown = json.loads(ok("audit", "list", *arguments).stdout)
            assert [one["seq"] for one in shown] == [after + 1, after + 2]
        assert asked == [0, 7]

    def test_in_a_pipe_an_action_is_one_line(self, control: Any, ok: Ok) -> None:
        control.answers = {"GET /audit": {"data": [record(7), record(8, "no such\nmodel")]}}
        head, first, second = ok("audit", "list", "--after", "0").stdout.splitlines()
        assert head.split()[-1] == "DETAIL"
        assert first.split()[0] == "7"
        assert second.split()[0] == "8"
        assert second.endswith("no such model")

    def test_what_was_done_is_whole_and_details_stand_below(
        self, control: Any, ok: Ok, wide: Callable[[int], io.StringIO]
    ) -> None:
        control.answers = {"GET /audit": {"data": [record(12344), record(12345, "no such model")]}}
        text = wide(100)
        ok("audit", "list", "--after", "0")
        lines = text.getvalue().splitlines()
        assert all(len(line) <= 100 for line in lines)
        assert all(word in lines[-3] + lines[-5] for word in ("12344", "2023-11-1", "127.0.0.1"))
        assert sum(record(1)["target"] in line for line in lines) == 2
        assert lines[-1] == "12345: no such model"
        assert "DETAIL" not in text.getvalue()
