"""What an engine can hold, and how long a sequence may become in it.

A pure decider's part: must not import torch, asyncio, time, logging or threading.
"""

from __future__ import annotations

from dataclasses import dataclass

from cloudlm.core.errors import BadSetting, ContextLengthExceeded, InvalidRequest


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine can hold. Lengths and budgets are in tokens."""

    max_model_len: int
    block_size: int
    blocks_total: int
    max_batch_tokens: int
    max_batch_sequences: int

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value < 1:
                hint = "; raise kv_cache_mb" if name == "blocks_total" else ""
                raise BadSetting(f"{name} = {value} must be at least 1{hint}", param=name)

    @property
    def cache_tokens(self) -> int:
        return self.blocks_total * self.block_size

    def total_tokens(self, prompt_tokens: int, max_tokens: int | None) -> int:
        """The longest that a sequence may become, prompt and answer together, tokens.

        Without ``max_tokens`` it may grow until context or cache end. Raises InvalidRequest
        (``max_tokens`` is negative) and ContextLengthExceeded (the prompt leaves no room in the
        context, or prompt and answer could outgrow the whole cache).
        """
        if max_tokens is not None and max_tokens < 0:
            raise InvalidRequest(
                f"max_tokens = {max_tokens} must not be negative", param="max_tokens"
            )
        least = prompt_tokens + (0 if max_tokens == 0 else 1)
        if least > self.max_model_len:
            raise ContextLengthExceeded(
                f"this model's context is {self.max_model_len} tokens, but the prompt alone has "
                f"{prompt_tokens} and an answer needs at least {least - prompt_tokens} more; "
                "shorten the prompt"
            )
        if max_tokens is None:
            total = min(self.max_model_len, max(self.cache_tokens, least))
        else:
            total = min(self.max_model_len, prompt_tokens + max_tokens)
        if total > self.cache_tokens:
            raise ContextLengthExceeded(
                f"prompt ({prompt_tokens} tokens) and answer may need {total} tokens together, but "
                f"this server's key-value cache holds {self.cache_tokens}; shorten the prompt, "
                "lower max_tokens, or give the server a larger kv_cache_mb",
                param="max_tokens" if least <= self.cache_tokens else None,
            )
        return total
