"""The paged key-value cache's book-keeping: which block belongs to whom, which can be reused.

Blocks are numbers here; the runner owns the memory. Paging follows PagedAttention (Kwon et al.,
SOSP 2023, arXiv 2309.06180); reuse is by hashes chained from the first block on, so that one hash
stands for a block and everything before it. Must not import torch, asyncio, time or threading.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

_DIGEST_BYTES = 32  # collisions would show one tenant another's tokens: full strength, never hash()


def chain_root(salt: str, adapter: str = "") -> bytes:
    """The parent of a sequence's first block. Sequences of different salts or adapters share no
    block."""
    # Lone surrogates are legal in a JSON string and must not break the engine.
    raw = salt.encode("utf-8", "surrogatepass")
    root = blake2b(raw, digest_size=_DIGEST_BYTES, person=b"cloudlm-kv-salt").digest()
    if not adapter:
        return root
    root += adapter.encode("utf-8", "surrogatepass")
    return blake2b(root, digest_size=_DIGEST_BYTES, person=b"cloudlm-kv-lora").digest()


def next_block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The hash of a full block: BLAKE2b over the parent's hash and the token ids (64 bit each)."""
    digest = blake2b(parent, digest_size=_DIGEST_BYTES, person=b"cloudlm-kv-block")
    digest.update(array("q", token_ids).tobytes())
    return digest.digest()


class BlockPool:
    """Reference-counted blocks; unreferenced ones keep their content until space is needed.

    A block is *held* (referenced by at least one sequence), *cached* (unreferenced, but its
    content can be found by hash) or *empty*. Cached and empty blocks are both free to take; empty
    ones go first, then the cached one that was unreferenced for longest.
    """

    def __init__(self, blocks_total: int, block_size: int) -> None:
        assert blocks_total > 0
        assert block_size > 0
        self.blocks_total = blocks_total
        self.block_size = block_size
        self._references = [0] * blocks_total
        self._hashes: list[bytes | None] = [None] * blocks_total
        self._by_hash: dict[bytes, int] = {}
        self._empty = list(range(blocks_total - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def free_blocks(self) -> int:
        """Blocks that can be taken now, cached ones included."""
        return len(self._empty) + len(self._cached)

    @property
    def usage(self) -> float:
        """Share of blocks that are held, 0 to 1."""
        return 1.0 - self.free_blocks / self.blocks_total

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // self.block_size)

    def match_prefix(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known beginning of this chain. Takes nothing yet."""
        matched: list[int] = []
        for block_hash in hashes:
            block = self._by_hash.get(block_hash)
            if block is None:
                break
            matched.append(block)
        return matched

    def cost(self, matched: Sequence[int], fresh: int) -> int:
        """Free blocks that ``allocate`` would use up: matched blocks held by others cost none."""
        return fresh + sum(1 for block in matched if self._references[block] == 0)

    def freed(self, table: Sequence[int], dropped: Counter[int]) -> int:
        """Blocks that freeing this table would give back, after so many references to each block
        were ``dropped``; adds the table's own to them."""
        dropped.update(table)
        return sum(1 for block in table if self._references[block] == dropped[block])

    def allocate(self, matched: Sequence[int], fresh: int) -> list[int]:
        """A block table: the matched blocks, referenced once more, then ``fresh`` empty ones.

        The caller has compared ``cost`` with ``free_blocks``.
        """
        assert self.cost(matched, fresh) <= self.free_blocks
        for block in matched:  # first, so that none of them is evicted for the fresh ones
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1
        return [*matched, *(self._take() for _ in range(fresh))]

    def append(self, table: list[int]) -> bool:
        """Add one fresh block to a table; False when none is free."""
        if self.free_blocks == 0:
            return False
        table.append(self._take())
        return True

    def publish(self, block: int, block_hash: bytes) -> None:
        """Let later sequences find this held block, which is full and computed.

        When another block holds the same content already, that one stays the known one.
        """
        assert self._references[block] > 0
        if self._hashes[block] is None and block_hash not in self._by_hash:
            self._hashes[block] = block_hash
            self._by_hash[block_hash] = block

    def free(self, table: list[int]) -> None:
        """Drop one reference of every block of the table and empty the table."""
        for block in reversed(table):  # ends are evicted before the beginnings they depend on
            assert self._references[block] > 0
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._hashes[block] is None:
                    self._empty.append(block)
                else:
                    self._cached[block] = None
        table.clear()

    def forget(self) -> None:
        """Empty every block that nobody holds: the runner's memory of them is gone."""
        for block in self._cached:
            block_hash = self._hashes[block]
            assert block_hash is not None
            del self._by_hash[block_hash]
            self._hashes[block] = None
            self._empty.append(block)
        self._cached.clear()

    def _take(self) -> int:
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            evicted = self._hashes[block]
            assert evicted is not None
            del self._by_hash[evicted]
            self._hashes[block] = None
        self._references[block] = 1
        return block

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert that the books agree with each other and with all tables in use."""
        counted = [0] * self.blocks_total
        for table in tables:
            assert len(set(table)) == len(table), "a table names a block twice"
            for block in table:
                counted[block] += 1
        assert counted == self._references, "reference counts differ from the tables"
        unreferenced = {block for block, count in enumerate(counted) if count == 0}
        empty, cached = set(self._empty), set(self._cached)
        assert len(empty) == len(self._empty), "a block is empty twice"
        assert not empty & cached, "a block is both empty and cached"
        assert empty | cached == unreferenced, "a block is lost or free while held"
        known = {block: h for block, h in enumerate(self._hashes) if h is not None}
        assert {h: block for block, h in known.items()} == self._by_hash, "hash index is wrong"
        assert not empty & known.keys(), "an empty block has a hash"
        assert cached <= known.keys(), "a cached block has no hash"
