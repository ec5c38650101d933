"""How much of a GPU's memory the cache may have. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass

from cloudlm.core.errors import BadSetting
from cloudlm.core.sizing import gpu_working_bytes


@dataclass(frozen=True, slots=True)
class Load:
    """What a model needs beside its cache. ``widest`` is the most outputs of a layer's product,
    ``batch_tokens`` and ``batch_sequences`` the limits of a step."""

    weights_bytes: int
    widest: int
    vocab_size: int
    batch_tokens: int
    batch_sequences: int

    @property
    def working_bytes(self) -> int:
        """An upper estimate of what a step allocates."""
        return gpu_working_bytes(
            self.widest, self.vocab_size, self.batch_tokens, self.batch_sequences
        )


def cache_bytes(free_bytes: int, total_bytes: int, utilization: float, load: Load) -> int:
    """What is left for keys and values of the share ``utilization`` of all memory, when
    ``free_bytes`` of it are free before the weights are loaded. Raises BadSetting if nothing is."""
    allowed = int(total_bytes * utilization) - (total_bytes - free_bytes)
    left = allowed - load.weights_bytes - load.working_bytes
    if left <= 0:
        raise BadSetting(
            f"gpu_memory_utilization = {utilization} leaves {max(allowed, 0) / 2**30:.1f} GiB of "
            f"{total_bytes / 2**30:.1f} ({free_bytes / 2**30:.1f} are free); the weights take "
            f"{load.weights_bytes / 2**30:.1f} and a step {load.working_bytes / 2**30:.1f}, so "
            "nothing is left for keys and values; raise it, lower max_batch_sequences or "
            "max_batch_tokens, or take precision int8 or int4",
            param="gpu_memory_utilization",
        )
    return left
