"""Reads how positions are rotated from a ``config.json``, in the form of transformers 5
(``rope_parameters``) and in the older one (``rope_theta`` and ``rope_scaling``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cloudlm.core.errors import UnsupportedModel
from cloudlm.engine.architectures.config import ModelConfig
from cloudlm.engine.ops.rope import Dynamic, Linear, Llama3, LongRope, Rope, Scaling, Yarn


@dataclass(frozen=True, slots=True)
class RopeFields:
    """How a family writes its rotation: names outside of ``rope_parameters`` and defaults.
    ``partial`` is the share of a head that turns, None where the family cannot turn a part;
    ``kinds`` renames scalings."""

    theta_name: str = "rope_theta"
    theta: float = 10000.0
    partial_name: str = "partial_rotary_factor"
    partial: float | None = None
    kinds: Mapping[str, str] | None = None
    original_context: int | None = None


COMMON_ROPE = RopeFields()


def read_rope(
    config: ModelConfig, head_dim: int, context: int, fields: RopeFields = COMMON_ROPE
) -> Rope:
    """The rotation of all layers. Raises BrokenModel naming the field, UnsupportedModel for kinds
    that are not run."""
    name = "rope_parameters" if "rope_parameters" in config else "rope_scaling"
    return rope_of(config.section(name), config, head_dim, context, fields)


def rope_of(
    section: ModelConfig, config: ModelConfig, head_dim: int, context: int, fields: RopeFields
) -> Rope:
    """The rotation that ``section`` of ``config`` describes. Raises as ``read_rope``."""
    theta = (
        section.number("rope_theta", low=1.0)
        if "rope_theta" in section
        else config.number(fields.theta_name, fields.theta, low=1.0)
    )
    dim = _rotated(section, config, head_dim, fields)
    kind = str(section.raw("rope_type") or section.raw("type") or "default")
    kind = (fields.kinds or {}).get(kind, kind)
    if kind == "default":
        return Rope(dim, theta)
    if kind not in _READERS:
        raise UnsupportedModel(
            f"config.json: rope scaling {kind[:40]!r} is not supported; "
            f"supported: default, {', '.join(_READERS)}"
        )
    # A length beside the section counts more than one inside, as in transformers.
    holder = config if "original_max_position_embeddings" in config else section
    original = holder.integer(
        "original_max_position_embeddings", fields.original_context or context, low=2
    )
    return Rope(dim, theta, _READERS[kind](section, dim, context, original))


def _rotated(section: ModelConfig, config: ModelConfig, head_dim: int, fields: RopeFields) -> int:
    """How many dimensions of a head turn."""
    inside = "partial_rotary_factor" in section
    holder, name = (section, "partial_rotary_factor") if inside else (config, fields.partial_name)
    part = holder.number(name, fields.partial or 1.0)
    if fields.partial is None and part != 1.0:
        raise UnsupportedModel(
            f"config.json: {name} other than 1 is not supported for this architecture"
        )
    dim = int(head_dim * part)
    if part > 1.0 or dim < 2:
        raise holder.fault(name, f"a share that turns 2 to {head_dim} dimensions of a head")
    return dim


def _linear(section: ModelConfig, dim: int, context: int, original: int) -> Scaling:
    return Linear(section.number("factor"))


def _dynamic(section: ModelConfig, dim: int, context: int, original: int) -> Scaling:
    if dim < 4:
        raise section.fault("rope_type", "another kind where heads turn less than 4 dimensions")
    return Dynamic(_factor(section), context)


def _llama3(section: ModelConfig, dim: int, context: int, original: int) -> Scaling:
    low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
    if low >= high:
        raise section.fault("low_freq_factor", f"less than high_freq_factor ({high:g})")
    return Llama3(section.number("factor"), low, high, original)


def _yarn(section: ModelConfig, dim: int, context: int, original: int) -> Scaling:
    factor = _factor(section, context / original)
    one, all_dims = section.number("mscale", 1.0), section.number("mscale_all_dim", 1.0)
    inferred = _yarn_magnitude(factor, 1.0)
    if "mscale" in section and "mscale_all_dim" in section:
        inferred = _yarn_magnitude(factor, one) / _yarn_magnitude(factor, all_dims)
    return Yarn(
        factor,
        original,
        section.number("beta_fast", 32.0),
        section.number("beta_slow", 1.0),
        section.flag("truncate", True),
        magnitude=section.number("attention_factor", inferred),
    )


def _yarn_magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _longrope(section: ModelConfig, dim: int, context: int, original: int) -> Scaling:
    factor = section.number("factor", context / original)
    inferred = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return LongRope(
        section.numbers("short_factor", (dim + 1) // 2),
        section.numbers("long_factor", (dim + 1) // 2),
        original,
        magnitude=section.number("attention_factor", inferred),
    )


def _factor(section: ModelConfig, default: float | None = None) -> float:
    factor = section.number("factor", default)
    if factor < 1:
        raise section.fault("factor", "at least 1")
    return factor


_READERS: dict[str, Callable[[ModelConfig, int, int, int], Scaling]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
