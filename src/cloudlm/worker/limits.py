"""The limits that depend on the loaded model: context length and vocabulary.

Pure. What can be judged without the model is judged by ``core.requests``.
"""

from __future__ import annotations

import os
from dataclasses import replace

from cloudlm.core.chat import Sampling
from cloudlm.core.errors import ContextLengthExceeded
from cloudlm.engine.api import EngineInfo
from cloudlm.engine.intake import check_token_ids


def room(prompt_tokens: int, max_tokens: int | None, max_model_len: int, param: str) -> int:
    """The answer's limit in tokens: what was asked, or all that the context leaves.

    Raises ContextLengthExceeded, naming the numbers, when prompt and answer do not fit together.
    """
    if prompt_tokens >= max_model_len:
        raise ContextLengthExceeded(
            f"the prompt has {prompt_tokens} tokens, but this model's context is {max_model_len} "
            "tokens for prompt and answer together; shorten the prompt",
            param=param,
        )
    if max_tokens is None:
        return max_model_len - prompt_tokens
    if prompt_tokens + max_tokens > max_model_len:
        raise ContextLengthExceeded(
            f"the prompt has {prompt_tokens} tokens and max_tokens asks for {max_tokens} more, "
            f"together {prompt_tokens + max_tokens}; this model's context is {max_model_len} "
            f"tokens: ask for at most {max_model_len - prompt_tokens}",
            param="max_tokens",
        )
    return max_tokens


def settle(sampling: Sampling, prompt_tokens: int, info: EngineInfo, param: str) -> Sampling:
    """``sampling`` with every open choice made: the token limit, and a random seed where a drawn
    answer was asked for without one. Raises InvalidRequest and ContextLengthExceeded."""
    check_token_ids(sampling.logit_bias, info.vocab_size, "logit_bias")
    check_token_ids(sampling.stop_token_ids, info.vocab_size, "stop_token_ids")
    limit = room(prompt_tokens, sampling.max_tokens, info.max_model_len, param)
    seed = sampling.seed
    if seed is None and sampling.temperature > 0:
        seed = int.from_bytes(os.urandom(8), "big") >> 1
    return replace(sampling, max_tokens=limit, seed=seed)
