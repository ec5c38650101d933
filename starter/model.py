"""A Llama decoder in plain PyTorch whose tensors carry the names of ``LlamaForCausalLM``.

Training needs neither a serving engine nor ``transformers``: the names and the order of
operations are the same, so the saved file loads there and gives the same logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Cache = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Shape:
    """The sizes that define the model; the defaults are the shipped ones."""

    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 768
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    max_positions: int = 512
    rope_theta: float = 10000.0
    rms_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads


class RMSNorm(nn.Module):
    """Root-mean-square norm."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Scale each vector to unit mean square."""
        y = F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        # Under autocast one cast here saves one in each of the layers that read the result.
        return y.bfloat16() if torch.is_autocast_enabled("cpu") else y


def thin(x: Tensor, share: float, training: bool) -> Tensor:
    """Dropout of whole channels per sequence: as useful here, and its masks cost nothing."""
    if not training or share == 0.0:
        return x
    kept = torch.rand(x.shape[0], 1, x.shape[2], device=x.device) >= share
    return x * (kept.to(x.dtype) / (1 - share))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions in the half-split layout of the Hugging Face format."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Attention(nn.Module):
    """Causal attention with grouped key and value heads."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width, head = shape.hidden_size, shape.head_dim
        self.q_proj = nn.Linear(width, shape.num_heads * head, bias=False)
        self.k_proj = nn.Linear(width, shape.num_kv_heads * head, bias=False)
        self.v_proj = nn.Linear(width, shape.num_kv_heads * head, bias=False)
        self.o_proj = nn.Linear(shape.num_heads * head, width, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Attend to this input and to ``past``; returns the extended keys and values too."""
        batch, length, _ = x.shape
        head = self.shape.head_dim

        def heads(y: Tensor) -> Tensor:
            return y.view(batch, length, -1, head).transpose(1, 2)

        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        q = rotate(heads(self.q_proj(x)), cos, sin)
        k = rotate(heads(self.k_proj(x)), cos, sin)
        v = heads(self.v_proj(x))
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        groups = self.shape.num_heads // self.shape.num_kv_heads
        wide_k, wide_v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = q @ wide_k.transpose(2, 3) * head**-0.5
        if past is None:  # on short sequences plain products beat the fused kernel on a CPU
            future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        y = scores.float().softmax(-1).to(wide_v.dtype) @ wide_v
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, -1)), (k, v)


class MLP(nn.Module):
    """The gated feed-forward part."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """SwiGLU."""
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Layer(nn.Module):
    """One decoder layer; dropout acts on what is added to the residual stream."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = MLP(shape)
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_eps)
        self.dropout = dropout

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Attention, then feed-forward, each on a normed input."""
        y, kept = self.self_attn(self.input_layernorm(x), cos, sin, past)
        x = x + thin(y, self.dropout, self.training)
        y = self.mlp(self.post_attention_layernorm(x))
        return x + thin(y, self.dropout, self.training), kept


class Decoder(nn.Module):
    """Embeddings, layers and the final norm (``model.*`` in the saved file)."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape, dropout) for _ in range(shape.num_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_eps)


class Llama(nn.Module):
    """The whole model; the output layer shares the embedding's weights."""

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape, self.dropout = shape, dropout
        self.model = Decoder(shape, dropout)
        inv = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
        angles = torch.outer(torch.arange(shape.max_positions).float(), inv)
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.apply(self._init)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def hidden(self, ids: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Final hidden states of ``ids``, which follow on what ``cache`` holds."""
        start = cache[0][0].shape[2] if cache else 0
        x = thin(self.model.embed_tokens(ids), self.dropout, self.training)
        if torch.is_autocast_enabled("cpu"):
            x = x.bfloat16()
        cos = self.cos[start : start + ids.shape[1]]  # type: ignore[index]
        sin = self.sin[start : start + ids.shape[1]]  # type: ignore[index]
        kept: Cache = []
        for i, layer in enumerate(self.model.layers):
            x, pair = layer(x, cos, sin, cache[i] if cache else None)
            kept.append(pair)
        return self.model.norm(x), kept

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary for (any selection of) hidden states."""
        return F.linear(hidden, self.model.embed_tokens.weight)


@torch.inference_mode()
def greedy(model: Llama, prompts: Tensor, stop: int, max_new: int) -> list[list[int]]:
    """Continue equally long prompts with the likeliest token until ``stop`` (left out)."""
    out: list[list[int]] = [[] for _ in range(len(prompts))]
    open_rows = set(range(len(prompts)))
    hidden, cache = model.hidden(prompts)
    for _ in range(max_new):
        token = model.logits(hidden[:, -1]).argmax(-1)
        for row in list(open_rows):
            if int(token[row]) == stop:
                open_rows.discard(row)
            else:
                out[row].append(int(token[row]))
        if not open_rows:
            break
        hidden, cache = model.hidden(token[:, None], cache)
    return out
