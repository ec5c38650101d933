"""JSON schemas of request bodies, for the OpenAPI document. ``core.wire`` does the checking."""

from __future__ import annotations

from typing import Any

from cloudlm.core.spec import CLOUDLM, ENGINES

_TEXT: dict[str, Any] = {"type": "string"}
_COUNT: dict[str, Any] = {"type": "integer", "minimum": 1, "maximum": 1000}

SPEC: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["model"],
    "properties": {
        "name": {"type": "string", "description": "API name; may be left out if in the path."},
        "model": {"type": "string", "examples": ["models:/bank/3", "models:/bank@champion"]},
        "driver": {"type": "string", "default": "process"},
        "engine": {"enum": list(ENGINES), "default": CLOUDLM},
        "min_replicas": {**_COUNT, "default": 1},
        "max_replicas": {**_COUNT, "default": 1},
        "target_ongoing_requests": {"type": "number", "exclusiveMinimum": 0, "default": 8},
        "max_surge": {"type": "integer", "minimum": 0, "maximum": 1000, "default": 1},
        "options": {"type": "object", "description": "Engine settings (max_model_len …)."},
        "env": {"type": "object", "additionalProperties": _TEXT},
        "adapters": {
            "type": "array",
            "description": "LoRA adapters; each name is a model's name in the API too.",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["name", "model"],
                "properties": {
                    "name": _TEXT,
                    "model": {"type": "string", "examples": ["models:/polite/1"]},
                },
            },
        },
        "asleep": {
            "type": ["boolean", "null"],
            "description": "true puts the replicas to sleep, false keeps them awake.",
        },
    },
}
SCALE: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["min_replicas", "max_replicas"],
    "properties": {"min_replicas": _COUNT, "max_replicas": _COUNT},
}
IMPORT: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["source"],
    "properties": {
        "source": {"type": "string", "examples": ["/models/bank", "hf://org/name", "s3://b/p"]},
        "name": _TEXT,
        "alias": _TEXT,
    },
}
ALIAS: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["version"],
    "properties": {"version": {"type": "integer", "minimum": 1}},
}
KEY: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name"],
    "properties": {"name": _TEXT, "role": {"enum": ["user", "admin"], "default": "user"}},
}
JOB: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["kind"],
    "properties": {"kind": {"enum": ["import"]}, "arguments": {"type": "object"}},
}
