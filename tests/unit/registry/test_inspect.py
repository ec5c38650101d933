"""Every fault of a model folder is an error that names the file; nothing unsafe gets through."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudlm.core.errors import BrokenModel, NotFound, UnsafeModel
from cloudlm.registry.inspect import inspect_folder
from cloudlm.registry.safetensors_header import read_header

Bytes = Callable[..., bytes]


def test_facts_of_a_good_folder(model: Path) -> None:
    found = inspect_folder(model)
    assert [file.path for file in found.files] == [
        "README.md", "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert found.facts.architecture == "LlamaForCausalLM"
    assert found.facts.task == "generate"
    assert found.facts.storage.precision == "float32"
    assert found.facts.storage.parameters == 36
    assert found.facts.context_length == 512
    assert found.facts.licence == "apache-2.0"
    assert found.notes == ()


@pytest.mark.promise(13)
@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "a.pt", "a.pth", "a.pkl", "a.pickle", "a.ckpt", "a.joblib", "tf.h5",
     "flax.msgpack", "a.npy", "a.zip", "a.tar", "a.tar.gz", "A.BIN"],
)  # fmt: skip
def test_unsafe_weights_are_left_behind_or_refused(model: Path, name: str) -> None:
    (model / name).write_bytes(b"\x80\x04evil")
    found = inspect_folder(model)
    assert name not in [file.path for file in found.files]
    assert any(name in note for note in found.notes)
    (model / "model.safetensors").unlink()
    with pytest.raises(UnsafeModel, match=name):
        inspect_folder(model)


@pytest.mark.promise(13)
@pytest.mark.parametrize("name", ["modeling_x.py", "x.PY", "lib.so", "sub/x.py", "x.pyc"])
def test_code_is_refused(model: Path, name: str) -> None:
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text("")
    with pytest.raises(UnsafeModel, match=name):
        inspect_folder(model)


@pytest.mark.parametrize("architecture", ["Phi3ForCausalLM", "FalconForCausalLM"])
def test_code_for_a_network_of_our_own_does_not_matter(
    model: Path, model_at: Callable[..., Path], architecture: str
) -> None:
    """As Microsoft's and TII's published configurations have it."""
    names = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    model_at(model, architectures=[architecture], auto_map=names)
    found = inspect_folder(model)
    assert found.facts.architecture == architecture
    assert any("code" in note and architecture in note for note in found.notes)
    model_at(model, architectures=[architecture], nested={"auto_map": names})
    with pytest.raises(UnsafeModel, match="auto_map"):
        inspect_folder(model)


@pytest.mark.promise(13)
@pytest.mark.known_failure("CVE-2025-66448")
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "body",
    [
        {"auto_map": {"AutoModel": "evil--x"}},
        {"text_config": {"auto_map": {"a": "b"}}},
        {"list": [{"auto_map": {"a": "b"}}]},
        {"trust_remote_code": True},
        {"custom_pipelines": {"x": {}}},
    ],
)
def test_code_in_configuration_is_refused(
    model: Path, model_at: Callable[..., Path], file: str, body: dict[str, object]
) -> None:
    if file == "config.json":
        model_at(model, **{"architectures": ["EvilForCausalLM"], **body})
    else:
        (model / file).write_text(json.dumps(body))
    with pytest.raises(UnsafeModel, match=file):
        inspect_folder(model)


@pytest.mark.promise(14)
def test_links_out_of_the_folder_are_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    (model / "extra.json").symlink_to("../secret.json")
    with pytest.raises(UnsafeModel, match=r"extra\.json"):
        inspect_folder(model)
    (model / "extra.json").unlink()
    (model / "sub").symlink_to(tmp_path)
    with pytest.raises(UnsafeModel, match="sub"):
        inspect_folder(model)


@pytest.mark.promise(14)
def test_links_to_nowhere_loops_and_disguises(model: Path) -> None:
    (model / "extra.json").symlink_to("nowhere")
    with pytest.raises(BrokenModel, match="nowhere"):
        inspect_folder(model)
    (model / "extra.json").unlink()
    (model / "extra.json").symlink_to("extra.json")
    with pytest.raises(BrokenModel, match=r"extra\.json"):
        inspect_folder(model)
    (model / "extra.json").unlink()
    (model / "real.bin").write_bytes(b"x")
    (model / "extra.json").symlink_to("real.bin")
    with pytest.raises(UnsafeModel, match=r"real\.bin"):
        inspect_folder(model)


def test_the_hub_caches_links_are_accepted(tmp_path: Path, model: Path) -> None:
    snapshot = tmp_path / "models--o--n" / "snapshots" / ("a" * 40)
    blobs = tmp_path / "models--o--n" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        file.rename(blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    assert len(inspect_folder(snapshot).files) == 4


@pytest.mark.promise(14)
def test_special_files_are_refused(model: Path) -> None:
    os.mkfifo(model / "generation_config.json")
    with pytest.raises(UnsafeModel, match=r"generation_config\.json"):
        inspect_folder(model)


def test_hidden_and_useless_files_are_skipped(model: Path) -> None:
    (model / ".git").mkdir()
    (model / ".git" / "hook.py").write_text("evil")
    (model / ".gitattributes").write_text("")
    (model / "picture.png").write_bytes(b"")
    assert len(inspect_folder(model).files) == 4


def test_a_model_below_is_named(model: Path) -> None:
    """As an archive unpacks it, or a folder of several models."""
    parent = model.parent
    with pytest.raises(BrokenModel) as caught:
        inspect_folder(parent)
    assert caught.value.message == (
        f"config.json is missing in {parent}, but a model lies below it: import {model}"
    )
    inspect_folder(Path(caught.value.message.rpartition(" ")[2]))
    (parent / "deep" / "lora").mkdir(parents=True)
    (parent / "deep" / "lora" / "adapter_config.json").write_text("{}")
    (parent / "deep" / "small.GGUF").write_bytes(b"")
    with pytest.raises(BrokenModel, match="import one of them") as caught:
        inspect_folder(parent)
    for named in (model, parent / "deep" / "lora", parent / "deep" / "small.GGUF"):
        assert str(named) in caught.value.message
    (parent / "more").mkdir()
    (parent / "more" / "config.json").write_text("{}")
    with pytest.raises(BrokenModel, match="or another of 4"):
        inspect_folder(parent)


def test_what_lies_below_a_model_is_no_other_model(model: Path) -> None:
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text("{}")
    inspect_folder(model)
    (model / "tokenizer.json").unlink()
    with pytest.raises(BrokenModel, match=r"tokenizer\.json is missing"):
        inspect_folder(model)


@pytest.mark.parametrize(
    ("file", "content", "fault"),
    [
        ("config.json", None, "config.json is missing"),
        ("tokenizer.json", None, "tokenizer.json is missing"),
        ("model.safetensors", None, "model.safetensors is missing"),
        ("config.json", b"{", "config.json: is not JSON"),
        ("config.json", b"\xff\xfe", "config.json: is not UTF-8"),
        ("config.json", b"[]", "config.json: expected a JSON object"),
        ("config.json", b"[" * 100_000, "config.json: is nested too deeply"),
        ("config.json", b'{"a":' * 200 + b"1" + b"}" * 200, "config.json: is nested deeper"),
        ("config.json", b"{}", "architectures"),
        ("config.json", b'{"architectures": []}', "architectures"),
        ("config.json", b'{"architectures": ["a b"]}', "architectures"),
        ("config.json", b'{"architectures": ["XForCausalLM"]}', "context length"),
        (
            "config.json",
            b'{"architectures": ["XForCausalLM"], "n_positions": -1}',
            "n_positions = -1",
        ),
        ("config.json", b" " * (17 << 20), "config.json: 17825792 bytes"),
        ("tokenizer.json", b'{"model":', "tokenizer.json: is not JSON"),
        ("tokenizer.json", b"{}", "tokenizer.json: has no 'model'"),
        ("special_tokens_map.json", b"{", "special_tokens_map.json: is not JSON"),
    ],
)
def test_each_fault_names_its_file(
    model: Path, file: str, content: bytes | None, fault: str
) -> None:
    if content is None:
        (model / file).unlink()
    else:
        (model / file).write_bytes(content)
    with pytest.raises(BrokenModel, match=fault):
        inspect_folder(model)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="does not exist"):
        inspect_folder(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotFound, match="is not a folder"):
        inspect_folder(tmp_path / "file")


def _header(body: object, data: bytes = b"") -> bytes:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return len(text).to_bytes(8, "little") + text + data


def _tensor(begin: int = 0, end: int = 4, dtype: str = "F32", shape: object = (1,)) -> object:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.promise(13)
@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "truncated"),
        (b"\x01\x02", "truncated"),
        ((1 << 63).to_bytes(8, "little") + b"{}" * 9, "header claims"),
        ((1000).to_bytes(8, "little") + b"{}" * 9, "truncated or not safetensors"),
        (_header(b"[]"), "not a JSON object"),
        (_header(b'{"a":}'), "not readable JSON"),
        (_header(b'{"a":' + b"[" * 100_000), "not readable JSON"),
        (_header(b'{"a":{},"a":{}}'), "occurs twice"),
        (_header(b'{"a":"\xff"}'), "not readable JSON"),
        (_header({"__metadata__": {"a": 1}}), "__metadata__"),
        (_header({"a": {"dtype": "F32"}}), "exactly dtype, shape"),
        (_header({"a": _tensor(dtype="OBJECT")}, b"1234"), "unknown dtype"),
        (_header({"a": _tensor(shape=[-1])}, b"1234"), "shape"),
        (_header({"a": _tensor(shape=[1.0])}, b"1234"), "shape"),
        (_header({"a": _tensor(shape=[True])}, b"1234"), "shape"),
        (_header({"a": _tensor(shape=[1 << 40, 1 << 40])}, b"1234"), "too many elements"),
        (_header({"a": _tensor(shape=[1] * 17)}, b"1234"), "shape"),
        (_header({"a": _tensor(4, 0)}, b"1234"), "data_offsets"),
        (_header({"a": _tensor(0, 8)}, b"12345678"), "needs 4 bytes"),
        (_header({"a": _tensor()}, b"123"), "truncated: the tensors need 4"),
        (_header({"a": _tensor()}, b"12345"), "follow the last tensor"),
        (_header({"a": _tensor(), "b": _tensor()}, b"1234"), "overlaps"),
        (_header({"a": _tensor(4, 8)}, b"12345678"), "gap"),
        (_header({}), "holds no tensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
    ],
)
def test_bad_safetensors(model: Path, content: bytes, fault: str) -> None:
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(BrokenModel, match=rf"model\.safetensors.*{fault}"):
        inspect_folder(model)


@pytest.mark.promise(13)
@pytest.mark.parametrize("content", [b"PK\x03\x04" + b"\0" * 40, b"\x80\x04\x95" + b"\0" * 40])
def test_disguised_pickles(model: Path, content: bytes) -> None:
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(UnsafeModel, match=r"model\.safetensors"):
        inspect_folder(model)


@pytest.mark.promise(13)
@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_give_a_verdict(noise: bytes, framed: bool) -> None:
    import io

    content = _header(noise) if framed else noise
    try:
        read_header(io.BytesIO(content), len(content), "x.safetensors")
    except BrokenModel as error:
        assert "x.safetensors" in error.message


def _shard(model: Path, safetensors: Bytes) -> Path:
    (model / "model.safetensors").unlink()
    for number, tensor in enumerate("ab", 1):
        content = safetensors({tensor: ("F32", [2])})
        (model / f"model-0000{number}-of-00002.safetensors").write_bytes(content)
    _index(model, {t: f"model-0000{n}-of-00002.safetensors" for n, t in enumerate("ab", 1)})
    return model


def _index(model: Path, table: object) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))


def test_shards(model: Path, safetensors: Bytes) -> None:
    _shard(model, safetensors)
    (model / "consolidated.safetensors").write_bytes(safetensors({"c": ("F32", [2])}))
    found = inspect_folder(model)
    assert found.facts.storage.parameters == 4
    assert "consolidated.safetensors" not in [file.path for file in found.files]
    assert any("consolidated" in note for note in found.notes)


def test_bad_shards(model: Path, safetensors: Bytes) -> None:
    _shard(model, safetensors)
    second = model / "model-00002-of-00002.safetensors"
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(BrokenModel, match=r"model-00002-of-00002.*is missing"):
        inspect_folder(model)
    second.write_bytes(content[:-1])
    with pytest.raises(BrokenModel, match=r"model-00002.*truncated"):
        inspect_folder(model)
    second.write_bytes(safetensors({"a": ("F32", [2])}))
    with pytest.raises(BrokenModel, match="is also in"):
        inspect_folder(model)
    second.write_bytes(safetensors({"z": ("F32", [2])}))
    with pytest.raises(BrokenModel, match="tensor 'b' is missing"):
        inspect_folder(model)
    for hostile in ("../x.safetensors", "/etc/x.safetensors", "x.bin", 3, "sub/x.safetensors"):
        _index(model, {"a": hostile})
        with pytest.raises(BrokenModel, match="not a safetensors file of this folder"):
            inspect_folder(model)
    (model / "model.safetensors.index.json").unlink()
    with pytest.raises(BrokenModel, match=r"index\.json is missing"):
        inspect_folder(model)


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({"README.md": "no front matter"}, None),
        ({"README.md": "---\nlicense: other\nlicense_name: llama3\n---\n"}, "llama3"),
        ({"README.md": "x", "LICENSE": "Apache License\nVersion 2.0"}, "apache-2.0"),
        ({"README.md": "x", "LICENSE.txt": "MIT License"}, "mit"),
        ({"README.md": "x", "LICENSE": "All mine"}, "see LICENSE"),
    ],
)
def test_licence(model: Path, files: dict[str, str], licence: str | None) -> None:
    for name, text in files.items():
        (model / name).write_text(text)
    assert inspect_folder(model).facts.licence == licence
