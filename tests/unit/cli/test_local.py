"""Commands that work on this machine alone: keys --local, models, config, drivers."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from cloudlm.cli.connect import control_client, open_local_state
from cloudlm.cli.options import date_text
from cloudlm.core.deployment import DeploymentSpec
from cloudlm.core.errors import (
    AuthenticationFailed,
    BadSetting,
    BrokenModel,
    Conflict,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    StorageFailed,
    Unavailable,
)
from cloudlm.registry.bundled import bundled_folder

Ok = Callable[..., Any]


class TestKeys:
    def test_local_keys_from_making_to_revoking(self, ok: Ok) -> None:
        made = json.loads(ok("keys", "create", "--local", "--role", "owner", "--json").stdout)
        text = ok("keys", "create", "--local", "--name", "mine")
        assert text.stdout.strip().startswith("clm_live_")
        assert "shown once" in text.stderr
        listed = ok("keys", "list", "--local")
        assert made["key"].split("_")[3] not in listed.stdout + listed.stderr
        assert [row.split()[1:3] for row in listed.stdout.splitlines()[1:]] == [
            ["key", "owner"],
            ["mine", "user"],
        ]
        key_id = made["record"]["id"]
        ok("keys", "revoke", key_id, "--local")
        records = json.loads(ok("keys", "list", "--local", "--json").stdout)
        assert [record["revoked_at"] is None for record in records] == [False, True]
        assert all("digest" not in record for record in records)

    def test_a_local_name_follows_the_rules_of_control(self, cli: Ok) -> None:
        result = cli("keys", "create", "--local", "--name", "x" * 65)
        assert isinstance(result.exception, InvalidRequest)
        assert isinstance(cli("keys", "revoke", "nobody", "--local").exception, NotFound)

    def test_a_scope_that_is_not_there(self, ok: Ok, cli: Ok) -> None:
        for scope, wanted in (
            ("acme/web", "cloudlm projects create web --tenant acme"),
            ("acme", "cloudlm tenants create acme"),
            ("default/web", "cloudlm projects create web --tenant default"),
        ):
            result = cli("keys", "create", "--local", "--scope", scope)
            assert isinstance(result.exception, InvalidRequest)
            assert wanted in result.exception.message
        refused = cli("keys", "create", "--local", "--project", "web")
        assert "cloudlm projects create web --tenant default" in refused.exception.message
        assert json.loads(ok("keys", "list", "--local", "--json").stdout) == []
        made = ok("keys", "create", "--local", "--scope", "default/default", "--json")
        assert json.loads(made.stdout)["record"]["project"] == "default"

    def test_keys_of_control(self, control: Any, ok: Ok) -> None:
        record = {"id": "k1", "name": "n", "role": "user", "last4": "abcd", "created_at": 1.0}
        control.answers = {
            "POST /keys": {"key": "clm_secret", "record": record},
            "GET /keys": {"data": [record]},
            "DELETE /keys/k1": {**record, "revoked_at": 2.0},
        }
        assert ok("keys", "create", "--name", "n").stdout == "clm_secret\n"
        assert control.sent("POST /keys") == {"name": "n", "role": "user"}
        assert "…abcd" in ok("keys", "list", "--all").stdout
        assert "…abcd" not in ok("keys", "list").stdout
        assert json.loads(ok("keys", "revoke", "k1", "--json").stdout)["revoked_at"] == 2.0

    def test_a_rotation_says_what_it_replaced_and_until_when_that_is_good(
        self, control: Any, ok: Ok
    ) -> None:
        old = {"id": "k1", "name": "shop", "role": "user", "last4": "abcd", "created_at": 1.0}
        new = {**old, "id": "k2", "last4": "efgh"}
        until = 1.9e9
        for replaced, said in (
            ({**old, "revoked_at": 5.0}, "which is refused from now on"),
            ({**old, "expires_at": until}, f"which stays good until {date_text(until)}"),
        ):
            answer = {"key": "clm_secret", "record": new, "replaced": replaced}
            control.answers = {"POST /keys/k1/rotate": answer}
            shown = ok("keys", "rotate", "k1", "--overlap", "1h")
            assert shown.stdout == "clm_secret\n"
            assert "id k2" in shown.stderr
            assert f"It replaces k1 (shop, …abcd), {said}." in shown.stderr
            told = json.loads(ok("keys", "rotate", "k1", "--json").stdout)
            assert (told["key"], told["record"]["id"]) == ("clm_secret", "k2")
            assert told["replaced"]["id"] == "k1"
        control.answers = {"POST /keys/k1/rotate": {"key": "clm_secret", "record": new}}
        assert "replaces" not in ok("keys", "rotate", "k1").stderr  # an older control

    def test_keys_on_a_terminal(
        self, control: Any, ok: Ok, wide: Callable[[int], io.StringIO]
    ) -> None:
        record = {
            "id": "d4e5f6a7b8c9", "name": "nightly-batch", "role": "user", "scope": "acme/web",
            "last4": "abcd", "created_at": 1.0, "models": ["bank", "chat-*"],
            "limits": {"requests_per_minute": 1200, "tokens_per_minute": 2000000},
            "expires_at": 1.8e9, "last_used_at": time.time() - 3 * 86_400 - 9,
        }  # fmt: skip
        gone = {**record, "id": "k2", "revoked_at": 5.0, "last_used_at": None}
        control.answers = {"GET /keys": {"data": [record, gone]}}
        text = wide(100)
        ok("keys", "list")
        shown = text.getvalue()
        assert all(len(line) <= 100 for line in shown.splitlines())
        for whole in ("d4e5f6a7b8c9", "nightly-batch", "acme/web", "2027-01-1", "2000000 tok/min"):
            assert whole in shown
        assert "3 d ago" in shown
        (line,) = [line for line in shown.splitlines() if line.startswith("k2 ")]
        assert "revoked" in line
        assert "never" in line

    def test_no_key_says_what_to_do(self, cli: Ok, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-service")
        result = cli("keys", "list")
        assert isinstance(result.exception, AuthenticationFailed)
        assert "CLOUDLM_API_KEY" in result.exception.message
        assert "--local" in result.exception.message

    def test_control_that_refuses(self, control: Any, cli: Ok) -> None:
        control.answers = {"GET /keys": httpx2.ConnectError("refused")}
        result = cli("keys", "list")
        assert isinstance(result.exception, Unavailable)
        assert "cloudlm up" in result.exception.message


class TestModels:
    def test_from_import_to_removal(self, ok: Ok, cli: Ok, tmp_path: Path, home: Path) -> None:
        assert json.loads(ok("models", "list", "--json").stdout) == []
        assert "cloudlm models import" in ok("models", "list").stderr
        folder = tmp_path / "own"
        shutil.copytree(bundled_folder(), folder)
        (folder / "pytorch_model.bin").write_bytes(b"pickle")
        made = ok("models", "import", str(folder), "--alias", "champion")
        assert made.stdout == "models:/own/1\n"
        assert "pytorch_model.bin was left behind" in made.stderr
        again = json.loads(ok("models", "import", str(folder), "--json").stdout)
        assert (again["version"], again["already_registered"]) == (1, True)
        row = ok("models", "list").stdout.splitlines()[1].split()
        assert row[:4] == ["own", "1", "champion", "LlamaForCausalLM"]
        assert json.loads(ok("models", "list", "--json").stdout)[0]["aliases"] == ["champion"]
        assert "model.safetensors" in ok("models", "show", "own").stdout
        shown = json.loads(ok("models", "show", "models:/own/1", "--json").stdout)
        assert shown["architecture"] == "LlamaForCausalLM"
        assert isinstance(cli("models", "rm", "own/1").exception, Conflict)  # the alias

    def test_an_alias_is_set_moved_and_removed(self, ok: Ok, cli: Ok, tmp_path: Path) -> None:
        folder = tmp_path / "own"
        shutil.copytree(bundled_folder(), folder)
        ok("models", "import", str(folder), "--alias", "champion")
        (folder / "README.md").write_text("another version")
        ok("models", "import", str(folder))
        moved = ok("models", "alias", "own", "champion", "2").stderr
        assert "models:/own@champion is version 2 now; it was version 1" in moved
        assert "cloudlm deploy models:/own/2 --name NAME" in moved
        assert "it was" not in ok("models", "alias", "own", "champion", "2").stderr
        told = json.loads(ok("models", "alias", "models:/own", "old", "1", "--json").stdout)
        assert told == {"name": "own", "alias": "old", "version": 1, "before": None}
        rows = json.loads(ok("models", "list", "--json").stdout)
        assert [row["aliases"] for row in rows] == [["old"], ["champion"]]
        assert json.loads(ok("models", "show", "own@champion", "--json").stdout)["version"] == 2
        assert "removed models:/own@old" in ok("models", "unalias", "own", "old").stderr
        ok("models", "rm", "own/1")  # no alias holds it any more
        assert isinstance(cli("models", "unalias", "own", "old").exception, NotFound)

    def test_an_alias_that_is_named_is_removed_with_a_warning(self, ok: Ok) -> None:
        ok("models", "import", str(bundled_folder()), "--name", "used", "--alias", "champion")
        asyncio.run(_deploy("front", "models:/used@champion"))
        asyncio.run(_deploy("other", "models:/used/1"))
        removed = ok("models", "unalias", "used", "champion", "--json").stdout
        told = {"removed": "models:/used@champion", "named_by": ["front"]}
        assert json.loads(removed) == told
        ok("models", "alias", "used", "champion", "1")
        assert (
            "deployment front still names it" in ok("models", "unalias", "used", "champion").stderr
        )

    @pytest.mark.parametrize(
        ("words", "fault"),
        [
            (("own", "champion", "7"), "has no version 7; it has: 1"),
            (("own", "Champion!", "1"), "alias 'Champion!' is not valid"),
            (("nobody", "champion", "1"), "'nobody' is not registered; registered: own"),
            (("No Name", "champion", "1"), "model 'No Name' is not valid"),
        ],
    )
    def test_an_alias_that_cannot_be_changes_nothing(
        self, ok: Ok, cli: Ok, words: tuple[str, ...], fault: str
    ) -> None:
        ok("models", "import", str(bundled_folder()), "--name", "own", "--alias", "champion")
        result = cli("models", "alias", *words)
        assert fault in result.exception.message
        rows = json.loads(ok("models", "list", "--json").stdout)
        assert [row["aliases"] for row in rows] == [["champion"]]
        for bad in ("0", "-1", "latest"):
            assert cli("models", "alias", "own", "champion", bad).exit_code == 2

    def test_a_version_in_use_stays(self, ok: Ok, cli: Ok) -> None:
        ok("models", "import", str(bundled_folder()), "--name", "used")
        asyncio.run(_deploy("gone", "models:/nobody@champion"))
        asyncio.run(_deploy("front", "models:/used"))
        result = cli("models", "rm", "models:/used/1")
        assert isinstance(result.exception, Conflict)
        assert "cloudlm delete front" in result.exception.message
        assert json.loads(ok("models", "list", "--json").stdout)[0]["name"] == "used"

    def test_removal_is_not_stopped_by_a_deployment_without_its_model(self, ok: Ok) -> None:
        ok("models", "import", str(bundled_folder()), "--name", "free")
        asyncio.run(_deploy("gone", "models:/free@no-such-alias"))
        assert json.loads(ok("models", "rm", "free/1", "--json").stdout) == {
            "removed": "models:/free/1"
        }

    def test_a_folder_beside_needs_no_dots(
        self, ok: Ok, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shutil.copytree(bundled_folder(), tmp_path / "beside")
        monkeypatch.chdir(tmp_path)
        assert ok("models", "import", "beside").stdout == "models:/beside/1\n"

    def test_a_broken_folder_registers_nothing(self, ok: Ok, cli: Ok, tmp_path: Path) -> None:
        folder = tmp_path / "broken"
        shutil.copytree(bundled_folder(), folder)
        (folder / "tokenizer.json").unlink()
        result = cli("models", "import", str(folder))
        assert isinstance(result.exception, BrokenModel)
        assert "tokenizer.json" in result.exception.message
        assert json.loads(ok("models", "list", "--json").stdout) == []

    def test_a_model_that_does_not_exist(self, cli: Ok) -> None:
        assert isinstance(cli("models", "show", "nobody").exception, ModelNotFound)


async def _deploy(name: str, model: str) -> None:
    state, _ = await open_local_state()
    try:
        await state.put_deployment(DeploymentSpec(name=name, model=model), now=1.0)
    finally:
        await state.close()


class TestSettings:
    def test_config(self, ok: Ok, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CLOUDLM_GATEWAY_PORT", "9")
        monkeypatch.setenv("CLOUDLM_STATE_URL", "postgresql://ann:pa55word@db/x")
        rows = {row["name"]: row for row in json.loads(ok("config", "--json").stdout)}
        assert rows["gateway.port"]["value"] == 9
        assert rows["gateway.port"]["source"] == "CLOUDLM_GATEWAY_PORT"
        assert rows["state.url"]["value"] == "***"
        shown = ok("config").stdout
        assert "gateway.first_token_timeout_s" in shown
        assert "CLOUDLM_GATEWAY_FIRST_TOKEN_TIMEOUT_S" not in shown
        assert "pa55word" not in shown

    def test_config_on_a_terminal_is_a_line_per_setting(
        self, ok: Ok, wide: Callable[[int], io.StringIO], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CLOUDLM_HOME", "/tmp/home")
        rows = json.loads(ok("config", "--json").stdout)
        text = wide(100)
        assert "CLOUDLM_ and its name in capitals" in ok("config").stderr
        lines = text.getvalue().splitlines()[1:]
        names = {row["name"] for row in rows}
        shown = [line.split()[0] for line in lines if line[:1].strip()]
        assert set(shown) == names
        assert all(len(line) <= 100 for line in lines)

    def test_a_bad_value(self, cli: Ok, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CLOUDLM_GATEWAY_PORT", "http")
        result = cli("config")
        assert isinstance(result.exception, BadSetting)
        assert "CLOUDLM_GATEWAY_PORT" in result.exception.message

    def test_the_home_of_the_flag(self, ok: Ok, tmp_path: Path) -> None:
        rows = json.loads(ok("--home", str(tmp_path / "other"), "config", "--json").stdout)
        assert rows[0]["value"] == str(tmp_path / "other")

    def test_a_home_that_cannot_be(self, cli: Ok, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        result = cli("--home", str(tmp_path / "file" / "home"), "models", "list")
        assert isinstance(result.exception, StorageFailed)
        assert "--home" in result.exception.message

    def test_drivers(self, ok: Ok) -> None:
        rows = json.loads(ok("drivers", "--json").stdout)
        assert {"memory", "process"} <= {row["name"] for row in rows}
        assert [row["fault"] for row in rows if row["package"] == "cloudlm"] == ["", "", ""]
        assert "restarts_replicas" in ok("drivers").stdout


class TestWhichControl:
    @pytest.fixture(autouse=True)
    def key(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CLOUDLM_API_KEY", "clm_live_x")

    def test_the_settings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CLOUDLM_CONTROL_PORT", "7001")
        monkeypatch.setenv("CLOUDLM_CONTROL_HOST", "::")
        monkeypatch.setenv("CLOUDLM_CONTROL_URL", "")
        with control_client() as client:
            assert client.connection.control_url == "http://127.0.0.1:7001"

    def test_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CLOUDLM_CONTROL_URL", "https://control.example/")
        with control_client() as client:
            assert client.connection.control_url == "https://control.example"
