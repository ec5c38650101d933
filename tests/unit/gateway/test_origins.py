"""What a web page in a browser on this machine can do to a gateway there: nothing, by no method."""

from __future__ import annotations

from typing import Any

import pytest
from served_gateway import served, talk, wire

from cloudlm.core.errors import BadSetting, PermissionDenied
from cloudlm.security.hosts import HostGuard, read_origins

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
PATHS = ("/v1/chat/completions", "/v1/models", "/readyz", "/metrics", "/no/such/path")
FOREIGN = ("http://evil.example", "https://evil.example:8000", "null", "http://localhost.evil.it")
OWN = ("http://localhost:3000", "https://127.0.0.1", "http://[::1]:8000", "app://desktop")


@pytest.mark.promise(35)
@pytest.mark.known_failure("CVE-2026-27482")
@pytest.mark.parametrize("method", METHODS)
async def test_foreign_pages_and_foreign_names_are_refused_whatever_they_ask(
    kit: Any, method: str
) -> None:
    async with served(kit) as rig:
        for path in PATHS:
            body = kit.chat_body() if method in ("POST", "PUT", "PATCH") else None
            foreign = [{"origin": origin} for origin in FOREIGN]
            foreign += [{"host": "evil.example"}, {"host": "evil.example", "origin": OWN[0]}]
            for headers in foreign:
                raw = wire(rig, body, method=method, path=path, **headers)
                if method == "HEAD":
                    raw = raw.replace(b"HEAD ", b"DELETE ", 1)  # a HEAD's answer has no body
                status, told, _ = await talk(rig, raw)
                assert status == 403, (method, path, headers)
                assert not [name for name in told if name.startswith("access-control")]
        assert not rig.replicas[0].requests


@pytest.mark.promise(35)
async def test_pages_of_this_machine_and_programs_may_ask(kit: Any) -> None:
    async with served(kit) as rig:
        for origin in OWN:
            status, headers, _ = await talk(rig, wire(rig, kit.chat_body(), origin=origin))
            assert status == 200
            assert not [name for name in headers if name.startswith("access-control")]
        assert (await talk(rig, wire(rig, kit.chat_body(), origin="http://evil.example")))[0] == 403
    async with served(kit, allowed_origins="https://chat.example, http://10.0.0.5:3000/") as rig:
        for origin in ("https://chat.example", "http://10.0.0.5:3000"):
            assert (await talk(rig, wire(rig, kit.chat_body(), origin=origin)))[0] == 200
        for origin in ("http://chat.example", "https://chat.example.evil.example"):
            assert (await talk(rig, wire(rig, kit.chat_body(), origin=origin)))[0] == 403


@pytest.mark.promise(35)
def test_hosts_that_passed_are_remembered_within_bounds() -> None:
    """As many ports as somebody cares to write; each is answered, a foreign name by none."""
    guard = HostGuard("127.0.0.1")
    for port in range(1, 1000):
        guard.check({"host": f"localhost:{port}"})
    for length in (64, 65, 4000):
        guard.check({"host": "localhost:".ljust(length, "1")})
    assert len(guard._passed) <= 256
    assert max(map(len, guard._passed)) <= 64
    for host in ("evil.example", "localhost.evil.example", "evil.example:1", "[evil]:1", ""):
        for _ in range(2):
            with pytest.raises(PermissionDenied):
                guard.check({"host": host})
        assert host not in guard._passed


@pytest.mark.promise(35)
def test_who_listens_for_others_leaves_names_to_them() -> None:
    HostGuard("0.0.0.0").check({"host": "gateway.example", "origin": "https://chat.example"})
    with pytest.raises(PermissionDenied, match="allowed_origins"):
        HostGuard("127.0.0.1").check({"host": "localhost", "origin": "https://chat.example"})
    HostGuard("127.0.0.1", "https://Chat.example").check(
        {"host": "localhost", "origin": "https://chat.example"}
    )


@pytest.mark.parametrize(
    "text", ["*", "chat.example", "ftp://a", "https://", "https://a/path", "https://a b, http://c?"]
)
def test_origins_that_are_none_are_named(text: str) -> None:
    with pytest.raises(BadSetting, match="allowed_origins"):
        read_origins(text)


def test_no_origins_are_none() -> None:
    assert read_origins(" , ") == []
