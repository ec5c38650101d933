"""Checks a request against the loaded model and makes its sequence.

The runner trusts what passes here: one wrong token id would stop it for everybody. Field syntax is
checked at the edge (``core.requests``); only what needs the model is checked here.
"""

from __future__ import annotations

from collections.abc import Collection

from cloudlm.core.chat import Sampling
from cloudlm.core.errors import InvalidRequest
from cloudlm.core.tenant import MAX_WEIGHT, MIN_WEIGHT
from cloudlm.engine.api import EmbedRequest, EngineInfo, GenerateRequest
from cloudlm.engine.limits import Limits
from cloudlm.engine.sequence import Sequence
from cloudlm.engine.step import Pooling


def sequence_for(
    request: GenerateRequest,
    sequence_id: int,
    info: EngineInfo,
    limits: Limits,
    adapter: str = "",
) -> Sequence:
    """The sequence that the request asks for; ``adapter`` is the runner's key of its adapter.

    Raises InvalidRequest (empty prompt, unknown token id, too many logprobs, negative max_tokens,
    more tokens to resume from than the answer may have, a weight that is none) and
    ContextLengthExceeded (see ``Limits.total_tokens``).
    """
    sampling = request.sampling
    if not request.prompt_token_ids:
        raise InvalidRequest("the prompt is empty: it needs at least one token", param="prompt")
    check_token_ids(request.prompt_token_ids, info.vocab_size, "prompt")
    check_token_ids(request.output_token_ids, info.vocab_size, "output_token_ids")
    check_token_ids(sampling.logit_bias, info.vocab_size, "logit_bias")
    if sampling.logprobs is not None and not 0 <= sampling.logprobs <= info.vocab_size:
        raise InvalidRequest(
            f"logprobs = {sampling.logprobs} must be from 0 to {info.vocab_size}, the number of "
            "this model's tokens",
            param="logprobs",
        )
    _check_weight(request.weight)
    total_tokens = limits.total_tokens(len(request.prompt_token_ids), sampling.max_tokens)
    room = total_tokens - len(request.prompt_token_ids)
    if len(request.output_token_ids) > room:
        raise InvalidRequest(
            f"output_token_ids: {len(request.output_token_ids)} tokens to resume from, but the "
            f"whole answer may have {room}; raise max_tokens or resume from fewer",
            param="output_token_ids",
        )
    end_token_ids = set(sampling.stop_token_ids)
    if not sampling.ignore_eos:
        end_token_ids.update(info.eos_token_ids)
    return Sequence(
        sequence_id=sequence_id,
        request_id=request.request_id,
        prompt=tuple(request.prompt_token_ids),
        outputs=list(request.output_token_ids),
        sampling=sampling,
        token_limit=total_tokens,
        end_token_ids=frozenset(end_token_ids),
        salt=request.cache_salt,
        index=request.index,
        prompt_logprobs=request.prompt_logprobs,
        adapter=adapter,
        tenant=request.tenant,
        priority=request.priority,
        weight=request.weight,
    )


def sequence_to_embed(
    request: EmbedRequest,
    sequence_id: int,
    pooling: Pooling,
    info: EngineInfo,
    limits: Limits,
    adapter: str = "",
) -> Sequence:
    """The sequence that computes the prompt and nothing more.

    Raises InvalidRequest (empty input, unknown token id, a weight that is none) and
    ContextLengthExceeded.
    """
    if not request.prompt_token_ids:
        raise InvalidRequest("the input is empty: it needs at least one token", param="input")
    check_token_ids(request.prompt_token_ids, info.vocab_size, "input")
    _check_weight(request.weight)
    total_tokens = limits.total_tokens(len(request.prompt_token_ids), 0)
    return Sequence(
        sequence_id=sequence_id,
        request_id=request.request_id,
        prompt=tuple(request.prompt_token_ids),
        sampling=Sampling(max_tokens=0),
        token_limit=total_tokens,
        salt=request.cache_salt,
        pooling=pooling,
        adapter=adapter,
        tenant=request.tenant,
        priority=request.priority,
        weight=request.weight,
    )


def _check_weight(weight: float) -> None:
    if not MIN_WEIGHT <= weight <= MAX_WEIGHT:
        raise InvalidRequest(
            f"weight = {weight} must be from {MIN_WEIGHT} to {MAX_WEIGHT}", param="weight"
        )


def check_token_ids(token_ids: Collection[int], vocab_size: int, param: str) -> None:
    """Raise InvalidRequest for an id outside the vocabulary."""
    for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"{param}: token id {token_id} does not exist; this model's ids go from 0 to "
                f"{vocab_size - 1}",
                param=param,
            )
