"""Says an answer as a response object of OpenAI's Responses API: whole, or as its events.

The output is a list of items (reasoning, message, function calls); in a stream one item is open at
a time. Must not read requests.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec

from cloudlm.core.chat import Usage
from cloudlm.core.errors import CloudlmError
from cloudlm.gateway.dialects import openai
from cloudlm.gateway.dialects.base import EVENT_STREAM
from cloudlm.gateway.dialects.heard import CallPart, Heard, heard
from cloudlm.gateway.exchange import unique
from cloudlm.gateway.sse import event


class ResponseRendering:
    """Says one response. ``echoed`` are the request's fields that a response repeats."""

    stream_type = EVENT_STREAM

    def __init__(self, model: str, echoed: dict[str, Any]) -> None:
        self._model = model
        self._echoed = echoed
        self._id = f"resp_{unique()}"
        self._created_at = int(time.time())
        self._number = 0
        self._items: list[dict[str, Any]] = []
        self._open: str | None = None
        self._parts: list[str] = []
        self._finish: str | None = None
        self._usage: Usage | None = None

    def whole(self, body: dict[str, Any]) -> bytes:
        self._take_usage(body)
        self._said(heard(body), body_is_whole=True)
        return msgspec.json.encode(self._ended())

    def chunk(self, chunk: dict[str, Any]) -> bytes:
        self._take_usage(chunk)
        out = b""
        if self._number == 0:
            head = {"response": self._response("in_progress", None)}
            out += self._event("response.created", head) + self._event("response.in_progress", head)
        return out + self._said(heard(chunk), body_is_whole=False)

    def done(self) -> bytes:
        out = b""
        if not self._items:  # an empty answer is still a message
            out += self._begin("message")
        out += self._close()
        response = self._ended()
        return out + self._event(f"response.{response['status']}", {"response": response})

    def error(self, error: CloudlmError) -> bytes:
        failed = self._response("failed", None)
        failed["error"] = {"code": "server_error", "message": error.message}
        return self._event("response.failed", {"response": failed})

    def _take_usage(self, body: dict[str, Any]) -> None:
        self._usage = openai.usage_of(body) or self._usage

    def _said(self, said: Heard, *, body_is_whole: bool) -> bytes:
        out = b""
        if said.reasoning:
            out += self._begin("reasoning") + self._more(said.reasoning)
        if said.text or (body_is_whole and not said.calls):
            out += self._begin("message") + self._more(said.text)
        for call in said.calls:
            out += self._begin(f"call {call.index}", call)
            if call.arguments:
                out += self._more(call.arguments)
        self._finish = said.finish or self._finish
        return out + (self._close() if body_is_whole else b"")

    # Items ----------------------------------------------------------------------------------------

    def _begin(self, key: str, call: CallPart | None = None) -> bytes:
        """Open the item of that key, unless it is open."""
        if self._open == key:
            return b""
        out = self._close()
        self._open, self._parts = key, []
        item = _item(key, call)
        self._items.append(item)
        out += self._event("response.output_item.added", {**self._place(), "item": item})
        if item["type"] != "function_call":
            out += self._event("response.content_part.added", self._part(""))
        return out

    def _more(self, text: str) -> bytes:
        self._parts.append(text)
        where = self._where()
        return self._event(f"response.{self._word()}.delta", {**where, "delta": text})

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        item, text = self._items[-1], "".join(self._parts)
        word, where = self._word(), self._where()
        item["status"] = "completed"
        if item["type"] == "function_call":
            item["arguments"] = text
            done = {"arguments": text, "name": item["name"]}
            out = self._event(f"response.{word}.done", {**where, **done})
        else:
            part = self._part(text)
            item["content"] = [part["part"]]
            out = self._event(f"response.{word}.done", {**where, "text": text})
            out += self._event("response.content_part.done", part)
        out += self._event("response.output_item.done", {**self._place(), "item": item})
        self._open = None
        return out

    def _word(self) -> str:
        kinds = {"reasoning": "reasoning_text", "message": "output_text"}
        return kinds.get(self._items[-1]["type"], "function_call_arguments")

    def _place(self) -> dict[str, Any]:
        return {"output_index": len(self._items) - 1}

    def _where(self) -> dict[str, Any]:
        where = {**self._place(), "item_id": self._items[-1]["id"]}
        if self._items[-1]["type"] != "function_call":
            where["content_index"] = 0
        if self._items[-1]["type"] == "message":
            where["logprobs"] = []
        return where

    def _part(self, text: str) -> dict[str, Any]:
        part: dict[str, Any] = {"type": self._word(), "text": text}
        if part["type"] == "output_text":
            part |= {"annotations": [], "logprobs": []}
        place = {**self._place(), "item_id": self._items[-1]["id"], "content_index": 0}
        return {**place, "part": part}

    # The response ---------------------------------------------------------------------------------

    def _ended(self) -> dict[str, Any]:
        cut = self._finish == "length"
        response = self._response("incomplete" if cut else "completed", self._usage)
        if cut:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
            self._items[-1]["status"] = "incomplete"
        else:
            response["completed_at"] = int(time.time())
        return response

    def _response(self, status: str, usage: Usage | None) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created_at,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": self._model,
            "output": self._items if status != "in_progress" else [],
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
            **self._echoed,
        }

    def _event(self, kind: str, fields: dict[str, Any]) -> bytes:
        body = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return b"event: " + kind.encode() + b"\n" + event(msgspec.json.encode(body))


def _item(key: str, call: CallPart | None) -> dict[str, Any]:
    if call is not None:
        return {
            "id": f"fc_{unique()}",
            "type": "function_call",
            "status": "in_progress",
            "call_id": call.id,
            "name": call.name,
            "arguments": "",
        }
    if key == "reasoning":
        head: dict[str, Any] = {"id": f"rs_{unique()}", "type": "reasoning", "summary": []}
    else:
        head = {"id": f"msg_{unique()}", "type": "message", "role": "assistant"}
    return {**head, "status": "in_progress", "content": []}


def _usage(usage: Usage) -> dict[str, Any]:
    """The replica does not tell reasoning apart, so its tokens are among the others."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
