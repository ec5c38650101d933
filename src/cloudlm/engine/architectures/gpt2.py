"""GPT-2: learned positions, layer norms with bias, projections stored transposed.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from cloudlm.engine.architectures.base import Decoder, Shape
from cloudlm.engine.architectures.config import ModelConfig
from cloudlm.engine.ops.activation import ACTIVATIONS
from cloudlm.engine.ops.attention import Attend

MAX_LAYERS = 1024
# Causal masks that old files carry along.
_OLD_BUFFER = re.compile(r"(?:transformer\.)?h\.\d+\.attn\.(?:bias|masked_bias)")


@dataclass(frozen=True, slots=True)
class GPT2Config:
    """The sizes of a GPT-2 and how its attention is scaled."""

    vocab_size: int
    hidden_size: int
    inner_size: int
    layers: int
    heads: int
    context: int
    norm_eps: float
    activation: str
    tied: bool
    scaled: bool
    scaled_by_layer: bool


def read_config(config: ModelConfig) -> GPT2Config:
    """Check a GPT-2's ``config.json``. Raises BrokenModel."""
    hidden = config.integer("n_embd", 768)
    heads = config.integer("n_head", 12, high=65536)
    if hidden % heads:
        raise config.fault("n_head", f"a divisor of n_embd ({hidden})")
    return GPT2Config(
        vocab_size=config.integer("vocab_size", 50257),
        hidden_size=hidden,
        inner_size=config.integer("n_inner", 4 * hidden),
        layers=config.integer("n_layer", 12, high=MAX_LAYERS),
        heads=heads,
        context=config.integer("n_positions", 1024),
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        activation=config.choice("activation_function", "gelu_new", ACTIVATIONS),
        tied=config.flag("tie_word_embeddings", True),
        scaled=config.flag("scale_attn_weights", True),
        scaled_by_layer=config.flag("scale_attn_by_inverse_layer_idx", False),
    )


class Projection(nn.Module):
    """``x @ weight + bias`` with ``weight`` [inputs, outputs], as GPT-2's files hold it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [tokens, inputs]."""
        return torch.addmm(self.bias, x, self.weight)


class Attention(nn.Module):
    """Causal self-attention; all heads have keys of their own."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.hidden_size // config.heads
        self.scale = self.head_dim**-0.5 if config.scaled else 1.0
        if config.scaled_by_layer:
            self.scale /= layer + 1
        self.c_attn = Projection(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = Projection(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """``x`` [tokens, hidden]."""
        heads = self.c_attn(x).unflatten(1, (3, -1, self.head_dim))
        query, key, value = heads.unbind(1)
        projected: Tensor = self.c_proj(attend(self.layer, query, key, value, scale=self.scale))
        return projected


class MLP(nn.Module):
    """Two projections with an activation between them."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = Projection(config.hidden_size, config.inner_size)
        self.c_proj = Projection(config.inner_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [tokens, hidden]."""
        projected: Tensor = self.c_proj(self.activation(self.c_fc(x)))
        return projected


class Block(nn.Module):
    """Attention and MLP, each on a normed copy that is added back."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """``x`` [tokens, hidden]."""
        x = x + self.attn(self.ln_1(x), attend)
        after: Tensor = x + self.mlp(self.ln_2(x))
        return after


class Trunk(nn.Module):
    """Everything but the output projection; named ``transformer`` in the files."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.context, config.hidden_size)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """``x`` [tokens, hidden] after all blocks."""
        for block in self.h:
            x = block(x, attend)
        return x


class GPT2LMHeadModel(Decoder):
    """A whole GPT-2."""

    layers_path: ClassVar[str] = "transformer.h"
    embedding_path: ClassVar[str] = "transformer.wte"

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.transformer = Trunk(config)
        self.lm_head = (
            None if config.tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        head_dim = config.hidden_size // config.heads
        self.shape = Shape(
            config.vocab_size,
            config.heads,
            head_dim,
            config.context,
            (None,) * config.layers,
            config.hidden_size,
        )

    @classmethod
    def from_config(cls, config: ModelConfig) -> Self:
        """See ``Decoder``."""
        return cls(read_config(config))

    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """See ``Decoder``."""
        x: Tensor = self.transformer.wte(token_ids) + self.transformer.wpe(positions)
        return x

    def through(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """See ``Decoder``."""
        after: Tensor = self.transformer(x, attend)
        return after

    def finish(self, x: Tensor) -> Tensor:
        """See ``Decoder``."""
        normed: Tensor = self.transformer.ln_f(x)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """See ``Decoder``."""
        head = self.transformer.wte if self.lm_head is None else self.lm_head
        return functional.linear(hidden, head.weight).float()

    def parameter_name(self, stored: str) -> str | None:
        """See ``Decoder``; the first GPT-2 files have no prefix ``transformer.``."""
        if _OLD_BUFFER.fullmatch(stored) or (self.lm_head is None and stored == "lm_head.weight"):
            return None
        if stored.startswith(("transformer.", "lm_head.")):
            return stored
        return f"transformer.{stored}"
