"""Any architecture as PyTorch modules, on any device and in any floating type."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cloudlm.engine.architectures.base import Decoder
from cloudlm.engine.ops.attention import PagedAttention
from cloudlm.engine.ops.cache import BlockPool
from cloudlm.engine.step import Chunk


class TorchPath:
    """See ``base.Path``. ``model`` must be loaded, all parameters of one type on one device.

    Raises BadSetting if the pool does not fit into memory.
    """

    def __init__(self, model: Decoder, num_blocks: int, block_size: int) -> None:
        first = next(model.parameters())
        self.shape = model.shape
        self.device = first.device
        self.precision = str(first.dtype).removeprefix("torch.")
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.pool = BlockPool(
            self.shape.layers,
            num_blocks,
            block_size,
            self.shape.kv_heads,
            self.shape.head_dim,
            first.dtype,
            first.device,
        )
        self._model = model.eval()
        self._windows = frozenset(self.shape.windows)

    def hidden(self, chunks: Sequence[Chunk]) -> Tensor:
        """See ``Path``."""
        token_ids = [token_id for chunk in chunks for token_id in chunk.token_ids]
        attend = PagedAttention(chunks, self.pool, self._windows)
        tokens = torch.tensor(token_ids, dtype=torch.int64, device=self.device)
        hidden: Tensor = self._model(tokens, attend.positions, attend)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """See ``Path``."""
        return self._model.logits(hidden)
