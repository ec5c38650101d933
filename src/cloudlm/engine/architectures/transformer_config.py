"""What distinguishes one rotary decoder from another, and how it is read from ``config.json``.

A family is a ``TransformerConfig``: its file says where its configuration departs from the common
one, the modules of ``transformer`` and below do the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from cloudlm.engine.architectures.config import ModelConfig
from cloudlm.engine.architectures.rope_config import COMMON_ROPE, RopeFields, read_rope
from cloudlm.engine.ops.activation import ACTIVATIONS
from cloudlm.engine.ops.rope import Rope

MAX_LAYERS = 1024
# Each expert is a few modules: a bound on what a hostile configuration can make us build.
MAX_EXPERTS_IN_ALL_LAYERS = 65536
_LAYER_KINDS = ("full_attention", "sliding_attention")


class Norm(Enum):
    """How hidden states are normed."""

    RMS = "rms"
    OFFSET_RMS = "offset rms"
    LAYER = "layer"


class Residual(Enum):
    """Where a layer norms, and what is added to its input."""

    PRE = "inputs of attention and MLP are normed"
    POST = "outputs of attention and MLP are normed"
    SANDWICH = "inputs and outputs are normed"
    PARALLEL = "attention and MLP see the same input, each with a norm of its own"
    PARALLEL_ONE_NORM = "attention and MLP see the same normed input"


class Projections(Enum):
    """How queries, keys and values are stored."""

    APART = "three matrices"
    STACKED = "one matrix: all queries, all keys, all values"
    GROUPED = "one matrix: per key head its queries, its key, its value"


class QueryKeyNorm(Enum):
    """Whether queries and keys are normed before they are rotated."""

    NONE = "not at all"
    HEAD = "each head for itself"
    WHOLE = "all heads together"


class MLPKind(Enum):
    """The dense MLP of a layer."""

    GATED = "down(act(gate(x)) * up(x))"
    GATED_FUSED = "the same, gate and up stored as one matrix"
    PLAIN = "down(act(up(x)))"


@dataclass(frozen=True, slots=True)
class Experts:
    """The sparse MLPs: ``per_token`` of ``count`` experts see each token; ``normalised`` if their
    weights are made to sum to one. ``shared_size`` is the inner size of an expert that sees all
    tokens, 0 without one. ``dense_layers`` have a dense MLP instead."""

    count: int
    per_token: int
    inner_size: int
    normalised: bool
    shared_size: int = 0
    dense_layers: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class TransformerConfig:
    """Everything that distinguishes one family, and one member of it, from another. ``windows``
    and ``ropes`` have one entry per layer."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    norm_eps: float
    activation: str
    tied: bool
    windows: tuple[int | None, ...]
    ropes: tuple[Rope, ...]
    scale: float
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float | None = None
    norm: Norm = Norm.RMS
    residual: Residual = Residual.PRE
    projections: Projections = Projections.APART
    qk_norm: QueryKeyNorm = QueryKeyNorm.NONE
    mlp: MLPKind = MLPKind.GATED
    experts: Experts | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False

    @property
    def layers(self) -> int:
        return len(self.windows)


@dataclass(frozen=True, slots=True)
class Fields:
    """The names that a family gives to common fields, and its defaults. ``inner_ratio`` times the
    hidden size is the default of ``inner_size``, which is required if that is 0. Without a name for
    ``kv_heads`` every head has keys of its own."""

    inner_size: str = "intermediate_size"
    inner_ratio: int = 0
    kv_heads: str | None = "num_key_value_heads"
    head_dim: int | None = None
    activation: str = "hidden_act"
    default_activation: str = "silu"
    norm_eps: str = "rms_norm_eps"
    default_norm_eps: float = 1e-6
    context: int = 2048
    tied: bool = False
    rope: RopeFields = COMMON_ROPE


def read_common(config: ModelConfig, fields: Fields = Fields()) -> TransformerConfig:
    """The fields that all families have; all layers see all positions. Raises BrokenModel or
    UnsupportedModel."""
    hidden = config.integer("hidden_size")
    heads = config.integer("num_attention_heads", high=65536)
    kv_heads = _read_kv_heads(config, fields.kv_heads, heads)
    head_dim = config.integer("head_dim", fields.head_dim or hidden // heads, high=65536)
    if head_dim % 2:
        raise config.fault("head_dim", "an even number")
    trained = config.integer("max_position_embeddings", fields.context)
    rope = read_rope(config, head_dim, trained, fields.rope)
    layers = config.integer("num_hidden_layers", high=MAX_LAYERS)
    inner = config.integer(fields.inner_size, fields.inner_ratio * hidden or None)
    return TransformerConfig(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=inner,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context=rope.scaling.reach(trained),
        norm_eps=config.number(fields.norm_eps, fields.default_norm_eps),
        activation=config.choice(fields.activation, fields.default_activation, ACTIVATIONS),
        tied=config.flag("tie_word_embeddings", fields.tied),
        windows=(None,) * layers,
        ropes=(rope,) * layers,
        scale=head_dim**-0.5,
    )


def _read_kv_heads(config: ModelConfig, name: str | None, heads: int) -> int:
    if name is None:
        return heads
    kv_heads = config.integer(name, heads, high=65536)
    if heads % kv_heads:
        raise config.fault(name, f"a divisor of num_attention_heads ({heads})")
    return kv_heads


def read_sliding(config: ModelConfig, layers: int) -> tuple[bool, ...] | None:
    """Which layers ``layer_types`` lets slide, None if the field is absent. Raises BrokenModel."""
    if "layer_types" not in config:
        return None
    kinds = config.choices("layer_types", layers, _LAYER_KINDS)
    return tuple(kind == "sliding_attention" for kind in kinds)


def read_experts(config: ModelConfig, layers: int, inner_size: str, *, normalised: bool) -> Experts:
    """The sparse MLPs of all layers; ``inner_size`` names the field. Raises BrokenModel."""
    # transformers 5 writes the latter where older files have the former.
    name = "num_experts" if "num_experts" in config else "num_local_experts"
    count = config.integer(name, high=MAX_EXPERTS_IN_ALL_LAYERS // layers)
    per_token = config.integer("num_experts_per_tok", high=count)
    return Experts(count, per_token, config.integer(inner_size), normalised)
