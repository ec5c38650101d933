"""Writes small quantised models as other tools do: GPTQ, AWQ, compressed-tensors and GGUF.

The packing of safetensors is written down here from the formats' documentation, bit by bit and
with NumPy, so that it shares nothing with what reads it; GGUF comes from llama.cpp's own package.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SKIPPED = ("embed_tokens", "lm_head", "norm")


def packed_rows(codes: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """``codes`` [a, b] put into 32-bit numbers along b: number ``order[i]`` of each group of
    neighbours at bit ``i * bits``."""
    each = 32 // bits
    places = order or tuple(range(each))
    words = np.zeros((codes.shape[0], codes.shape[1] // each), dtype=np.uint64)
    for word in range(words.shape[1]):
        for place, number in enumerate(places):
            part = codes[:, word * each + number].astype(np.uint64)
            words[:, word] |= part << np.uint64(bits * place)
    return words.astype(np.uint32).view(np.int32)


def quantised(
    weight: np.ndarray, group: int, bits: int, groups: np.ndarray, *, symmetric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [out, in], scales and zero points [out, groups] of ``weight``, to the nearest."""
    count = int(groups.max()) + 1
    top = 2**bits - 1
    scale = np.zeros((weight.shape[0], count))
    zeros = np.zeros((weight.shape[0], count), dtype=np.int64)
    for number in range(count):
        part = weight[:, groups == number]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            scale[:, number] = 2 * np.maximum(-low, high) / top
            zeros[:, number] = 2 ** (bits - 1)
        else:
            scale[:, number] = (high - low) / top
            zeros[:, number] = np.clip(np.round(-low / scale[:, number]), 1, top)
    scale = scale.astype(np.float16).astype(np.float64)
    codes = np.round(weight / scale[:, groups]) + zeros[:, groups]
    return np.clip(codes, 0, top).astype(np.int64), scale, zeros


class Quantiser:
    """Writes a quantised copy of a model folder, and a plain one with the same numbers."""

    def __init__(self, source: Path, target: Path) -> None:
        self.folder, self.plain = target / "quantised", target / "plain"
        for folder in (self.folder, self.plain):
            shutil.copytree(source, folder)
        self.tensors: dict[str, torch.Tensor] = load_file(source / "model.safetensors")
        self.numbers = dict(self.tensors)

    def matrices(self) -> list[tuple[str, np.ndarray]]:
        return [
            (name.removesuffix(".weight"), tensor.double().numpy())
            for name, tensor in sorted(self.tensors.items())
            if tensor.dim() == 2 and not any(part in name for part in SKIPPED)
        ]

    def replace(self, base: str, parts: dict[str, Any], numbers: np.ndarray) -> None:
        """One matrix by its parts; ``numbers`` is what they stand for."""
        del self.tensors[f"{base}.weight"]
        for name, part in parts.items():
            self.tensors[f"{base}.{name}"] = torch.as_tensor(part).contiguous()
        self.numbers[f"{base}.weight"] = torch.from_numpy(numbers).float()

    def save(self, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Quantiser:
        save_file(self.tensors, self.folder / "model.safetensors")
        save_file(
            {name: one.to(dtype).contiguous() for name, one in self.numbers.items()},
            self.plain / "model.safetensors",
        )
        path = self.folder / "config.json"
        body = {**json.loads(path.read_text()), "quantization_config": config}
        path.write_text(json.dumps(body))
        return self


def write_gptq(
    source: Path,
    target: Path,
    *,
    bits: int = 4,
    group: int = 32,
    form: str = "gptq",
    act_order: bool = False,
    symmetric: bool = False,
    biases_of_zeros: bool = False,
) -> Quantiser:
    """As AutoGPTQ and GPTQModel write it."""
    made = Quantiser(source, target)
    less = 1 if form == "gptq" else 0
    for number, (base, weight) in enumerate(made.matrices()):
        outputs, inputs = weight.shape
        size = inputs if group == -1 else group
        groups = np.arange(inputs) // size
        if act_order:
            groups = np.random.default_rng(number).permutation(groups)
        codes, scale, zeros = quantised(weight, size, bits, groups, symmetric=symmetric)
        parts = {
            "qweight": packed_rows(codes, bits).T,
            "qzeros": packed_rows((zeros - less).T, bits),
            "scales": torch.from_numpy(scale.T.copy()).half(),
            "g_idx": groups.astype(np.int32),
        }
        if biases_of_zeros and f"{base}.bias" not in made.tensors:
            parts["bias"] = torch.zeros(outputs, dtype=torch.float16)
        made.replace(base, parts, scale[:, groups] * (codes - zeros[:, groups]))
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order}
    return made.save({**config, "sym": symmetric, "checkpoint_format": form})


def write_awq(source: Path, target: Path, *, group: int = 32) -> Quantiser:
    """As AutoAWQ writes it."""
    made = Quantiser(source, target)
    for base, weight in made.matrices():
        groups = np.arange(weight.shape[1]) // group
        codes, scale, zeros = quantised(weight, group, 4, groups, symmetric=False)
        parts = {
            "qweight": packed_rows(codes.T, 4, AWQ_ORDER),
            "qzeros": packed_rows(zeros.T, 4, AWQ_ORDER),
            "scales": torch.from_numpy(scale.T.copy()).half(),
        }
        made.replace(base, parts, scale[:, groups] * (codes - zeros[:, groups]))
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True}
    return made.save({**config, "version": "gemm"})


def write_compressed(
    source: Path,
    target: Path,
    *,
    bits: int,
    group: int = 0,
    packed: bool = True,
    symmetric: bool = True,
    act_order: bool = False,
    eight_bit_inputs: bool = False,
) -> Quantiser:
    """As llm-compressor writes it."""
    made = Quantiser(source, target)
    half = 2 ** (bits - 1)
    for number, (base, weight) in enumerate(made.matrices()):
        outputs, inputs = weight.shape
        groups = np.arange(inputs) // (group or inputs)
        if act_order:
            groups = np.random.default_rng(number).permutation(groups)
        codes, scale, zeros = quantised(weight, group, bits, groups, symmetric=symmetric)
        parts: dict[str, Any] = {"weight_scale": torch.from_numpy(scale).bfloat16()}
        scale = parts["weight_scale"].double().numpy()
        if packed:
            parts["weight_packed"] = packed_rows(codes, bits)
            parts["weight_shape"] = torch.tensor([outputs, inputs])
        else:
            parts["weight"] = torch.from_numpy((codes - half).astype(np.int8))
        if not symmetric:
            parts["weight_zero_point"] = (
                packed_rows(zeros.T, bits).T if packed else (zeros - half).astype(np.int8)
            )
        if act_order:
            parts["weight_g_idx"] = groups.astype(np.int32)
        made.replace(base, parts, scale[:, groups] * (codes - zeros[:, groups]))
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric}
    weights |= {"strategy": "group" if group else "channel", "group_size": group or None}
    inputs_of = {"num_bits": 8, "type": "int", "dynamic": True} if eight_bit_inputs else None
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": inputs_of}
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": scheme}}
    form = "pack-quantized" if packed else "int-quantized"
    return made.save({**config, "format": form, "ignore": ["lm_head"]})
