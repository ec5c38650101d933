"""Which replica has seen the beginning of a prompt: an estimate of what its cache still holds.

A request's body is cut into blocks; each block's key is a keyed hash of all bytes up to its end, so
that equal keys mean equal beginnings, and tenants (whose caches are apart) never share one. Clients
write the conversation first and append to it, so beginnings of bodies stand for beginnings of
prompts. Bounded and forgetful: a wrong estimate costs time, never an answer. Pure: ``now`` comes as
an argument.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Sequence
from hashlib import blake2b

BLOCK_BYTES = 1024
KEPT_BLOCKS = 16_384
KEPT_S = 600.0


def block_keys(body: bytes, tenant: str) -> tuple[bytes, ...]:
    """The keys of the full blocks of ``body``, 8 bytes each."""
    if len(body) < BLOCK_BYTES:
        return ()
    keys: list[bytes] = []
    salt = blake2b(tenant.encode(), digest_size=32).digest()
    so_far = blake2b(digest_size=8, key=salt)
    view = memoryview(body)
    for end in range(BLOCK_BYTES, len(body) + 1, BLOCK_BYTES):
        so_far.update(view[end - BLOCK_BYTES : end])
        keys.append(so_far.digest())
    return tuple(keys)


class Prefixes:
    """What each replica was given lately: at most ``kept_blocks`` blocks, for ``kept_s``. 16,384 of
    them take 3.5 (of long prompts) to 5.6 MB (of one block each); what is too old to be believed
    goes when the replica is next given something."""

    def __init__(self, *, kept_blocks: int = KEPT_BLOCKS, kept_s: float = KEPT_S) -> None:
        self._kept_blocks = kept_blocks
        self._kept_s = kept_s
        self._seen: dict[str, OrderedDict[bytes, float]] = {}
        self._holders: dict[bytes, tuple[str, ...]] = {}  # of beginnings, who was given them

    def known(self, replica: str, keys: Sequence[bytes], now: float) -> int:
        """How many of the first blocks ``replica`` was given and may still have."""
        seen = self._seen.get(replica)
        if not seen:
            return 0
        oldest = now - self._kept_s
        for count, key in enumerate(keys):
            if seen.get(key, float("-inf")) < oldest:
                return count
        return len(keys)

    def note(self, replica: str, keys: Sequence[bytes], now: float) -> None:
        """``replica`` is given these blocks. The first are kept longest: without them the others
        are worth nothing."""
        if not keys:
            return
        seen = self._seen.setdefault(replica, OrderedDict())
        if keys[0] not in seen:
            self._holders[keys[0]] = (*self._holders.get(keys[0], ()), replica)
        for key in reversed(keys[: self._kept_blocks]):
            seen[key] = now
            seen.move_to_end(key)
        oldest = now - self._kept_s
        while len(seen) > self._kept_blocks or (seen and next(iter(seen.values())) < oldest):
            self._drop(seen.popitem(last=False)[0], replica)

    def holders(self, beginning: bytes) -> tuple[str, ...]:
        """Who was given prompts of this first block, and may still have it: nobody else has."""
        return self._holders.get(beginning, ())

    def forget(self, replica: str) -> None:
        """``replica`` failed: whatever comes after it has an empty cache."""
        for key in self._seen.pop(replica, ()):
            self._drop(key, replica)

    def keep_only(self, replicas: Container[str]) -> None:
        """Forget replicas that are no longer endpoints."""
        for replica in [replica for replica in self._seen if replica not in replicas]:
            self.forget(replica)

    def _drop(self, key: bytes, replica: str) -> None:
        held = self._holders.get(key)
        if held is not None and replica in held:
            left = tuple(one for one in held if one != replica)
            if left:
                self._holders[key] = left
            else:
                del self._holders[key]
