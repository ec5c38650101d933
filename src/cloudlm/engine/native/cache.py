"""The order of keys and values inside a block of the native cache, and back. Plain PyTorch.

It is the order in which tiles and dot products want them, so that attention never rearranges:
keys ``[slot / 16, dim / 2, 16 slots, 2 dims]``, values ``[slot / 2, dim, 2 slots]``. Blocks are
whole memory stretches all the same: they are copied, saved and freed as any other block.
"""

from __future__ import annotations

from torch import Tensor

SLOT_UNIT = 32  # a block's size is a multiple of this
HEAD_UNIT = 32  # and so is the size of a head,
MAX_HEAD_DIM = 512  # which the library computes in room of a fixed size: see src/kernels.h


def runs_heads(head_dim: int) -> bool:
    """Whether the kernels have room for heads of so many numbers."""
    return 0 < head_dim <= MAX_HEAD_DIM and head_dim % HEAD_UNIT == 0


def unpack_keys(keys: Tensor, head_dim: int) -> Tensor:
    """[blocks, kv_heads, block_size * dim] to [blocks, block_size, kv_heads, dim] (a copy)."""
    blocks, kv_heads, _ = keys.shape
    tiles = keys.view(blocks, kv_heads, -1, head_dim // 2, 16, 2)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(blocks, -1, kv_heads, head_dim)


def unpack_values(values: Tensor, head_dim: int) -> Tensor:
    """[blocks, kv_heads, block_size * dim] to [blocks, block_size, kv_heads, dim] (a copy)."""
    blocks, kv_heads, _ = values.shape
    pairs = values.view(blocks, kv_heads, -1, head_dim, 2)
    return pairs.permute(0, 2, 4, 1, 3).reshape(blocks, -1, kv_heads, head_dim)


def key_places(keys: Tensor, head_dim: int) -> Tensor:
    """A view [blocks, slot / 16, slot % 16, kv_heads, dim / 2, 2] to write keys into."""
    blocks, kv_heads, _ = keys.shape
    tiles = keys.view(blocks, kv_heads, -1, head_dim // 2, 16, 2)
    return tiles.permute(0, 2, 4, 1, 3, 5)


def value_places(values: Tensor, head_dim: int) -> Tensor:
    """A view [blocks, slot / 2, slot % 2, kv_heads, dim] to write values into."""
    blocks, kv_heads, _ = values.shape
    return values.view(blocks, kv_heads, -1, head_dim, 2).permute(0, 2, 4, 1, 3)
