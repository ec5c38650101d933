"""To zero and back with real processes: a thousand requests are held, one worker starts, all are
answered (promise 19)."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest
from installations import QUESTION, Installation, processes_of, wait_for
from watching import Watch

pytestmark = [pytest.mark.flow, pytest.mark.promise(19)]
COLD = "cold"
REQUESTS = 1000
SPEC = f"""
name: {COLD}
model: models:/bank-helper@champion
min_replicas: 0
max_replicas: 1
target_ongoing_requests: 16
scaling: {{idle_s: 2}}
"""


class Guards(Watch):
    """The guards of the deployment's replicas that lived at any moment, by process id."""

    def __init__(self, home: Path) -> None:
        super().__init__(every_s=0.2)
        self._home = home
        self.pids: set[int] = set()

    def look(self) -> None:
        for pid, command in processes_of(self._home).items():
            if "cloudlm.drivers.guard" in command and f"{COLD}-r" in command:
                self.pids.add(pid)


async def herd(running: Installation) -> list[tuple[int, str]]:
    """Status and body of so many requests at once."""
    body = {
        "model": COLD,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 2,
        "temperature": 0,
    }
    headers = {"authorization": f"Bearer {running.key}"}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:

        async def ask() -> tuple[int, str]:
            url = f"{running.gateway}/v1/chat/completions"
            async with session.post(url, json=body) as answer:
                return answer.status, await answer.text()

        return await asyncio.gather(*(ask() for _ in range(REQUESTS)))


@pytest.mark.promise(19)
def test_a_thousand_requests_wait_for_one_start(
    own_installation: Callable[..., Installation], tmp_path: Path
) -> None:
    running = own_installation()
    file = tmp_path / "cold.yaml"
    file.write_text(SPEC)
    running.cli("apply", "-f", str(file))
    assert running.replicas(COLD) == []
    assert "idle" in running.cli("status").stdout
    for _ in range(2):  # and again from zero
        with Guards(running.home) as watch:
            answers = asyncio.run(herd(running))
            counted = Counter(status for status, _ in answers)
            assert counted == {200: REQUESTS}, [text for code, text in answers if code != 200][:1]
            (replica,) = running.replicas(COLD)
            assert replica["restarts"] == 0
        assert len(watch.pids) == 1
        wait_for("nothing runs", lambda: not running.replicas(COLD), 150)
    used = json.loads(running.cli("usage", "--by", "model", "--json").stdout)
    assert [row["requests"] for row in used if row["model"] == COLD] == [2 * REQUESTS]
