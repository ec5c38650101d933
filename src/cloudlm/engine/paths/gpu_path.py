"""Any architecture on a GPU: its own modules, packed, over paged attention, decoding by graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cloudlm.core.chat import Sampling
from cloudlm.engine.adapters import Adapting
from cloudlm.engine.architectures.base import Decoder
from cloudlm.engine.architectures.modules import SparseMLP
from cloudlm.engine.architectures.transformer import Transformer
from cloudlm.engine.gpu.accelerator import Accelerator
from cloudlm.engine.gpu.batch import PagedBatch, plan_batch
from cloudlm.engine.gpu.budget import Load
from cloudlm.engine.gpu.contract import Matrix, Operations
from cloudlm.engine.gpu.graphs import DecodeGraphs
from cloudlm.engine.gpu.matrices import GROUP, pack
from cloudlm.engine.gpu.modules import Packer
from cloudlm.engine.ops.cache import BlockPool
from cloudlm.engine.step import Chunk

_WARM_UP_TOKENS = 80
BITS = {"bfloat16": 16, "float16": 16, "float32": 16, "int8": 8, "int4": 4}
"""Precision -> bits of a quantised weight; 16 stands for none, whatever the type."""


def why_not(model: Decoder, precision: str) -> str | None:
    """What stands against this network at this precision; None if nothing."""
    if precision not in BITS:
        return f"{precision} is for CPUs; a GPU has int8 and int4"
    if BITS[precision] < 16 and not isinstance(model, Transformer):
        return f"{type(model).__name__} has no quantised form"
    return None


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """What is built: a cache of ``num_blocks`` blocks for sequences of at most ``longest`` tokens,
    and graphs for batches of ``graph_sizes`` (empty for none, and for kernels that are compiled
    when they are first needed)."""

    precision: str
    num_blocks: int
    block_size: int
    longest: int
    graph_sizes: tuple[int, ...]


def memory_load(
    model: Decoder, precision: str, dtype: torch.dtype, *, batch_tokens: int, batch_sequences: int
) -> Load:
    """What the network will need beside its cache, from its parameters' shapes alone."""
    bits = BITS.get(precision, 16)
    vocabulary = model.shape.vocab_size
    weights_bytes, widest = 0, 1
    for parameter in model.parameters():
        count = parameter.numel()
        if vocabulary in parameter.shape or parameter.dim() < 2 or bits == 16:
            weights_bytes += count * dtype.itemsize
        else:
            scales = count // parameter.shape[-1] * -(-parameter.shape[-1] // GROUP) * 8
            weights_bytes += count * bits // 8 + scales
        if parameter.dim() > 1 and vocabulary not in parameter.shape:
            widest = max(widest, *parameter.shape)
    if bits < 16:  # the output projection in 8 bits, beside tied embeddings
        weights_bytes += vocabulary * (model.shape.hidden_size + 4)
    # Gate and up are one product, and so are queries, keys and values.
    return Load(weights_bytes, 2 * widest, vocabulary, batch_tokens, batch_sequences)


class GpuPath:
    """See ``base.ComputePath``. ``model`` may lie anywhere; it is packed onto the accelerator in
    place, and ``why_not`` must have nothing against it. ``progress`` is told what share is done.

    Raises BadSetting if the pool does not fit into memory.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: Decoder,
        operations: Operations,
        accelerator: Accelerator,
        facts: GpuFacts,
        progress: Callable[[float], None] = lambda share: None,
    ) -> None:
        self.precision = self.weights = facts.precision
        self.kernels = type(operations).__name__
        self.adapters: Adapting | None = None
        self._model = model
        self._operations = operations
        dtype = next(model.parameters()).dtype
        bits = BITS[facts.precision]
        Packer(operations, accelerator.device, bits).pack(model, lambda done: progress(done / 2))
        self._head = _packed_head(model) if bits < 16 else None
        self.pool = BlockPool(
            model.shape.layers,
            facts.num_blocks + 1,  # the last one belongs to rows that fill a graph's batch up
            facts.block_size,
            model.shape.kv_heads,
            model.shape.head_dim,
            dtype,
            accelerator.device,
        )
        self._longest = facts.longest
        if facts.graph_sizes:
            self._warm_up(facts.num_blocks)
        self._graphs: DecodeGraphs | None = None
        if facts.graph_sizes and _recordable(model):
            self._graphs = DecodeGraphs(
                self._forward,
                operations,
                accelerator,
                self.pool,
                facts.longest,
                facts.graph_sizes,
                lambda done: progress((1 + done) / 2),
            )

    def hidden(self, chunks: Sequence[Chunk]) -> Tensor:
        """See ``ComputePath``."""
        if self._graphs is not None and self._graphs.fits(chunks):
            return self._graphs.hidden(chunks)
        return self._eager(chunks)

    def logits(self, hidden: Tensor) -> Tensor:
        """See ``ComputePath``."""
        if self._head is None:
            return self._model.logits(hidden)
        logits = self._operations.linear(hidden, self._head, None).float()
        softcap = getattr(self._model, "logit_softcap", None)
        return logits if softcap is None else (logits / softcap).tanh() * softcap

    def _eager(self, chunks: Sequence[Chunk]) -> Tensor:
        return self._forward(*plan_batch(chunks, self.pool, self._operations, self._longest))

    def _warm_up(self, nobody: int) -> None:
        """Have the kernels of prompts compiled now, not while a request waits: more rows than
        kernels for few rows take, in the block ``nobody``."""
        tokens = min(_WARM_UP_TOKENS, self._longest)
        table = (nobody,) * -(-tokens // self.pool.block_size)
        self._eager((Chunk(0, (0,) * tokens, 0, table, samples=False, sampling=Sampling()),))

    def _forward(self, token_ids: Tensor, positions: Tensor, batch: PagedBatch) -> Tensor:
        hidden: Tensor = self._model(token_ids, positions, batch)
        return hidden


def _recordable(model: Decoder) -> bool:
    """Experts are chosen by data, which the host must wait for."""
    return not any(isinstance(module, SparseMLP) for module in model.modules())


def _packed_head(model: Decoder) -> Matrix:
    """The output projection: what it loses nothing behind it makes good, so 8 bits."""
    assert isinstance(model, Transformer)
    if model.lm_head is None:
        return pack(model.model.embed_tokens.weight, 8)
    head = pack(model.lm_head.weight, 8)
    model.lm_head = None  # logits come from the codes alone
    return head
