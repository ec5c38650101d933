"""``cloudlm demo``: the whole path on real questions, in an installation that is thrown away."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import resources
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from cloudlm.cli.options import Json
from cloudlm.cli.screen import out, print_json, print_marked, print_text, say
from cloudlm.cli.up import Running, curl_line, running_stack, stop_signal
from cloudlm.core.errors import Unavailable
from cloudlm.core.settings import Settings
from cloudlm.core.tenant import Role
from cloudlm.drivers.guard import port_is_free

if TYPE_CHECKING:
    from cloudlm.client import Client


def demo(
    keep: Annotated[
        bool | None,
        typer.Option("--keep/--no-keep", help="Go on serving; the default on a terminal."),
    ] = None,
    json_output: Json = False,
) -> None:
    """Start everything, ask five questions, show how to go on."""
    began = time.monotonic()
    stay = sys.stdin.isatty() and sys.stdout.isatty() if keep is None else keep
    ports = _ports()
    with _own_home(), running_stack(ports, starter=True) as (running, stack):
        ready_s = time.monotonic() - began
        _say_where(ports, running)
        if running.admin_key is None or running.starter is None:
            raise Unavailable("the demo's installation is not fresh; remove it and start again")
        if not json_output:
            _print_start(running, ready_s)
        answers = [
            _ask(running, running.admin_key, question, quiet=json_output)
            for question in questions()
        ]
        key = _user_key(running, running.admin_key) if stay else ""
        if json_output:
            shown = {"ready_s": round(ready_s, 2), "answers": answers}
            there = {"openai_base_url": f"{running.gateway_url}/v1", "api_key": key}
            print_json({**shown, **there} if stay else shown)
        else:
            right = sum(answer["right"] for answer in answers)
            out.print(f"\n{right} of {len(answers)} answers are the right reply.\n")
        if stay:
            if not json_output:
                _print_address(running, key)
            say("serving until Ctrl-C")
            stack.wait_until(stop_signal(stack))
    if not (stay or json_output):
        out.print(
            "The demo is over: all that it started was stopped, and nothing of it is left.\n"
            "'cloudlm up' serves the same model until Ctrl-C; 'cloudlm demo --keep' goes on after "
            "the questions."
        )
    wrong = [answer["question"] for answer in answers if not answer["right"]]
    if wrong:
        raise Unavailable(f"{len(wrong)} of {len(answers)} answers were wrong: {wrong}")


def questions() -> list[dict[str, Any]]:
    """Five customers' questions kept out of training, with the replies that answer them."""
    text = resources.files("cloudlm.cli").joinpath("demo_questions.json").read_text("utf-8")
    loaded: list[dict[str, Any]] = json.loads(text)
    return loaded


@contextlib.contextmanager
def _own_home() -> Iterator[None]:
    """A fresh home, and none of the user's settings, state or registry: the demo neither needs nor
    changes the user's installation."""
    before = {name: value for name, value in os.environ.items() if _is_setting(name)}
    with tempfile.TemporaryDirectory(prefix="cloudlm-demo-", ignore_cleanup_errors=True) as folder:
        for name in before:
            del os.environ[name]
        os.environ["CLOUDLM_HOME"] = folder
        try:
            yield
        finally:
            del os.environ["CLOUDLM_HOME"]
            os.environ.update(before)


def _is_setting(variable: str) -> bool:
    return variable.startswith("CLOUDLM_") and variable != "CLOUDLM_DEBUG"


def _ports() -> dict[str, Any]:
    """The usual ports, or free ones where those are taken."""
    usual = Settings()
    pairs = (("gateway.port", usual.gateway), ("control.port", usual.control))
    return {
        name: where.port if port_is_free(where.host, where.port) else 0 for name, where in pairs
    }


def _say_where(ports: dict[str, Any], running: Running) -> None:
    """Say which of the usual ports somebody else has, another installation most often."""
    usual = Settings()
    for name, what, port, url in (
        ("gateway.port", "gateway", usual.gateway.port, running.gateway_url),
        ("control.port", "control API", usual.control.port, running.control_url),
    ):
        if ports[name] == 0:
            say(f"port {port} is in use already: the demo's {what} is on port {urlsplit(url).port}")


def _ask(running: Running, key: str, item: dict[str, Any], *, quiet: bool) -> dict[str, Any]:
    """Stream one answer through the official client, printing it as it comes."""
    with _client(running, key) as sdk, sdk.openai() as client:
        if not quiet:
            print_marked("\nQ", "bold cyan", f" {item['question']}")
            print_marked("A", "bold green", " ", end="")
        began = time.monotonic()
        first_s = None
        pieces: list[str] = []
        stream = client.chat.completions.create(
            model=str(running.starter),
            messages=[{"role": "user", "content": item["question"]}],
            temperature=0,
            stream=True,
        )
        for chunk in stream:
            piece = chunk.choices[0].delta.content if chunk.choices else None
            if not piece:
                continue
            first_s = first_s or time.monotonic() - began
            pieces.append(piece)
            if not quiet:
                print_text(piece, end="")
    answer = "".join(pieces).strip()
    if not quiet:
        seconds = time.monotonic() - began
        first_ms = (first_s or 0.0) * 1000
        out.print(f"\n  first token {first_ms:.0f} ms, all {seconds:.2f} s", style="dim")
    return {
        "question": item["question"],
        "answer": answer,
        "first_token_s": round(first_s or 0.0, 4),
        "right": answer in item["replies"],
    }


def _user_key(running: Running, admin_key: str) -> str:
    """A key for inference alone, made through the control API, to try the address with."""
    with _client(running, admin_key) as client:
        text, _ = client.keys.create("demo", Role.USER)
        return text


def _client(running: Running, key: str) -> Client:
    from cloudlm.client import Client

    return Client(
        api_key=key,
        control_url=running.control_url,
        gateway_url=running.gateway_url,
        ca=running.control_trust,
    )


def _print_start(running: Running, ready_s: float) -> None:
    out.print(
        f"gateway, control and one worker are up after {ready_s:.1f} s; the model "
        f"{running.starter} is deployed from the registry.\n"
        "Five customers' questions, none of them seen in training:"
    )


def _print_address(running: Running, key: str) -> None:
    out.print(f"  OpenAI API  {running.gateway_url}/v1")
    out.print(f"  API key     {key}\n")
    out.print(curl_line(running, key))
