"""GGUF headers from strangers: what is wrong is named, nothing crashes or allocates on a claim."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.core.errors import BrokenModel, CloudlmError, UnsupportedModel
from cloudlm.registry.gguf.config import config_of
from cloudlm.registry.gguf.header import GgufHeader, read_header
from cloudlm.registry.gguf.vocabulary import tokenizer_of


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def setting(key: str, value: Any) -> bytes:
    if isinstance(value, str):
        return text(key) + struct.pack("<I", 8) + text(value)
    if isinstance(value, list):
        kind, items = (8, b"".join(map(text, value))) if isinstance(value[0], str) else (
            6, struct.pack(f"<{len(value)}f", *value)
        )  # fmt: skip
        return text(key) + struct.pack("<IIQ", 9, kind, len(value)) + items
    kind, form = (6, "f") if isinstance(value, float) else (4, "I")
    return text(key) + struct.pack("<I" + form, kind, value)


def tensor(name: str, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


LLAMA = {
    "general.architecture": "llama",
    "llama.context_length": 64,
    "llama.embedding_length": 8,
    "llama.block_count": 1,
    "llama.feed_forward_length": 16,
    "llama.attention.head_count": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "▁", "a", "▁a"],
    "tokenizer.ggml.scores": [0.0, 0.0, -1.0, -2.0, -3.0],
    "tokenizer.ggml.token_type": [2.0, 3.0, 1.0, 1.0, 1.0],
    "tokenizer.ggml.bos_token_id": 1,
}
EMBEDDING = tensor("token_embd.weight", [6, 8])


def file(
    settings: dict[str, Any] = LLAMA, tensors: tuple[bytes, ...] = (EMBEDDING,), data: int = 192
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(settings))
    head += b"".join(setting(*one) for one in settings.items()) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + b"\0" * data


def read(raw: bytes) -> GgufHeader:
    return read_header(io.BytesIO(raw), len(raw), "x.gguf")


def understand(raw: bytes) -> dict[str, Any]:
    header = read(raw)
    config = config_of(header, Path("/nowhere"))
    return {**tokenizer_of(header, config["vocab_size"]), "config.json": config}


def test_a_sound_file_becomes_configuration_and_tokenizer() -> None:
    found = understand(file())
    assert found["config.json"]["architectures"] == ["LlamaForCausalLM"]
    assert found["config.json"]["tie_word_embeddings"] is True
    assert found["tokenizer.json"]["model"]["merges"] == [["▁", "a"]]
    assert found["tokenizer_config.json"]["bos_token"] == "<s>"


@pytest.mark.parametrize(
    ("raw", "kind", "words"),
    [
        (b"GGML" + file()[4:], BrokenModel, "not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 1) + file()[8:], UnsupportedModel, "version 1"),
        (b"GGUF" + struct.pack(">I", 3) + file()[8:], UnsupportedModel, "little-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 1), BrokenModel, "claims"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 2**60), BrokenModel, "claims"),
        (file()[:100], BrokenModel, "truncated inside the header"),
        (file(data=191), BrokenModel, "truncated or damaged"),
        (file(tensors=(tensor("a", [2**50, 2**50]),)), BrokenModel, "cannot have shape"),
        (file(tensors=(tensor("a", [0]),)), BrokenModel, "cannot have shape"),
        (file(tensors=(tensor("a", [33], kind=2),)), BrokenModel, "cannot have shape"),
        (file(tensors=(tensor("a", [4], kind=99),)), UnsupportedModel, "kind 99"),
        (file(tensors=(tensor("a", [4], offset=7),)), BrokenModel, "from"),
        (file(tensors=(tensor("a", [4]), tensor("a", [4], offset=32))), BrokenModel, "twice"),
        (file(tensors=(tensor("a", [16]), tensor("b", [4], offset=32))), BrokenModel, "overlaps"),
        (file({**LLAMA, "general.alignment": 0}), BrokenModel, "alignment"),
        (file({**LLAMA, "general.architecture": "bert"}), UnsupportedModel, "bert"),
        (file({**LLAMA, "llama.expert_count": 8}), UnsupportedModel, "experts"),
        (file({**LLAMA, "llama.block_count": 2**31}), BrokenModel, "block_count"),
        (file({**LLAMA, "llama.rope.scaling.type": "magic"}), UnsupportedModel, "magic"),
        (file({**LLAMA, "tokenizer.ggml.tokens": ["a"] * 5}), BrokenModel, "twice"),
        (file({**LLAMA, "tokenizer.ggml.tokens": list("abcdefg")}), BrokenModel, "tokens"),
        (file({**LLAMA, "tokenizer.ggml.scores": [1.0]}), BrokenModel, "scores"),
        (file({**LLAMA, "tokenizer.ggml.model": "gpt2"}), UnsupportedModel, "default"),
        (file(tensors=(tensor("x", [4]),)), BrokenModel, "token_embd"),
    ],
)  # fmt: skip
def test_faults_are_named(raw: bytes, kind: type[CloudlmError], words: str) -> None:
    with pytest.raises(BrokenModel, match=words) as raised:
        understand(raw)
    assert type(raised.value) is kind
    assert "x.gguf" in raised.value.message


@given(st.integers(0, len(file()) - 1), st.binary(min_size=1, max_size=12))
def test_damaged_files_are_read_or_refused(at: int, damage: bytes) -> None:
    raw = file()
    try:
        understand(raw[:at] + damage + raw[at + len(damage) :])
    except CloudlmError as error:
        assert error.message


@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(CloudlmError):
        read(b"GGUF" + noise)


@given(st.integers(0, len(file()) - 1))
def test_every_truncation_is_refused(length: int) -> None:
    with pytest.raises(CloudlmError):
        read(file()[:length])
