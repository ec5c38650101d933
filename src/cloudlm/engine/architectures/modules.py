"""The parts that decoders are put together from: norms, attention, MLPs, layers.

Each part takes of a ``TransformerConfig`` what concerns it. Every matrix is an ``nn.Linear``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cloudlm.engine.architectures.transformer_config import (
    Experts,
    MLPKind,
    Norm,
    Projections,
    QueryKeyNorm,
    Residual,
    TransformerConfig,
)
from cloudlm.engine.ops.activation import ACTIVATIONS
from cloudlm.engine.ops.attention import Attend
from cloudlm.engine.ops.norm import OffsetRMSNorm, RMSNorm
from cloudlm.engine.ops.rope import rotate

_NORMS: dict[Norm, type[nn.Module]] = {
    Norm.RMS: RMSNorm,
    Norm.OFFSET_RMS: OffsetRMSNorm,
    Norm.LAYER: nn.LayerNorm,
}


def make_norm(config: TransformerConfig, size: int | None = None) -> nn.Module:
    """The family's norm over ``size`` numbers, by default those of a hidden state."""
    return _NORMS[config.norm](size or config.hidden_size, eps=config.norm_eps)


class Attention(nn.Module):
    """Causal self-attention with grouped key and value heads."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.scale = config.scale
        self.window = config.windows[layer]
        self.softcap = config.attention_softcap
        width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self._make_inputs(config, width, kv_width)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.out_bias)
        self.norm_whole = config.qk_norm is QueryKeyNorm.WHOLE
        if config.qk_norm is QueryKeyNorm.NONE:
            self.q_norm = self.k_norm = None
        else:
            self.q_norm = make_norm(config, width if self.norm_whole else config.head_dim)
            self.k_norm = make_norm(config, kv_width if self.norm_whole else config.head_dim)

    def _make_inputs(self, config: TransformerConfig, width: int, kv_width: int) -> None:
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)

    def _inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [tokens, heads or kv_heads, head_dim]."""
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.norm_whole and self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        return (
            query.unflatten(1, (-1, self.head_dim)),
            key.unflatten(1, (-1, self.head_dim)),
            value.unflatten(1, (-1, self.head_dim)),
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """``x`` [tokens, hidden]; ``cos`` and ``sin`` as from ``ops.rope.cos_sin``."""
        query, key, value = self._inputs(x)
        if not self.norm_whole and self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        seen = attend(
            self.layer,
            query,
            key,
            value,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
        )
        projected: Tensor = self.o_proj(seen)
        return projected


class FusedAttention(Attention):
    """The same with one matrix for queries, keys and values."""

    def _make_inputs(self, config: TransformerConfig, width: int, kv_width: int) -> None:
        self.kv_heads = config.kv_heads
        self.grouped = config.projections is Projections.GROUPED
        self.qkv_proj = nn.Linear(config.hidden_size, width + 2 * kv_width, bias=config.qkv_bias)

    def _inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fused: Tensor = self.qkv_proj(x)
        if self.grouped:
            groups = fused.view(len(x), self.kv_heads, -1, self.head_dim)
            return groups[:, :, :-2].flatten(1, 2), groups[:, :, -2], groups[:, :, -1]
        heads = fused.view(len(x), -1, self.head_dim)
        keys, values = heads.shape[1] - 2 * self.kv_heads, heads.shape[1] - self.kv_heads
        return heads[:, :keys], heads[:, keys:values], heads[:, values:]


class GatedMLP(nn.Module):
    """``down(act(gate(x)) * up(x))``."""

    def __init__(self, config: TransformerConfig, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [tokens, hidden]."""
        projected: Tensor = self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return projected


class FusedGatedMLP(nn.Module):
    """The same with one matrix for gate and up."""

    def __init__(self, config: TransformerConfig, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [tokens, hidden]."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        projected: Tensor = self.down_proj(self.activation(gate) * up)
        return projected


class PlainMLP(nn.Module):
    """``down(act(up(x)))``."""

    def __init__(self, config: TransformerConfig, inner: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [tokens, hidden]."""
        projected: Tensor = self.down_proj(self.activation(self.up_proj(x)))
        return projected


class SparseMLP(nn.Module):
    """A mixture of experts: each token goes through the few that its router scores highest.

    Source: Shazeer et al., "Outrageously Large Neural Networks", 2017; the shared expert is that
    of Qwen1.5-MoE.
    """

    def __init__(self, config: TransformerConfig, experts: Experts) -> None:
        super().__init__()
        self.per_token, self.normalised = experts.per_token, experts.normalised
        self.gate = nn.Linear(config.hidden_size, experts.count, bias=False)
        self.experts = nn.ModuleList(
            GatedMLP(config, experts.inner_size) for _ in range(experts.count)
        )
        self.shared_expert = self.shared_expert_gate = None
        if experts.shared_size:
            self.shared_expert = GatedMLP(config, experts.shared_size)
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [tokens, hidden]."""
        weights, chosen = self.gate(x).float().softmax(-1).topk(self.per_token, dim=-1)
        if self.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        answer = torch.zeros_like(x)
        # All pairs of a token and one of its experts, put in the order of the experts: one product
        # per expert that is chosen at all.
        by_expert = chosen.flatten().argsort(stable=True)
        tokens = by_expert // self.per_token
        sorted_weights = weights.flatten()[by_expert].unsqueeze(1)
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        begin = 0
        for expert, count in zip(self.experts, counts, strict=True):
            if count:
                part = slice(begin, begin + count)
                weighted = expert(x[tokens[part]]) * sorted_weights[part]
                answer.index_add_(0, tokens[part], weighted.to(x.dtype))
                begin += count
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            answer += self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)
        return answer


_MLPS = {
    MLPKind.GATED: GatedMLP,
    MLPKind.GATED_FUSED: FusedGatedMLP,
    MLPKind.PLAIN: PlainMLP,
}


class Layer(nn.Module):
    """Attention and MLP, each on a normed copy that is added back."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        kind = Attention if config.projections is Projections.APART else FusedAttention
        self.self_attn = kind(config, layer)
        experts = config.experts
        self.mlp: nn.Module
        if experts is None or layer in experts.dense_layers:
            self.mlp = _MLPS[config.mlp](config, config.intermediate_size)
        else:
            self.mlp = SparseMLP(config, experts)
        self._make_norms(config)

    def _make_norms(self, config: TransformerConfig) -> None:
        self.input_layernorm = make_norm(config)
        self.post_attention_layernorm = make_norm(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """``x`` [tokens, hidden]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        after: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return after


class PostNormLayer(Layer):
    """Attention and MLP, the norms on what they answer."""

    def _make_norms(self, config: TransformerConfig) -> None:
        self.post_attention_layernorm = make_norm(config)
        self.post_feedforward_layernorm = make_norm(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """See ``Layer``."""
        x = x + self.post_attention_layernorm(self.self_attn(x, cos, sin, attend))
        after: Tensor = x + self.post_feedforward_layernorm(self.mlp(x))
        return after


class SandwichLayer(Layer):
    """Attention and MLP, norms on what they see and on what they answer."""

    def _make_norms(self, config: TransformerConfig) -> None:
        self.input_layernorm = make_norm(config)
        self.post_attention_layernorm = make_norm(config)
        self.pre_feedforward_layernorm = make_norm(config)
        self.post_feedforward_layernorm = make_norm(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """See ``Layer``."""
        seen = self.self_attn(self.input_layernorm(x), cos, sin, attend)
        x = x + self.post_attention_layernorm(seen)
        answer = self.mlp(self.pre_feedforward_layernorm(x))
        after: Tensor = x + self.post_feedforward_layernorm(answer)
        return after


class ParallelLayer(Layer):
    """Attention and MLP side by side on the same hidden states."""

    def _make_norms(self, config: TransformerConfig) -> None:
        self.input_layernorm = make_norm(config)
        self.one_norm = config.residual is Residual.PARALLEL_ONE_NORM
        if not self.one_norm:
            self.post_attention_layernorm = make_norm(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """See ``Layer``."""
        normed = self.input_layernorm(x)
        seen = self.self_attn(normed, cos, sin, attend)
        if not self.one_norm:
            normed = self.post_attention_layernorm(x)
        after: Tensor = x + seen + self.mlp(normed)
        return after


LAYERS: dict[Residual, type[Layer]] = {
    Residual.PRE: Layer,
    Residual.POST: PostNormLayer,
    Residual.SANDWICH: SandwichLayer,
    Residual.PARALLEL: ParallelLayer,
    Residual.PARALLEL_ONE_NORM: ParallelLayer,
}
