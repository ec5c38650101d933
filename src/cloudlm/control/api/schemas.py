"""JSON schemas of request bodies, for the OpenAPI document. ``core.wire`` does the checking."""

from __future__ import annotations

from typing import Any

from cloudlm.core.external import MAX_ENDPOINTS, MAX_PRIORITY
from cloudlm.core.rollout import DEFAULT_STRATEGY, MAX_STEPS, Kind
from cloudlm.core.routing import MAX_HEDGE_AFTER_S, SESSION_HEADER, Policy
from cloudlm.core.scaling import IDLE_S, Algorithm
from cloudlm.core.spec import CLOUDLM, ENGINES, MAX_MEMORY_MB

_TEXT: dict[str, Any] = {"type": "string"}
_COUNT: dict[str, Any] = {"type": "integer", "minimum": 1, "maximum": 1000}
_RATE: dict[str, Any] = {"type": "number", "minimum": 0, "maximum": 1_000_000}


def _at_least(low: float, usual: float, high: float | None = None) -> dict[str, Any]:
    most = {} if high is None else {"maximum": high}
    return {"type": "number", "minimum": low, "default": usual, **most}


_USUAL = DEFAULT_STRATEGY
_STRATEGY: dict[str, Any] = {
    "type": "object",
    "description": "How a new revision takes over from the one before.",
    "additionalProperties": False,
    "properties": {
        "strategy": {"enum": [one.value for one in Kind], "default": _USUAL.kind.value},
        "steps": {
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_STEPS,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["percent", "duration_s"],
                "properties": {
                    "percent": {"type": "number", "exclusiveMinimum": 0, "maximum": 100},
                    "duration_s": {"type": "number", "minimum": 0},
                },
            },
        },
        "bake_s": _at_least(0, _USUAL.bake_s),
        "mirror_percent": _at_least(0, _USUAL.mirror_percent, 100),
        "max_error_rate": _at_least(0, _USUAL.max_error_rate, 1),
        "max_ttft_ratio": _at_least(0, _USUAL.max_ttft_ratio),
        "max_latency_ratio": _at_least(0, _USUAL.max_latency_ratio),
        "min_requests": {"type": "integer", "minimum": 0, "default": _USUAL.min_requests},
        "min_score": _at_least(0, _USUAL.min_score, 1),
        "min_scores": {"type": "integer", "minimum": 1, "default": _USUAL.min_scores},
        "start_timeout_s": _at_least(0, _USUAL.start_timeout_s),
        "auto_promote": {"type": "boolean", "default": _USUAL.auto_promote},
        "auto_rollback": {"type": "boolean", "default": _USUAL.auto_rollback},
    },
}

SPEC: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["model"],
    "properties": {
        "name": {"type": "string", "description": "API name; may be left out if in the path."},
        "model": {"type": "string", "examples": ["models:/bank/3", "models:/bank@champion"]},
        "driver": {"type": "string", "default": "process"},
        "engine": {"enum": list(ENGINES), "default": CLOUDLM},
        "min_replicas": {**_COUNT, "minimum": 0, "default": 1},
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
        "prices": {
            "type": ["object", "null"],
            "description": "Per million tokens; without them the gateway's own table holds.",
            "additionalProperties": False,
            "required": ["prompt", "completion"],
            "properties": {"prompt": _RATE, "cached": _RATE, "completion": _RATE},
        },
        "tenant": {
            "type": "string",
            "description": "Whose it is: no other tenant sees or uses it. Empty: everybody's.",
        },
        "routing": {
            "type": "object",
            "description": "How requests are spread over the replicas.",
            "additionalProperties": False,
            "properties": {
                "policy": {"enum": [one.value for one in Policy], "default": "least_cost"},
                "session_header": {"type": "string", "default": SESSION_HEADER},
                "hedge_after_s": {
                    "type": "number",
                    "minimum": 0,
                    "maximum": MAX_HEDGE_AFTER_S,
                    "default": 0,
                },
            },
        },
        "placement": {
            "type": ["object", "null"],
            "description": "Traffic, service level and bounds by which machines are chosen.",
        },
        "rollout": _STRATEGY,
        "scaling": {
            "type": "object",
            "description": "What decides how many replicas there are.",
            "additionalProperties": False,
            "properties": {
                "algorithm": {"enum": [one.value for one in Algorithm], "default": "tokens"},
                "target_ttft_ms": {"type": "number", "minimum": 0, "default": 0},
                "target_tpot_ms": {"type": "number", "minimum": 0, "default": 0},
                "utilization": {"type": "number", "minimum": 0, "maximum": 1, "default": 0},
                "late_share": {"type": "number", "minimum": 0, "maximum": 0.5, "default": 0},
                "stable_window_s": {"type": "number", "minimum": 6, "default": 60},
                "up_window_s": {"type": "number", "minimum": 0, "default": 0},
                "down_window_s": {"type": ["number", "null"], "minimum": 0},
                "idle_s": {"type": "number", "minimum": 0, "default": IDLE_S},
                "schedules": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["cron", "duration_s"],
                        "properties": {
                            "cron": {"type": "string", "examples": ["0 8 * * mon-fri"]},
                            "duration_s": {"type": "number", "minimum": 60},
                            "min_replicas": {"type": ["integer", "null"], "minimum": 0},
                            "max_replicas": {"type": ["integer", "null"], "minimum": 1},
                            "timezone": {"type": "string", "default": "UTC"},
                        },
                    },
                },
            },
        },
        "endpoints": {
            "type": "array",
            "maxItems": MAX_ENDPOINTS,
            "description": "Services that are not ours (driver 'external'); 'model' is their name "
            "for it.",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["url"],
                "properties": {
                    "url": {"type": "string", "examples": ["https://api.example.com/v1"]},
                    "model": {"type": "string", "description": "Its name there, if another."},
                    "secret": {"type": "string", "description": "The key's name, never the key."},
                    "weight": {"type": "number", "exclusiveMinimum": 0, "default": 1},
                    "priority": {
                        "type": "integer",
                        "minimum": 0,
                        "maximum": MAX_PRIORITY,
                        "default": 0,
                    },
                },
            },
        },
        "asleep": {
            "type": ["boolean", "null"],
            "description": "true puts the replicas to sleep, false keeps them awake.",
        },
        "pinned": {
            "type": "boolean",
            "default": False,
            "description": "Under a memory budget it is never unloaded for others.",
        },
        "memory_mb": {
            "type": "integer",
            "minimum": 0,
            "maximum": MAX_MEMORY_MB,
            "default": 0,
            "description": "What a replica needs of the memory budget, MiB; 0: as estimated.",
        },
    },
}
SCALE: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["min_replicas", "max_replicas"],
    "properties": {"min_replicas": {**_COUNT, "minimum": 0}, "max_replicas": _COUNT},
}
PROMOTION: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {"fully": {"type": "boolean", "default": False}},
}
UNDO: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {"revision": {"type": ["integer", "null"], "minimum": 1}},
}
SCORE: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["score"],
    "properties": {
        "score": {"type": "number", "minimum": 0, "maximum": 1},
        "count": {"type": "integer", "minimum": 1, "default": 1},
        "revision": {"type": ["integer", "null"], "minimum": 1},
        "request_id": {
            "type": ["string", "null"],
            "description": "x-request-id of an answer, instead of the revision that gave it.",
        },
    },
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
_LIMITS: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "requests_per_minute": {"type": ["integer", "null"], "minimum": 0},
        "tokens_per_minute": {"type": ["integer", "null"], "minimum": 0},
        "concurrent_streams": {"type": ["integer", "null"], "minimum": 0},
        "spend_per_month": {"type": ["number", "null"], "minimum": 0},
        "spend_per_day": {"type": ["number", "null"], "minimum": 0},
    },
}
_SECONDS: dict[str, Any] = {"type": ["number", "null"], "minimum": 1}
_PATTERNS: dict[str, Any] = {"type": "array", "items": _TEXT, "examples": [["bank", "gpt-*"]]}
_GRANTS: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "additionalProperties": False,
        "required": ["role", "scope"],
        "properties": {"role": _TEXT, "scope": {"type": "string", "examples": ["acme/web"]}},
    },
}


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": required,
        "properties": properties,
    }


KEY = _object(
    ["name"],
    name=_TEXT,
    role={"type": "string", "default": "user"},
    scope=_TEXT,
    principal=_TEXT,
    project=_TEXT,
    models=_PATTERNS,
    limits=_LIMITS,
    expires_in_s=_SECONDS,
)
KEY_CHANGE = _object([], name=_TEXT, models=_PATTERNS, limits=_LIMITS, expires_in_s=_SECONDS)
ROTATION = _object([], overlap_s={"type": "number", "minimum": 0, "default": 0})
TENANT = _object(["name"], name=_TEXT, title=_TEXT, limits=_LIMITS)
TENANT_CHANGE = _object([], title=_TEXT, limits=_LIMITS, disabled={"type": "boolean"})
PROJECT = _object(["name"], name=_TEXT, tenant=_TEXT, title=_TEXT, limits=_LIMITS)
PROJECT_CHANGE = _object([], title=_TEXT, limits=_LIMITS)
PRINCIPAL = _object(
    ["name"],
    name=_TEXT,
    kind={"enum": ["service", "person"], "default": "service"},
    tenant=_TEXT,
    project=_TEXT,
    grants=_GRANTS,
    subject={"type": "string", "description": "issuer#sub of a person who signs in."},
    limits=_LIMITS,
)
PRINCIPAL_CHANGE = _object(
    [], name=_TEXT, grants=_GRANTS, limits=_LIMITS, disabled={"type": "boolean"}
)
_RULES: dict[str, Any] = {
    "type": "array",
    "items": _object(
        ["verbs", "resources"],
        effect={"enum": ["allow", "deny"], "default": "allow"},
        verbs={"type": "array", "items": _TEXT},
        resources={"type": "array", "items": _TEXT, "examples": [["inference:bank-*"]]},
    ),
}
ROLE = _object(["name", "rules"], name=_TEXT, scope=_TEXT, rules=_RULES)
ROLE_CHANGE = _object(["rules"], scope=_TEXT, rules=_RULES)
JOB: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["kind"],
    "properties": {"kind": {"enum": ["import"]}, "arguments": {"type": "object"}},
}
