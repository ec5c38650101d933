"""The gateway's OpenAPI document: every route of inference, as the matrix of rights knows them.

What must be in a body is said; the rest of each dialect is that dialect's own documentation. Must
not decide what a route does.
"""

from __future__ import annotations

import re
from typing import Any

from cloudlm import __version__
from cloudlm.security.matrix import ROWS, Holder, Server

PATH = "/openapi.json"
_TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
_TEXTS: dict[str, Any] = {"type": "array", "items": _TEXT, "minItems": 1}
_COUNT: dict[str, Any] = {"type": "integer", "minimum": 1}
_TEMPERATURE: dict[str, Any] = {"type": "number", "minimum": 0, "maximum": 2}
_MESSAGES: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "properties": {
            "role": {"enum": ["system", "user", "assistant"]},
            "content": {"type": "string"},
        },
    },
}
_TEXT_OR_TEXTS: dict[str, Any] = {"anyOf": [_TEXT, _TEXTS]}
_INSTANCES: dict[str, Any] = {"type": "array", "minItems": 1, "items": {}}
_OPTIONS: dict[str, Any] = {"type": "object"}
_STREAM: dict[str, Any] = {"type": "boolean", "default": False}


def _body(required: str, **fields: Any) -> dict[str, Any]:
    return {"type": "object", "required": required.split(), "properties": fields}


_BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": _body(
        "model messages",
        model=_TEXT,
        messages=_MESSAGES,
        max_tokens=_COUNT,
        temperature=_TEMPERATURE,
        stream=_STREAM,
    ),
    "/v1/completions": _body(
        "model prompt",
        model=_TEXT,
        prompt=_TEXT_OR_TEXTS,
        max_tokens=_COUNT,
        temperature=_TEMPERATURE,
        stream=_STREAM,
    ),
    "/v1/embeddings": _body("model input", model=_TEXT, input=_TEXT_OR_TEXTS),
    "/v1/responses": _body(
        "model input",
        model=_TEXT,
        input=_TEXT,
        max_output_tokens=_COUNT,
        temperature=_TEMPERATURE,
        stream=_STREAM,
    ),
    "/v1/messages": _body(
        "model messages max_tokens",
        model=_TEXT,
        messages=_MESSAGES,
        max_tokens=_COUNT,
        stream=_STREAM,
    ),
    "/v1/messages/count_tokens": _body("model messages", model=_TEXT, messages=_MESSAGES),
    "/tokenize": _body("model prompt", model=_TEXT, prompt=_TEXT),
    "/detokenize": _body(
        "model tokens", model=_TEXT, tokens={"type": "array", "items": {"type": "integer"}}
    ),
    "/api/chat": _body("model messages", model=_TEXT, messages=_MESSAGES, options=_OPTIONS),
    "/api/generate": _body("model prompt", model=_TEXT, prompt=_TEXT, options=_OPTIONS),
    "/api/embed": _body("model input", model=_TEXT, input=_TEXT_OR_TEXTS),
    "/api/embeddings": _body("model prompt", model=_TEXT, prompt=_TEXT),
    "/api/show": _body("model", model=_TEXT),
    "/": _body("inputs", inputs=_TEXT, parameters=_OPTIONS, stream=_STREAM),
    "/generate": _body("inputs", inputs=_TEXT, parameters=_OPTIONS),
    "/generate_stream": _body("inputs", inputs=_TEXT, parameters=_OPTIONS),
    "/invocations": _body("inputs", inputs=_TEXT, parameters=_OPTIONS),
    "/v1/models/{name}:predict": _body("instances", instances=_INSTANCES),
    "/v2/models/{name}/infer": _body("inputs", inputs=_INSTANCES),
    "/predictions/{name}": {},
}
_FAULT: dict[str, Any] = {
    "description": "What is wrong, in the dialect's own form",
    "content": {"application/json": {"schema": {"type": "object"}}},
}


def document() -> dict[str, Any]:
    """The document, OpenAPI 3.1."""
    paths: dict[str, dict[str, Any]] = {}
    for row in ROWS:
        if row.server is Server.GATEWAY and row.path != PATH:
            keyed = row.holder is not Holder.OPEN
            paths.setdefault(row.path, {})[row.method.lower()] = _operation(row.path, keyed)
    return {
        "openapi": "3.1.0",
        "info": {"title": "cloudlm gateway", "version": __version__},
        "paths": paths,
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            }
        },
    }


def _operation(path: str, keyed: bool) -> dict[str, Any]:
    said: dict[str, Any] = {"responses": {"200": {"description": "The answer"}}}
    if keyed:
        said["security"] = [{"bearer": []}, {"key": []}]
        said["responses"]["default"] = _FAULT
    names = re.findall(r"\{([a-z_]+)\}", path)
    if names:
        said["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": _TEXT} for name in names
        ]
    if path in _BODIES:
        content = {"application/json": {"schema": _BODIES[path]}}
        said["requestBody"] = {"required": True, "content": content}
    return said
