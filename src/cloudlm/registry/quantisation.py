"""How a version's weights are stored: the format, how they are quantised, how many they are.

Derived from config.json and the headers of the weights. Says what is written there; whether the
engine can run it is the engine's to say.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cloudlm.core.errors import BrokenModel
from cloudlm.registry.safetensors_header import TensorFacts

_PRECISIONS = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0",
    "F6_E2M3": "float6_e2m3",
    "F6_E3M2": "float6_e3m2",
    "F4": "float4",
    "C64": "complex64",
    "BOOL": "bool",
    "I8": "int8",
    "U8": "uint8",
    "I16": "int16",
    "U16": "uint16",
    "I32": "int32",
    "U32": "uint32",
    "I64": "int64",
    "U64": "uint64",
}
_BESIDE = re.compile(
    r".+\.(?:qzeros|scales|g_idx|weight_(?:scale|zero_point|shape|g_idx)|(?:input|output)_\w+)"
)
_PACKED = (".qweight", ".weight_packed")


@dataclass(frozen=True, slots=True)
class Storage:
    """``format`` is ``safetensors`` or ``gguf``; ``precision`` what most weights are held in;
    ``quantisation`` empty for plain numbers; ``parameters`` counts weights, not the numbers that
    they are packed in."""

    format: str
    precision: str
    quantisation: str
    parameters: int


def read_storage(
    config: Mapping[str, Any], tensors: Mapping[str, TensorFacts], weights_format: str
) -> Storage:
    """Raises BrokenModel for a ``quantization_config`` that is none."""
    elements: Counter[str] = Counter()
    for tensor in tensors.values():
        elements[tensor.dtype] += tensor.elements
    most = max(sorted(elements), key=elements.__getitem__)
    total = sum(elements.values())
    if weights_format == "gguf":
        quantised = re.fullmatch(r"Q(\d)_\w+", most)
        precision = f"int{quantised[1]}" if quantised else _PRECISIONS[most]
        return Storage("gguf", precision, f"gguf {most}" if quantised else "", total)
    name = "quantization_config" if config.get("quantization_config") else "compression_config"
    section = config.get(name)
    if not section:
        return Storage("safetensors", _PRECISIONS[most], "", total)
    if not isinstance(section, dict):
        raise BrokenModel(f"config.json: {name} is not a JSON object")
    method = re.sub(r"[^\w.-]", "", str(section.get("quant_method") or "unknown"))[:40]
    bits = _bits(section)
    if bits is None:
        return Storage("safetensors", _PRECISIONS[most], method, total)
    count = sum(_count(tensor, facts, bits) for tensor, facts in tensors.items())
    return Storage("safetensors", f"int{bits}", f"{method} int{bits}", count)


def _bits(section: Mapping[str, Any]) -> int | None:
    """Bits of a weight, None if they are no whole numbers of 2 to 8 bits."""
    groups = section.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and weights.get("type", "int") == "int":
            section = {"bits": weights.get("num_bits")}
            break
    found = section.get("bits", section.get("w_bit"))
    return found if type(found) is int and 2 <= found <= 8 else None


def _count(tensor: str, facts: TensorFacts, bits: int) -> int:
    if _BESIDE.fullmatch(tensor):
        return 0
    return facts.elements * 32 // bits if tensor.endswith(_PACKED) else facts.elements
