"""Which rank holds what: pure arithmetic over ranks, layers, heads and rows. Knows no PyTorch.

Ranks are numbered stage by stage: rank ``stage * tensor + shard``. Rank 0 schedules, samples and
speaks to the world.
"""

from __future__ import annotations

from dataclasses import dataclass

from cloudlm.core.errors import BadSetting
from cloudlm.engine.step import Chunk

# A batch is cut for a pipeline only as far as its pieces stay worth a pass over the weights.
MICRO_BATCH_TOKENS = 64

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Layout:
    """``tensor`` ranks share every layer, ``pipeline`` stages follow each other."""

    tensor: int = 1
    pipeline: int = 1

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline

    def at(self, rank: int) -> Place:
        """Where ``rank`` stands."""
        return Place(self, rank // self.tensor, rank % self.tensor)


@dataclass(frozen=True, slots=True)
class Place:
    """One rank's place: the stage, and its share of that stage's layers."""

    layout: Layout
    stage: int
    shard: int

    @property
    def rank(self) -> int:
        return self.stage * self.layout.tensor + self.shard

    @property
    def stage_ranks(self) -> list[int]:
        """The ranks that share this one's layers, itself included."""
        first = self.stage * self.layout.tensor
        return list(range(first, first + self.layout.tensor))

    @property
    def next_rank(self) -> int:
        """Who goes on with what leaves this stage; behind the last stage that is the first."""
        return (self.rank + self.layout.tensor) % self.layout.ranks

    @property
    def previous_rank(self) -> int:
        """Whose activations enter here."""
        return (self.rank - self.layout.tensor) % self.layout.ranks

    def layers(self, count: int) -> Span:
        """The layers of this stage, of ``count``; where they do not come out even, the later
        stages have one more, as the first has embedding and output projection as well."""
        stages = self.layout.pipeline
        return count * self.stage // stages, count * (self.stage + 1) // stages

    def share(self, size: int) -> Span:
        """This shard's part of ``size`` things, which ``tensor`` divides."""
        part = size // self.layout.tensor
        return self.shard * part, (self.shard + 1) * part

    def rows(self, size: int) -> Span:
        """This shard's part of ``size`` rows of a vocabulary; the last ones may have fewer."""
        part = -(-size // self.layout.tensor)
        return min(self.shard * part, size), min((self.shard + 1) * part, size)

    def key_heads(self, kv_heads: int) -> Span:
        """The key heads that this shard's queries need; several shards hold the same one if there
        are fewer heads than shards."""
        if kv_heads >= self.layout.tensor:
            return self.share(kv_heads)
        first = self.shard * kv_heads // self.layout.tensor
        return first, first + 1


def check_divides(layout: Layout, what: str, size: int) -> None:
    """Raise BadSetting unless ``tensor`` divides ``size``, which the model calls ``what``."""
    if size % layout.tensor:
        fitting = [str(count) for count in range(1, min(size, 64) + 1) if size % count == 0]
        raise BadSetting(
            f"tensor_parallel = {layout.tensor} does not divide this model's {size} {what}; "
            f"numbers that do: {', '.join(fitting)}",
            param="tensor_parallel",
        )


def check_heads(layout: Layout, heads: int, kv_heads: int) -> None:
    """Raise BadSetting unless the heads can be dealt out evenly."""
    check_divides(layout, "attention heads", heads)
    if kv_heads % layout.tensor and layout.tensor % kv_heads:
        raise BadSetting(
            f"tensor_parallel = {layout.tensor} neither divides this model's {kv_heads} key heads "
            "nor is a multiple of them",
            param="tensor_parallel",
        )


def check_layers(layout: Layout, layers: int) -> None:
    """Raise BadSetting if a stage would be left without a layer."""
    if layout.pipeline > layers:
        raise BadSetting(
            f"pipeline_parallel = {layout.pipeline} is more than this model's {layers} layers",
            param="pipeline_parallel",
        )


def micro_batches(chunks: tuple[Chunk, ...], stages: int) -> list[tuple[Chunk, ...]]:
    """A batch cut into at most ``stages`` pieces between chunks, so that stages work at the same
    time. Every rank cuts the same batch the same way."""
    tokens = sum(len(chunk.token_ids) for chunk in chunks)
    pieces = max(1, min(stages, len(chunks), tokens // MICRO_BATCH_TOKENS))
    found: list[tuple[Chunk, ...]] = []
    piece: list[Chunk] = []
    done = 0
    for chunk in chunks:
        piece.append(chunk)
        done += len(chunk.token_ids)
        if done * pieces >= tokens * (len(found) + 1):
            found.append(tuple(piece))
            piece = []
    return found
