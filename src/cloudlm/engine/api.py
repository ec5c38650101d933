"""The engine port: what a worker asks of an engine and gets back.

Knows no PyTorch, so that workers and other engines' adapters can import it cheaply.
"""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from cloudlm.core.chat import Constraint, FinishReason, Sampling


class Guide(Protocol):
    """Keeps one sequence's answer to its constraint; made by ``Engine.guide``, for one use."""

    @property
    def finished(self) -> bool:
        """Whether the answer is complete and nothing can follow."""
        ...


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One sequence to generate.

    ``prompt_token_ids`` must not be empty. ``output_token_ids`` are tokens that were generated
    before (resume): they are not sent again, they count towards ``max_tokens``, penalties, stop
    strings and the position that keys the seed. ``index`` is the choice number among ``n``;
    it enters the random draw so that choices differ. ``cache_salt`` keeps tenants' prefixes apart.
    ``prompt_logprobs`` asks for the prompt tokens' log probabilities (echo with logprobs).
    ``adapter`` names a loaded LoRA adapter, empty for the base.
    ``tenant`` is whose share of the engine it uses, ``weight`` how large that share is beside
    others' (above 0); a higher ``priority`` goes first, whosever it is.
    ``guide`` is the same engine's, for ``sampling.constraint`` and ``output_token_ids``; a
    constraint without one is refused. ``shown_token_ids`` are special tokens that have a text in
    this answer (the marks of tool calls).
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    output_token_ids: tuple[int, ...] = ()
    index: int = 0
    cache_salt: str = ""
    prompt_logprobs: bool = False
    adapter: str = ""
    tenant: str = ""
    priority: int = 0
    weight: float = 1.0
    guide: Guide | None = field(default=None, compare=False, repr=False)
    shown_token_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """One prompt to embed; ``prompt_token_ids`` must not be empty. The other
    fields are those of ``GenerateRequest``."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    cache_salt: str = ""
    adapter: str = ""
    tenant: str = ""
    priority: int = 0
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Embedding:
    """A prompt's vector: ``EngineInfo.hidden_size`` float32 numbers of Euclidean length 1."""

    values: array[float]
    prompt_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of a token under temperature-1 softmax of the processed-free logits;
    ``top`` are the likeliest alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What one step of one sequence produced.

    ``token_ids`` are the new tokens (usually one; empty in an event that only flushes text or ends
    the sequence). ``text`` is the text that became certain: it may lag behind the tokens while
    a UTF-8 character is incomplete or a stop string may be beginning. The last event, and only it,
    has a ``finish_reason``. The stop token itself is counted in ``token_ids`` but has no text.
    ``stop_match`` is the stop string or stop token id that ended the sequence. ``queued_s``, in a
    sequence's first event only, is the time from submission to its first step, seconds (None where
    an engine does not measure it). ``embedding`` is in an embedded prompt's only event.
    """

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_match: str | int | None = None
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    queued_s: float | None = None
    embedding: array[float] | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of counters. ``steps`` is the progress that health is judged by: it grows while
    there is work. ``busy_since`` is the monotonic time at which the present step began, or None.
    ``drafts`` are guesses of several tokens, of which so many were ``drafted`` and ``accepted``."""

    steps: int = 0
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    blocks_total: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    drafts: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    alive: bool = True
    busy_since: float | None = None


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Facts of the loaded model. ``max_model_len`` is the longest prompt plus answer, tokens;
    ``hidden_size`` the length of an embedding; ``tensor_parallel`` processes share every layer in
    each of ``pipeline_parallel`` stages. ``dtype`` names what most weights are held in, ``weights``
    how exactly all of them are; ``kernels`` says what computes, with which instructions;
    ``deterministic``: as the setting."""

    architecture: str
    parameters: int
    dtype: str
    device: str
    vocab_size: int
    max_model_len: int
    block_size: int
    blocks_total: int
    eos_token_ids: tuple[int, ...]
    hidden_size: int = 0
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    weights: str = ""
    kernels: str = ""
    deterministic: bool = False


class Engine(Protocol):
    """Submit, cancel, look. Called from one event loop; ``submit`` validates at once."""

    info: EngineInfo

    async def guide(self, constraint: Constraint, output_token_ids: tuple[int, ...] = ()) -> Guide:
        """Compile a constraint, outside the engine's steps, for one sequence that has
        ``output_token_ids`` already.

        Raises InvalidRequest (it cannot be followed, or is too complex), NotSupported (the
        tokenizer's tokens are no bytes), MissingExtra, Overloaded.
        """
        ...

    def submit(self, request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        """Start a sequence and yield its events.

        Raises at the call (not at the first event): InvalidRequest (empty prompt, token id out of
        range, weight out of bounds), ContextLengthExceeded (prompt does not fit), ModelNotFound
        (no such adapter), Overloaded (queue full), InternalError (engine stopped). Closing the
        iterator cancels the sequence.
        """
        ...

    async def embed(self, requests: Sequence[EmbedRequest]) -> list[Embedding]:
        """The embeddings of all prompts, in their order, computed beside whatever else runs.

        Raises InvalidRequest and ContextLengthExceeded before anything is computed, Overloaded
        (queue full), Unavailable (cancelled: ``cancel``, ``close``), InternalError. Cancelling the
        call ends what is left of it.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """End all sequences of this request; their iterators get a last event with ABORT."""
        ...

    def adapters(self) -> Mapping[str, str]:
        """The loaded LoRA adapters by name, with the address that each was loaded from."""
        ...

    async def load_adapter(self, name: str, folder: Path, address: str) -> None:
        """Load the adapter of ``folder`` while others are served.

        Raises InvalidRequest (name taken, too many loaded), BrokenModel and its kinds.
        """
        ...

    async def unload_adapter(self, name: str) -> None:
        """Refuse new requests for it, wait for those that run, forget it. Raises ModelNotFound."""
        ...

    async def sleep(self, level: int) -> None:
        """Refuse new requests (Unavailable), wait for those that run, then give back the memory of
        weights and cache; at level 2 also the system's copy of the weights' files. What sleeps
        already sleeps on. Raises NotSupported (this engine cannot)."""
        ...

    async def wake(self) -> None:
        """Load the weights again and take requests. What is awake stays so. Raises BrokenModel and
        its kinds if the files can no longer be loaded; then it sleeps on."""
        ...

    def stats(self) -> EngineStats: ...

    async def close(self) -> None:
        """Stop the engine's thread; running sequences end with ABORT."""
        ...
