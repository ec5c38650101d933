"""A rotary decoder of any family: embedding, layers, norm, output projection.

Source of the design: Vaswani et al., "Attention Is All You Need", 2017, as decoders have it since
Touvron et al., "LLaMA", 2023. What differs between families stands in their configurations.
"""

from __future__ import annotations

import re
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from cloudlm.engine.architectures.base import Decoder, Shape
from cloudlm.engine.architectures.config import ModelConfig
from cloudlm.engine.architectures.modules import LAYERS, make_norm
from cloudlm.engine.architectures.transformer_config import TransformerConfig
from cloudlm.engine.ops.attention import Attend
from cloudlm.engine.ops.rope import Rope, cos_sin

# Tables and masks that old files carry along.
_OLD_BUFFER = re.compile(
    r".+\.\d+\.(?:self_attn|self_attention|attention)\.(?:rotary_emb\.inv_freq|bias|masked_bias)"
)


class Trunk(nn.Module):
    """Everything but the output projection; named ``model`` in most files."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.longest = config.context
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layer = LAYERS[config.residual]
        self.layers = nn.ModuleList(layer(config, i) for i in range(config.layers))
        self.norm = make_norm(config)
        self._frequencies: dict[Rope, Tensor] = {}

    def embed(self, token_ids: Tensor) -> Tensor:
        """What enters the first layer, [tokens, hidden]."""
        x: Tensor = self.embed_tokens(token_ids)
        if self.config.embedding_scale is not None:
            x = x * torch.full((), self.config.embedding_scale, dtype=x.dtype, device=x.device)
        return x

    def forward(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """``x`` [tokens, hidden] after all layers."""
        turns = {
            rope: cos_sin(positions, frequency, rope.scaling.magnitude, x.dtype)
            for rope, frequency in self._all_frequencies(x.device).items()
        }
        for layer, rope in zip(self.layers, self.config.ropes, strict=True):
            x = layer(x, *turns[rope], attend)
        return x

    def _all_frequencies(self, device: torch.device) -> dict[Rope, Tensor]:
        if not self._frequencies:
            self._frequencies = {
                rope: rope.scaling.frequencies(rope.dim, rope.theta, self.longest).to(device)
                for rope in dict.fromkeys(self.config.ropes)
            }
        return self._frequencies


class Transformer(Decoder):
    """A whole decoder; a family overrides ``read`` and, where its files name tensors differently,
    ``renames``: patterns and what they become, applied one after the other."""

    renames: ClassVar[tuple[tuple[str, str], ...]] = ()
    layers_path: ClassVar[str] = "model.layers"
    embedding_path: ClassVar[str] = "model.embed_tokens"

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.model = Trunk(config)
        self.lm_head = (
            None if config.tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self.logit_softcap = config.logit_softcap
        self.shape = Shape(
            config.vocab_size,
            config.kv_heads,
            config.head_dim,
            config.context,
            config.windows,
            config.hidden_size,
        )

    @classmethod
    def read(cls, config: ModelConfig) -> TransformerConfig:
        """The member of the family that a ``config.json`` describes."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: ModelConfig) -> Self:
        """See ``Decoder``."""
        return cls(cls.read(config))

    def limit(self, longest: int) -> None:
        """See ``Decoder``."""
        self.model.longest = longest

    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """See ``Decoder``."""
        return self.model.embed(token_ids)

    def through(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """See ``Decoder``."""
        after: Tensor = self.model(x, positions, attend)
        return after

    def finish(self, x: Tensor) -> Tensor:
        """See ``Decoder``."""
        normed: Tensor = self.model.norm(x)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """See ``Decoder``."""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        logits = functional.linear(hidden, head.weight).float()
        if self.logit_softcap is not None:
            logits = (logits / self.logit_softcap).tanh() * self.logit_softcap
        return logits

    def parameter_name(self, stored: str) -> str | None:
        """See ``Decoder``."""
        if _OLD_BUFFER.fullmatch(stored):
            return None
        for pattern, replacement in self.renames:
            stored = re.sub(pattern, replacement, stored)
        return None if self.lm_head is None and stored == "lm_head.weight" else stored
