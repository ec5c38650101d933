"""Says an answer as an Anthropic message: whole, or as its sequence of named events.

A message is a list of blocks (thinking, text, tool use); in a stream one block is open at a time.
Must not read requests.
"""

from __future__ import annotations

from typing import Any

import msgspec

from cloudlm.core.chat import Usage
from cloudlm.core.errors import CloudlmError
from cloudlm.gateway.account import status_of
from cloudlm.gateway.dialects import openai
from cloudlm.gateway.dialects.base import EVENT_STREAM
from cloudlm.gateway.dialects.heard import Heard, heard
from cloudlm.gateway.exchange import unique
from cloudlm.gateway.sse import event

_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}
_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_body(error: CloudlmError) -> dict[str, Any]:
    """An error in Anthropic's shape."""
    status = status_of(error)
    other = "invalid_request_error" if status < 500 or status == 501 else "api_error"
    kind = _ERROR_TYPES.get(status, other)
    return {"type": "error", "error": {"type": kind, "message": error.message}}


class MessageRendering:
    """Says one message. ``thinks``: the client wants to see the reasoning."""

    stream_type = EVENT_STREAM

    def __init__(self, model: str, thinks: bool) -> None:
        self._model = model
        self._thinks = thinks
        self._begun = False
        self._open: str | None = None
        self._index = -1
        self._finish = Heard()
        self._usage = Usage()

    def whole(self, body: dict[str, Any]) -> bytes:
        said = heard(body)
        content: list[dict[str, Any]] = []
        if said.reasoning and self._thinks:
            content.append({"type": "thinking", "thinking": said.reasoning, "signature": ""})
        if said.text or not (said.calls or content):
            content.append({"type": "text", "text": said.text})
        for call in said.calls:
            given = openai.decode(call.arguments.encode()) or {}
            content.append({"type": "tool_use", "id": call.id, "name": call.name, "input": given})
        message = self._message(openai.usage_of(body) or Usage())
        return msgspec.json.encode(message | {"content": content} | _ending(said))

    def chunk(self, chunk: dict[str, Any]) -> bytes:
        self._usage = openai.usage_of(chunk) or self._usage
        said = heard(chunk)
        out = b""
        if not self._begun:
            self._begun = True
            start = {"type": "message_start", "message": self._message(self._usage)}
            out += _named(start)
        if said.reasoning and self._thinks:
            out += self._block("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            out += self._delta({"type": "thinking_delta", "thinking": said.reasoning})
        if said.text:
            out += self._block("text", {"type": "text", "text": ""})
            out += self._delta({"type": "text_delta", "text": said.text})
        for call in said.calls:
            head = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
            out += self._block(f"call {call.index}", head)
            if call.arguments:
                out += self._delta({"type": "input_json_delta", "partial_json": call.arguments})
        if said.finish is not None:
            self._finish = said
        return out

    def done(self) -> bytes:
        out = b""
        if self._index < 0:  # an empty answer still has a block
            out += self._block("text", {"type": "text", "text": ""})
        out += self._close()
        delta = {
            "type": "message_delta",
            "delta": _ending(self._finish),
            "usage": _usage(self._usage),
        }
        return out + _named(delta) + _named({"type": "message_stop"})

    def error(self, error: CloudlmError) -> bytes:
        return _named(error_body(error))

    def _message(self, usage: Usage) -> dict[str, Any]:
        return {
            "id": f"msg_{unique()}",
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(usage),
        }

    def _block(self, key: str, head: dict[str, Any]) -> bytes:
        """Open the block of that key, unless it is open."""
        if self._open == key:
            return b""
        out = self._close()
        self._open = key
        self._index += 1
        start = {"type": "content_block_start", "index": self._index, "content_block": head}
        return out + _named(start)

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        return _named({"type": "content_block_stop", "index": self._index})

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _named({"type": "content_block_delta", "index": self._index, "delta": delta})


def _named(body: dict[str, Any]) -> bytes:
    kind: str = body["type"]
    return b"event: " + kind.encode() + b"\n" + event(msgspec.json.encode(body))


def _ending(said: Heard) -> dict[str, Any]:
    reason = _STOP_REASONS.get(said.finish or "", "end_turn")
    if said.finish == "stop" and said.stop is not None:
        reason = "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": said.stop}


def _usage(usage: Usage) -> dict[str, int]:
    """Anthropic counts tokens read from the cache apart from the other input."""
    return {
        "input_tokens": max(usage.prompt_tokens - usage.cached_tokens, 0),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
