"""A replica's key-value cache: tokens in use, and blocks of beginnings kept least recently used.

Blocks are shared by sequences whose prompts begin alike and stay after them as long as nobody needs
the room. Counts tokens only. Pure.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class BlockCache:
    """``capacity`` in tokens. ``used`` are those that sequences hold, alone or together."""

    __slots__ = ("_held", "_idle", "_idle_tokens", "capacity", "used")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self._held: dict[int, int] = {}  # how many sequences hold a block
        self._idle: OrderedDict[int, int] = OrderedDict()  # tokens of blocks that nobody holds
        self._idle_tokens = 0

    @property
    def kept(self) -> int:
        """Tokens of blocks that nobody holds now."""
        return self._idle_tokens

    def known(self, blocks: Sequence[int]) -> int:
        """How many of the first blocks are here."""
        held, idle = self._held, self._idle
        for count, block in enumerate(blocks):
            if block not in held and block not in idle:
                return count
        return len(blocks)

    def reserve(self, tokens: int) -> bool:
        """Take room for tokens of one sequence alone; False if there is none."""
        if self.used + tokens > self.capacity:
            return False
        self.used += tokens
        self._make_room()
        return True

    def give_back(self, tokens: int) -> None:
        """Tokens that one sequence held alone are free."""
        self.used -= tokens
        assert self.used >= 0

    def hold(self, blocks: Sequence[int], block_tokens: int) -> None:
        """A sequence uses these blocks, which are here (``known``)."""
        for block in blocks:
            holders = self._held.get(block, 0)
            if not holders:
                self._idle_tokens -= self._idle.pop(block)
                self.used += block_tokens
            self._held[block] = holders + 1

    def add(self, blocks: Sequence[int], block_tokens: int) -> list[int]:
        """A sequence has computed these blocks and held the tokens alone. Returns those that it
        holds from now on with others; what was here already stays its own."""
        added: list[int] = []
        for block in blocks:
            if block in self._held or block in self._idle:
                continue
            self._held[block] = 1
            added.append(block)
        return added

    def release(self, blocks: Sequence[int], block_tokens: int) -> None:
        """A sequence ended. The first blocks stay longest: without them the others are of no
        use."""
        for block in reversed(blocks):
            holders = self._held[block] - 1
            if holders:
                self._held[block] = holders
                continue
            del self._held[block]
            self._idle[block] = block_tokens
            self._idle_tokens += block_tokens
            self.used -= block_tokens
        self._make_room()

    def _make_room(self) -> None:
        while self._idle_tokens and self.used + self._idle_tokens > self.capacity:
            self._idle_tokens -= self._idle.popitem(last=False)[1]
