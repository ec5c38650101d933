"""What a step of the engine allocates beside weights and cache: one estimate for the engine, which
sizes its cache by it, and for placement, which chooses a machine by it. Arithmetic only."""

from __future__ import annotations

# Per row and token of the vocabulary: logits, their double, what sorting and summing add.
_SAMPLING_BYTES = 48
# Per token of a step and number that is widest in a layer: its inputs, outputs and wider copies.
_ACTIVATION_BYTES = 24
# CUDA's own libraries, kernels and the memory of graphs.
_GPU_LIBRARIES_BYTES = 1536 * 2**20


def gpu_working_bytes(widest: int, vocab_size: int, batch_tokens: int, batch_sequences: int) -> int:
    """An upper estimate of what a step allocates on a GPU, its libraries included."""
    return _GPU_LIBRARIES_BYTES + step_bytes(widest, vocab_size, batch_tokens, batch_sequences)


def step_bytes(widest: int, vocab_size: int, batch_tokens: int, batch_sequences: int) -> int:
    """The same without libraries: logits of each sequence, and each token's widest numbers."""
    sampling = batch_sequences * vocab_size * _SAMPLING_BYTES
    return sampling + batch_tokens * widest * _ACTIVATION_BYTES
