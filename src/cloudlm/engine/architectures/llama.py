"""Llama, and the parts that its descendants (Mistral, Qwen2, Qwen3) share with it.

Source: Touvron et al., "LLaMA", 2023; Dubey et al., "The Llama 3 Herd of Models", 2024.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor, nn
from torch.nn import functional

from cloudlm.core.errors import UnsupportedModel
from cloudlm.engine.architectures.base import Decoder, Shape
from cloudlm.engine.architectures.config import ModelConfig
from cloudlm.engine.ops.activation import ACTIVATIONS
from cloudlm.engine.ops.attention import Attend
from cloudlm.engine.ops.norm import RMSNorm
from cloudlm.engine.ops.rope import RopeScaling, cos_sin, frequencies, rotate

MAX_LAYERS = 1024
_ROPE_KINDS = dict.fromkeys(("default", "linear", "llama3"))
_OLD_BUFFER = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """Everything that distinguishes one member of the family from another."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    norm_eps: float
    activation: str
    rope_theta: float
    rope_scaling: RopeScaling
    tied: bool
    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False


def read_rope(config: ModelConfig, context: int) -> tuple[float, RopeScaling]:
    """Theta and scaling, from ``rope_parameters`` (transformers 5) or from ``rope_theta`` and
    ``rope_scaling`` (before). Raises UnsupportedModel for kinds that are not run."""
    section = config.section("rope_parameters" if "rope_parameters" in config else "rope_scaling")
    theta_from = section if "rope_theta" in section else config
    theta = theta_from.number("rope_theta", 10000.0)
    kind = section.raw("rope_type") or section.raw("type") or "default"
    if kind not in _ROPE_KINDS:
        raise UnsupportedModel(
            f"config.json: rope scaling {str(kind)[:40]!r} is not supported; "
            f"supported: {', '.join(_ROPE_KINDS)}"
        )
    for holder in (section, config):
        if holder.number("partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedModel(
                "config.json: partial_rotary_factor other than 1 is not supported"
            )
    if kind == "default":
        return theta, RopeScaling()
    factor = section.number("factor")
    if kind == "linear":
        return theta, RopeScaling("linear", factor)
    low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
    if low >= high:
        raise section.fault("low_freq_factor", f"less than high_freq_factor ({high:g})")
    original = section.integer("original_max_position_embeddings", context)
    return theta, RopeScaling("llama3", factor, low, high, original)


def read_common(config: ModelConfig) -> LlamaConfig:
    """The fields that all members have. Raises BrokenModel or UnsupportedModel."""
    hidden = config.integer("hidden_size")
    heads = config.integer("num_attention_heads", high=65536)
    kv_heads = config.integer("num_key_value_heads", heads, high=65536)
    if heads % kv_heads:
        raise config.fault("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    head_dim = config.integer("head_dim", hidden // heads, high=65536)
    if head_dim % 2:
        raise config.fault("head_dim", "an even number")
    context = config.integer("max_position_embeddings", 2048)
    theta, scaling = read_rope(config, context)
    layers = config.integer("num_hidden_layers", high=MAX_LAYERS)
    return LlamaConfig(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=config.integer("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context=context,
        norm_eps=config.number("rms_norm_eps", 1e-6),
        activation=config.choice("hidden_act", "silu", ACTIVATIONS),
        rope_theta=theta,
        rope_scaling=scaling,
        tied=config.flag("tie_word_embeddings", False),
        windows=(None,) * layers,
    )


class Attention(nn.Module):
    """Causal self-attention with grouped key and value heads."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.window = config.windows[layer]
        width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.out_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """``x`` [tokens, hidden]; ``cos`` and ``sin`` as from ``ops.rope.cos_sin``."""
        query = self.q_proj(x).unflatten(1, (-1, self.head_dim))
        key = self.k_proj(x).unflatten(1, (-1, self.head_dim))
        value = self.v_proj(x).unflatten(1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        seen = attend(self.layer, query, key, value, scale=self.scale, window=self.window)
        projected: Tensor = self.o_proj(seen)
        return projected


class GatedMLP(nn.Module):
    """``down(act(gate(x)) * up(x))``."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [tokens, hidden]."""
        projected: Tensor = self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return projected


class Layer(nn.Module):
    """Attention and MLP, each on a normed copy that is added back."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = GatedMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """``x`` [tokens, hidden]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        after: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return after


class Trunk(nn.Module):
    """Everything but the output projection; named ``model`` in the files."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(len(config.windows)))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self._frequency: Tensor | None = None

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Normed last hidden states [tokens, hidden]."""
        x = self.embed_tokens(token_ids)
        if self._frequency is None:
            config = self.config
            self._frequency = frequencies(
                config.head_dim, config.rope_theta, config.rope_scaling, x.device
            )
        cos, sin = cos_sin(positions, self._frequency, x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, attend)
        normed: Tensor = self.norm(x)
        return normed


class LlamaForCausalLM(Decoder):
    """A whole Llama-like decoder; members override ``read``."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.model = Trunk(config)
        self.lm_head = (
            None if config.tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self.shape = Shape(
            config.vocab_size, config.kv_heads, config.head_dim, config.context, config.windows
        )

    @classmethod
    def read(cls, config: ModelConfig) -> LlamaConfig:
        """The family member's configuration."""
        common = read_common(config)
        bias = config.flag("attention_bias", False)
        return replace(
            common, qkv_bias=bias, out_bias=bias, mlp_bias=config.flag("mlp_bias", False)
        )

    @classmethod
    def from_config(cls, config: ModelConfig) -> Self:
        """See ``Decoder``."""
        return cls(cls.read(config))

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """See ``Decoder``."""
        hidden: Tensor = self.model(token_ids, positions, attend)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """See ``Decoder``."""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return functional.linear(hidden, head.weight).float()

    def parameter_name(self, stored: str) -> str | None:
        """See ``Decoder``."""
        if _OLD_BUFFER.fullmatch(stored) or (self.lm_head is None and stored == "lm_head.weight"):
            return None
        return stored
