"""Llama-like decoders on the kernels of ``engine.native``: all layers in one call.

The network's own matrices are packed layer by layer and given up; embeddings and norms stay.
Activations between layers are float32, keys and values bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from cloudlm.engine.adapters import Adapting
from cloudlm.engine.architectures.base import Decoder
from cloudlm.engine.architectures.modules import (
    Attention,
    FusedAttention,
    FusedGatedMLP,
    Layer,
)
from cloudlm.engine.architectures.transformer import Transformer
from cloudlm.engine.architectures.transformer_config import (
    MLPKind,
    Norm,
    Projections,
    QueryKeyNorm,
    Residual,
)
from cloudlm.engine.formats.base import Codes, StoredLinear
from cloudlm.engine.memory import forget_mapped, give_back
from cloudlm.engine.native.cache import HEAD_UNIT, MAX_HEAD_DIM, SLOT_UNIT, runs_heads
from cloudlm.engine.native.contract import Kernels, LayerCache, Packed, Rotary, StackLayer, Weight
from cloudlm.engine.native.contract import Path as Way
from cloudlm.engine.native.fallback import run_layers
from cloudlm.engine.native.packed_files import PackedFile
from cloudlm.engine.native.packing import join, quantize_int8
from cloudlm.engine.native.plan import Query, plan_attention
from cloudlm.engine.ops.attention import token_places
from cloudlm.engine.ops.cache import BlockPool
from cloudlm.engine.paths.native_adapters import NativeAdapters, Place
from cloudlm.engine.step import Chunk

# Precision -> bits of a weight, and in how many planes of 8 bits inputs are taken.
PRECISIONS = {
    "bfloat16": (16, 0),
    "int8": (8, 2),
    "int8-a8": (8, 1),
    "int4": (4, 2),
    "int4-a8": (4, 1),
}
INT4_GROUP = 128


def why_not(model: Decoder) -> str | None:
    """What the kernels lack for this network; None if they can run it."""
    if not isinstance(model, Transformer):
        return f"{type(model).__name__} is not a Llama-like decoder"
    config = model.model.config
    can = {
        "its norm": config.norm is Norm.RMS,
        "the place of its norms": config.residual is Residual.PRE,
        "its norm of queries and keys": config.qk_norm is not QueryKeyNorm.WHOLE,
        "its layout of queries, keys and values": config.projections is not Projections.GROUPED,
        "its MLP": config.mlp is not MLPKind.PLAIN and config.activation == "silu",
        "its experts": config.experts is None,
        "its softcap": config.attention_softcap is None and config.logit_softcap is None,
        "its scaled embeddings": config.embedding_scale is None,
        "its rotation": len(set(config.ropes)) == 1 and config.ropes[0].dim == config.head_dim,
        f"its head size ({config.head_dim}; a multiple of {HEAD_UNIT} up to {MAX_HEAD_DIM})": (
            runs_heads(config.head_dim)
        ),
    }
    return next((f"the kernels lack {name}" for name, yes in can.items() if not yes), None)


def native_block_size(block_size: int) -> int:
    """The smallest size from ``block_size`` tokens on that the kernels' cache can have."""
    return -(-block_size // SLOT_UNIT) * SLOT_UNIT


class NativePath:
    """See ``base.ComputePath``. ``model`` must be one that ``why_not`` has nothing against, loaded
    in bfloat16 on the CPU; it loses all its parts. ``stored`` is the precision of the projections
    that were left quantised in their files, empty without any; ``precision`` is that of the others.
    ``progress`` is told the share that is packed. ``kept`` is the file that has the packed weights
    already, or will have them. ``deterministic``: what a token gets depends on its own sequence
    alone, to the last bit, neither on others in the batch nor on how it was cut into chunks.

    Raises BadSetting if the pool does not fit into memory.
    """

    def __init__(
        self,
        model: Decoder,
        kernels: Kernels,
        precision: str,
        num_blocks: int,
        block_size: int,
        progress: Callable[[float], None] = lambda share: None,
        stored: str = "",
        kept: PackedFile | None = None,
        deterministic: bool = False,
    ) -> None:
        assert isinstance(model, Transformer)
        config = model.model.config
        self.shape = model.shape
        self.precision = stored or precision
        self.weights = f"{stored} as stored, {precision}" if stored else precision
        self.kernels = kernels.name
        self.pool = BlockPool(
            self.shape.layers,
            num_blocks,
            block_size,
            config.kv_heads,
            config.head_dim,
            torch.bfloat16,
            torch.device("cpu"),
        )
        self._kernels = kernels
        self._deterministic = deterministic
        # Quantised products are the same on every path, so that the quickest may be taken.
        exact = PRECISIONS[precision][0] < 16
        self._way: Way = "tiles" if deterministic and not exact else "auto"
        self._config = config
        self._rope = config.ropes[0]
        self._frequencies = self._rope.scaling.frequencies(
            self._rope.dim, self._rope.theta, model.model.longest
        )
        # One attention plan per distinct window; layers name theirs by number.
        self._windows = tuple(dict.fromkeys(config.windows))
        self._norm = _wide(model.model.norm)
        packer = _Packer(kernels, precision, stored, () if kept is None else kept.read())
        head = model.model.embed_tokens if model.lm_head is None else model.lm_head
        self._head = packer.head(head)
        # Tied embeddings are in memory once where the packed projection lost nothing of them.
        tied = head is model.model.embed_tokens
        shared = tied and kernels.rows(self._head, torch.zeros(1, dtype=torch.int64)) is not None
        table = model.model.embed_tokens.weight.detach()
        self._embeddings = None if shared else table.clone()
        forget_mapped((model.model.embed_tokens.weight, head.weight))  # copied and packed
        model.lm_head = None
        # What stays in the network would hold the whole file in memory.
        model.model.embed_tokens = nn.Identity()  # type: ignore[assignment]
        model.model.norm = nn.Identity()
        layers: list[StackLayer] = []
        places: dict[str, Place] = {}
        for number in range(config.layers):
            layer = cast(Layer, model.model.layers[number])
            places.update(_places(layer, number))
            layers.append(self._layer(packer, layer, number))
            forget_mapped(layer.parameters())  # packed: the file's copy need not stay in memory
            model.model.layers[number] = nn.Identity()  # gives the originals' memory back
            progress((number + 1) / config.layers)
        self._layers = layers
        self._stack = kernels.stack(layers)
        # Adapters are bfloat16, whatever the base is held in.
        self._adapters = NativeAdapters(
            kernels, layers, places, "tiles" if deterministic else "auto"
        )
        self.adapters: Adapting | None = self._adapters
        if packer.made:
            give_back()  # what packing took for a while
            if kept is not None:
                kept.write(packer.matrices)

    def _layer(self, packer: _Packer, layer: Layer, number: int) -> StackLayer:
        attention, mlp = layer.self_attn, cast(Any, layer.mlp)
        fused = isinstance(mlp, FusedGatedMLP)
        keys, values = (part.view(self._cache_shape) for part in self.pool.layer(number))
        return StackLayer(
            qkv=packer.pack(*_query_key_value(attention)),
            out=packer.pack(attention.o_proj),
            gate_up=packer.pack(
                *([mlp.gate_up_proj] if fused else [mlp.gate_proj, mlp.up_proj]), gated=True
            ),
            down=packer.pack(mlp.down_proj),
            input_norm=_wide(layer.input_layernorm),
            post_norm=_wide(layer.post_attention_layernorm),
            cache=LayerCache(keys, values, self.pool.block_size),
            q_norm=None if attention.q_norm is None else _wide(attention.q_norm),
            k_norm=None if attention.k_norm is None else _wide(attention.k_norm),
            plan=self._windows.index(self.shape.windows[number]),
        )

    @property
    def _cache_shape(self) -> tuple[int, int, int]:
        """The kernels' order inside a block is their own; blocks are as long as anybody's."""
        return (-1, self._config.kv_heads, self.pool.block_size * self._config.head_dim)

    def hidden(self, chunks: Sequence[Chunk]) -> Tensor:
        """See ``ComputePath``; float32."""
        config = self._config
        token_ids = torch.tensor([token_id for chunk in chunks for token_id in chunk.token_ids])
        positions, slots = map(torch.from_numpy, token_places(chunks, self.pool.block_size))
        queries = [
            Query(
                chunk.start,
                len(chunk.token_ids),
                chunk.block_table,
                self._deterministic or chunk.drafts > 0,
            )
            for chunk in chunks
        ]
        plans = [
            plan_attention(queries, self.pool.block_size, window=window) for window in self._windows
        ]
        hidden = self._embedded(token_ids).float()
        rotary = self._rotary(positions)
        step = (hidden, rotary, slots, plans, config.scale)
        more = self._adapters.additions(chunks, config.norm_eps)
        if more is None:
            return self._kernels.run_stack(self._stack, *step, norm=self._norm, path=self._way)
        return run_layers(
            self._kernels, self._layers, *step, norm=self._norm, path=self._way, more=more
        )

    def _embedded(self, token_ids: Tensor) -> Tensor:
        if self._embeddings is not None:
            return functional.embedding(token_ids, self._embeddings)
        rows = self._kernels.rows(self._head, token_ids)
        assert rows is not None
        return rows

    def logits(self, hidden: Tensor) -> Tensor:
        """See ``ComputePath``."""
        out = torch.empty(len(hidden), self.shape.vocab_size)
        return self._kernels.linear(self._head, hidden, out, path=self._way)

    def _rotary(self, positions: Tensor) -> Rotary:
        angles = positions.float().unsqueeze(1) * self._frequencies
        cos, sin = angles.cos(), angles.sin()
        if self._rope.scaling.magnitude != 1.0:
            cos, sin = cos * self._rope.scaling.magnitude, sin * self._rope.scaling.magnitude
        config = self._config
        return Rotary(config.heads, config.kv_heads, config.head_dim, cos, sin, eps=config.norm_eps)


class _Packer:
    """Fuses, quantises and packs matrices at one precision; what is quantised already stays.
    ``ready`` are the packed matrices of the same model in the same order, or nothing."""

    def __init__(
        self, kernels: Kernels, precision: str, stored: str, ready: Sequence[Packed]
    ) -> None:
        self.matrices: list[Packed] = []
        self.made = 0  # how many of them were not ready
        self._ready = ready
        self._kernels = kernels
        self._bits, planes = PRECISIONS[precision]
        self._planes = (PRECISIONS[stored][1] if stored else planes) or 2

    @torch.inference_mode()
    def pack(self, *parts: nn.Linear, gated: bool = False) -> Packed:
        """The matrices below each other as one."""

        def make() -> Packed:
            biases: list[Tensor] = [part.bias for part in parts if part.bias is not None]
            bias = torch.cat(biases).float() if biases else None
            return self._packed(self._codes(parts) or _numbers(parts), self._bits, gated, bias)

        rows = sum(part.out_features for part in parts)
        return self._ready_or(make, rows // 2 if gated else rows, parts[0].in_features, gated)

    @torch.inference_mode()
    def head(self, head: nn.Module) -> Packed:
        """The output projection: what it loses nothing behind it makes good, so 8 bits at least."""
        linear = cast(nn.Linear, head)

        def make() -> Packed:
            weight = self._codes((linear,)) or linear.weight
            return self._packed(weight, max(self._bits, 8), False, None)

        outputs, inputs = linear.weight.shape
        return self._ready_or(make, outputs, inputs, False)

    def _ready_or(
        self, make: Callable[[], Packed], outputs: int, inputs: int, gated: bool
    ) -> Packed:
        place = len(self.matrices)
        found = self._ready[place] if place < len(self._ready) else None
        shape = (outputs, inputs, gated)
        if found is None or (found.outputs, found.inputs, found.gated) != shape:
            found = make()
            self.made += 1
        self.matrices.append(found)
        return found

    def _codes(self, parts: Sequence[nn.Linear]) -> Codes | None:
        """The matrices as they are stored, None if they do not go together."""
        stored = [part.codes() for part in parts if isinstance(part, StoredLinear)]
        return join(stored) if len(stored) == len(parts) else None

    def _packed(self, weight: Weight, bits: int, gated: bool, bias: Tensor | None) -> Packed:
        if isinstance(weight, Tensor):
            weight = weight.detach()
            if bits == 8:
                weight = quantize_int8(weight)
            elif bits == 4:
                weight = self._kernels.quantize_int4(weight, INT4_GROUP)
        return self._kernels.pack(weight, gated=gated, bias=bias, planes=self._planes)


def _numbers(parts: Sequence[nn.Linear]) -> Tensor:
    weights = [
        part.floats(torch.bfloat16, False) if isinstance(part, StoredLinear) else part.weight
        for part in parts
    ]
    return torch.cat(weights) if weights[1:] else weights[0]


def _places(layer: Layer, number: int) -> Iterator[tuple[str, Place]]:
    """Where the layer's projections are, by their paths in the network."""
    mlp = cast(Any, layer.mlp)
    fused = isinstance(mlp, FusedGatedMLP)
    matrices = {
        "qkv": _query_key_value(layer.self_attn),
        "out": [layer.self_attn.o_proj],
        "gate_up": [mlp.gate_up_proj] if fused else [mlp.gate_proj, mlp.up_proj],
        "down": [mlp.down_proj],
    }
    names = {id(module): name for name, module in layer.named_modules()}
    for matrix, parts in matrices.items():
        first = 0
        for part in parts:
            yield f"model.layers.{number}.{names[id(part)]}", Place(number, matrix, first)
            first += part.out_features


def _query_key_value(attention: Attention) -> list[nn.Linear]:
    if isinstance(attention, FusedAttention):
        return [attention.qkv_proj]
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def _wide(norm: Any) -> Tensor:
    weight: Tensor = norm.weight
    return weight.detach().float().contiguous()
