"""Settings: file < environment < flag, each value with its source, bad ones refused by name."""

import pytest

from cloudlm.core.errors import BadSetting
from cloudlm.core.settings import Settings, environment_name, read_settings


def test_defaults() -> None:
    settings, rows = read_settings()
    assert settings == Settings()
    assert {row.source for row in rows} == {"default"}
    assert all(row.doc.endswith(".") for row in rows)


def test_precedence_and_sources() -> None:
    file = {"gateway": {"port": 1, "idle_timeout_s": 5, "host": "::1"}}
    environment = {"CLOUDLM_GATEWAY_PORT": "2", "CLOUDLM_GATEWAY_IDLE_TIMEOUT_S": "6.5"}
    settings, rows = read_settings(file, environment, {"gateway.port": 3, "control.port": None})
    assert settings.gateway.port == 3
    assert settings.gateway.idle_timeout_s == 6.5
    sources = {row.name: row.source for row in rows}
    assert sources["gateway.port"] == "--gateway-port"
    assert sources["gateway.idle_timeout_s"] == "CLOUDLM_GATEWAY_IDLE_TIMEOUT_S"
    assert sources["gateway.host"] == "config.yaml"
    assert sources["control.port"] == "default"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("gateway.port", "http", ["CLOUDLM_GATEWAY_PORT", "'http'", "whole number"]),
        ("gateway.port", "70000", ["70000", "from 0 to 65535"]),
        ("gateway.idle_timeout_s", "nan", ["at least"]),
        ("gateway.idle_timeout_s", "inf", ["at least"]),
        ("log.level", "loud", ["debug, info, warning, error"]),
        ("engine.kv_cache_mb", "1.5", ["whole number"]),
    ],
)
def test_a_bad_value_names_value_source_and_expectation(
    name: str, value: str, words: list[str]
) -> None:
    with pytest.raises(BadSetting) as caught:
        read_settings(environment={environment_name(name): value})
    for word in [name, *words]:
        assert word in caught.value.message


def test_unknown_names_are_refused() -> None:
    with pytest.raises(BadSetting, match=r"gateway\.prot.*config\.yaml"):
        read_settings({"gateway": {"prot": 1}})


def test_a_bad_secret_is_not_shown() -> None:
    with pytest.raises(BadSetting) as caught:
        read_settings({"state": {"url": ["postgresql://ann:pa55word@db"]}})
    assert "state.url" in caught.value.message
    assert "pa55word" not in caught.value.message


@pytest.mark.parametrize("value", [True, 1.5, float("inf"), float("nan"), [1], None])
def test_a_whole_number_in_yaml_is_whole(value: object) -> None:
    with pytest.raises(BadSetting):
        read_settings({"gateway": {"port": value}})
