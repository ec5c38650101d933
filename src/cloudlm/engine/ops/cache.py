"""The block pool: keys and values of all layers, addressed by block. Decides nothing."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from cloudlm.core.errors import BadSetting

_LINE = 64  # bytes of a CPU's cache line


def block_size_bytes(
    layers: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> int:
    """Bytes that one block of ``block_size`` tokens takes in all layers together."""
    return 2 * layers * block_size * kv_heads * head_dim * dtype.itemsize


class BlockPool:
    """Keys and values, ``blocks[layer, 0 or 1, block, slot, head, dimension]``.

    The memory begins as zeros: slots that are masked out of attention must still be finite, as
    zero weight times NaN is NaN. Raises BadSetting if the memory cannot be had.
    """

    def __init__(
        self,
        layers: int,
        num_blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, 2, num_blocks, block_size, kv_heads, head_dim)
        self.block_size = block_size
        try:
            self.blocks = _zeros(shape, dtype, device)
        except (MemoryError, RuntimeError) as error:
            size = num_blocks * block_size_bytes(layers, kv_heads, head_dim, block_size, dtype)
            raise BadSetting(
                f"a key-value cache of {size / 2**20:.0f} MiB does not fit into the memory of "
                f"{device}; lower kv_cache_mb",
                param="kv_cache_mb",
            ) from error

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each [blocks, block_size, kv_heads, head_dim]."""
        return self.blocks[index, 0], self.blocks[index, 1]

    def copy(self, pairs: tuple[tuple[int, int], ...]) -> None:
        """Copy whole blocks (source, target) in all layers; all are read before any is written."""
        if not pairs:
            return
        index = torch.tensor(pairs, dtype=torch.int64, device=self.blocks.device)
        self.blocks[:, :, index[:, 1]] = self.blocks[:, :, index[:, 0]]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # NumPy asks the system for zeroed pages, which cost nothing until they are touched;
    # torch.zeros would write all of them now.
    size = math.prod(shape) * dtype.itemsize
    plain = torch.from_numpy(np.zeros(size + _LINE, dtype=np.uint8))
    # From a cache line's begin: no row then lies in more lines than it must.
    return plain[-plain.data_ptr() % _LINE :][:size].view(dtype).view(shape)
