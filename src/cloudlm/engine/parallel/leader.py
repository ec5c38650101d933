"""Rank 0: the engine's runner for a model over several processes. Tells the others, then does the
same, so that all make the same exchanges in the same order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cloudlm.core.errors import InternalError, NotSupported
from cloudlm.engine.adapter_files import Adapter, Site
from cloudlm.engine.architectures.base import Decoder
from cloudlm.engine.masks import StepMasks
from cloudlm.engine.parallel.messages import (
    AddAdapter,
    Copy,
    Forward,
    Logits,
    Piece,
    RemoveAdapter,
    Sleep,
    Wake,
)
from cloudlm.engine.parallel.part import PartRunner
from cloudlm.engine.parallel.ranks import Ranks
from cloudlm.engine.parallel.split import Split
from cloudlm.engine.parallel.team import Team
from cloudlm.engine.runner import RunnerFacts, Source
from cloudlm.engine.step import Chunk, Sampled, Step

NOTICE_S = 1.0
"""Longest wait for the cause of a failed step, seconds."""


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """An adapter as rank 0 read it, and where the others will."""

    folder: Path
    own: Adapter


class LeaderRunner(PartRunner):
    """See ``PartRunner``. ``parameters`` are those of the whole network; ``team`` is closed with
    this runner."""

    def __init__(
        self,
        model: Decoder,
        facts: RunnerFacts,
        source: Source,
        split: Split,
        ranks: Ranks,
        whole_sites: dict[str, Site],
        team: Team,
        parameters: int,
    ) -> None:
        team_source = Source(lambda: self._load_all(source.load), source.files)
        super().__init__(model, facts, team_source, split, ranks, whole_sites)
        layout = ranks.place.layout
        self.team = team
        self.info = replace(
            self.info,
            parameters=parameters,
            tensor_parallel=layout.tensor,
            pipeline_parallel=layout.pipeline,
        )

    def run(self, step: Step, masks: StepMasks | None = None) -> list[Sampled]:
        """See ``Runner``."""
        try:
            if step.copies:
                self.team.tell(Copy(step.copies))
            return super().run(step, masks)
        except Exception as error:
            lost = self.team.wait_lost(NOTICE_S)
            if lost is None:
                raise
            raise InternalError(f"{lost}; this replica must be restarted") from error

    @torch.inference_mode()
    def hidden(self, chunks: tuple[Chunk, ...]) -> Tensor:
        """See ``Runner``."""
        self.team.tell(Forward(tuple(Piece.of(chunk) for chunk in chunks)))
        return super().hidden(chunks)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """See ``Runner``."""
        place = self._ranks.place
        if place.layout.tensor > 1:
            self.team.tell(Logits(len(hidden)), place.stage_ranks[1:])
        return super().logits(hidden)

    def read_adapter(self, folder: Path) -> AdapterFolder:  # type: ignore[override]
        """See ``Runner``; the other ranks read theirs when it is added."""
        return AdapterFolder(folder.absolute(), super().read_adapter(folder))

    def add_adapter(self, key: str, adapter: AdapterFolder) -> None:  # type: ignore[override]
        """See ``Runner``. Raises what reading or adding it raises on any rank; none has it then."""
        try:
            self.team.ask(AddAdapter(key, str(adapter.folder)))
            super().add_adapter(key, adapter.own)
        except Exception:
            self.team.tell(RemoveAdapter(key))
            raise

    def remove_adapter(self, key: str) -> None:
        """See ``Runner``."""
        self.team.tell(RemoveAdapter(key))
        super().remove_adapter(key)

    def sleep(self, level: int) -> None:
        """See ``Runner``."""
        if self._source is None:
            raise NotSupported("this model was not loaded from files and cannot sleep")
        self.team.tell(Sleep(level))
        try:
            super().sleep(level)
        finally:
            self._collect()

    def wake(self) -> None:
        """See ``Runner``: all wake up, or all sleep on."""
        try:
            super().wake()
        except Exception:
            self.team.tell(Sleep(1))
            self._collect()
            raise

    def _load_all(self, load_own: Callable[[], Decoder]) -> Decoder:
        """The own part again, while all others load theirs."""
        self.team.tell(Wake())
        try:
            return load_own()
        finally:
            self._collect()

    def _collect(self) -> None:
        fault = self.team.collect()
        if fault is not None:
            raise fault

    def when_lost(self, call: Callable[[str], None]) -> None:
        """See ``Runner``: told which rank has ended."""
        self.team.when_lost(call)

    def close(self) -> None:
        """See ``Runner``; returns when the other ranks have ended."""
        super().close()
        self.team.close()
        if self.team.lost is None or self._device.type == "cpu":
            self._ranks.close()  # with GPUs that would wait for the lost rank
