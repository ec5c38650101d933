"""Reading requests at the edge: every field checked, with hard caps, before anything else happens.

Gateway and worker use the same functions, so that a request which passes one is not refused by the
other for its form. Limits that depend on the model (context, vocabulary) are the worker's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from cloudlm.core.chat import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Message,
    Sampling,
    StreamOptions,
)
from cloudlm.core.errors import InvalidRequest, NotSupported
from cloudlm.core.fields import check_flag, check_integer, check_number, check_text, shown
from cloudlm.core.request_format import parse_constraint
from cloudlm.core.request_tools import message_extras, parse_tool_use

MAX_DEPTH = 32
MAX_CONTAINERS = 32_768
MAX_STRINGS = 131_072
MAX_MESSAGES = 2048
MAX_PROMPTS = 64
MAX_INPUTS = 2048
MAX_DIMENSIONS = 65_536
MAX_PROMPT_TOKENS = 1_000_000
MAX_TOKENS = 1_000_000
MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_LOGIT_BIASES = 1024
MAX_TOKEN_ID = 2**31 - 1
MAX_NAME_CHARACTERS = 256
MAX_PRIORITY = 100
ROLES = ("system", "developer", "user", "assistant", "tool")

_ABSENT: Any = object()
# Possessive and with an optional end, so that it runs in linear time over any bytes.
_JSON_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)


def decode_body(raw: bytes) -> dict[str, Any]:
    """The JSON object in ``raw``. Raises InvalidRequest for anything else."""
    _check_size(raw)
    try:
        body = msgspec.json.decode(raw)
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {str(error)[:200]}") from None
    except (UnicodeDecodeError, ValueError):
        raise InvalidRequest("the body is not valid UTF-8 JSON") from None
    except RecursionError:
        raise InvalidRequest(f"the JSON is nested deeper than {MAX_DEPTH} levels") from None
    if not isinstance(body, dict):
        raise InvalidRequest("the body must be a JSON object")
    _check_depth(body)
    return body


def _check_size(raw: bytes) -> None:
    """Refuse a flood of little texts, objects or lists before it is decoded: a few megabytes of
    them would hold up everybody else for a second."""
    if raw.count(b'"') - raw.count(b'\\"') > 2 * MAX_STRINGS:
        raise InvalidRequest(f"the body holds more than {MAX_STRINGS} texts")
    if raw.count(b"[") + raw.count(b"{") <= MAX_CONTAINERS:
        return
    bare = _JSON_STRING.sub(b"", raw)  # brackets inside texts do not count
    if bare.count(b"[") + bare.count(b"{") > MAX_CONTAINERS:
        raise InvalidRequest(f"the body holds more than {MAX_CONTAINERS} objects and lists")


def _check_depth(body: dict[str, Any]) -> None:
    level: list[Any] = [body]
    for _ in range(MAX_DEPTH):
        deeper: list[Any] = []
        for value in level:
            inner = value.values() if isinstance(value, dict) else value
            deeper.extend([v for v in inner if type(v) is dict or type(v) is list])
        if not deeper:
            return
        level = deeper
    raise InvalidRequest(f"the JSON is nested deeper than {MAX_DEPTH} levels")


def parse_chat(body: Mapping[str, Any]) -> ChatRequest:
    """A ``/v1/chat/completions`` body. Raises InvalidRequest with the field in ``param``."""
    _refuse_unsupported(body)
    limit = _integer(body, "max_completion_tokens", None, 1, MAX_TOKENS)
    if limit is None:
        limit = _integer(body, "max_tokens", None, 1, MAX_TOKENS)
    wants_logprobs = _boolean(body, "logprobs", False)
    top = _integer(body, "top_logprobs", None, 0, MAX_TOP_LOGPROBS)
    if top is not None and not wants_logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    stream = _boolean(body, "stream", False)
    return ChatRequest(
        model=_model(body),
        messages=_messages(body),
        sampling=_sampling(body, limit, (top or 0) if wants_logprobs else None),
        n=_integer(body, "n", 1, 1, MAX_CHOICES) or 1,
        stream=stream,
        stream_options=_stream_options(body, stream),
        user=_text(body, "user", None, MAX_NAME_CHARACTERS),
        tool_use=parse_tool_use(body),
    )


def parse_completion(body: Mapping[str, Any]) -> CompletionRequest:
    """A ``/v1/completions`` body. Raises InvalidRequest with the field in ``param``."""
    if body.get("suffix"):
        raise NotSupported("suffix is not supported", param="suffix")
    n = _integer(body, "n", 1, 1, MAX_CHOICES) or 1
    if _integer(body, "best_of", n, 1, MAX_CHOICES) != n:
        raise NotSupported("best_of other than n is not supported", param="best_of")
    stream = _boolean(body, "stream", False)
    logprobs = _integer(body, "logprobs", None, 0, MAX_TOP_LOGPROBS)
    return CompletionRequest(
        model=_model(body),
        prompts=_texts_or_ids(body, "prompt", MAX_PROMPTS),
        sampling=_sampling(body, _integer(body, "max_tokens", 16, 1, MAX_TOKENS), logprobs),
        n=n,
        stream=stream,
        stream_options=_stream_options(body, stream),
        echo=_boolean(body, "echo", False),
        user=_text(body, "user", None, MAX_NAME_CHARACTERS),
    )


def parse_embedding(body: Mapping[str, Any]) -> EmbeddingRequest:
    """A ``/v1/embeddings`` body. Raises InvalidRequest with the field in ``param``."""
    encoding = _text(body, "encoding_format", "float", 20)
    if encoding not in ("float", "base64"):
        raise InvalidRequest(
            f"encoding_format must be float or base64, not {shown(encoding)}",
            param="encoding_format",
        )
    return EmbeddingRequest(
        model=_model(body),
        inputs=_texts_or_ids(body, "input", MAX_INPUTS),
        dimensions=_integer(body, "dimensions", None, 1, MAX_DIMENSIONS),
        base64=encoding == "base64",
        user=_text(body, "user", None, MAX_NAME_CHARACTERS),
    )


def parse_sampling(body: Mapping[str, Any]) -> Sampling:
    """The sampling fields of an internal request, named as in ``Sampling``."""
    logprobs = _integer(body, "logprobs", None, 0, MAX_TOP_LOGPROBS)
    return _sampling(body, _integer(body, "max_tokens", None, 1, MAX_TOKENS), logprobs)


def read_priority(body: Mapping[str, Any]) -> int:
    """``priority``, vLLM's field: a *lower* number goes first, 0 is usual. What is beyond
    MAX_PRIORITY counts as that. Raises InvalidRequest if it is no whole number."""
    value = _integer(body, "priority", 0, -(2**63), 2**63 - 1) or 0
    return max(-MAX_PRIORITY, min(value, MAX_PRIORITY))


def token_ids(value: Any, param: str) -> tuple[int, ...]:
    """A list of token ids. Raises InvalidRequest naming the first bad one."""
    if not isinstance(value, list) or len(value) > MAX_PROMPT_TOKENS:
        raise InvalidRequest(
            f"{param} must be a list of at most {MAX_PROMPT_TOKENS} token ids", param=param
        )
    for item in value:
        if type(item) is not int or not 0 <= item <= MAX_TOKEN_ID:
            raise InvalidRequest(f"{param} holds {item!r:.40}, which is no token id", param=param)
    return tuple(value)


def _sampling(body: Mapping[str, Any], limit: int | None, logprobs: int | None) -> Sampling:
    return Sampling(
        max_tokens=limit,
        temperature=_number(body, "temperature", 1.0, 0.0, 2.0),
        top_p=_number(body, "top_p", 1.0, 0.0, 1.0, above=True),
        top_k=_top_k(body),
        min_p=_number(body, "min_p", 0.0, 0.0, 1.0),
        repetition_penalty=_number(body, "repetition_penalty", 1.0, 0.0, 10.0, above=True),
        presence_penalty=_number(body, "presence_penalty", 0.0, -2.0, 2.0),
        frequency_penalty=_number(body, "frequency_penalty", 0.0, -2.0, 2.0),
        logit_bias=_logit_bias(body),
        seed=_integer(body, "seed", None, -(2**63), 2**63 - 1),
        stop=_stop(body),
        stop_token_ids=_stop_token_ids(body),
        ignore_eos=_boolean(body, "ignore_eos", False),
        logprobs=logprobs,
        constraint=parse_constraint(body),
    )


def _top_k(body: Mapping[str, Any]) -> int:
    """0 and -1 both mean all tokens, as users of vLLM write it."""
    top_k = _integer(body, "top_k", 0, -1, MAX_TOKEN_ID)
    return max(top_k or 0, 0)


def _given(body: Mapping[str, Any], name: str) -> Any:
    """The field's value; absent and null are the same, as in OpenAI's API."""
    value = body.get(name)
    return _ABSENT if value is None else value


def _number(
    body: Mapping[str, Any],
    name: str,
    default: float,
    low: float,
    high: float,
    *,
    above: bool = False,
) -> float:
    value = _given(body, name)
    return default if value is _ABSENT else check_number(value, name, low, high, above=above)


def _integer(
    body: Mapping[str, Any], name: str, default: int | None, low: int, high: int
) -> int | None:
    """3.0 is a whole number too: some languages have but one kind."""
    value = _given(body, name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return default if value is _ABSENT else check_integer(value, name, low, high)


def _boolean(body: Mapping[str, Any], name: str, default: bool) -> bool:
    value = _given(body, name)
    return default if value is _ABSENT else check_flag(value, name)


def _text(body: Mapping[str, Any], name: str, default: str | None, longest: int) -> str | None:
    value = _given(body, name)
    return default if value is _ABSENT else check_text(value, name, max_length=longest)


def _model(body: Mapping[str, Any]) -> str:
    name = _text(body, "model", None, MAX_NAME_CHARACTERS)
    if not name:
        raise InvalidRequest("model is required: the name of a deployed model", param="model")
    return name


def _messages(body: Mapping[str, Any]) -> tuple[Message, ...]:
    value = _given(body, "messages")
    if not isinstance(value, list) or not value or len(value) > MAX_MESSAGES:
        raise InvalidRequest(
            f"messages must be a list of 1 to {MAX_MESSAGES} messages", param="messages"
        )
    return tuple(_message(item, f"messages[{number}]") for number, item in enumerate(value))


def _message(item: Any, param: str) -> Message:
    if not isinstance(item, dict):
        raise InvalidRequest(f"{param} must be an object with role and content", param=param)
    role = item.get("role")
    if role not in ROLES:
        raise InvalidRequest(
            f"{param}.role must be one of {', '.join(ROLES)}, not {shown(role)}",
            param=f"{param}.role",
        )
    name = item.get("name")
    if name is not None and (not isinstance(name, str) or len(name) > MAX_NAME_CHARACTERS):
        raise InvalidRequest(f"{param}.name must be a short text", param=f"{param}.name")
    content = _content(item.get("content"), f"{param}.content")
    return Message(role, content, name, **message_extras(item, role, param))


def _content(value: Any, param: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return _clean(value, param)
    if not isinstance(value, list):
        raise InvalidRequest(f"{param} must be a text or a list of text parts", param=param)
    texts: list[str] = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise NotSupported(
                f"{param} holds a part of type {shown(kind)}; only text is supported", param=param
            )
        text = part.get("text")
        if not isinstance(text, str):
            raise InvalidRequest(f"{param} holds a text part without text", param=param)
        texts.append(_clean(text, param))
    return "".join(texts)


def _clean(text: str, param: str) -> str:
    """Refuse lone surrogates, which no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"{param} is not valid Unicode text", param=param) from None
    return text


def _texts_or_ids(
    body: Mapping[str, Any], name: str, most: int
) -> tuple[str | tuple[int, ...], ...]:
    """One text, one list of token ids, or a list of up to ``most`` of either."""
    value = _given(body, name)
    if isinstance(value, str):
        return (_clean(value, name),)
    if not isinstance(value, list) or not value:
        raise InvalidRequest(
            f"{name} must be a text, a list of texts, a list of token ids or a list of such lists",
            param=name,
        )
    if type(value[0]) is int:
        return (token_ids(value, name),)
    if len(value) > most:
        raise InvalidRequest(f"{name} may hold at most {most} {name}s", param=name)
    return tuple(
        _clean(item, name) if isinstance(item, str) else token_ids(item, name) for item in value
    )


def _stop(body: Mapping[str, Any]) -> tuple[str, ...]:
    value = _given(body, "stop")
    if value is _ABSENT:
        return ()
    stops = [value] if isinstance(value, str) else value
    good = isinstance(stops, list) and len(stops) <= MAX_STOPS
    if not good or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_CHARACTERS for s in stops):
        raise InvalidRequest(
            f"stop must be a text or a list of at most {MAX_STOPS} texts of 1 to "
            f"{MAX_STOP_CHARACTERS} characters",
            param="stop",
        )
    return tuple(_clean(stop, "stop") for stop in stops)


def _stop_token_ids(body: Mapping[str, Any]) -> tuple[int, ...]:
    value = _given(body, "stop_token_ids")
    ids = () if value is _ABSENT else token_ids(value, "stop_token_ids")
    if len(ids) > MAX_STOPS:
        raise InvalidRequest(
            f"stop_token_ids may hold at most {MAX_STOPS} ids", param="stop_token_ids"
        )
    return ids


def _logit_bias(body: Mapping[str, Any]) -> dict[int, float]:
    value = _given(body, "logit_bias")
    if value is _ABSENT:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_LOGIT_BIASES:
        raise InvalidRequest(
            f"logit_bias must be an object of at most {MAX_LOGIT_BIASES} token ids",
            param="logit_bias",
        )
    biases: dict[int, float] = {}
    for key, bias in value.items():
        number = isinstance(bias, int | float) and not isinstance(bias, bool)
        plain_id = key.isascii() and key.isdigit() and len(key) <= 10 and int(key) <= MAX_TOKEN_ID
        if not plain_id or not number or not -100 <= bias <= 100:
            raise InvalidRequest(
                f"logit_bias[{shown(key)}] must map a token id to a number from -100 to 100",
                param="logit_bias",
            )
        biases[int(key)] = float(bias)
    return biases


def _stream_options(body: Mapping[str, Any], stream: bool) -> StreamOptions:
    value = _given(body, "stream_options")
    if value is _ABSENT:
        return StreamOptions()
    if not isinstance(value, dict):
        raise InvalidRequest("stream_options must be an object", param="stream_options")
    if not stream:
        raise InvalidRequest("stream_options needs stream: true", param="stream_options")
    return StreamOptions(
        include_usage=_boolean(value, "include_usage", False),
        continuous_usage_stats=_boolean(value, "continuous_usage_stats", False),
    )


def _refuse_unsupported(body: Mapping[str, Any]) -> None:
    for name, instead in (("functions", "tools"), ("function_call", "tool_choice"), ("audio", "")):
        if body.get(name) not in (None, [], {}, "none", "auto"):
            hint = f"; use {instead}" if instead else ""
            raise NotSupported(f"{name} is not supported by this server{hint}", param=name)
