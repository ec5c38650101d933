"""Routes, prices and weights that change while the gateway runs, and files that cannot be used."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.core.deployment import DeploymentSpec, Endpoint
from cloudlm.core.errors import BadSetting
from cloudlm.core.price import read_prices
from cloudlm.core.settings import GatewaySettings
from cloudlm.core.tenant import WEIGHT_HEADER
from cloudlm.gateway.app import make_app
from cloudlm.gateway.bridge import Bridge
from cloudlm.gateway.live_settings import LiveSettings, Source
from cloudlm.gateway.model_routes import read_routes
from cloudlm.state.home import load_settings, settings_path

Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Put settings of the gateway into the home's file, at once, as editors do."""

    def put(**gateway: Any) -> None:
        fresh = tmp_path / "fresh.yaml"
        fresh.write_text(yaml.safe_dump({"gateway": gateway}))
        fresh.replace(tmp_path / "config.yaml")

    return put


def _read(tmp_path: Path) -> GatewaySettings:
    return load_settings(environ={"CLOUDLM_HOME": str(tmp_path)})[0].gateway


def _follow(rig: Any, tmp_path: Path) -> LiveSettings:
    """As the process does it, but looking only when told."""
    gateway = rig.gateway
    live = LiveSettings(
        Source(settings_path(environ={"CLOUDLM_HOME": str(tmp_path)}), lambda: _read(tmp_path)),
        _read(tmp_path),
        gateway.held,
        gateway._settings_changed,
    )
    gateway.live = live
    return live


def _held(routes: Any, prices: Any = None) -> dict[str, Any]:
    return {"routes": routes, "prices": {} if prices is None else prices, "tenant_weights": {}}


async def _looked(live: LiveSettings) -> bool:
    """Two looks: a file that is being written is left alone."""
    assert not await live.renew()
    return await live.renew()


async def _second_model(rig: Any) -> None:
    name, mock = "large", rig.replicas[1]
    await rig.state.put_deployment(DeploymentSpec(name, "models:/m/1"), now=3.0)
    await rig.state.put_endpoints(name, [Endpoint(name, mock.name, mock.url, 1)])
    await rig.gateway.view.refresh()


async def _readiness(rig: Any) -> dict[str, Any]:
    asked = rig.request(method="GET", path="/readyz", raw=b"")
    result = await rig.finish(await Bridge(make_app(rig.gateway))(asked))
    return dict(result.json)


async def test_a_changed_route_holds_for_the_next_request(
    kit: Any, tmp_path: Path, write: Write
) -> None:
    write(routes=f"chat = {kit.MODEL}", prices="large=1/1/1")
    settings = _read(tmp_path)
    async with kit.open_rig(
        2, home=tmp_path, routes=settings.routes, prices=settings.prices
    ) as rig:
        await _second_model(rig)
        live = _follow(rig, tmp_path)
        assert not await live.renew()
        asked = kit.chat_body(model="chat")
        assert (await rig.ask(asked)).headers["x-cloudlm-model"] == kit.MODEL
        write(routes="chat = large; other = large", prices="large=5/5/5")
        assert await _looked(live)
        assert (await rig.ask(asked)).headers["x-cloudlm-model"] == "large"
        assert (await rig.rows())[-1].cost == (7 + 5) * 5_000
        listed = (await rig.ask(method="GET", path="/v1/models")).json["data"]
        assert {one["id"] for one in listed} == {kit.MODEL, "large", "chat", "other"}
        write(prices="large=5/5/5")
        assert await _looked(live)
        assert (await rig.ask(asked)).status == 404
        assert not await _looked(live)
        rig.assert_nothing_open()


async def test_a_changed_weight_holds_for_the_next_request(
    kit: Any, tmp_path: Path, write: Write
) -> None:
    """For the queue here, for what replicas are told, and for shares of the caches' memory."""

    def told(rig: Any) -> list[str]:
        lines = rig.replicas[0].heads[-1].lower().splitlines()
        return [line for line in lines if line.startswith(WEIGHT_HEADER)]

    write(tenant_weights="default=2")
    async with kit.open_rig(home=tmp_path, tenant_weights="default=2") as rig:
        live = _follow(rig, tmp_path)
        assert not await live.renew()
        await rig.ask(kit.chat_body())
        assert told(rig) == [f"{WEIGHT_HEADER}: 2"]
        write(tenant_weights="default=5, other=3")
        assert await _looked(live)
        assert live.notes == []
        await rig.ask(kit.chat_body())
        assert told(rig) == [f"{WEIGHT_HEADER}: 5"]
        for weights in (rig.gateway.handler._rooms.weights, _shares(rig.gateway)):
            assert weights == {"default": 5.0, "other": 3.0}
        write(tenant_weights="default=-1")
        assert not await _looked(live)
        assert "gateway.tenant_weights" in live.notes[0]
        await rig.ask(kit.chat_body())
        assert told(rig) == [f"{WEIGHT_HEADER}: 5"]


def _shares(gateway: Any) -> Any:
    return gateway.handler.recall.answers._store._holdings._weights


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("gateway: {routes: 'chat ='}", "gateway.routes"),
        ("gateway: {prices: 'x=1'}", "gateway.prices"),
        ("gateway: {port: -1, routes: 'chat = large'}", "gateway.port"),
        ("gateway: [", "cannot be used"),
        ("note: 2024-02-30", "cannot be used"),
        (None, "cannot be used"),
    ],
)
async def test_a_bad_file_changes_nothing_and_is_told(
    kit: Any,
    tmp_path: Path,
    write: Write,
    caplog: pytest.LogCaptureFixture,
    text: str | None,
    named: str,
) -> None:
    write(routes=f"chat = {kit.MODEL}")
    async with kit.open_rig(home=tmp_path, routes=f"chat = {kit.MODEL}") as rig:
        live = _follow(rig, tmp_path)
        file = tmp_path / "config.yaml"
        if text is None:
            file.unlink()
        else:
            file.write_text(text)
        assert not await _looked(live)
        assert (await rig.ask(kit.chat_body(model="chat"))).status == 200
        assert "settings_not_renewed" in caplog.text
        told = await _readiness(rig)
        assert (told["ready"], told["status"]) == (True, "ready")
        assert named in told["notes"][0]
        assert b"cloudlm_gateway_files_refused 1.0" in rig.gateway.meter.exposition()
        write(routes=f"chat = {kit.MODEL}; again = {kit.MODEL}")
        assert await _looked(live)
        assert (await _readiness(rig))["notes"] == []
        assert b"cloudlm_gateway_files_refused 0.0" in rig.gateway.meter.exposition()


async def test_what_wants_a_restart_is_named_without_its_value(
    kit: Any, tmp_path: Path, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    write()
    async with kit.open_rig(home=tmp_path) as rig:
        live = _follow(rig, tmp_path)
        write(limits_url="redis://user:hush@127.0.0.1/0", max_attempts=5)
        assert not await _looked(live)
        (note,) = (await _readiness(rig))["notes"]
        assert "gateway.max_attempts, gateway.limits_url" in note
        assert "hush" not in note + caplog.text
        write()
        assert not await _looked(live)
        assert live.notes == []


async def test_a_file_that_is_being_written_is_left_alone(tmp_path: Path, write: Write) -> None:
    routes = read_routes("chat = a")
    reads = []

    def read() -> GatewaySettings:
        reads.append(1)
        return _read(tmp_path)

    async def changed() -> None:
        return None

    write(routes="chat = a")
    source = Source(tmp_path / "config.yaml", read)
    live = LiveSettings(source, GatewaySettings(), _held(routes), changed)
    for length in range(1, 4):  # it grows from look to look
        (tmp_path / "config.yaml").write_text("#" * length)
        assert not await live.renew()
    assert reads == []
    assert routes == read_routes("chat = a")
    assert await live.renew()
    assert routes == {}


async def _nothing() -> None:
    return None


async def test_what_was_written_before_the_first_look_is_taken(
    tmp_path: Path, write: Write
) -> None:
    """The settings were read, then the file changed, then the gateway began to follow it."""
    write(routes="chat = a", prices="a=1/1/1")
    running = _read(tmp_path)
    routes, prices = read_routes(running.routes), read_prices(running.prices)
    write(routes="chat = b", prices="a=2/2/2")
    reads = []

    def read() -> GatewaySettings:
        reads.append(1)
        return _read(tmp_path)

    source = Source(tmp_path / "config.yaml", read)
    live = LiveSettings(source, running, _held(routes, prices), _nothing)
    assert await live.renew()
    assert routes == read_routes("chat = b")
    assert prices == read_prices("a=2/2/2")
    assert not await live.renew()
    assert len(reads) == 1


async def test_an_installation_without_a_file_has_no_fault(tmp_path: Path, write: Write) -> None:
    routes = read_routes("chat = a")
    source = Source(tmp_path / "config.yaml", lambda: _read(tmp_path))
    live = LiveSettings(source, _read(tmp_path), _held(routes), _nothing)
    assert not await _looked(live)
    assert not live.refused
    assert routes == read_routes("chat = a")
    write(routes="chat = b")
    assert await _looked(live)
    assert routes == read_routes("chat = b")


@pytest.mark.parametrize("returns", [True, False])
async def test_a_file_that_vanishes_while_it_is_read_empties_nothing(
    tmp_path: Path, write: Write, returns: bool
) -> None:
    """Between the look at the file and its reading somebody moves it away, and perhaps back."""
    file, away = tmp_path / "config.yaml", tmp_path / "away.yaml"
    routes = read_routes("chat = a")
    moves = [file.rename]

    def read() -> GatewaySettings:
        if moves:
            moves.pop()(away)
        return _read(tmp_path)

    write(routes="chat = a")
    running = _read(tmp_path)
    live = LiveSettings(Source(file, read), running, _held(routes), _nothing)
    write(routes="chat = b")
    assert not await _looked(live)
    assert routes == read_routes("chat = a")
    assert not live.refused
    if returns:
        away.rename(file)
        assert await live.renew()
        assert routes == read_routes("chat = b")
    else:
        assert not await _looked(live)
        assert live.refused
        assert routes == read_routes("chat = a")


async def test_an_unforeseen_fault_is_told_and_ends_nothing(
    kit: Any, tmp_path: Path, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    write(routes=f"chat = {kit.MODEL}")
    async with kit.open_rig(home=tmp_path, routes=f"chat = {kit.MODEL}") as rig:
        live = _follow(rig, tmp_path)
        good = live._source.read

        def broken() -> GatewaySettings:
            raise RuntimeError("nobody thought of this")

        live._source = live._source._replace(read=broken)
        following = asyncio.create_task(live.follow(0.0))
        while not live.refused and not following.done():
            await asyncio.sleep(0)
        assert "settings_not_renewed" in caplog.text and "nobody thought" in caplog.text
        assert "unexpected RuntimeError" in (await _readiness(rig))["notes"][0]
        assert b"cloudlm_gateway_files_refused 1.0" in rig.gateway.meter.exposition()
        assert (await rig.ask(kit.chat_body(model="chat"))).status == 200
        live._source = live._source._replace(read=good)
        write(routes=f"chat = {kit.MODEL}; again = {kit.MODEL}")
        while (await rig.ask(kit.chat_body(model="again"))).status != 200:
            assert not following.done()
        assert not live.refused
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


_ROUTES = st.sampled_from(["", "chat = a", "chat = b", "chat = a; more = b", "chat = ", "= a", "x"])


@given(st.lists(_ROUTES, max_size=6))
async def test_the_last_good_text_holds(texts: list[str]) -> None:
    """Whatever is written, what holds is the last text that can be read, and ``refused`` says
    whether that is the last of all."""
    routes = read_routes("first = a")
    good = dict(routes)
    said = [0]

    async def changed() -> None:
        said[0] += 1

    wanted = [GatewaySettings(routes="first = a")]
    live = LiveSettings(
        Source(Path(__file__), lambda: wanted[0]), wanted[0], _held(routes), changed
    )
    for number, text in enumerate(texts):
        wanted[0] = replace(wanted[0], routes=text)
        live._mark = live._seen = (0, 0, number)  # as if the file had changed
        live._seen = None
        before, calls = dict(routes), said[0]
        assert not await live.renew()
        renewed = await live.renew()
        try:
            good = read_routes(text)
        except BadSetting:
            assert live.refused
        else:
            assert not live.refused
        assert routes == good
        assert renewed == (before != good) == (said[0] > calls)


def test_the_path_is_the_one_that_is_read(tmp_path: Path) -> None:
    named = tmp_path / "own.yaml"
    named.write_text("gateway: {routes: 'chat = a'}")
    environ = {"CLOUDLM_CONFIG": str(named), "CLOUDLM_HOME": str(tmp_path)}
    assert settings_path(environ=environ) == named
    assert load_settings(environ=environ)[0].gateway.routes == "chat = a"
    assert settings_path(environ={"CLOUDLM_HOME": str(tmp_path)}) == tmp_path / "config.yaml"
