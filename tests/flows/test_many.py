"""Four models on a machine with memory for two, with real processes: every request is answered, the
pinned one never goes, and never are there more workers than the budget holds."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest
from installations import MODEL, QUESTION, Installation, processes_of
from watching import Watch

pytestmark = [pytest.mark.flow, pytest.mark.timeout(300)]
NAMES = ("one", "two", "three")
ROUNDS = 2
MEMORY_MB = 900
SPEC = f"""
name: {{name}}
model: models:/bank-helper@champion
memory_mb: {MEMORY_MB}
"""


def parent_of(number: int) -> int:
    """The process that began this one, 0 if it is gone."""
    try:
        facts = Path(f"/proc/{number}/stat").read_text("utf-8")
    except OSError:
        return 0
    return int(facts.rpartition(")")[2].split()[1])


class Workers(Watch):
    """The most workers that lived at one moment."""

    def __init__(self, home: Path) -> None:
        super().__init__(every_s=0.1)
        self._home = home
        self.most = 0
        self.named: set[str] = set()

    def look(self) -> None:
        workers = {
            number: command
            for number, command in processes_of(self._home).items()
            if "-m cloudlm.worker --model" in command and "cloudlm.drivers.guard" not in command
        }
        # A process that a worker begins looks like the worker until it has become what it will be.
        own = [number for number in workers if parent_of(number) not in workers]
        self.most = max(self.most, len(own))
        for name in (MODEL, *NAMES):
            if any(f"--served-model-name {name} " in one for one in workers.values()):
                self.named.add(name)


async def ask_all(running: Installation, rounds: int) -> list[tuple[str, int, str]]:
    """Rounds of requests for all models at once: name, status and body of each."""
    headers = {"authorization": f"Bearer {running.key}"}
    async with aiohttp.ClientSession(headers=headers) as session:

        async def ask(name: str) -> tuple[str, int, str]:
            body = {
                "model": name,
                "messages": [{"role": "user", "content": QUESTION}],
                "max_tokens": 4,
                "temperature": 0,
            }
            url = f"{running.gateway}/v1/chat/completions"
            async with session.post(url, json=body) as answer:
                return name, answer.status, await answer.text()

        found = []
        for _ in range(rounds):
            found += await asyncio.gather(*(ask(name) for name in (MODEL, *NAMES) * 4))
        return found


def test_four_models_are_served_from_memory_for_two(
    own_installation: Callable[..., Installation],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CLOUDLM_CONTROL_MEMORY_BUDGET", f"{2 * MEMORY_MB + 300}MiB")
    monkeypatch.setenv("CLOUDLM_CONTROL_MIN_RESIDENCY_S", "1")
    running = own_installation()
    file = tmp_path / "many.yaml"
    file.write_text("---".join(SPEC.format(name=name) for name in NAMES))
    with Workers(running.home) as watch:
        running.cli("apply", "-f", str(file))
        answers = asyncio.run(ask_all(running, ROUNDS))
    wrong = [one for one in answers if one[1] != 200]
    assert not wrong, wrong[:1]
    assert Counter(name for name, *_ in answers) == dict.fromkeys((MODEL, *NAMES), 4 * ROUNDS)
    assert watch.most <= 2
    assert watch.named == {MODEL, *NAMES}
    shown = running.cli("status").stdout
    assert "GiB held; " in shown
    assert "unloaded" in shown

    refused = running.cli(
        *("deploy", "models:/bank-helper@champion", "--name", "huge", "--memory-mb", "99999"),
        check=False,
    )
    assert refused.returncode != 0
    assert "memory budget" in refused.stderr

    running.cli("deploy", "models:/bank-helper@champion", "--name", "kept", "--pinned")
    first = running.replicas("kept")[0]
    again = asyncio.run(ask_all(running, 1))
    assert Counter(status for _, status, _ in again) == {200: 4 * 4}
    (after,) = running.replicas("kept")
    assert (after["pid"], after["restarts"]) == (first["pid"], 0)
    rows = json.loads(running.cli("status", "--json").stdout)
    pinned = {row["spec"]["name"]: row["status"]["residence"] for row in rows}
    assert pinned["kept"] == "resident"
