"""The numbers of a model that decide how much memory and work it takes.

Derived from a manifest and a ``config.json``, or given by a user who has neither. Arithmetic and
checks only; must not read a file or know a device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cloudlm.core.errors import BrokenModel
from cloudlm.core.fields import Fields
from cloudlm.core.model import Manifest

# Bits a weight takes with its scales: our 8 bits have one scale per output, 4 bits one of 16 bits
# and a zero for each group of 128 inputs.
WEIGHT_BITS = {
    "float64": 64.0,
    "float32": 32.0,
    "float16": 16.0,
    "bfloat16": 16.0,
    "int8": 8.05,
    "int8-a8": 8.05,
    "int4": 4.25,
    "int4-a8": 4.25,
}
_CACHE_BITS = 16.0


@dataclass(frozen=True, slots=True)
class ModelFigures:
    """``parameters`` of which ``active_parameters`` work on one token (all, without experts),
    ``layers`` with ``kv_heads`` heads of ``head_dim`` numbers for keys and as many for values,
    ``widest`` outputs of a layer's largest product, and bits per weight and per cached number."""

    parameters: int
    layers: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    active_parameters: int = 0
    widest: int = 0
    context_length: int = 0
    weight_bits: float = 16.0
    cache_bits: float = _CACHE_BITS

    @property
    def active(self) -> int:
        return self.active_parameters or self.parameters

    @property
    def weights_bytes(self) -> float:
        return self.parameters * self.weight_bits / 8

    @property
    def active_bytes(self) -> float:
        """What a step reads of the weights for one sequence."""
        return self.active * self.weight_bits / 8

    @property
    def cache_bytes_per_token(self) -> float:
        return 2 * self.layers * self.kv_heads * self.head_dim * self.cache_bits / 8


def figures_of(
    manifest: Manifest, config: Mapping[str, Any], precision: str | None = None
) -> ModelFigures:
    """The figures of a version: counts from its manifest, shapes from its ``config.json``.

    ``precision`` is what it is to run in (None: as it is stored). Raises BrokenModel naming the
    field that is missing or no whole number.
    """
    inner = config.get("text_config")
    shape = _Shape({**config, **inner} if isinstance(inner, dict) else dict(config))
    hidden = shape.first("hidden_size", "n_embd")
    heads = shape.first("num_attention_heads", "n_head")
    experts = shape.either("num_local_experts", "num_experts", default=0)
    width = shape.either("intermediate_size", "ffn_hidden_size", "n_inner", default=4 * hidden)
    wide = shape.either("moe_intermediate_size", default=width) if experts else width
    layers = shape.first("num_hidden_layers", "n_layer")
    idle = 0
    if experts:
        used = shape.either("num_experts_per_tok", default=experts)
        idle = 3 * hidden * wide * layers * max(0, experts - used)
    return ModelFigures(
        parameters=manifest.parameters,
        layers=layers,
        kv_heads=shape.either(
            "num_key_value_heads", "num_kv_heads", default=1 if config.get("multi_query") else heads
        ),
        head_dim=shape.either("head_dim", default=max(1, hidden // heads)),
        hidden_size=hidden,
        vocab_size=shape.first("vocab_size"),
        active_parameters=max(1, manifest.parameters - idle) if idle else 0,
        widest=2 * max(width, hidden),
        context_length=manifest.context_length,
        weight_bits=_weight_bits(manifest, precision),
    )


def figures_body(figures: ModelFigures) -> dict[str, Any]:
    """Figures as JSON; ``figures_from_body`` reads them back."""
    return {name: getattr(figures, name) for name in figures.__dataclass_fields__}


def figures_from_body(body: Any, path: str = "figures.") -> ModelFigures:
    """Read figures from a request. Raises InvalidRequest and UnprocessableRequest."""
    fields = Fields(body, "figures", path=path)
    most = 2**50
    found = ModelFigures(
        parameters=fields.integer("parameters", low=1, high=most),
        layers=fields.integer("layers", low=1, high=4096),
        kv_heads=fields.integer("kv_heads", low=1, high=4096),
        head_dim=fields.integer("head_dim", low=1, high=65_536),
        hidden_size=fields.integer("hidden_size", low=1, high=2**24),
        vocab_size=fields.integer("vocab_size", low=1, high=2**24),
        active_parameters=fields.integer("active_parameters", 0, high=most),
        widest=fields.integer("widest", 0, high=2**24),
        context_length=fields.integer("context_length", 0, high=2**31),
        weight_bits=fields.number("weight_bits", 16.0, low=1.0, high=64.0),
        cache_bits=fields.number("cache_bits", _CACHE_BITS, low=1.0, high=64.0),
    )
    fields.end()
    return found


def _weight_bits(manifest: Manifest, precision: str | None) -> float:
    """Bits per weight at ``precision``, else as the files hold them."""
    if precision in WEIGHT_BITS:
        return WEIGHT_BITS[precision]
    weights = (".safetensors", ".gguf")
    stored = sum(file.size_bytes for file in manifest.files if file.path.endswith(weights))
    if stored and manifest.parameters:
        return 8 * stored / manifest.parameters
    return WEIGHT_BITS.get(manifest.precision, 16.0)


class _Shape:
    """Whole numbers of a ``config.json`` under the names that families give them."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def first(self, *names: str) -> int:
        for name in names:
            value = self._values.get(name)
            if value is not None:
                return self._whole(name, value)
        raise BrokenModel(f"config.json: {' or '.join(names)} is missing; expected a whole number")

    def either(self, *names: str, default: int) -> int:
        given = any(self._values.get(name) is not None for name in names)
        return self.first(*names) if given else default

    @staticmethod
    def _whole(name: str, value: Any) -> int:
        if type(value) is not int or not 0 < value <= 2**24:
            raise BrokenModel(f"config.json: {name} is {str(value)[:40]}, expected a whole number")
        return value
