"""``/v1/embeddings``: texts to requests for the engine, and its vectors to OpenAI's answer.

Must not know HTTP. ``dimensions`` cuts a vector and gives it length 1 again; models that were
trained for it keep their meaning (Kusupati et al., "Matryoshka Representation Learning", 2022).
"""

from __future__ import annotations

import base64
import math
import sys
from array import array
from collections.abc import Sequence

import msgspec

from cloudlm.core.chat import EmbeddingRequest
from cloudlm.core.errors import ContextLengthExceeded, InvalidRequest
from cloudlm.engine.api import Embedding, EmbedRequest
from cloudlm.worker.prepare import prompt_token_ids
from cloudlm.worker.serving import Serving, new_id
from cloudlm.worker.sharing import Share

MAX_NUMBERS_AS_TEXT = 2_500_000
MAX_NUMBERS_AS_BASE64 = 10_000_000  # either is an answer of some 50 MB


def prepare_embedding(
    serving: Serving, request: EmbeddingRequest, salt: str, share: Share
) -> tuple[EmbedRequest, ...]:
    """One request per input, all of one share. Raises InvalidRequest and ContextLengthExceeded."""
    adapter = serving.check_model(request.model)
    _check_size(request, serving.info.hidden_size)
    request_id = new_id("embd")
    longest = serving.info.max_model_len
    made: list[EmbedRequest] = []
    for number, given in enumerate(request.inputs):
        token_ids = prompt_token_ids(serving, given, "input")
        if len(token_ids) > longest:
            raise ContextLengthExceeded(
                f"input {number} has {len(token_ids)} tokens, but this model's context is "
                f"{longest}; shorten it",
                param="input",
            )
        made.append(
            EmbedRequest(
                request_id,
                token_ids,
                salt,
                adapter,
                tenant=share.tenant,
                priority=share.priority,
                weight=share.weight,
            )
        )
    return tuple(made)


def _check_size(request: EmbeddingRequest, hidden_size: int) -> None:
    if request.dimensions is not None and request.dimensions > hidden_size:
        raise InvalidRequest(
            f"dimensions = {request.dimensions}, but this model's embeddings have {hidden_size}",
            param="dimensions",
        )
    numbers = len(request.inputs) * (request.dimensions or hidden_size)
    limit = MAX_NUMBERS_AS_BASE64 if request.base64 else MAX_NUMBERS_AS_TEXT
    if numbers > limit:
        hint = "" if request.base64 else " or ask for encoding_format base64"
        raise InvalidRequest(
            f"{len(request.inputs)} inputs would be answered with {numbers} numbers, more than the "
            f"{limit} that fit one answer; send fewer inputs at a time{hint}",
            param="input",
        )


def embedding_answer(request: EmbeddingRequest, embeddings: Sequence[Embedding]) -> bytes:
    """The ``list`` object as JSON."""
    tokens = sum(one.prompt_tokens for one in embeddings)
    cached = sum(one.cached_tokens for one in embeddings)
    body = {
        "object": "list",
        "model": request.model,
        "data": [
            {"object": "embedding", "index": number, "embedding": _shaped(one.values, request)}
            for number, one in enumerate(embeddings)
        ],
        "usage": {
            "prompt_tokens": tokens,
            "total_tokens": tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        },
    }
    return msgspec.json.encode(body)


def _shaped(values: array[float], request: EmbeddingRequest) -> str | list[float]:
    if request.dimensions is not None and request.dimensions < len(values):
        values = shortened(values, request.dimensions)
    if not request.base64:
        return values.tolist()
    if sys.byteorder == "big":
        values = values[:]
        values.byteswap()
    return base64.b64encode(values.tobytes()).decode("ascii")


def shortened(values: array[float], dimensions: int) -> array[float]:
    """The first ``dimensions`` numbers, scaled to length 1."""
    part = values[:dimensions]
    length = math.hypot(*part) or 1.0
    return array("f", [value / length for value in part])
