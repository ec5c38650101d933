"""The command line in this process, against a control API that is a table of answers."""

from __future__ import annotations

import io
import json
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from cloudlm.cli import audit, connect, deployments, keys, rollouts, screen
from cloudlm.cli.main import app
from cloudlm.client import Client

KEY = "clm_live_test"


@pytest.fixture(autouse=True)
def logging_as_before(restored_logging: None) -> None:
    """Commands that compute here, such as ``models perplexity``, set up logging."""


@dataclass
class FakeControl:
    """``answers`` maps "METHOD /path" to JSON, a response, an error of the transport, or a
    ``deque`` of those: one after another, the last one again."""

    answers: dict[str, Any] = field(default_factory=dict)
    requests: list[tuple[str, Any]] = field(default_factory=list)

    def handle(self, request: httpx2.Request) -> httpx2.Response:
        what = f"{request.method} {request.url.path.removeprefix('/api/v1')}"
        self.requests.append((what, json.loads(request.content) if request.content else None))
        answer = self.answers.get(what)
        if isinstance(answer, deque):
            answer = answer.popleft() if len(answer) > 1 else answer[0]
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, httpx2.Response):
            headers, content = answer.headers.copy(), answer.content
            return httpx2.Response(answer.status_code, headers=headers, content=content)
        if answer is None:
            return refused(404, f"there is no {what}", "not_found")
        return httpx2.Response(200, json=answer)

    def client(self) -> Client:
        return Client(
            api_key=KEY, transport=httpx2.MockTransport(self.handle), sleep=lambda _seconds: None
        )

    def sent(self, what: str) -> Any:
        """The body of the one such request."""
        (body,) = [body for asked, body in self.requests if asked == what]
        return body


def refused(status: int, message: str, code: str) -> httpx2.Response:
    return httpx2.Response(status, json={"error": {"message": message, "code": code}})


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, and nothing of the developer's own environment."""
    for name in ("API_KEY", "CONTROL_URL", "GATEWAY_URL", "CONFIG", "STATE_URL", "REGISTRY_URL"):
        monkeypatch.delenv(f"CLOUDLM_{name}", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    path = tmp_path / "home"
    monkeypatch.setenv("CLOUDLM_HOME", str(path))
    return path


@pytest.fixture
def control(monkeypatch: pytest.MonkeyPatch) -> FakeControl:
    fake = FakeControl()
    for module in (audit, connect, deployments, keys, rollouts):
        monkeypatch.setattr(module, "control_client", fake.client)
    monkeypatch.setattr(deployments, "gateway_notes", lambda _connection: [])
    return fake


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], io.StringIO]:
    """Results go to a terminal of so many columns, whose text is given back."""

    def make(columns: int) -> io.StringIO:
        text = io.StringIO()
        console = Console(
            file=text, force_terminal=True, width=columns, highlight=False, markup=False,
            emoji=False, color_system=None,
        )  # fmt: skip
        monkeypatch.setattr(screen, "out", console)
        return text

    return make


@pytest.fixture
def cli() -> Iterator[Callable[..., Result]]:
    """Run a command; raises what is no orderly end, as ``main`` would have to translate it."""

    def run(*arguments: str, input: str | None = None) -> Result:
        return CliRunner().invoke(app, list(arguments), input=input)

    yield run


@pytest.fixture
def ok(cli: Callable[..., Result]) -> Callable[..., Result]:
    """Run a command that must succeed."""

    def run(*arguments: str, input: str | None = None) -> Result:
        result = cli(*arguments, input=input)
        assert result.exit_code == 0, f"{result.output}{result.exception!r}"
        return result

    return run


@pytest.fixture
def deployment() -> Callable[..., dict[str, Any]]:
    """A deployment as the control API shows it."""

    def make(
        name: str = "helper", *, phase: str | None = "ready", message: str = "", low: int = 1
    ) -> dict[str, Any]:
        replica = {"id": f"{name}-r1-0", "state": "ready", "url": "http://127.0.0.1:8100"}
        replica |= {"pid": 42, "restarts": 0, "message": message, "started_at": 1.0}
        status = {"name": name, "phase": phase, "observed_generation": 1, "wanted_replicas": low}
        status |= {"ready_replicas": low, "replicas": [replica], "message": message}
        return {
            "spec": {"name": name, "model": "models:/bank/1", "min_replicas": low},
            "generation": 1,
            "revision": 1,
            "deleting": False,
            "created_at": 1.0,
            "updated_at": 1.0,
            "status": status if phase else None,
        }

    return make
