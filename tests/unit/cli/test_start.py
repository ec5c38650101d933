"""up, demo, serve and run: what they decide before and around the processes they start."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cloudlm.cli import demo, serve, up
from cloudlm.cli.connect import control_client
from cloudlm.cli.stack import Addresses, Stack, demand_free_port, free_port, running_addresses
from cloudlm.core.errors import BadSetting, Conflict, Unavailable
from cloudlm.core.settings import read_settings
from cloudlm.state.home import Home
from cloudlm.worker import app as worker_app

ADDRESSES = Addresses("http://127.0.0.1:7000", "http://127.0.0.1:7001")


class TestPorts:
    def test_a_port_in_use(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(Conflict, match=rf"port {port} .* --gateway-port"):
                demand_free_port("127.0.0.1", port, "gateway")
        demand_free_port("127.0.0.1", free_port("127.0.0.1", "gateway"), "gateway")

    def test_an_address_of_another_machine(self) -> None:
        for check in (lambda: free_port("192.0.2.1", "control"),):
            with pytest.raises(BadSetting, match="CLOUDLM_CONTROL_HOST"):
                check()
        with pytest.raises(BadSetting, match="CLOUDLM_GATEWAY_HOST"):
            demand_free_port("192.0.2.1", 8000, "gateway")

    def test_the_same_port_twice(self) -> None:
        settings, _ = read_settings(flags={"gateway.port": 8001})
        with pytest.raises(BadSetting, match="both 8001"):
            up._choose_ports(settings)

    def test_free_ones_are_chosen(self) -> None:
        settings, _ = read_settings(flags={"gateway.port": 0, "control.port": 0})
        assert all(port > 0 for port in up._choose_ports(settings))


class TestHome:
    def test_one_stack_per_home(self, home: Path) -> None:
        here = Home(home).ensure()
        with (
            Stack(here, {}),
            pytest.raises(Conflict, match=r"runs already .* --home"),
            Stack(here, {}),
        ):
            pass
        with Stack(here, {}):
            pass

    def test_commands_find_the_running_installation(
        self, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CLOUDLM_API_KEY", "clm_live_x")
        here = Home(home).ensure()
        assert running_addresses(here) is None
        with Stack(here, {}) as stack:
            stack.announce(ADDRESSES)
            assert running_addresses(here) == ADDRESSES
            with control_client() as client:
                assert client.connection.control_url == ADDRESSES.control_url
        assert running_addresses(here) is None

    def test_an_installation_that_was_killed_is_not_found(self, home: Path) -> None:
        here = Home(home).ensure()
        (home / "up").mkdir()
        gone = {"pid": 2**22 + 1, "gateway_url": "http://x", "control_url": "http://x"}
        for text in (json.dumps(gone), "{", "[]", '{"pid": "x"}', ""):
            (home / "up" / "addresses.json").write_text(text)
            assert running_addresses(here) is None


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """``up`` without processes; names what was started."""
    names: list[str] = []
    monkeypatch.setattr(Stack, "start", lambda _self, name, *_: names.append(name))
    monkeypatch.setattr(Stack, "wait_ready", lambda *_: None)
    monkeypatch.setenv("CLOUDLM_GATEWAY_PORT", "0")
    monkeypatch.setenv("CLOUDLM_CONTROL_PORT", "0")
    return names


class TestUp:
    def test_what_is_shown(
        self, started: list[str], ok: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(up, "stop_signal", lambda _stack: lambda: True)
        first = json.loads(ok("up", "--no-starter", "--json").stdout)
        assert started == ["gateway", "control"]
        assert first["admin_key"].startswith("clm_live_")
        assert first["openai_base_url"] == first["gateway_url"] + "/v1"
        text = ok("up", "--no-starter").stdout
        assert "as shown at the first start" in text
        assert "clm_live_" not in text

    def test_a_start_that_fails_does_not_lose_the_new_key(
        self, started: list[str], cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_: object) -> None:
            raise Unavailable("the gateway does not start")

        monkeypatch.setattr(Stack, "wait_ready", broken)
        result = cli("up", "--no-starter")
        assert isinstance(result.exception, Unavailable)
        assert "clm_live_" in result.stderr
        assert "clm_live_" not in cli("up", "--no-starter").stderr


class TestDemo:
    def test_it_touches_nothing_of_the_users(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CLOUDLM_STATE_URL", "postgresql://production")
        monkeypatch.setenv("CLOUDLM_HOME", "/mine")
        with demo._own_home():
            given = {name: text for name, text in os.environ.items() if name.startswith("CLOUDLM_")}
            assert list(given) == ["CLOUDLM_HOME"]
            folder = Path(given["CLOUDLM_HOME"])
            assert folder.is_dir()
        assert not folder.exists()
        assert os.environ["CLOUDLM_HOME"] == "/mine"
        assert os.environ["CLOUDLM_STATE_URL"] == "postgresql://production"

    def test_a_usual_port_that_is_taken_is_told_with_the_one_instead(
        self, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given: list[dict[str, Any]] = []

        @contextlib.contextmanager
        def stack(flags: dict[str, Any], *, starter: bool) -> Iterator[Any]:
            given.append(flags)
            yield up.Running("http://127.0.0.1:7400", "http://127.0.0.1:7401", "k", "m", None), None

        monkeypatch.setattr(demo, "running_stack", stack)
        monkeypatch.setattr(demo, "questions", list)
        monkeypatch.setattr(demo, "port_is_free", lambda _host, port: port == 8001)
        result = cli("demo", "--json", "--no-keep")
        assert given == [{"gateway.port": 0, "control.port": 8001}]
        assert "port 8000 is in use already: the demo's gateway is on port 7400" in result.stderr
        assert "8001" not in result.stderr
        assert json.loads(result.stdout)["answers"] == []
        monkeypatch.setattr(demo, "port_is_free", lambda _host, _port: True)
        assert cli("demo", "--no-keep").stderr == ""

    @pytest.mark.parametrize("right", [True, False])
    def test_it_tells_right_from_wrong(
        self, right: bool, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        waited: list[Any] = []

        class Served:
            def wait_until(self, stop: Any) -> None:
                waited.append(stop)

        @contextlib.contextmanager
        def stack(_flags: dict[str, Any], *, starter: bool) -> Iterator[Any]:
            assert starter
            yield up.Running("http://g", "http://c", "admin", "bank-helper", None), Served()

        def create(**asked: Any) -> list[Any]:
            question = asked["messages"][0]["content"]
            (item,) = [one for one in demo.questions() if one["question"] == question]
            answer = item["replies"][0] if right else "no idea"
            delta = SimpleNamespace(content=answer)
            return [SimpleNamespace(choices=[SimpleNamespace(delta=delta)])]

        class FakeSdk:
            chat = SimpleNamespace(completions=SimpleNamespace(create=create))
            keys = SimpleNamespace(create=lambda *_: ("clm_live_demo", None))

            def openai(self) -> FakeSdk:
                return self

            def __enter__(self) -> FakeSdk:
                return self

            def __exit__(self, *_: object) -> None:
                return None

        asked_ones = [{"question": f"q{n}", "replies": [f"a{n}", "b"]} for n in range(5)]
        monkeypatch.setattr(demo, "questions", lambda: asked_ones)
        monkeypatch.setattr(demo, "running_stack", stack)
        monkeypatch.setattr(demo, "_client", lambda *_: FakeSdk())
        monkeypatch.setattr(demo, "stop_signal", lambda _stack: lambda: True)
        result = cli("demo")
        assert f"{5 if right else 0} of 5 answers are the right reply" in result.stdout
        assert result.exit_code == (0 if right else 1)
        # Off a terminal it ends: what nobody can reach any more is not offered.
        assert waited == []
        assert not any(gone in result.stdout for gone in ("clm_live_demo", "http://g", "curl"))
        assert "'cloudlm up'" in result.stdout
        kept = cli("demo", "--keep").stdout
        assert len(waited) == 1
        assert "clm_live_demo" in kept
        assert "http://g/v1" in kept
        assert "The demo is over" not in kept
        told = json.loads(cli("demo", "--json").stdout)
        assert (len(told["answers"]), "api_key" in told) == (5, False)
        told = json.loads(cli("demo", "--json", "--keep").stdout)
        assert (told["openai_base_url"], told["api_key"]) == ("http://g/v1", "clm_live_demo")


class TestServe:
    @pytest.mark.parametrize(
        ("model", "name"),
        [
            ("models:/bank/3", "bank"),
            ("bank@champion", "bank"),
            ("./some/folder/", "folder"),
            ("org/Model-1B", "Model-1B"),
        ],
    )
    def test_the_name_in_the_api(self, model: str, name: str) -> None:
        assert serve.default_name(model) == name

    @pytest.mark.parametrize("code", [0, 1, 98])
    def test_what_the_worker_is_given_and_how_it_ends(
        self, code: int, cli: Callable[..., Any], home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given: list[Any] = []

        def run_worker(config: Any) -> int:
            given.append(config)
            config.on_progress(0.5, "reading")
            config.on_ready("http://127.0.0.1:8123")
            return code

        def end(code: int) -> None:
            raise SystemExit(code)

        monkeypatch.setattr(worker_app, "run_worker", run_worker)
        monkeypatch.setattr(serve, "end_process", end)
        monkeypatch.setattr(serve, "setup_logging", lambda *_: None)
        result = cli(
            *("serve", "bank", "--port", "0", "--option", "max_model_len=64", "-tp", "2"),
            *("--precision", "int8", "--option", "precision=int4", "--json"),
        )
        assert result.exit_code == code
        assert json.loads(result.stdout) == {
            "openai_base_url": "http://127.0.0.1:8123/v1",
            "model": "bank",
        }
        (config,) = given
        options = {"max_model_len": 64, "precision": "int8", "tensor_parallel": 2}
        assert (config.port, config.options, config.home) == (0, options, home)
