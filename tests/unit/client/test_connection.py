"""Where requests go, and that the key goes nowhere else."""

from __future__ import annotations

import pytest

from cloudlm.client.connection import Connection
from cloudlm.core.errors import BadSetting


def test_this_machine_is_the_default() -> None:
    connection = Connection.read(None, None, None, {})
    assert connection.control_url == "http://127.0.0.1:8001"
    assert connection.gateway_url == "http://127.0.0.1:8000"
    assert connection.api_key is None


def test_arguments_win_over_the_environment() -> None:
    environ = {
        "CLOUDLM_API_KEY": "clm_env",
        "CLOUDLM_CONTROL_URL": "https://control.example/",
        "CLOUDLM_GATEWAY_URL": "https://lm.example/base/",
    }
    found = Connection.read(None, None, None, environ)
    assert found.control_url == "https://control.example"
    assert found.gateway_url == "https://lm.example/base"
    assert found.api_key == "clm_env"
    given = Connection.read("clm_arg", "http://a:1", "http://b:2", environ)
    assert (given.api_key, given.control_url, given.gateway_url) == (
        "clm_arg",
        "http://a:1",
        "http://b:2",
    )


def test_only_a_key_of_ours_is_taken_from_openais_variable() -> None:
    assert Connection.read(None, None, None, {"OPENAI_API_KEY": "clm_x"}).api_key == "clm_x"
    assert Connection.read(None, None, None, {"OPENAI_API_KEY": "sk-secret"}).api_key is None


def test_no_text_shows_the_key() -> None:
    assert "clm_x" not in repr(Connection.read("clm_x", None, None, {}))


@pytest.mark.parametrize("key", ["clm_x\r\nHost: evil", "clm x", "clm_ü", "clm_\0"])
def test_a_key_cannot_write_headers(key: str) -> None:
    with pytest.raises(BadSetting) as caught:
        Connection.read(key, None, None, {})
    assert key not in str(caught.value)


@pytest.mark.promise(15)
@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8001",
        "ftp://host",
        "http://",
        "http://host:port",
        "http://user:hunter2@host",
        "http://host/?key=hunter2",
        "file:///etc/passwd",
    ],
)
def test_other_addresses_are_refused(url: str) -> None:
    for arguments in ((None, url, None), (None, None, url)):
        with pytest.raises(BadSetting, match="must be an address such as") as caught:
            Connection.read(*arguments, {})
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "proxies"),
    [
        ("http://127.0.0.1:8001", False),
        ("http://localhost:8001", False),
        ("http://[::1]:8001", False),
        ("https://control.example", True),
        ("http://10.0.0.7:8001", True),
    ],
)
def test_no_proxy_stands_before_this_machine(url: str, proxies: bool) -> None:
    assert Connection.read(None, url, None, {}).http_options["trust_env"] is proxies
