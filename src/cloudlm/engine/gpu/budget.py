"""How much of a GPU's memory the cache may have. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass

from cloudlm.core.errors import BadSetting

# Per row and token of the vocabulary: logits, their double, what sorting and summing add.
_SAMPLING_BYTES = 48
# Per token of a step and number that is widest in a layer: its inputs, outputs and wider copies.
_ACTIVATION_BYTES = 24
# CUDA's own libraries, kernels and the memory of graphs.
_LIBRARIES_BYTES = 1536 * 2**20


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
        sampling = self.batch_sequences * self.vocab_size * _SAMPLING_BYTES
        return sampling + self.batch_tokens * self.widest * _ACTIVATION_BYTES + _LIBRARIES_BYTES


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
