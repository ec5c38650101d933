"""What a version needs of a machine: memory for weights, keys and values, and work. Pure.

Must not know prices or speed: ``speed`` says how quick a machine is, ``place`` chooses.
"""

from __future__ import annotations

from dataclasses import dataclass

from cloudlm.control.catalogue.words import GIB, Device, Kind, Offer
from cloudlm.core.figures import ModelFigures
from cloudlm.core.placement import Placement, Traffic
from cloudlm.core.sizing import gpu_working_bytes, step_bytes

# A GPU's share is the engine's own default; of a machine's memory some belongs to its system.
GPU_SHARE = 0.9
RAM_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class Batch:
    """The engine's limits: tokens and sequences of a step."""

    tokens: int = 1024
    sequences: int = 64


@dataclass(frozen=True, slots=True)
class Need:
    """``sequence_tokens`` of ``cache_bytes_per_token`` are held for each sequence; ``least``
    sequences must fit on a replica."""

    weights_bytes: float
    cache_bytes_per_token: float
    sequence_tokens: int
    gpu_working_bytes: int
    cpu_working_bytes: int
    least: int

    def bytes_for(self, sequences: int, kind: Kind, pieces: int) -> float:
        """Memory of a replica with so many sequences on so many pieces of a device."""
        working = self.cpu_working_bytes
        if kind is Kind.GPU:  # every piece has the libraries and computes a part of every step
            working = pieces * self.gpu_working_bytes
        cache = sequences * self.sequence_tokens * self.cache_bytes_per_token
        return self.weights_bytes + working + cache

    def sequences_in(self, memory_bytes: float, kind: Kind, pieces: int) -> int:
        """How many sequences fit beside the weights; below 0 if these alone do not."""
        left = memory_bytes - self.bytes_for(0, kind, pieces)
        return int(left // max(1.0, self.sequence_tokens * self.cache_bytes_per_token))


def need_of(figures: ModelFigures, placement: Placement, traffic: Traffic, batch: Batch) -> Need:
    """What the version needs for this traffic, or for what the placement asks if that is more."""
    tokens = max(traffic.prompt_tokens + traffic.output_tokens, placement.context_tokens)
    widest = figures.widest or 8 * figures.hidden_size
    sizes = (widest, figures.vocab_size, batch.tokens, batch.sequences)
    return Need(
        weights_bytes=figures.weights_bytes,
        cache_bytes_per_token=figures.cache_bytes_per_token,
        sequence_tokens=tokens,
        gpu_working_bytes=gpu_working_bytes(*sizes),
        cpu_working_bytes=step_bytes(*sizes),
        least=max(1, placement.concurrency),
    )


def usable_bytes(offer: Offer, device: Device, pieces: int) -> float:
    """Memory that a replica on ``pieces`` devices of a machine may have."""
    if device.kind is Kind.CPU:
        return offer.ram_gib * GIB * RAM_SHARE * pieces / offer.count
    return device.memory_gib * GIB * GPU_SHARE * pieces
