"""The installation's folder: private, its secrets made once; settings from file and environment."""

import os
import stat
import threading
from pathlib import Path

import pytest

from cloudlm.core.errors import BadSetting, StorageFailed
from cloudlm.state.home import Home, load_settings


def test_secrets_are_made_once_and_private(tmp_path: Path) -> None:
    home = Home(tmp_path / "home").ensure()
    pepper, token = home.pepper(), home.worker_token()
    assert (home.pepper(), home.worker_token()) == (pepper, token)
    assert len(pepper) == 32
    for path in (home.path / "secrets").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(home.path.stat().st_mode) == 0o700
    assert sorted(p.name for p in (home.path / "secrets").iterdir()) == ["pepper", "worker-token"]


def test_two_first_uses_agree(tmp_path: Path) -> None:
    home = Home(tmp_path).ensure()
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(home.pepper())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1


def test_an_unusable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageFailed, match=r"file/home.*CLOUDLM_HOME"):
        Home(tmp_path / "file" / "home").ensure()


def test_settings_come_from_the_file_in_home(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("gateway:\n  port: 9000\n")
    settings, rows = load_settings(environ={"CLOUDLM_HOME": str(tmp_path)})
    assert settings.gateway.port == 9000
    source = next(row.source for row in rows if row.name == "gateway.port")
    assert source == os.fspath(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    "text",
    [
        b"gateway: [",
        b"- a",
        b"\x00",
        b"gateway:\n  prot: 1",
        b"note: 2024-02-30",
        b"home: \xff",
        b"[" * 5000,
    ],
    ids=str,
)
def test_a_bad_file_is_named(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(text)
    with pytest.raises(BadSetting, match=r"config\.yaml"):
        load_settings(environ={"CLOUDLM_HOME": str(tmp_path)})


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match="cannot be read"):
        load_settings(environ={"CLOUDLM_CONFIG": str(tmp_path / "none.yaml")})


def test_a_fault_in_the_file_is_on_one_line_and_quotes_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("state:\n  url: [postgresql://ann:pa55word@db\n")
    with pytest.raises(BadSetting) as caught:
        load_settings(environ={"CLOUDLM_HOME": str(tmp_path)})
    assert "pa55word" not in caught.value.message
    assert "\n" not in caught.value.message
    assert "line 3" in caught.value.message


def test_the_file_in_home_cannot_name_another_home(tmp_path: Path) -> None:
    """The processes of an installation are told the home and would read another file there."""
    file = tmp_path / "config.yaml"
    file.write_text("home: /elsewhere\n")
    with pytest.raises(BadSetting, match="CLOUDLM_CONFIG"):
        load_settings(environ={"CLOUDLM_HOME": str(tmp_path)})
    settings, _ = load_settings(environ={"CLOUDLM_CONFIG": str(file)})
    assert settings.home == "/elsewhere"


def test_a_user_without_a_folder(tmp_path: Path) -> None:
    for use in (
        lambda: Home("~nobody-of-that-name/x"),
        lambda: load_settings(environ={"CLOUDLM_HOME": "~nobody-of-that-name/x"}),
    ):
        with pytest.raises(BadSetting, match="CLOUDLM_HOME"):
            use()


@pytest.mark.parametrize("content", [b"", b"\n", b"00", b"zz" * 32, b"\xff\xfe"])
def test_a_damaged_secret_is_never_used(tmp_path: Path, content: bytes) -> None:
    home = Home(tmp_path).ensure()
    for name, read in (("pepper", home.pepper), ("worker-token", home.worker_token)):
        (tmp_path / "secrets" / name).write_bytes(content)
        if name == "worker-token" and len(content) >= 32:
            continue  # any long text is a token
        with pytest.raises(StorageFailed, match="damaged"):
            read()
