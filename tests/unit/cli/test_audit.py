"""``cloudlm audit`` on this machine's own state."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
