"""Attention with softly capped scores, which PyTorch's fused attention does not offer.

Source: Gemma team, "Gemma 2: Improving Open Language Models at a Practical Size", 2024.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Scores are kept as a whole: so many queries of a long prompt at a time.
_QUERIES = 128


def capped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float
) -> Tensor:
    """``query`` [..., queries, head_dim] over ``key`` and ``value`` [..., keys, head_dim] where
    ``mask``, which broadcasts to [..., queries, keys], is true; scores in float32."""
    scores = (query @ key.transpose(-1, -2)).float() * scale
    scores = (scores / softcap).tanh() * softcap
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return weights.to(value.dtype) @ value


def capped_run(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """``query`` [tokens, heads, head_dim] over ``keys`` and ``values`` [keys, kv_heads, head_dim]
    where ``mask`` [tokens, keys] is true; without one, causally over the tokens themselves."""
    count, heads, dim = query.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    if mask is None:
        mask = torch.ones(count, count, dtype=torch.bool, device=query.device).tril()
    key, value = keys.transpose(0, 1), values.transpose(0, 1)
    parts = []
    for begin in range(0, count, _QUERIES):
        rows = query[begin : begin + _QUERIES]
        # [kv_heads, group * rows, dim]: a key head's query heads stand one below the other.
        folded = rows.view(-1, kv_heads, group, dim).permute(1, 2, 0, 3).flatten(1, 2)
        seen = mask[begin : begin + _QUERIES].repeat(group, 1)
        answer = capped_attention(folded, key, value, seen, scale, softcap)
        parts.append(answer.view(heads, -1, dim).transpose(0, 1))
    return torch.cat(parts)
