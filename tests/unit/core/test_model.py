"""Names, addresses and manifests."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.core.errors import BrokenModel, CloudlmError, InvalidRequest
from cloudlm.core.model import (
    AddressKind,
    Manifest,
    ModelFile,
    ModelRef,
    address_kind,
    check_name,
    manifest_from_body,
    parse_ref,
)

MANIFEST = Manifest(
    name="bank",
    version=2,
    files=(ModelFile("config.json", 3, "a" * 64), ModelFile("sub/model.safetensors", 5, "b" * 64)),
    task="generate",
    architecture="LlamaForCausalLM",
    precision="bfloat16",
    parameters=10,
    context_length=512,
    licence="apache-2.0",
    lineage={"source": "file:///x"},
    created_at=1.5,
)


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("models:/bank/3", ModelRef("bank", version=3)),
        ("models:/bank@champion", ModelRef("bank", alias="champion")),
        ("models:/bank", ModelRef("bank")),
        ("bank@x", ModelRef("bank", alias="x")),
    ],
)
def test_references(text: str, ref: ModelRef) -> None:
    assert parse_ref(text) == ref
    assert parse_ref(str(ref)) == ref


@pytest.mark.parametrize(
    "text", ["", "models:/", "models:/a/0", "models:/a/x", "models:/A/1", "a/1/2", "a@B", "../a"]
)
def test_bad_references(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_ref(text)


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a b", "a/b", "a..b", "ä", "a" * 65, "a\n"])
def test_bad_names(name: str) -> None:
    with pytest.raises(InvalidRequest):
        check_name(name)


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("models:/a/1", AddressKind.REGISTRY),
        ("bank-helper", AddressKind.REGISTRY),
        ("bank@champion", AddressKind.REGISTRY),
        ("./folder", AddressKind.FOLDER),
        ("/abs/folder", AddressKind.FOLDER),
        ("~/m", AddressKind.FOLDER),
        ("file:///m", AddressKind.FOLDER),
        ("my-model/", AddressKind.FOLDER),
        ("out/models/mine", AddressKind.FOLDER),
        ("org/name@refs/pr/1", AddressKind.HUB),
        ("Qwen/Qwen3-0.6B", AddressKind.HUB),
        ("hf://Qwen/Qwen3-0.6B@main", AddressKind.HUB),
        ("s3://bucket/key", AddressKind.OBJECT_STORE),
    ],
)
def test_address_kinds(address: str, kind: AddressKind) -> None:
    assert address_kind(address) is kind


def test_unknown_scheme() -> None:
    with pytest.raises(InvalidRequest, match="is not a model address"):
        address_kind("ftp://x/y")


def test_a_manifest_survives_its_body() -> None:
    assert manifest_from_body(MANIFEST.body()) == MANIFEST
    assert MANIFEST.size_bytes == 8


@pytest.mark.promise(14)
@pytest.mark.known_failure("CVE-2024-1561", "CVE-2026-49119", "CVE-2025-11201", "CVE-2023-51449")
@pytest.mark.known_failure("CVE-2026-24208")
@pytest.mark.parametrize(
    "path", ["../x", "/x", "a/../b", "a//b", "", ".", "a\\b", "a\0", "x" * 300]
)
def test_a_manifest_cannot_leave_its_folder(path: str) -> None:
    body = MANIFEST.body()
    body["files"][0]["path"] = path
    with pytest.raises(BrokenModel):
        manifest_from_body(body)


@pytest.mark.promise(14)
@pytest.mark.known_failure("CVE-2024-37032")
@pytest.mark.parametrize(
    "digest", ["../../../etc/passwd", "0" * 63, "0" * 63 + "/", "0" * 65, "A" * 64, "0" * 64 + "\n"]
)
def test_a_digest_is_no_path(digest: str) -> None:
    body = MANIFEST.body()
    body["files"][0]["sha256"] = digest
    with pytest.raises(BrokenModel):
        manifest_from_body(body)


@given(st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=5))
def test_any_value_as_manifest_is_refused_cleanly(value: object) -> None:
    for field in MANIFEST.body():
        with contextlib.suppress(CloudlmError):
            manifest_from_body({**MANIFEST.body(), field: value})
    with pytest.raises(BrokenModel):
        manifest_from_body(value)
