"""A web page in a browser on control's machine: refused by every method, on every path."""

from __future__ import annotations

from types import SimpleNamespace

import httpx2
import pytest

from cloudlm.control.api.edge import Edge
from cloudlm.core.errors import AuthenticationFailed
from cloudlm.security.hosts import HostGuard

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
PATHS = ("/api/v1/deployments", "/api/v1/deployments/bank", "/api/v1/keys/1", "/livez", "/metrics")


class Deed:
    """A deed that is told to nobody."""

    async def begin(self):
        pass

    async def end(self, status):
        pass


class NoCallers:
    """Nobody has a key."""

    async def of(self, *_):
        raise AuthenticationFailed("no key")


@pytest.fixture
def asked():
    """What got through the edge."""
    return []


@pytest.fixture
def client(asked):
    async def app(scope, receive, send):
        asked.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    auditor = SimpleNamespace(deed=lambda scope, request_id: Deed())
    edge = Edge(app, NoCallers(), auditor, HostGuard("127.0.0.1"))
    transport = httpx2.ASGITransport(app=edge)
    return httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:8001")


@pytest.mark.promise(35)
@pytest.mark.known_failure("CVE-2026-27482", "CVE-2023-48022")
@pytest.mark.parametrize("method", METHODS)
async def test_foreign_pages_and_foreign_names_are_refused(client, asked, method):
    foreign = (
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"host": "evil.example"},
        {"host": "evil.example:8001", "origin": "http://evil.example:8001"},
    )
    async with client:
        for path in PATHS:
            for headers in foreign:
                answer = await client.request(method, path, headers=headers)
                assert answer.status_code == 403, (method, path, headers)
                assert not [name for name in answer.headers if name.startswith("access-control")]
        assert asked == []
        own = await client.get("/livez", headers={"origin": "http://localhost:8001"})
        assert (own.status_code, asked) == (200, ["/livez"])
        keyless = await client.request("DELETE", "/api/v1/deployments/bank")
        assert (keyless.status_code, asked) == (401, ["/livez"])
