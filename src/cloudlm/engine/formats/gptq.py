"""GPTQ's and AWQ's safetensors: 4 bits (GPTQ also 8) in groups of inputs, each with a zero point.

GPTQ (Frantar et al., 2022; the layout is AutoGPTQ's): ``qweight`` [inputs / 8, outputs] packed
along the inputs, ``qzeros`` [groups, outputs / 8] along the outputs, ``scales`` [groups, outputs],
``g_idx`` [inputs] the group of each input. Its first form stores zero points less one.

AWQ (Lin et al., 2023; the layout is AutoAWQ's "gemm"): ``qweight`` [inputs, outputs / 8] packed
along the outputs in the order 0 2 4 6 1 3 5 7, ``qzeros`` and ``scales`` as above.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cloudlm.core.errors import BrokenModel, UnsupportedModel
from cloudlm.engine.architectures.config import ModelConfig
from cloudlm.engine.formats import integers
from cloudlm.engine.formats.base import Codes, Entry
from cloudlm.engine.formats.safetensors_files import StoredTensor, Tensors

_PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")
_SCALES = ("F16", "BF16", "F32")
# Where in a 32-bit number AWQ puts each of 8 neighbouring outputs.
_AWQ_PLACES = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])


@dataclass(frozen=True, slots=True)
class _Scheme:
    """What the configuration says. ``group`` is 0 for one group of all inputs; ``shift`` is added
    to stored zero points."""

    awq: bool
    bits: int
    group: int
    shift: int


@dataclass(frozen=True, slots=True)
class _Matrix:
    """One quantised matrix: the tensors it is made of."""

    tensors: Tensors
    scheme: _Scheme
    weight: StoredTensor
    zeros: StoredTensor
    scale: StoredTensor
    outputs: int
    inputs: int
    size: int
    groups: Tensor
    regular: bool

    def codes(self) -> Codes:
        """For the kernels."""
        codes, zeros, scale = self._read()
        if self.scheme.bits == 8:
            return integers.int8_weight((codes.to(torch.int16) - 128).to(torch.int8), scale)
        return integers.int4_weight(codes, scale, zeros, self.size)

    def floats(self, dtype: torch.dtype, copy: bool) -> Tensor:
        """As numbers."""
        codes, zeros, scale = self._read()
        return integers.matrix(codes, scale, zeros, self.groups, dtype)

    def _read(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [outputs, inputs], zero points and scales [outputs, groups]."""
        packed, zeros = self.tensors.read(self.weight), self.tensors.read(self.zeros)
        bits = self.scheme.bits
        points = integers.unpack(zeros, bits, 1, self.outputs)
        if self.scheme.awq:
            codes = integers.unpack(packed, bits, 1, self.outputs)
            codes, points = _in_place(codes), _in_place(points)
            codes = codes.T
        else:
            codes = integers.unpack(packed.T, bits, 1, self.inputs)
        points = (points + self.scheme.shift) & (2**bits - 1)
        return codes, points.T.contiguous(), self.tensors.read(self.scale).T.contiguous()


def _in_place(mixed: Tensor) -> Tensor:
    """AWQ's order of neighbours undone."""
    return mixed.view(len(mixed), -1, 8)[:, :, _AWQ_PLACES].flatten(1)


def read_gptq(tensors: Tensors, config: ModelConfig) -> tuple[list[Entry], str, str]:
    """Entries, what to call the quantisation, and the precision that keeps it. ``config`` is the
    section ``quantization_config``. Raises BrokenModel, UnsupportedModel."""
    scheme = _read_scheme(config)
    entries: list[Entry] = []
    bases = {name.removesuffix(".qweight") for name in tensors.stored if name.endswith(".qweight")}
    for name, tensor in tensors.stored.items():
        base, _, last = name.rpartition(".")
        if base in bases and f".{last}" in _PARTS:
            continue
        # Some writers add a bias of zeros to every quantised projection.
        entries.append(tensors.plain(tensor, idle=last == "bias" and base in bases))
    matrices = [entry for base in bases for entry in _matrix(tensors, base, scheme)]
    kept = any(entry.codes for entry in matrices)
    word = "awq" if scheme.awq else "gptq"
    size = f"group {scheme.group}" if scheme.group else "per output"
    precision = f"int{scheme.bits}" if kept else ""
    return [*entries, *matrices], f"{word} int{scheme.bits} {size}", precision


def _read_scheme(config: ModelConfig) -> _Scheme:
    awq = config.raw("quant_method") == "awq"
    bits = config.integer("bits" if "bits" in config else "w_bit", high=16)
    if bits != 4 and (awq or bits != 8):
        raise UnsupportedModel(
            f"config.json: quantization_config: {bits} bits are not read; expected 4 (GPTQ: or 8)"
        )
    name = "group_size" if "group_size" in config else "q_group_size"
    group = -1 if config.raw(name) == -1 else config.integer(name, 128, low=8)
    form = config.raw("version" if awq else "checkpoint_format") or ("gemm" if awq else "gptq")
    known = ("gemm",) if awq else ("gptq", "gptq_v2")
    if str(form).lower() not in known:
        raise UnsupportedModel(
            f"config.json: quantization_config: layout {str(form)[:40]!r} is not read; expected "
            f"{' or '.join(known)}"
        )
    shift = 0 if awq or str(form).lower() == "gptq_v2" else 1
    return _Scheme(awq, bits, max(group, 0), shift)


def _matrix(tensors: Tensors, base: str, scheme: _Scheme) -> Iterator[Entry]:
    scale = tensors.part(f"{base}.scales", _SCALES, (None, None))
    groups, outputs = scale.shape
    each = 32 // scheme.bits
    shape = (None, outputs // each) if scheme.awq else (None, outputs)
    weight = tensors.part(f"{base}.qweight", ("I32",), shape)
    inputs = weight.shape[0] * (1 if scheme.awq else each)
    zeros = tensors.part(f"{base}.qzeros", ("I32",), (groups, -(-outputs // each)))
    size = integers.group_size(scheme.group, inputs)
    if inputs == 0 or outputs % each or groups != -(-inputs // size):
        raise BrokenModel(
            f"{weight.where} of {inputs} inputs and {outputs} outputs does not fit {groups} groups "
            f"of {size}"
        )
    order, regular = integers.in_order(inputs, size), True
    if f"{base}.g_idx" in tensors.stored:
        found = tensors.part(f"{base}.g_idx", ("I32", "I64"), (inputs,))
        order, regular = _order(tensors, found, groups, order)
    one = _Matrix(tensors, scheme, weight, zeros, scale, outputs, inputs, size, order, regular)
    kept = regular and scale.dtype != "F32" and integers.runs_in_kernels(size)
    if scheme.bits == 8:
        kept = regular and groups == 1 and _centred(one)
    yield Entry(
        weight.file,
        f"{base}.weight",
        weight.where,
        (outputs, inputs),
        one.floats,
        one.codes if kept else None,
    )


def _order(
    tensors: Tensors, found: StoredTensor, groups: int, usual: Tensor
) -> tuple[Tensor, bool]:
    """The group of each input, and whether it is the usual one."""
    order = tensors.read(found).long()
    if bool(((order < 0) | (order >= groups)).any()):
        raise BrokenModel(f"{found.where} names groups outside of 0 to {groups - 1}")
    return order, bool((order == usual).all())


def _centred(one: _Matrix) -> bool:
    """Whether all zero points of 8 bits are 128: signed numbers without one."""
    zeros = integers.unpack(one.tensors.read(one.zeros), 8, 1, one.outputs)
    return bool(((zeros + one.scheme.shift) == 128).all())
