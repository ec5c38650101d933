"""Keys of others' services: kept privately, each for its own origin (promises 15 and 32)."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from cloudlm.core.errors import CloudlmError, InvalidRequest, NotFound, StorageFailed
from cloudlm.security.credentials import Credential, Credentials, NoCredential

URL = "https://api.example.com/v1"
ORIGIN = "https://api.example.com:443"
CANARY = "sk-canary-4711"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "secrets" / "endpoints"


def kept(folder: Path, value: str = CANARY, name: str = "one") -> Credentials:
    credentials = Credentials(folder, {})
    credentials.put(Credential(name, ORIGIN, value, set_at=5.0))
    return credentials


@pytest.mark.promise(32)
def test_a_key_is_kept_for_its_owner_alone(folder: Path) -> None:
    credentials = kept(folder)
    assert credentials.names() == ["one"]
    assert credentials.key_for("one", URL) == CANARY
    assert stat.S_IMODE((folder / "one.json").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert CANARY not in repr(credentials.find("one"))


@pytest.mark.promise(15)
@pytest.mark.parametrize(
    "url",
    [
        "http://api.example.com/v1",
        "https://api.example.com:8443/v1",
        "https://api.example.com.evil.example/v1",
        "https://evil.example/api.example.com",
    ],
)
def test_a_key_goes_to_its_own_origin_alone(folder: Path, url: str) -> None:
    with pytest.raises(NoCredential) as refused:
        kept(folder).key_for("one", url)
    assert CANARY not in refused.value.message


def test_a_changed_key_is_used_at_once(folder: Path) -> None:
    credentials = kept(folder)
    assert credentials.key_for("one", URL) == CANARY
    kept(folder, "sk-new")
    assert credentials.key_for("one", URL) == "sk-new"
    credentials.remove("one")
    with pytest.raises(NoCredential, match="cloudlm secrets set one"):
        credentials.key_for("one", URL)
    with pytest.raises(NotFound):
        credentials.remove("one")


@pytest.mark.promise(32)
def test_one_that_others_can_read_is_refused(folder: Path) -> None:
    credentials = kept(folder)
    (folder / "one.json").chmod(0o640)
    os.utime(folder / "one.json", (1, 1))
    with pytest.raises(StorageFailed, match="chmod 600"):
        credentials.find("one")


@pytest.mark.parametrize("text", ["", "[]", '{"name": "one"}', '{"x": 1}', "\x00"])
def test_a_damaged_file_is_named(folder: Path, text: str) -> None:
    credentials = kept(folder)
    (folder / "one.json").write_text(text)
    with pytest.raises(StorageFailed, match="damaged"):
        credentials.find("one")


def test_a_link_is_not_followed(folder: Path, tmp_path: Path) -> None:
    credentials = kept(folder)
    (folder / "one.json").rename(tmp_path / "else.json")
    (folder / "one.json").symlink_to(tmp_path / "else.json")
    with pytest.raises(StorageFailed):
        credentials.find("one")


def test_the_environment_comes_first_and_names_its_origin(folder: Path) -> None:
    kept(folder)
    environment = {"CLOUDLM_SECRET_ONE": f"{CANARY}-2\n", "CLOUDLM_ORIGIN_ONE": URL + "/"}
    credentials = Credentials(folder, environment)
    assert credentials.key_for("one", URL) == f"{CANARY}-2"
    with pytest.raises(NoCredential):
        credentials.key_for("one", "https://evil.example/v1")
    del environment["CLOUDLM_ORIGIN_ONE"]
    with pytest.raises(NoCredential, match="CLOUDLM_ORIGIN_ONE") as refused:
        credentials.key_for("one", URL)
    assert CANARY not in refused.value.message


@pytest.mark.parametrize("value", ["", "two words", "line\nend", "é", "x" * 9000, "a\0b"])
def test_what_no_header_can_carry_is_no_key(folder: Path, value: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        kept(folder, value)
    assert not value or value not in refused.value.message


@pytest.mark.parametrize("name", ["../x", "A", "", "a/b", ".json", "a" * 64])
def test_a_name_is_no_path(folder: Path, name: str) -> None:
    with pytest.raises(CloudlmError):
        kept(folder, name=name)
    with pytest.raises(InvalidRequest):
        Credentials(folder, {}).find(name)
