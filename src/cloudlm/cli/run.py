"""``cloudlm run``: chat with a model in the terminal.

Starts a worker of its own for the time of the chat, on loopback, with a key that nobody else
knows, under a guard: nothing is left running when the chat ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cloudlm.cli.screen import out, print_json, say, spinner
from cloudlm.cli.serve import default_name
from cloudlm.core.errors import ContextLengthExceeded, Unavailable, error_from_body
from cloudlm.drivers.guard import LIFELINE_VARIABLE
from cloudlm.state.home import Home, load_settings

if TYPE_CHECKING:
    from openai import OpenAI

START_TIMEOUT_S = 600.0


def add_to(app: typer.Typer) -> None:
    app.command("run")(run)


def run(
    model: Annotated[str, typer.Argument(help="A folder, models:/name/3, name, org/name…")],
    prompt: Annotated[
        str | None, typer.Argument(help="Ask this and end; otherwise chat until Ctrl-D.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, max=2.0)] = 0.7,
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="Engine setting.")
    ] = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print JSON, one answer per line.")
    ] = False,
) -> None:
    """Chat with a model in the terminal; questions may also come from standard input."""
    from openai import OpenAI

    with (
        private_worker(model, option or []) as (url, key),
        OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client,
    ):
        chat = Chat(client, default_name(model), system, temperature, json_output)
        if prompt is not None:
            chat.ask(prompt)
            return
        if sys.stdin.isatty():
            say("Ask away; Ctrl-D ends, /clear forgets the conversation.")
        for question in _questions():
            if question == "/clear":
                chat.clear()
            else:
                chat.ask(question)


def _questions() -> Iterator[str]:
    """Lines from the terminal with a prompt, or from a pipe without one."""
    while True:
        try:
            line = input(">>> ") if sys.stdin.isatty() else sys.stdin.readline()
        except EOFError:
            return
        if not sys.stdin.isatty() and not line:
            return
        if line.strip():
            yield line.strip()


class Chat:
    """One conversation; forgets its oldest turns when the model's context is full."""

    def __init__(
        self, client: OpenAI, model: str, system: str | None, temperature: float, json_output: bool
    ) -> None:
        self._client = client
        self._model = model
        self._opening = [{"role": "system", "content": system}] if system else []
        self._temperature = temperature
        self._json = json_output
        self._turns: list[dict[str, str]] = []

    def clear(self) -> None:
        self._turns = []

    def ask(self, question: str) -> None:
        """Stream the answer to the terminal. Raises the server's error."""
        self._turns.append({"role": "user", "content": question})
        while True:
            try:
                answer = self._stream()
                break
            except ContextLengthExceeded:
                if len(self._turns) <= 2:
                    raise
                self._turns = self._turns[2:]
        self._turns.append({"role": "assistant", "content": answer})
        if self._json:
            print_json({"question": question, "answer": answer})

    def _stream(self) -> str:
        from openai import APIStatusError

        messages: Any = [*self._opening, *self._turns]
        try:
            stream = self._client.chat.completions.create(
                model=self._model, messages=messages, temperature=self._temperature, stream=True
            )
        except APIStatusError as error:
            body = error.body if isinstance(error.body, dict) else {}
            raise error_from_body(error.status_code, {"error": body}) from None
        pieces: list[str] = []
        for chunk in stream:
            piece = chunk.choices[0].delta.content if chunk.choices else None
            if piece:
                pieces.append(piece)
                if not self._json:
                    out.print(piece, end="", markup=False)
        if not self._json:
            out.print()
        return "".join(pieces)


@contextlib.contextmanager
def private_worker(model: str, options: list[str]) -> Iterator[tuple[str, str]]:
    """A worker for this process alone: (address, key). Raises Unavailable with its last words."""
    settings, _ = load_settings()
    home = Home(settings.home).ensure()
    key = secrets.token_urlsafe(24)
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, False)
    with tempfile.TemporaryDirectory(prefix="run-", dir=home.run, ignore_cleanup_errors=True) as at:
        state, log = Path(at) / "worker.json", Path(at) / "worker.log"
        command = [sys.executable, "-m", "cloudlm.drivers.guard", "--state", str(state)]
        command += ["--log", str(log), "--first-port", str(settings.worker.first_port)]
        command += ["--", sys.executable, "-m", "cloudlm.worker", "--model", model]
        command += ["--served-model-name", default_name(model), "--port", "{port}"]
        for pair in options:
            command += ["--option", pair]
        environment = {
            **os.environ,
            LIFELINE_VARIABLE: str(read_end),
            "CLOUDLM_HOME": str(home.path),
            "CLOUDLM_REGISTRY_URL": home.registry_url(settings),
            "CLOUDLM_WORKER_TOKEN": key,
        }
        guard = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, pass_fds=(read_end,)
        )
        try:
            yield _wait_ready(guard, state, log), key
        finally:
            guard.terminate()
            os.close(write_end)
            os.close(read_end)
            guard.wait()


def _wait_ready(guard: subprocess.Popen[bytes], state: Path, log: Path) -> str:
    import httpx2

    deadline = time.monotonic() + START_TIMEOUT_S
    with spinner("loading"):
        while time.monotonic() < deadline and guard.poll() is None:
            with contextlib.suppress(OSError, ValueError, KeyError, httpx2.HTTPError):
                port = json.loads(state.read_text("utf-8"))["port"]
                url = f"http://127.0.0.1:{port}"
                if httpx2.get(f"{url}/readyz", timeout=2.0).status_code == 200:
                    return url
            time.sleep(0.05)
    raise Unavailable(f"the model did not start: {_last_words(log)}")


def _last_words(log: Path) -> str:
    try:
        lines = log.read_text("utf-8", "replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1] if lines else "it said nothing"
