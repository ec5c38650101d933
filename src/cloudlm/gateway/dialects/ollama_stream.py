"""Says an answer as Ollama does: one JSON object, or one per line while it is written.

Durations are the gateway's: whole is from the request's reading to its end, in nanoseconds. Must
not read requests.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec

from cloudlm.core.chat import Usage
from cloudlm.core.errors import CloudlmError, UpstreamFailed
from cloudlm.gateway.dialects import openai
from cloudlm.gateway.dialects.base import NDJSON
from cloudlm.gateway.dialects.heard import CallPart, Heard, heard, rfc3339


def error_body(error: CloudlmError) -> dict[str, Any]:
    """An error in Ollama's shape."""
    return {"error": error.message}


class Clocked:
    """When a request was read."""

    def __init__(self) -> None:
        self._began_ns = time.monotonic_ns()

    def durations(self) -> dict[str, int]:
        """How long it took so far; a deployment's model is loaded before it is asked."""
        return {"total_duration": time.monotonic_ns() - self._began_ns, "load_duration": 0}


class LineRendering:
    """Says one answer. ``said_in`` is where the text stands: ``message`` or ``response``."""

    stream_type = NDJSON

    def __init__(self, model: str, clocked: Clocked, said_in: str, thinks: bool) -> None:
        self._model = model
        self._clocked = clocked
        self._said_in = said_in
        self._thinks = thinks
        self._calls: dict[int, CallPart] = {}
        self._created: Any = 0
        self._finish: str | None = None
        self._usage = Usage()

    def whole(self, body: dict[str, Any]) -> bytes:
        self._take(body)
        said = heard(body)
        self._gather(said)
        self._finish = said.finish
        return msgspec.json.encode(self._line(said, self._calls_said()) | self._end())

    def chunk(self, chunk: dict[str, Any]) -> bytes:
        self._take(chunk)
        said = heard(chunk)
        self._gather(said)
        self._finish = said.finish or self._finish
        shown = said.text or (said.reasoning and self._thinks)
        return _encoded({**self._line(said), "done": False}) if shown else b""

    def done(self) -> bytes:
        """Calls are said whole, in a line of their own, once nothing can be added to them."""
        out = b""
        if self._calls:
            out = _encoded({**self._line(Heard(), self._calls_said()), "done": False})
        return out + _encoded(self._line(Heard()) | self._end())

    def error(self, error: CloudlmError) -> bytes:
        return _encoded(error_body(error))

    def _take(self, body: dict[str, Any]) -> None:
        self._created = body.get("created") or self._created
        self._usage = openai.usage_of(body) or self._usage

    def _gather(self, said: Heard) -> None:
        for part in said.calls:
            known = self._calls.get(part.index, CallPart(part.index, "", "", ""))
            self._calls[part.index] = CallPart(
                part.index,
                known.id or part.id,
                known.name or part.name,
                known.arguments + part.arguments,
            )

    def _calls_said(self) -> list[dict[str, Any]]:
        made = []
        for call in self._calls.values():
            arguments = openai.decode(call.arguments.encode()) or {}
            made.append({"function": {"name": call.name, "arguments": arguments}})
        return made

    def _line(self, said: Heard, calls: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        head = {"model": self._model, "created_at": rfc3339(self._created)}
        thought = {"thinking": said.reasoning} if said.reasoning and self._thinks else {}
        if self._said_in == "response":
            return {**head, "response": said.text, **thought}
        message = {"role": "assistant", "content": said.text, **thought}
        return {**head, "message": message | ({"tool_calls": calls} if calls else {})}

    def _end(self) -> dict[str, Any]:
        return {
            "done": True,
            "done_reason": "length" if self._finish == "length" else "stop",
            **self._clocked.durations(),
            "prompt_eval_count": self._usage.prompt_tokens,
            "eval_count": self._usage.completion_tokens,
        }


def embeddings(model: str, clocked: Clocked, older: bool, body: dict[str, Any]) -> dict[str, Any]:
    """Says embeddings. ``older``: as ``/api/embeddings``, which has only one."""
    vectors = openai.vectors_of(body)
    if older:
        if not vectors:
            raise UpstreamFailed("a replica sent no embedding")
        return {"embedding": vectors[0]}
    usage = openai.usage_of(body) or Usage()
    said = {"model": model, "embeddings": vectors, **clocked.durations()}
    return {**said, "prompt_eval_count": usage.prompt_tokens}


def _encoded(line: dict[str, Any]) -> bytes:
    return msgspec.json.encode(line) + b"\n"
