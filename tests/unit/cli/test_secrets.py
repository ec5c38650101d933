"""``cloudlm secrets``, and deployments of external endpoints on the command line."""

from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cloudlm.cli.connect import open_local_state
from cloudlm.core.audit import AuditEvent
from cloudlm.core.errors import InvalidRequest, NotFound

Ok = Callable[..., Any]
KEY = "sk-cli-canary"


def test_a_key_from_keeping_to_removing(ok: Ok, cli: Ok, home: Path) -> None:
    made = ok("secrets", "set", "openai", "--for", "https://api.example.com/v1/", input=f"{KEY}\n")
    listed = ok("secrets", "list")
    assert listed.stdout.splitlines()[1].split()[:2] == ["openai", "https://api.example.com:443"]
    as_json = ok("secrets", "list", "--json")
    (one,) = json.loads(as_json.stdout)
    assert one["for"] == "https://api.example.com:443"
    for result in (made, listed, as_json):
        assert KEY not in result.output + (result.stderr or "")
    (file,) = (home / "secrets" / "endpoints").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    ok("secrets", "delete", "openai")
    assert isinstance(cli("secrets", "delete", "openai").exception, NotFound)
    assert json.loads(ok("secrets", "list", "--json").stdout) == []
    deeds = asyncio.run(audited())
    assert [deed.action for deed in deeds] == ["create secrets", "delete secrets"]
    assert deeds[0].target == "secret openai for https://api.example.com:443"
    assert KEY not in repr(deeds)


async def audited() -> list[AuditEvent]:
    state, _ = await open_local_state()
    try:
        return [record.event for record in await state.list_audit()]
    finally:
        await state.close()


@pytest.mark.parametrize(
    ("name", "url", "key"),
    [
        ("openai", "https://h/v1", ""),
        ("openai", "https://h/v1", "two words"),
        ("openai", "h/v1", KEY),
        ("openai", "https://h/v1?x", KEY),
        ("Open AI", "https://h/v1", KEY),
        ("../up", "https://h/v1", KEY),
    ],
)
def test_what_cannot_be_kept_is_refused(cli: Ok, name: str, url: str, key: str) -> None:
    result = cli("secrets", "set", name, "--for", url, input=key)
    assert isinstance(result.exception, InvalidRequest)
    assert KEY not in str(result.exception)


def test_endpoints_are_deployed_without_an_import(
    control: Any, ok: Ok, deployment: Callable[..., dict[str, Any]]
) -> None:
    control.answers = {
        "PUT /deployments/chat": deployment("chat"),
        "GET /deployments/chat": deployment("chat"),
    }
    urls = ["https://one.example/v1/", "https://two.example/v1"]
    options = [word for url in urls for word in ("--endpoint", url)]
    ok("deploy", "gpt-small", "--name", "chat", *options, "--secret", "openai")
    sent = control.sent("PUT /deployments/chat")
    assert sent["driver"] == "external"
    assert sent["routing"]["policy"] == "weighted"
    assert [(e["url"], e["model"], e["secret"]) for e in sent["endpoints"]] == [
        (url.rstrip("/"), "gpt-small", "openai") for url in urls
    ]


def test_a_file_of_endpoints_is_applied(
    control: Any, ok: Ok, deployment: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    control.answers = {
        "PUT /deployments/chat": deployment("chat"),
        "GET /deployments/chat": deployment("chat"),
    }
    file = tmp_path / "chat.yaml"
    file.write_text(
        "name: chat\nmodel: big\nendpoints:\n  - {url: https://one.example/v1, weight: 9}\n"
    )
    ok("apply", "-f", str(file))
    assert control.sent("PUT /deployments/chat")["endpoints"][0]["weight"] == 9
