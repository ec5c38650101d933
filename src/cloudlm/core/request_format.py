"""Reads what an answer must look like: ``response_format`` (OpenAI), ``structured_outputs`` and
``guided_*`` (vLLM).

Only form and size are checked here. Whether a schema, expression or grammar can be followed is
found out by the engine, which compiles it outside its loop.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from cloudlm.core.chat import Constraint, ConstraintKind
from cloudlm.core.errors import InvalidRequest
from cloudlm.core.fields import check_flag, check_text, kind_of, shown

MAX_CONSTRAINT_CHARACTERS = 65_536
MAX_CHOICES_OFFERED = 1024
MAX_CHOICE_CHARACTERS = 4096
MAX_SCHEMA_DEPTH = 32
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_FIELDS = ("json", "regex", "choice", "grammar", "json_object")


def parse_constraint(body: Mapping[str, Any]) -> Constraint | None:
    """The constraint that the body asks for, if any. Raises InvalidRequest with ``param``."""
    found = [
        (param, constraint)
        for param, constraint in (
            ("response_format", _response_format(body.get("response_format"))),
            ("structured_outputs", _structured(body.get("structured_outputs"))),
            *((f"guided_{name}", _field(body, name, f"guided_{name}")) for name in _FIELDS),
        )
        if constraint is not None
    ]
    if len(found) > 1:
        names = ", ".join(param for param, _ in found)
        raise InvalidRequest(
            f"an answer can follow one constraint only, not {names} together", param=found[1][0]
        )
    return found[0][1] if found else None


def schema_text(value: Any, param: str) -> str:
    """A JSON schema, given as an object or as a text, as canonical JSON.

    Raises InvalidRequest if it is no object, too long or too deep.
    """
    schema = _decoded(value, param) if isinstance(value, str) else value
    if not isinstance(schema, dict):
        raise InvalidRequest(
            f"{param} must be a JSON schema (an object), not {kind_of(value)}", param=param
        )
    check_depth(schema, param, MAX_SCHEMA_DEPTH)
    try:
        text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
        text.encode()
    except (UnicodeEncodeError, ValueError):
        raise InvalidRequest(f"{param} is not valid Unicode text", param=param) from None
    if len(text) > MAX_CONSTRAINT_CHARACTERS:
        raise InvalidRequest(
            f"{param} has {len(text)} characters; at most {MAX_CONSTRAINT_CHARACTERS} are allowed",
            param=param,
        )
    return text


def _decoded(text: str, param: str) -> Any:
    if len(text) > MAX_CONSTRAINT_CHARACTERS:
        raise InvalidRequest(
            f"{param} may have at most {MAX_CONSTRAINT_CHARACTERS} characters", param=param
        )
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeEncodeError, ValueError, RecursionError):
        raise InvalidRequest(f"{param} is a text that is not valid JSON", param=param) from None


def check_depth(value: Any, param: str, deepest: int) -> None:
    """Raise InvalidRequest if ``value`` is nested deeper than ``deepest`` levels."""
    level: list[Any] = [value]
    for _ in range(deepest):
        inner = (v.values() if isinstance(v, dict) else v for v in level)
        level = [v for values in inner for v in values if isinstance(v, dict | list)]
        if not level:
            return
    raise InvalidRequest(f"{param} is nested deeper than {deepest} levels", param=param)


def _response_format(value: Any) -> Constraint | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise InvalidRequest(
            f"response_format must be an object with a type, not {kind_of(value)}",
            param="response_format",
        )
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return any_object()
    if kind == "json_schema":
        return _named_schema(value.get("json_schema"))
    raise InvalidRequest(
        f"response_format.type must be text, json_object or json_schema, not {shown(kind)}",
        param="response_format",
    )


def _named_schema(value: Any) -> Constraint:
    """``json_schema``: its name is checked, ``strict`` makes no difference: the schema is always
    followed exactly."""
    param = "response_format.json_schema"
    if not isinstance(value, dict):
        raise InvalidRequest(f"{param} must be an object with name and schema", param=param)
    name = value.get("name")
    if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise InvalidRequest(
            f"{param}.name must be 1 to 64 letters, digits, _ or -, not {shown(name)}",
            param=f"{param}.name",
        )
    if value.get("strict") is not None:
        check_flag(value["strict"], f"{param}.strict")
    if value.get("schema") is None:
        raise InvalidRequest(f"{param}.schema is required", param=f"{param}.schema")
    text = schema_text(value["schema"], f"{param}.schema")
    return Constraint(ConstraintKind.JSON_SCHEMA, text)


def any_object() -> Constraint:
    """Any JSON object."""
    return Constraint(ConstraintKind.JSON_SCHEMA, '{"type":"object"}')


def _structured(value: Any) -> Constraint | None:
    if value is None:
        return None
    param = "structured_outputs"
    if not isinstance(value, dict):
        raise InvalidRequest(f"{param} must be an object, not {kind_of(value)}", param=param)
    given = [name for name in _FIELDS if value.get(name) not in (None, False)]
    if len(given) != 1:
        raise InvalidRequest(
            f"{param} must hold exactly one of {', '.join(_FIELDS)}, not {len(given)}", param=param
        )
    return _one(given[0], value[given[0]], f"{param}.{given[0]}")


def _field(body: Mapping[str, Any], name: str, param: str) -> Constraint | None:
    value = body.get(param)
    return None if value in (None, False) else _one(name, value, param)


def _one(name: str, value: Any, param: str) -> Constraint:
    if name == "json":
        return Constraint(ConstraintKind.JSON_SCHEMA, schema_text(value, param))
    if name == "json_object":
        check_flag(value, param)
        return any_object()
    if name == "choice":
        return Constraint(ConstraintKind.CHOICE, _choices(value, param))
    text = check_text(value, param, low=1, max_length=MAX_CONSTRAINT_CHARACTERS)
    if name == "grammar" and "::=" in text:
        raise InvalidRequest(
            f"{param} is written in GBNF ('::='); write it in Lark ('start: …')", param=param
        )
    return Constraint(ConstraintKind(name), text)


def _choices(value: Any, param: str) -> str:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_CHOICES_OFFERED:
        raise InvalidRequest(
            f"{param} must be a list of 1 to {MAX_CHOICES_OFFERED} texts", param=param
        )
    for text in value:
        check_text(text, param, low=1, max_length=MAX_CHOICE_CHARACTERS)
    if sum(map(len, value)) > MAX_CONSTRAINT_CHARACTERS:
        raise InvalidRequest(
            f"{param} may have at most {MAX_CONSTRAINT_CHARACTERS} characters together",
            param=param,
        )
    return json.dumps(value, ensure_ascii=False)
