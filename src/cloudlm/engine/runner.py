"""Computes one step: tokens in, next tokens out. Decides nothing about who runs when."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cloudlm.core.chat import Sampling
from cloudlm.core.errors import BadSetting, BrokenModel, NotSupported, Unavailable
from cloudlm.engine.adapter_files import Adapter, read_adapter, sites
from cloudlm.engine.adapters import Adapters, Adapting
from cloudlm.engine.api import EngineInfo
from cloudlm.engine.architectures.base import Decoder
from cloudlm.engine.architectures.modules import SparseMLP
from cloudlm.engine.fixed_batches import FIXED_ROWS, hidden_in_batches, logits_in_batches
from cloudlm.engine.masks import StepMasks
from cloudlm.engine.memory import drop_from_page_cache, give_back
from cloudlm.engine.ops.attention import PagedAttention
from cloudlm.engine.ops.cache import BlockPool
from cloudlm.engine.ops.transfer import to_device
from cloudlm.engine.paths.base import ComputePath
from cloudlm.engine.sampler import Choice, Mask, sample, token_logprobs
from cloudlm.engine.step import Chunk, Pooling, Sampled, Step

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
    deterministic: bool = False


@dataclass(frozen=True, slots=True)
class Source:
    """Where the network came from: ``load`` makes it again, out of ``files``."""

    load: Callable[[], Decoder]
    files: tuple[Path, ...]


class Runner:
    """A network with its block pool. ``run`` is called by one thread at a time. ``source`` is what
    it wakes up from; without one it cannot sleep. ``make_path`` turns the loaded network into
    what computes in its place (native kernels); without it the network's own modules do.

    The network must be loaded, all parameters of one type on one device. In ``deterministic`` mode
    a sequence's tokens depend on nothing else in the batch, nor on how it was cut into chunks: a
    path that was made so sees to it, or ``fixed_batches``. Raises BadSetting if the pool does not
    fit into memory, or the network cannot be run that way.
    """

    def __init__(
        self,
        model: Decoder,
        facts: RunnerFacts,
        source: Source | None = None,
        make_path: Callable[[Decoder], ComputePath] | None = None,
    ) -> None:
        first = next(model.parameters())
        shape = model.shape
        self.model = model.eval()
        self.num_blocks = facts.num_blocks
        self.block_size = facts.block_size
        self._dtype = first.dtype
        self._sites = sites(model)
        self._windows = frozenset(shape.windows)
        self._deterministic = facts.deterministic
        if facts.deterministic and any(isinstance(one, SparseMLP) for one in model.modules()):
            raise BadSetting(
                "deterministic = true is not possible for a mixture of experts, whose batches "
                "depend on what other sequences are routed to; set it to false",
                param="deterministic",
            )
        self._source = source
        self._make_path = make_path
        parameters = sum(parameter.numel() for parameter in model.parameters())
        self._path = None if make_path is None else make_path(model)
        self._device = first.device
        self._pool = self._make_pool()
        self._device = self._pool.blocks.device  # a path may have moved the network
        self._loaded: dict[str, Adapter] = {}
        self._adapters = self._make_adapters()
        dtype = str(first.dtype).removeprefix("torch.")
        self.info = EngineInfo(
            architecture=facts.architecture,
            parameters=parameters,
            dtype=self._path.precision if self._path else dtype,
            device=str(self._device),
            vocab_size=shape.vocab_size,
            max_model_len=facts.max_model_len,
            block_size=facts.block_size,
            blocks_total=facts.num_blocks,
            eos_token_ids=facts.eos_token_ids,
            hidden_size=shape.hidden_size,
            weights=self._path.weights if self._path else dtype,
            kernels=self._path.kernels if self._path else _pytorch(self._device),
            deterministic=facts.deterministic,
        )

    def _make_pool(self) -> BlockPool:
        if self._path is not None:
            return self._path.pool
        shape = self.model.shape
        return BlockPool(
            shape.layers,
            self.num_blocks,
            self.block_size,
            shape.kv_heads,
            shape.head_dim,
            self._dtype,
            self._device,
        )

    def _make_adapters(self) -> Adapting | None:
        """What adds the loaded adapters from now on; None if nothing here can."""
        adapters = Adapters(self.model) if self._path is None else self._path.adapters
        if adapters is not None:
            for key, adapter in self._loaded.items():
                adapters.add(key, adapter)
        return adapters

    @torch.inference_mode()
    def run(self, step: Step, masks: StepMasks | None = None) -> list[Sampled]:
        """Compute all chunks of ``step`` in one pass. One Sampled per chunk that samples (and per
        draft of it) or asked for prompt log probabilities or pooling, in the order of the chunks.
        ``masks`` tell which tokens constrained sequences, which have no drafts, may go on with."""
        self._pool.copy(step.copies)
        if not step.chunks:
            return []
        hidden = self.hidden(step.chunks)
        choices = self._choices(step.chunks, hidden, masks)
        sampled: list[Sampled] = []
        begin = 0
        for place, chunk in enumerate(step.chunks):
            end = begin + len(chunk.token_ids)
            chosen = choices.get(place, [])
            scores: _Scores = ()
            if chunk.prompt_logprobs:
                scores = self._prompt_scores(chunk, hidden[begin:end], chosen)
            if chosen:
                sampled += [
                    Sampled(chunk.sequence_id, one.token_id, one.logprob, one.top, scores)
                    for one in chosen
                ]
            elif chunk.prompt_logprobs:
                sampled.append(Sampled(chunk.sequence_id, None, prompt_logprobs=scores))
            elif chunk.pooling is not None:
                pooled = _pooled(chunk, hidden[begin:end])
                sampled.append(Sampled(chunk.sequence_id, None, pooled=pooled))
            begin = end
        return sampled

    @torch.inference_mode()
    def hidden(self, chunks: tuple[Chunk, ...]) -> Tensor:
        """Last hidden states [tokens, hidden] of all chunks, one behind the other; stores their
        keys and values in the pool."""
        if self._path is not None:
            return self._path.hidden(chunks)
        if self._deterministic:
            return hidden_in_batches(self.model, chunks, self._pool, self._windows)
        token_ids = [token_id for chunk in chunks for token_id in chunk.token_ids]
        attend = PagedAttention(chunks, self._pool, self._windows)
        tokens = to_device(np.array(token_ids, dtype=np.int64), self._device)
        with self._adapted(chunks):
            hidden: Tensor = self.model(tokens, attend.positions, attend)
        return hidden

    def read_adapter(self, folder: Path) -> Adapter:
        """The LoRA adapter of ``folder``; from any thread. See ``adapters.read_adapter``."""
        model: Decoder | None = getattr(self, "model", None)
        if model is None:
            raise Unavailable("the model is asleep; wake it first")
        if self._adapters is None:
            raise NotSupported("adapters are not possible on these kernels; set kernels=torch")
        return read_adapter(folder, self._sites, model.parameter_name, self._dtype, self._device)

    def add_adapter(self, key: str, adapter: Adapter) -> None:
        """From the next step on chunks may name ``key``. Raises NotSupported in deterministic
        mode on PyTorch's modules, whose batches do not tell adapters apart."""
        if self._deterministic and self._make_path is None:
            raise NotSupported(
                "adapters with deterministic = true need the native kernels (kernels = native)"
            )
        if self._adapters is not None:  # or the model sleeps
            self._adapters.add(key, adapter)
        self._loaded[key] = adapter  # last: what could not be added is not to be added at a wake

    def remove_adapter(self, key: str) -> None:
        """No chunk names ``key`` any more."""
        del self._loaded[key]
        if self._adapters is not None:
            self._adapters.remove(key)

    def _adapted(self, chunks: Sequence[Chunk]) -> AbstractContextManager[None]:
        """While the network's own modules compute ``chunks``."""
        assert isinstance(self._adapters, Adapters)
        return self._adapters.applied(chunks, self._device)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of some rows; in deterministic mode in batches of one shape too."""
        if self._path is not None:
            return self._path.logits(hidden)
        if self._deterministic:
            return logits_in_batches(self.model, hidden)
        return self.model.logits(hidden)

    def _sample(self, logits: Tensor, chunks: list[Chunk], masks: list[Mask]) -> list[Choice]:
        if not self._deterministic:
            return sample(logits, chunks, masks)
        rows = enumerate(zip(chunks, masks, strict=True))
        return [sample(logits[at : at + 1], [chunk], [mask])[0] for at, (chunk, mask) in rows]

    def check(self) -> None:
        """Compute one token for trial, which also warms the machine up. Raises BrokenModel if the
        logits are not finite numbers, BadSetting if they cannot be made deterministic here."""
        trial = Chunk(0, (0,), 0, (0,), samples=True, sampling=Sampling())
        with torch.inference_mode():
            logits = self.logits(self.hidden((trial,)))
        if not bool(logits.isfinite().all()):
            raise BrokenModel(
                "the model's weights give logits that are not finite numbers: the files are "
                f"damaged, or {self.info.dtype} is too narrow for them (try dtype=float32)"
            )
        if self._deterministic:
            with torch.inference_mode():
                self._check_rows()

    def _check_rows(self) -> None:
        """Deterministic mode needs products of one shape to treat all rows alike, which kernels do
        without promising it: the same token in every row must give the same numbers everywhere."""
        trial = Chunk(0, (0,), 0, (0,), samples=True, sampling=Sampling())
        hidden = self.hidden((trial,) * FIXED_ROWS)
        logits = self.logits(hidden)
        if not all(bool((rows == rows[:1]).all()) for rows in (hidden, logits)):
            raise BadSetting(
                f"deterministic = true is not possible here: this machine's kernels for "
                f"{self.info.dtype} compute a row differently in another place; try another dtype",
                param="deterministic",
            )

    def sleep(self, level: int) -> None:
        """Give the memory of weights and cache back until ``wake``; adapters stay. At level 2 the
        system is also asked to forget the weights' files."""
        if self._source is None:
            raise NotSupported("this model was not loaded from files and cannot sleep")
        self._adapters = None
        del self.model, self._pool
        self._path = None
        give_back()
        if level >= 2:
            drop_from_page_cache(self._source.files)

    def wake(self) -> None:
        """Load the weights again; the cache is empty. Raises as loading does, and sleeps on."""
        assert self._source is not None, "only what sleeps wakes up"
        self.model = self._source.load().eval()
        try:
            self._path = None if self._make_path is None else self._make_path(self.model)
            self._pool = self._make_pool()
            self._adapters = self._make_adapters()
            self.check()
        except BaseException:
            self.__dict__.pop("_pool", None)
            self._path = self._adapters = None
            del self.model
            raise

    def when_lost(self, call: Callable[[str], None]) -> None:
        """Have ``call`` told, from any thread, what this runner cannot go on without and lost:
        nothing, as long as it computes in this process alone."""

    def close(self) -> None:
        """Give the memory of weights and cache back; the runner cannot run any more."""
        for name in ("model", "_pool", "_adapters", "_loaded", "_path"):
            self.__dict__.pop(name, None)  # asleep it has two of them no more

    def _choices(
        self, chunks: tuple[Chunk, ...], hidden: Tensor, masks: StepMasks | None
    ) -> dict[int, list[Choice]]:
        """The tokens behind the last known one and the drafts of each chunk that samples, by the
        chunk's place."""
        rows: list[int] = []
        places: list[int] = []
        sampled: list[Chunk] = []
        end = 0
        for place, chunk in enumerate(chunks):
            end += len(chunk.token_ids)
            if chunk.samples:
                rows += range(end - chunk.drafts - 1, end)
                places += [place] * (chunk.drafts + 1)
                sampled += _by_draft(chunk)
        if not rows:
            return {}
        last = (
            hidden
            if len(rows) == len(hidden)
            else hidden[to_device(np.array(rows, dtype=np.int64), self._device)]
        )
        allowed = masks.by_sequence() if masks is not None else {}
        masks_of = [allowed.get(chunk.sequence_id) for chunk in sampled]
        chosen = self._sample(self.logits(last), sampled, masks_of)
        by_place: dict[int, list[Choice]] = {}
        for place, choice in zip(places, chosen, strict=True):
            by_place.setdefault(place, []).append(choice)
        return by_place

    def _prompt_scores(self, chunk: Chunk, hidden: Tensor, chosen: list[Choice]) -> _Scores:
        """Log probabilities of the tokens that follow the chunk's positions. Behind the last known
        token that is the chosen one; if none was chosen, that position is left out."""
        known = (*chunk.prompt_token_ids, *chunk.output_token_ids)
        followers = list(known[chunk.start + 1 : chunk.start + 1 + len(chunk.token_ids)])
        if len(followers) < len(chunk.token_ids):
            followers += [choice.token_id for choice in chosen]
        token_ids = torch.tensor(followers, dtype=torch.int64, device=self._device)
        scores: list[tuple[float, tuple[tuple[int, float], ...]]] = []
        for begin in range(0, len(followers), _SCORED_ROWS):
            part = slice(begin, min(begin + _SCORED_ROWS, len(followers)))
            logits = self.logits(hidden[part])
            scores += token_logprobs(logits, token_ids[part], chunk.sampling.logprobs or 0)
        return tuple(scores)


def _pytorch(device: torch.device) -> str:
    """What computes where PyTorch's own modules do."""
    if device.type == "cuda":
        return f"PyTorch on {torch.cuda.get_device_name(device)}"
    return f"PyTorch with {torch.backends.cpu.get_cpu_capability()}"


def _by_draft(chunk: Chunk) -> list[Chunk]:
    """The chunk as the sampler is to see it at each position that is sampled: drafts before the
    position are part of the answer."""
    if not chunk.drafts:
        return [chunk]
    known, draft = chunk.output_token_ids, chunk.token_ids[-chunk.drafts :]
    return [
        replace(chunk, output_token_ids=(*known, *draft[:count])) for count in range(len(draft) + 1)
    ]


def _pooled(chunk: Chunk, hidden: Tensor) -> array[float] | None:
    """What this chunk's hidden states [tokens, hidden] add to its prompt's vector; see
    ``Sampled``. None for a part of the prompt that adds nothing."""
    if chunk.pooling is Pooling.MEAN:
        row = hidden.float().sum(0)
    elif chunk.start + len(chunk.token_ids) == len(chunk.prompt_token_ids):
        row = hidden[-1].float()
    else:
        return None
    return array("f", row.cpu().numpy().tobytes())
