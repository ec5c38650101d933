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

from cloudlm.cli.partition import PipelineParallel, TensorParallel, partition_options
from cloudlm.cli.precision import Precision, precision_options
from cloudlm.cli.screen import fail, print_json_line, print_text, say, spinner, talk
from cloudlm.cli.serve import default_name
from cloudlm.core.errors import (
    CloudlmError,
    ContextLengthExceeded,
    InvalidRequest,
    Unavailable,
    UpstreamFailed,
    error_from_body,
)
from cloudlm.core.spec import CLOUDLM
from cloudlm.drivers.launch import GuardOptions, start_guard
from cloudlm.state.home import Home, load_settings

if TYPE_CHECKING:
    from openai import APIError, OpenAI

START_TIMEOUT_S = 600.0


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
    precision: Precision = None,
    tensor_parallel: TensorParallel = None,
    pipeline_parallel: PipelineParallel = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print JSON, one answer per line.")
    ] = False,
) -> None:
    """Chat with a model in the terminal. Questions may also be piped in."""
    from openai import DefaultHttpx2Client, OpenAI

    flags = {
        **precision_options(precision, CLOUDLM),
        **partition_options(tensor_parallel, pipeline_parallel),
    }
    options = [*(option or []), *(f"{name}={value}" for name, value in flags.items())]
    with (
        private_worker(model, options) as (url, key),
        OpenAI(
            base_url=f"{url}/v1",
            api_key=key,
            max_retries=0,
            http_client=DefaultHttpx2Client(trust_env=False),  # no proxy to our own process
        ) as client,
    ):
        chat = Chat(client, default_name(model), system, temperature, json_output)
        if prompt is not None:
            chat.ask(prompt)
        elif sys.stdin.isatty():
            say("Ask away. Ctrl-C stops an answer, /clear forgets the conversation, Ctrl-D ends.")
            for question in _typed_questions():
                _ask_and_go_on(chat, question)
        else:
            for line in sys.stdin:
                _ask(chat, line.strip())


def _ask(chat: Chat, question: str) -> None:
    if question == "/clear":
        chat.clear()
    elif question:
        chat.ask(question)


def _ask_and_go_on(chat: Chat, question: str) -> None:
    """A person at the terminal may stop an answer, or ask again after a refusal."""
    try:
        _ask(chat, question)
    except KeyboardInterrupt:
        say("")
    except InvalidRequest as error:
        fail(error.message)


def _typed_questions() -> Iterator[str]:
    """Lines from the terminal, with line editing where the prompt may go to the terminal."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() uses it once it is imported)
    while True:
        try:
            if sys.stdout.isatty():
                yield input(">>> ")
            else:  # input() would write its prompt into the results
                talk.print(">>> ", end="")
                yield input()
        except EOFError:
            return


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
        """Stream the answer to the terminal. Raises the server's error; a question that was not
        answered to the end is not part of the conversation."""
        asked = {"role": "user", "content": question}
        while True:
            try:
                answer = self._stream([*self._opening, *self._turns, asked])
                break
            except ContextLengthExceeded:
                if not self._turns:
                    raise
                self._turns = self._turns[2:]
        self._turns += [asked, {"role": "assistant", "content": answer}]
        if self._json:
            print_json_line({"question": question, "answer": answer})

    def _stream(self, messages: Any) -> str:
        from openai import APIError

        pieces: list[str] = []
        try:
            stream = self._client.chat.completions.create(
                model=self._model, messages=messages, temperature=self._temperature, stream=True
            )
            with stream:
                for chunk in stream:
                    piece = chunk.choices[0].delta.content if chunk.choices else None
                    if piece:
                        pieces.append(piece)
                        if not self._json:
                            print_text(piece, end="")
        except APIError as error:
            raise _verdict(error) from None
        if not self._json:
            print_text("")
        return "".join(pieces)


def _verdict(error: APIError) -> CloudlmError:
    """What the official client raised, in our words."""
    if isinstance(error.body, dict):
        return error_from_body(getattr(error, "status_code", 500), {"error": error.body})
    return UpstreamFailed(f"the model's process broke off: {error.message}")


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
        command = [sys.executable, "-m", "cloudlm.worker", "--model", model]
        command += ["--served-model-name", default_name(model), "--port", "{port}"]
        for pair in options:
            command += ["--option", pair]
        environment = {
            **os.environ,
            "CLOUDLM_HOME": str(home.path),
            "CLOUDLM_REGISTRY_URL": home.registry_url(settings),
            "CLOUDLM_WORKER_TOKEN": key,
        }
        how = GuardOptions(
            state, log, command, restart=False, first_port=settings.worker.first_port
        )
        guard = start_guard(how, environment, read_end)
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
    with spinner("loading"), httpx2.Client(timeout=2.0, trust_env=False) as client:
        while time.monotonic() < deadline and guard.poll() is None:
            with contextlib.suppress(OSError, ValueError, KeyError, httpx2.HTTPError):
                port = json.loads(state.read_text("utf-8"))["port"]
                url = f"http://127.0.0.1:{port}"
                if client.get(f"{url}/readyz").status_code == 200:
                    return url
            time.sleep(0.05)
    raise Unavailable(f"the model did not start: {_last_words(log)}")


def _last_words(log: Path) -> str:
    try:
        lines = log.read_text("utf-8", "replace").strip().splitlines()
    except OSError:
        lines = []
    last = lines[-1] if lines else "it said nothing"
    return last.removeprefix("cloudlm worker: ")
