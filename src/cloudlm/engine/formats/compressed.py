"""compressed-tensors' safetensors, as llm-compressor writes them: whole numbers of 8 bits per
output, or of 4 or 8 bits packed in groups. https://github.com/vllm-project/compressed-tensors

Packed: ``weight_packed`` [outputs, inputs / 8] (lowest bits first, half the range added),
``weight_scale`` [outputs, groups], ``weight_shape``, ``weight_zero_point`` packed along the outputs
if the scheme is asymmetric, ``weight_g_idx`` if groups follow the activations. Unpacked: ``weight``
int8 [outputs, inputs], ``weight_scale`` [outputs, 1] or [1].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cloudlm.core.errors import BrokenModel, UnsupportedModel
from cloudlm.engine.architectures.config import ModelConfig
from cloudlm.engine.formats import integers
from cloudlm.engine.formats.base import Codes, Entry
from cloudlm.engine.formats.safetensors_files import StoredTensor, Tensors

_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "mixed-precision", "dense")
_SCALES = ("F16", "BF16", "F32")
_WHOLE = ("I32", "I64")
_PARTS = (
    "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx",
    "input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point",
)  # fmt: skip
_CACHE_PARTS = ("k_scale", "v_scale", "k_zero_point", "v_zero_point", "q_scale")


@dataclass(frozen=True, slots=True)
class _Matrix:
    """One quantised matrix: the tensors it is made of. ``half`` was added to its codes."""

    tensors: Tensors
    weight: StoredTensor
    scale: StoredTensor
    zeros: StoredTensor | None
    shape: tuple[int, int]
    bits: int
    packed: bool
    size: int
    groups: Tensor

    @property
    def half(self) -> int:
        return 1 << (self.bits - 1)

    def codes(self) -> Codes:
        """For the kernels."""
        codes, scale, zeros = self._read()
        if self.bits == 8:
            signed = (codes.to(torch.int16) - self.half).to(torch.int8)
            return integers.int8_weight(signed, scale)
        return integers.int4_weight(codes, scale, zeros, self.size)

    def floats(self, dtype: torch.dtype, copy: bool) -> Tensor:
        """As numbers."""
        codes, scale, zeros = self._read()
        return integers.matrix(codes, scale, zeros, self.groups, dtype)

    def _read(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes with ``half`` added [outputs, inputs], scales and zero points [outputs, groups]."""
        outputs, inputs = self.shape
        raw = self.tensors.read(self.weight)
        codes = integers.unpack(raw, self.bits, 1, inputs) if self.packed else self._lifted(raw)
        scale = self.tensors.read(self.scale).reshape(self.scale.shape[0], -1).expand(outputs, -1)
        if self.zeros is None:
            return codes, scale, torch.full(scale.shape, self.half, dtype=torch.uint8)
        points = self.tensors.read(self.zeros)
        if points.dtype == torch.int32:
            return codes, scale, integers.unpack(points, self.bits, 0, outputs)
        return codes, scale, self._lifted(points).reshape(-1, scale.shape[1]).expand(scale.shape)

    def _lifted(self, signed: Tensor) -> Tensor:
        return (signed.to(torch.int16) + self.half).to(torch.uint8)


def read_compressed(tensors: Tensors, config: ModelConfig) -> tuple[list[Entry], str, str]:
    """Entries, what to call the quantisation, and the precision that keeps it. ``config`` is the
    section ``quantization_config``. Raises BrokenModel, UnsupportedModel."""
    eight_bit_inputs, sizes = _check_scheme(config)
    bases = {name.rpartition(".")[0] for name in tensors.stored if name.endswith(".weight_scale")}
    entries: list[Entry] = []
    bits: set[int] = set()
    for name, tensor in tensors.stored.items():
        base, _, last = name.rpartition(".")
        if last in _CACHE_PARTS or (base in bases and last in _PARTS):
            continue
        if base not in bases or last != "weight":
            entries.append(tensors.plain(tensor))
    kept: set[int] = set()
    for base in sorted(bases):
        one = _matrix(tensors, base, sizes)
        keep = _keeps(one)
        bits.add(one.bits)
        if keep:
            kept.add(one.bits)
        entries.append(
            Entry(
                one.weight.file,
                f"{base}.weight",
                one.weight.where,
                one.shape,
                one.floats,
                one.codes if keep else None,
            )
        )
    word = " and ".join(f"int{one}" for one in sorted(bits)) or "none"
    precision = f"int{min(kept)}" if kept else ""
    if precision and eight_bit_inputs:
        precision += "-a8"
    return entries, f"compressed-tensors {word}", precision


def _check_scheme(config: ModelConfig) -> tuple[bool, set[int]]:
    """Raise UnsupportedModel for what is more than whole numbers; whether inputs are taken with 8
    bits everywhere, and the sizes of groups that are named."""
    form = str(config.raw("format") or "dense")
    if form not in _FORMATS:
        raise _unsupported(f"format {form[:40]!r}", f"one of {', '.join(_FORMATS)}")
    sparsity = config.section("sparsity_config").raw("format") or "dense"
    if sparsity != "dense":
        raise _unsupported(f"sparsity format {str(sparsity)[:40]!r}", "dense")
    if config.raw("transform_config"):
        raise _unsupported("transform_config", "weights that are used as they are")
    groups = config.section("config_groups")
    inputs = []
    sizes: set[int] = set()
    for name in config.raw("config_groups") or {}:
        weights = groups.section(name).section("weights")
        kind, bits = str(weights.raw("type") or "int"), weights.integer("num_bits", 8)
        if kind != "int" or bits not in (4, 8):
            raise _unsupported(f"weights of type {kind[:20]} with {bits} bits", "int of 4 or 8")
        if weights.raw("group_size") not in (None, -1):
            sizes.add(weights.integer("group_size"))
        inputs.append(groups.section(name).section("input_activations").raw("num_bits") == 8)
    return bool(inputs) and all(inputs), sizes


def _unsupported(found: str, expected: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"config.json: quantization_config: {found} is not supported; expected {expected}"
    )


def _matrix(tensors: Tensors, base: str, sizes: set[int]) -> _Matrix:
    packed = f"{base}.weight_packed" in tensors.stored
    if packed:
        weight = tensors.part(f"{base}.weight_packed", ("I32",), (None, None))
        shape = _shape(tensors, base, weight)
    else:
        weight = tensors.part(f"{base}.weight", ("I8",), (None, None))
        shape = (weight.shape[0], weight.shape[1])
    outputs, inputs = shape
    bits = 8 if not packed else _bits(weight, inputs)
    scale = _scale(tensors, base, outputs)
    groups = scale.shape[1] if len(scale.shape) == 2 else 1
    size = _size(scale, inputs, groups, sizes)
    zeros = _zeros(tensors, base, packed, (outputs, groups), bits)
    order = integers.in_order(inputs, size)
    if f"{base}.weight_g_idx" in tensors.stored:
        found = tensors.part(f"{base}.weight_g_idx", _WHOLE, (inputs,))
        named = tensors.read(found).long()
        if bool((named != -1).any()):  # -1 everywhere: groups are in order
            if bool(((named < 0) | (named >= groups)).any()):
                raise BrokenModel(f"{found.where} names groups outside of 0 to {groups - 1}")
            order = named
    return _Matrix(tensors, weight, scale, zeros, shape, bits, packed, size, order)


def _size(scale: StoredTensor, inputs: int, groups: int, sizes: set[int]) -> int:
    """Inputs in a group. The last group may have fewer, so that their number alone does not tell:
    96 inputs in 2 groups are 48 and 48, or 64 and 32."""
    if groups == 1 and inputs > 0:
        return inputs
    even = {inputs // groups} if inputs and inputs % groups == 0 else set()
    fitting = {size for size in sizes or even if -(-inputs // size) == groups}
    if len(fitting) != 1:
        raise BrokenModel(
            f"{scale.where}: {inputs} inputs do not make {groups} groups of one size that "
            f"config.json names ({', '.join(map(str, sorted(sizes))) or 'none'})"
        )
    return fitting.pop()


def _shape(tensors: Tensors, base: str, weight: StoredTensor) -> tuple[int, int]:
    """The shape of the unpacked matrix."""
    stored = tensors.part(f"{base}.weight_shape", _WHOLE, (2,))
    outputs, inputs = tensors.read(stored).tolist()
    if outputs != weight.shape[0] or not 0 < inputs <= 8 * weight.shape[1]:
        raise BrokenModel(
            f"{stored.where} is {[outputs, inputs]}, which {weight.name[:120]!r} of shape "
            f"{list(weight.shape)} cannot hold"
        )
    return outputs, inputs


def _bits(weight: StoredTensor, inputs: int) -> int:
    for bits in (4, 8):
        if weight.shape[1] == -(-inputs * bits // 32):
            return bits
    raise BrokenModel(f"{weight.where} has shape {list(weight.shape)} for {inputs} inputs")


def _scale(tensors: Tensors, base: str, outputs: int) -> StoredTensor:
    """[outputs, groups], or one number for all."""
    name = f"{base}.weight_scale"
    shape = tensors.stored[name].shape
    if shape == (1,):
        return tensors.part(name, _SCALES, (1,))
    if shape == (outputs,):
        return tensors.part(name, _SCALES, (outputs,))
    found = tensors.part(name, _SCALES, (outputs, None))
    if found.shape[1] == 0:
        raise BrokenModel(f"{found.where} is empty")
    return found


def _zeros(
    tensors: Tensors, base: str, packed: bool, shape: tuple[int, int], bits: int
) -> StoredTensor | None:
    name = f"{base}.weight_zero_point"
    stored = tensors.stored.get(name)
    if stored is None:
        return None
    outputs, groups = shape
    if packed and stored.dtype == "I32":
        return tensors.part(name, ("I32",), (-(-outputs * bits // 32), groups))
    if len(stored.shape) == 1 and groups == 1:
        return tensors.part(name, ("I8",), (1 if stored.shape == (1,) else outputs,))
    return tensors.part(name, ("I8",), (outputs, groups))


def _keeps(one: _Matrix) -> bool:
    """Whether the kernels can take the matrix as it is."""
    inputs = one.shape[1]
    regular = bool((one.groups == integers.in_order(inputs, one.size)).all())
    if one.bits == 8:
        return regular and one.zeros is None and one.size >= inputs
    return regular and one.scale.dtype != "F32" and integers.runs_in_kernels(one.size)
