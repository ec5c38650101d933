"""Loading weights: every fault of a file is found before use and named."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cloudlm.core.errors import BrokenModel, CloudlmError, UnsafeModel, UnsupportedModel
from cloudlm.engine.architectures import find_architecture
from cloudlm.engine.architectures.config import ModelConfig, read_json
from cloudlm.engine.formats.opening import open_checkpoint
from cloudlm.engine.formats.safetensors_files import INDEX, SINGLE, read_header
from cloudlm.engine.weights import load_weights

NORM = "model.norm.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(saved_model: Any, tmp_path: Path) -> Path:
    """A copy of a sound model that a test may spoil."""
    copy = tmp_path / "model"
    shutil.copytree(saved_model("llama").folder, copy)
    return copy


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    values = read_json(folder / "config.json")
    _, architecture = find_architecture(values["architectures"])
    with torch.device("meta"):
        model = architecture.from_config(ModelConfig(values))
    load_weights(model, open_checkpoint(folder), dtype=dtype, device=torch.device("cpu"), **options)
    return model


def rewrite(folder: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)


def shard(folder: Path) -> dict[str, str]:
    """Split the single file into two with an index; answers the index's weight_map."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    placed: dict[str, str] = {}
    for number in (0, 1):
        name = f"model-{number + 1:05}-of-00002.safetensors"
        part = {key: value for i, (key, value) in enumerate(tensors.items()) if i % 2 == number}
        save_file(part, folder / name)
        placed.update(dict.fromkeys(part, name))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return placed


def with_header(path: Path, header: Any, body: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def test_single_and_sharded_files_give_the_same_parameters(folder: Path) -> None:
    single = dict(load(folder).named_parameters())
    shard(folder)
    told: list[float] = []
    sharded = dict(load(folder, progress=told.append).named_parameters())
    assert single.keys() == sharded.keys()
    assert all(torch.equal(single[name], sharded[name]) for name in single)
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert not any(parameter.requires_grad for parameter in sharded.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parameters_get_the_asked_type(folder: Path, dtype: torch.dtype) -> None:
    rewrite(folder, lambda t: t.update({name: one.half() for name, one in t.items()}))
    assert {parameter.dtype for parameter in load(folder, dtype).parameters()} == {dtype}


def test_a_loaded_model_does_not_change_with_its_file(folder: Path) -> None:
    model = load(folder)
    before = [parameter.clone() for parameter in model.parameters()]
    with (folder / SINGLE).open("r+b") as file:
        file.seek(-50_000, 2)
        file.write(b"\x7f" * 50_000)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_tied_models_ignore_a_stored_head(saved_model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "tied"
    shutil.copytree(saved_model("llama-tied").folder, folder)
    rewrite(folder, lambda t: t.update({"lm_head.weight": torch.zeros(3)}))
    assert "lm_head.weight" not in dict(load(folder).named_parameters())


def _missing(folder: Path) -> None:
    rewrite(folder, lambda t: t.__delitem__(NORM))


def _extra(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.layers.3.mystery": torch.zeros(2)}))


def _wrong_shape(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({NORM: torch.zeros(63)}))


def _integers(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({NORM: torch.zeros(64, dtype=torch.int8)}))


def _doubled(folder: Path) -> None:
    name = shard(folder)[NORM]
    other = next(file for file in folder.glob("model-*.safetensors") if file.name != name)
    save_file({**load_file(other), NORM: torch.zeros(64)}, other)


def _shard_gone(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def _index_outside(folder: Path) -> None:
    shard(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {NORM: "../../other.safetensors"}}))


def _index_empty(folder: Path) -> None:
    shard(folder)
    (folder / INDEX).write_text("{}")


def _cut(folder: Path) -> None:
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[:-7])


def _no_weights(folder: Path) -> None:
    (folder / SINGLE).unlink()


def _pickled(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


@pytest.mark.parametrize(
    ("spoil", "kind", "words"),
    [
        (_missing, BrokenModel, [SINGLE, NORM, "missing"]),
        (_extra, BrokenModel, [SINGLE, "model.layers.3.mystery", "not a part of Llama"]),
        (_wrong_shape, BrokenModel, [SINGLE, NORM, "[63]", "[64]"]),
        (_integers, UnsupportedModel, [SINGLE, NORM, "I8", "BF16"]),
        (_doubled, BrokenModel, [NORM, "model-00001-of-00002", "model-00002-of-00002"]),
        (_shard_gone, BrokenModel, ["model-00002-of-00002.safetensors is missing", INDEX]),
        (_index_outside, BrokenModel, ["../../other.safetensors"]),
        (_index_empty, BrokenModel, [INDEX, "weight_map"]),
        (_cut, BrokenModel, [SINGLE, "cut or damaged"]),
        (_no_weights, BrokenModel, ["holds no weights", SINGLE]),
        (_pickled, UnsafeModel, ["pytorch_model.bin", "safetensors"]),
    ],
)
def test_a_spoilt_folder_is_refused_with_file_and_fault(
    folder: Path, spoil: Callable[[Path], None], kind: type[CloudlmError], words: list[str]
) -> None:
    spoil(folder)
    with pytest.raises(BrokenModel) as raised:
        load(folder)
    assert type(raised.value) is kind
    for word in words:
        assert word in str(raised.value)


SOUND = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "body", "words"),
    [
        (b"{", b"", "not valid JSON"),
        (b"[" * 100_000, b"", "not valid JSON"),
        (b"\xff\xfe", b"", "not valid JSON"),
        ([1], b"", "not a JSON object"),
        ({"a": 5}, b"", "'a' is malformed"),
        ({"a": {**SOUND, "shape": [-2]}}, b"\0" * 8, "'a' is malformed"),
        ({"a": {**SOUND, "shape": 2}}, b"\0" * 8, "'a' is malformed"),
        ({"a": {**SOUND, "shape": [2.0]}}, b"\0" * 8, "'a' is malformed"),
        ({"a": {**SOUND, "data_offsets": [0, 8, 9]}}, b"\0" * 8, "'a' is malformed"),
        ({"a": {**SOUND, "dtype": None}}, b"\0" * 8, "'a' is malformed"),
        ({"a": {**SOUND, "shape": [3]}}, b"\0" * 8, "cannot be bytes 0 to 8"),
        ({"a": {**SOUND, "data_offsets": [8, 0]}}, b"\0" * 8, "cannot be bytes 8 to 0"),
        ({"a": SOUND}, b"\0" * 7, "cut or damaged"),
        ({"a": SOUND}, b"\0" * 9, "cut or damaged"),
        ({"a": SOUND, "b": SOUND}, b"\0" * 8, "overlap or leave gaps"),
        ({"a": {**SOUND, "data_offsets": [4, 12]}}, b"\0" * 12, "overlap or leave gaps"),
    ],
)
def test_a_lying_header_is_refused(header: Any, body: bytes, words: str, tmp_path: Path) -> None:
    path = with_header(tmp_path / "x.safetensors", header, body)
    with pytest.raises(BrokenModel) as raised:
        read_header(path)
    assert words in str(raised.value)
    assert "x.safetensors" in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\xff" * 16, struct.pack("<Q", 9) + b"{}"])
def test_a_header_longer_than_its_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(BrokenModel, match="does not fit into the file"):
        read_header(path)


def test_a_sound_header_is_read(tmp_path: Path) -> None:
    path = with_header(
        tmp_path / "x.safetensors", {"__metadata__": {"format": "pt"}, "a": SOUND}, b"\0" * 8
    )
    assert read_header(path)["a"].shape == (2,)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BrokenModel, match=r"gone\.safetensors cannot be read"):
        read_header(tmp_path / "gone.safetensors")
