"""A runner over one rank's part of a network. Told what to do by rank 0, or being it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cloudlm.engine.adapter_files import Adapter, Pair, Site
from cloudlm.engine.architectures.base import Decoder
from cloudlm.engine.ops.attention import PagedAttention
from cloudlm.engine.parallel.layout import micro_batches
from cloudlm.engine.parallel.ranks import Ranks
from cloudlm.engine.parallel.split import Split
from cloudlm.engine.runner import Runner, RunnerFacts, Source
from cloudlm.engine.step import Chunk


class PartRunner(Runner):
    """``model`` has been cut by ``split``, which answered ``split``; ``whole_sites`` are the
    projections of the whole network. All ranks make the same calls in the same order."""

    def __init__(
        self,
        model: Decoder,
        facts: RunnerFacts,
        source: Source,
        split: Split,
        ranks: Ranks,
        whole_sites: dict[str, Site],
    ) -> None:
        super().__init__(model, facts, source)
        self._split, self._ranks = split, ranks
        self._sites = whole_sites
        self._shape = model.shape  # known while asleep

    @torch.inference_mode()
    def hidden(self, chunks: tuple[Chunk, ...]) -> Tensor:
        """Last hidden states [tokens, hidden] on the ranks of the first stage; nothing [0, hidden]
        on the others."""
        stages = self._ranks.place.layout.pipeline
        if stages == 1:
            return super().hidden(chunks)
        batches = micro_batches(chunks, stages)
        for batch in batches:
            self._ranks.send(self._through(batch))
        if self._ranks.place.stage:
            return self._activations(0)
        return torch.cat(
            [self.model.finish(self._ranks.receive(self._activations_of(one))) for one in batches]
        )

    def _through(self, chunks: tuple[Chunk, ...]) -> Tensor:
        """This stage's layers over a part of the batch."""
        attend = PagedAttention(chunks, self._pool, self._windows)
        if self._ranks.place.stage:
            x = self._ranks.receive(self._activations_of(chunks))
        else:
            token_ids = [token_id for chunk in chunks for token_id in chunk.token_ids]
            tokens = torch.tensor(token_ids, dtype=torch.int64, device=self._device)
            x = self.model.embed(tokens, attend.positions)
        with self._adapted(chunks):
            return self.model.through(x, attend.positions, attend)

    def _activations_of(self, chunks: tuple[Chunk, ...]) -> Tensor:
        return self._activations(sum(len(chunk.token_ids) for chunk in chunks))

    def _activations(self, rows: int) -> Tensor:
        """Room for hidden states."""
        size = self._shape.hidden_size
        return torch.empty((rows, size), dtype=self._dtype, device=self._device)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [rows, vocab_size] on rank 0, whose ``hidden`` counts; of the other ranks of the
        first stage their own part. No other stage has the output projection."""
        if self._ranks.place.layout.tensor == 1:
            return self.model.logits(hidden)
        own = self.model.logits(self._ranks.spread(hidden))
        widest = -(-self._shape.vocab_size // self._ranks.place.layout.tensor)
        if own.shape[1] < widest:
            own = torch.nn.functional.pad(own, (0, widest - own.shape[1]))
        parts = self._ranks.gather(own.contiguous())
        if parts is None:
            return own
        return torch.cat(parts, dim=1)[:, : self._shape.vocab_size]

    def peer_logits(self, rows: int) -> None:
        """Take part in rank 0's ``logits`` of so many rows."""
        self.logits(self._activations(rows))

    def copy_blocks(self, pairs: tuple[tuple[int, int], ...]) -> None:
        """Copy whole blocks of the cache (source, target)."""
        with torch.inference_mode():
            self._pool.copy(pairs)

    def read_adapter(self, folder: Path) -> Adapter:
        """This rank's part of the LoRA adapter of ``folder``. Raises as ``Runner.read_adapter``."""
        return self._own(super().read_adapter(folder))

    def _own(self, adapter: Adapter) -> Adapter:
        here = dict(self.model.named_modules())
        return Adapter(
            {path: self._cut(path, pair) for path, pair in adapter.pairs.items() if path in here}
        )

    def _cut(self, path: str, pair: Pair) -> Pair:
        """``up`` answers the outputs of a projection, ``down`` takes its inputs; where inputs are
        cut, the sum over the ranks is also that of the adapter's shares."""
        cut = self._split.cuts.get(f"{path}.weight")
        if cut is None:
            return pair
        if cut.outputs:
            return Pair(pair.down, replace(cut, dim=0).of(pair.up).contiguous())
        return Pair(replace(cut, dim=1).of(pair.down).contiguous(), pair.up)
