"""A GGUF file as a checkpoint: its tensors under Hugging Face's names, in their order and scale.

llama.cpp renames tensors, orders the rows of a Llama's queries and keys for another form of the
rotation, and adds one to Gemma's norms: all of that is undone here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cloudlm.core.errors import BrokenModel, UnsupportedModel
from cloudlm.engine.formats import gguf_blocks
from cloudlm.engine.formats.base import Checkpoint, Codes, Entry
from cloudlm.engine.formats.integers import int4_weight
from cloudlm.registry.gguf.config import main_kind
from cloudlm.registry.gguf.header import GgufHeader, GgufTensor, read_gguf
from cloudlm.registry.gguf.settings import Settings

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_STEP_BYTES = 16 << 20
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_TABLES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_CHANGES = {"phi3": {"ffn_up": "mlp.gate_up_proj"}, "gemma2": _GEMMA, "gemma3": _GEMMA}


def read_gguf_checkpoint(path: Path) -> Checkpoint:
    """The tensors of ``path``. Raises BrokenModel, UnsupportedModel."""
    header = read_gguf(path)
    family = Settings(header, "general.").text("architecture")
    entries = tuple(
        _entry(_Stored(path, tensor), name, family, header)
        for tensor in header.tensors.values()
        if (name := _name_of(tensor, family, header)) is not None
    )
    kind = main_kind(header)
    quantisation = "" if kind in _PLAIN else f"gguf {kind}"
    precision = "int4" if any(entry.codes for entry in entries) else ""
    return Checkpoint((path,), entries, quantisation, precision)


@dataclass(frozen=True, slots=True)
class _Stored:
    """One tensor of the file."""

    path: Path
    tensor: GgufTensor

    def rows(self) -> Tensor:
        """All its bytes, [rows, bytes of a row]. Raises BrokenModel."""
        raw = torch.empty(self.tensor.size_bytes, dtype=torch.uint8)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.tensor.offset)
                left = memoryview(raw.numpy().data)
                while left and (count := file.readinto(left)):
                    left = left[count:]
        except OSError as error:
            raise BrokenModel(f"{self.path.name} cannot be read: {error.strerror}") from error
        if left:
            raise BrokenModel(f"{self.path.name} was cut while it was read")
        return raw.view(self.tensor.elements // self.tensor.shape[-1], -1)

    def floats(self, order: Tensor | None, offset: float, dtype: torch.dtype, copy: bool) -> Tensor:
        """As numbers; some rows at a time, so that no second copy of all is in memory."""
        rows, kind = self.rows(), self.tensor.kind
        found = torch.empty(len(rows), self.tensor.shape[-1], dtype=dtype)
        step = max(1, _STEP_BYTES // rows.shape[1])
        for begin in range(0, len(rows), step):
            part = rows[begin : begin + step]
            if kind.name in _PLAIN:
                wide = part.contiguous().view(_PLAIN[kind.name])
            else:
                blocks = part.reshape(-1, kind.size_bytes)
                wide = gguf_blocks.BLOCKS[kind.name](blocks).view(len(part), -1)
            found[begin : begin + step] = wide.float() + offset if offset else wide
        if order is not None:
            found = found[order]
        return found.view(self.tensor.shape)

    def codes(self, order: Tensor | None) -> Codes:
        """Q4_0 for the kernels: groups of 32 with 8 as zero point, in float16 scales."""
        rows = self.rows()
        if order is not None:
            rows = rows[order]
        blocks = rows.view(len(rows), -1, self.tensor.kind.size_bytes)
        flat = blocks.flatten(0, 1)
        codes = gguf_blocks.nibbles(flat[:, 2:]).view(len(rows), -1)
        scale = gguf_blocks.half(flat[:, :2]).view(len(rows), -1)
        return int4_weight(codes, scale, None, 32)


def _name_of(tensor: GgufTensor, family: str, header: GgufHeader) -> str | None:
    """Hugging Face's name, None for tables that the configuration has taken over."""
    if tensor.name in _TABLES:
        return None
    if tensor.name in _TOP:
        return _TOP[tensor.name]
    match = re.fullmatch(r"blk\.(\d{1,4})\.(\w+)\.(weight|bias)", tensor.name, re.ASCII)
    names = {**_LAYER, **_CHANGES.get(family, {})}
    if match is None or match[2] not in names:
        raise UnsupportedModel(
            f"{header.name}: tensor {tensor.name[:120]!r} is not known for {family[:40]}"
        )
    return f"model.layers.{int(match[1])}.{names[match[2]]}.{match[3]}"


def _entry(stored: _Stored, name: str, family: str, header: GgufHeader) -> Entry:
    tensor = stored.tensor
    order = _llama_rows(tensor, header) if family == "llama" else None
    offset = -1.0 if family.startswith("gemma") and tensor.name.endswith("norm.weight") else 0.0
    matrix = tensor.kind.name == "Q4_0" and len(tensor.shape) == 2 and not offset
    codes: Callable[[], Codes] | None = partial(stored.codes, order) if matrix else None
    where = f"{header.name}: tensor {tensor.name[:120]!r}"
    floats = partial(stored.floats, order, offset)
    return Entry(stored.path, name, where, tensor.shape, floats, codes)


def _llama_rows(tensor: GgufTensor, header: GgufHeader) -> Tensor | None:
    """For queries and keys: which stored row each row is. There the two numbers that turn together
    are neighbours, here they stand half a head apart."""
    part = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(?:weight|bias)", tensor.name)
    if part is None:
        return None
    settings = Settings(header, "llama.")
    heads = settings.integer("attention.head_count", high=65536)
    if part[1] == "k":
        heads = settings.integer("attention.head_count_kv", heads, high=65536)
    rows = tensor.elements // tensor.shape[-1] if len(tensor.shape) > 1 else tensor.elements
    if rows % (2 * heads):
        raise BrokenModel(f"{header.name}: tensor {tensor.name[:120]!r} is not of {heads} heads")
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).flatten()
