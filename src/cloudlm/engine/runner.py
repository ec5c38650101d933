"""Computes one step: tokens in, next tokens out. Decides nothing about who runs when."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cloudlm.core.chat import Sampling
from cloudlm.core.errors import BrokenModel
from cloudlm.engine.api import EngineInfo
from cloudlm.engine.architectures.base import Decoder
from cloudlm.engine.paths.base import Path
from cloudlm.engine.paths.torch_path import TorchPath
from cloudlm.engine.sampler import Choice, sample, token_logprobs
from cloudlm.engine.step import Chunk, Sampled, Step

# Prompt log probabilities need the whole vocabulary per position: so many positions at a time.
_SCORED_ROWS = 128

_Scores = tuple[tuple[float, tuple[tuple[int, float], ...]], ...]


@dataclass(frozen=True, slots=True)
class RunnerFacts:
    """What the runner is told about itself for ``EngineInfo``, besides what the network knows."""

    architecture: str
    max_model_len: int
    num_blocks: int
    block_size: int
    eos_token_ids: tuple[int, ...] = ()


class Runner:
    """A network with its block pool. ``run`` is called by one thread at a time.

    ``path`` computes; without one it is the network's own modules, which must be loaded, all
    parameters of one type on one device. Raises BadSetting if the pool does not fit into memory.
    """

    def __init__(self, model: Decoder, facts: RunnerFacts, path: Path | None = None) -> None:
        self.model = model
        self.num_blocks = facts.num_blocks
        self.block_size = facts.block_size
        self._path = path or TorchPath(model, facts.num_blocks, facts.block_size)
        self._device = self._path.device
        self.info = EngineInfo(
            architecture=facts.architecture,
            parameters=self._path.parameters,
            dtype=self._path.precision,
            device=str(self._device),
            vocab_size=model.shape.vocab_size,
            max_model_len=facts.max_model_len,
            block_size=facts.block_size,
            blocks_total=facts.num_blocks,
            eos_token_ids=facts.eos_token_ids,
        )

    @torch.inference_mode()
    def run(self, step: Step) -> list[Sampled]:
        """Compute all chunks of ``step`` in one pass. One Sampled per chunk that samples or asked
        for prompt log probabilities, in the order of the chunks."""
        self._path.pool.copy(step.copies)
        if not step.chunks:
            return []
        hidden = self.hidden(step.chunks)
        choices = self._choices(step.chunks, hidden)
        sampled: list[Sampled] = []
        begin = 0
        for place, chunk in enumerate(step.chunks):
            end = begin + len(chunk.token_ids)
            choice = choices.get(place)
            scores: _Scores = ()
            if chunk.prompt_logprobs:
                scores = self._prompt_scores(chunk, hidden[begin:end], choice)
            if choice is not None:
                sampled.append(
                    Sampled(chunk.sequence_id, choice.token_id, choice.logprob, choice.top, scores)
                )
            elif chunk.prompt_logprobs:
                sampled.append(Sampled(chunk.sequence_id, None, prompt_logprobs=scores))
            begin = end
        return sampled

    @torch.inference_mode()
    def hidden(self, chunks: tuple[Chunk, ...]) -> Tensor:
        """Last hidden states [tokens, hidden] of all chunks, one behind the other; stores their
        keys and values in the pool."""
        return self._path.hidden(chunks)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [rows, vocab_size] in float32 of some rows of the hidden states."""
        return self._path.logits(hidden)

    def check(self) -> None:
        """Compute one token for trial, which also warms the machine up. Raises BrokenModel if the
        logits are not finite numbers."""
        trial = Chunk(0, (0,), 0, (0,), samples=True, sampling=Sampling())
        with torch.inference_mode():
            logits = self.logits(self.hidden((trial,)))
        if not bool(logits.isfinite().all()):
            raise BrokenModel(
                "the model's weights give logits that are not finite numbers: the files are "
                f"damaged, or {self.info.dtype} is too narrow for them (try dtype=float32)"
            )

    def close(self) -> None:
        """Give the memory of weights and cache back; the runner cannot run any more."""
        del self.model, self._path

    def _choices(self, chunks: tuple[Chunk, ...], hidden: Tensor) -> dict[int, Choice]:
        """The next token of each chunk that samples, by the chunk's place."""
        rows: list[int] = []
        sampling: dict[int, Chunk] = {}
        end = 0
        for place, chunk in enumerate(chunks):
            end += len(chunk.token_ids)
            if chunk.samples:
                rows.append(end - 1)
                sampling[place] = chunk
        if not rows:
            return {}
        last = (
            hidden if len(rows) == len(hidden) else hidden[torch.tensor(rows, device=self._device)]
        )
        chosen = sample(self.logits(last), list(sampling.values()))
        return dict(zip(sampling, chosen, strict=True))

    def _prompt_scores(self, chunk: Chunk, hidden: Tensor, choice: Choice | None) -> _Scores:
        """Log probabilities of the tokens that follow the chunk's positions. Behind the last known
        token that is the chosen one; if none was chosen, that position is left out."""
        known = (*chunk.prompt_token_ids, *chunk.output_token_ids)
        followers = list(known[chunk.start + 1 : chunk.start + 1 + len(chunk.token_ids)])
        if len(followers) < len(chunk.token_ids) and choice is not None:
            followers.append(choice.token_id)
        token_ids = torch.tensor(followers, dtype=torch.int64, device=self._device)
        scores: list[tuple[float, tuple[tuple[int, float], ...]]] = []
        for begin in range(0, len(followers), _SCORED_ROWS):
            part = slice(begin, min(begin + _SCORED_ROWS, len(followers)))
            logits = self.logits(hidden[part])
            scores += token_logprobs(logits, token_ids[part], chunk.sampling.logprobs or 0)
        return tuple(scores)
