"""Looks at others' endpoints, and what they add up to."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.core.clock import ManualClock
from cloudlm.core.deployment import GroupSpec
from cloudlm.core.errors import BadSetting, InvalidRequest
from cloudlm.core.external import ExternalEndpoint, origin_of
from cloudlm.core.health import MISSES_TO_FAIL
from cloudlm.core.settings import ExternalSettings
from cloudlm.drivers.base import DriverContext
from cloudlm.drivers.external import ExternalDriver
from cloudlm.drivers.external_look import Look, Looker, Record, judged
from cloudlm.security.credentials import Credential, Credentials
from cloudlm.security.outside import Outside
from cloudlm.security.tls import LiveContext, client_context

KEY = "sk-look-canary"
LOOKS = st.lists(st.sampled_from([Look(), Look("gone", passing=True), Look("no key")]), max_size=12)


class TestRecord:
    @given(LOOKS)
    def test_only_a_single_miss_is_forgiven(self, looks: list[Look]) -> None:
        record = Record()
        for number, look in enumerate(looks):
            record = record.after(look, float(number), 100.0 + number)
            recent = looks[max(number - MISSES_TO_FAIL + 1, 0) : number + 1]
            if not look.reason:
                assert not record.reason
                assert record.since
            elif not look.passing or len(recent) < MISSES_TO_FAIL or all(r.reason for r in recent):
                assert record.reason == look.reason
                assert not record.since

    def test_when_it_is_looked_at_again(self) -> None:
        assert Record().is_due(0.0, 30.0)
        well = Record().after(Look(), 10.0, 1.0)
        assert not well.is_due(39.0, 30.0)
        assert well.is_due(40.0, 30.0)
        failing = well.after(Look("no key"), 40.0, 1.0)
        assert not failing.is_due(44.0, 30.0)
        assert failing.is_due(45.0, 30.0)
        assert failing.is_due(43.0, 3.0)


@pytest.mark.parametrize(
    ("status", "body", "reason", "passing"),
    [
        (200, b'{"data": [{"id": "m"}]}', "", False),
        (200, b"<html>", "", False),
        (404, b"", "", False),
        (405, b"", "", False),
        (429, b"", "", False),
        (401, b"", "key", False),
        (403, b"", "key", False),
        (402, b"", "paid", False),
        (302, b"", "redirect", False),
        (500, b"", "500", True),
        (503, b"", "503", True),
    ],
)
def test_what_an_answer_says(status: int, body: bytes, reason: str, passing: bool) -> None:
    look = judged(status, body, "m")
    assert bool(look.reason) == bool(reason)
    assert reason in look.reason
    assert look.passing is passing


@pytest.mark.parametrize("body", [b"[]", b"{}", b'{"data": 1}', b'{"data": [1]}', b"[" * 9999])
def test_a_list_that_is_none_says_nothing(body: bytes) -> None:
    assert judged(200, body, "m") == Look()


def test_a_model_that_is_not_listed_is_told() -> None:
    assert "'m'" in judged(200, b'{"data": [{"id": "n"}]}', "m").note


@dataclass
class Service:
    """A service on this machine, and what came in."""

    url: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    seen: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    async def answer(self, request: web.Request) -> web.Response:
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.seen.append((request.path_qs, headers))
        body = json.dumps({"data": [{"id": "m"}]})
        return web.Response(status=self.status, text=body, headers=self.headers)


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    made = Service()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", made.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    yield made
    await runner.cleanup()


def looker(tmp_path: Path, networks: str = "127.0.0.0/8", **more: Any) -> Looker:
    tls = LiveContext(lambda: client_context((), None), ())
    settings = ExternalSettings(networks=networks)
    return Looker(Credentials(tmp_path, {}), Outside(settings, **more), tls)


class TestLooker:
    async def test_it_asks_for_the_models_with_the_key(self, service, tmp_path) -> None:
        Credentials(tmp_path, {}).put(Credential("one", origin_of(service.url), KEY))
        look = await looker(tmp_path).look(ExternalEndpoint(service.url, "m", "one"))
        assert look == Look()
        ((path, headers),) = service.seen
        assert path == "/v1/models"
        assert headers["authorization"] == f"Bearer {KEY}"

    async def test_a_redirect_takes_the_key_nowhere(self, service, tmp_path) -> None:
        Credentials(tmp_path, {}).put(Credential("one", origin_of(service.url), KEY))
        service.status, service.headers = 302, {"location": f"{service.url}/else"}
        look = await looker(tmp_path).look(ExternalEndpoint(service.url, "m", "one"))
        assert "redirect" in look.reason
        assert len(service.seen) == 1

    async def test_a_key_of_another_address_is_not_sent(self, service, tmp_path) -> None:
        Credentials(tmp_path, {}).put(Credential("one", "https://one.example:443", KEY))
        look = await looker(tmp_path).look(ExternalEndpoint(service.url, "m", "one"))
        assert "is for https://one.example:443" in look.reason
        assert KEY not in look.reason
        assert service.seen == []

    async def test_what_may_not_be_reached_is_not_asked(self, service, tmp_path) -> None:
        look = await looker(tmp_path, "").look(ExternalEndpoint(service.url, "m"))
        assert "external.networks" in look.reason
        assert not look.passing
        assert service.seen == []

    async def test_the_judged_address_is_the_one_asked(self, service, tmp_path) -> None:
        """Promise 15: a name that means something else a moment later gains nothing."""
        answers: list[Sequence[str]] = [["127.0.0.1"], ["169.254.169.254"]]

        async def resolve(host: str, port: int) -> Sequence[str]:
            return answers.pop(0)

        port = service.url.split(":")[2].partition("/")[0]
        one = looker(tmp_path, resolve=resolve)
        endpoint = ExternalEndpoint(f"http://flips.invalid:{port}/v1", "m")
        assert await one.look(endpoint) == Look()
        assert "metadata" in (await one.look(endpoint)).reason
        assert len(service.seen) == 1

    async def test_nobody_there(self, tmp_path) -> None:
        look = await looker(tmp_path).look(ExternalEndpoint("http://127.0.0.1:1/v1", "m"))
        assert look.passing
        assert "cannot be reached" in look.reason

    async def test_no_tls_there(self, service, tmp_path) -> None:
        url = service.url.replace("http:", "https:")
        look = await looker(tmp_path).look(ExternalEndpoint(url, "m"))
        assert look.reason


class TestDriver:
    def driver(self, home: Path, environment: dict[str, str] | None = None) -> ExternalDriver:
        return ExternalDriver(DriverContext(home, ManualClock(), environment or {}, {}))

    async def test_more_replicas_than_endpoints_cannot_be(self, tmp_path) -> None:
        with pytest.raises(InvalidRequest):
            await self.driver(tmp_path).apply(GroupSpec("a-r1", "a", 1, "m", replicas=1))

    async def test_an_unreadable_file_belongs_to_nobody(self, tmp_path) -> None:
        (tmp_path / "external").mkdir()
        (tmp_path / "external" / "a-r1.json").write_text("{")
        driver = self.driver(tmp_path)
        seen = await driver.observe("a-r1")
        assert seen.spec is not None
        assert seen.spec.deployment == ""
        await driver.delete("a-r1")
        assert await self.driver(tmp_path).groups() == []

    def test_its_settings_come_from_file_and_environment(self, tmp_path) -> None:
        (tmp_path / "config.yaml").write_text("external: {networks: nonsense}")
        with pytest.raises(BadSetting):
            self.driver(tmp_path)
        self.driver(tmp_path, {"CLOUDLM_EXTERNAL_NETWORKS": "10.0.0.0/8"})
