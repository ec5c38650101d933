"""Reads settings from file, environment and flags into the declared dataclasses, and says of each
value where it came from.

Pure: nothing here touches a disk; ``state.home`` hands in the file's content and the environment.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from cloudlm.core.errors import BadSetting
from cloudlm.core.settings.whole import Settings

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class SettingRow:
    """One value with its source, for ``cloudlm config`` and the generated reference."""

    name: str
    value: Any
    source: str
    environment: str
    doc: str
    secret: bool


def environment_name(name: str) -> str:
    """``gateway.port`` is ``CLOUDLM_GATEWAY_PORT``."""
    return "CLOUDLM_" + name.replace(".", "_").upper()


def read_settings(
    file: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
    *,
    file_name: str = "config.yaml",
) -> tuple[Settings, list[SettingRow]]:
    """Merge the three sources. ``file`` is nested as in YAML, ``flags`` has dotted names.

    Returns the settings and one row per value. Raises BadSetting for an unknown name in file or
    flags, and for a value that does not fit.
    """
    given: dict[str, tuple[Any, str]] = {}
    for name, value in _flatten(file or {}, file_name).items():
        given[name] = (value, file_name)
    for name in _names():
        variable = environment_name(name)
        if environment and environment.get(variable):
            given[name] = (environment[variable], variable)
    for name, value in (flags or {}).items():
        if value is not None:
            given[name] = (value, "--" + name.replace(".", "-").replace("_", "-"))
    unknown = sorted(set(given) - set(_names()))
    if unknown:
        name = unknown[0]
        raise BadSetting(
            f"unknown setting {name!r} in {given[name][1]}; 'cloudlm config' lists all"
        )
    rows: list[SettingRow] = []
    settings = _build(Settings, "", given, rows)
    return settings, rows


def _names(cls: type[Any] = Settings, prefix: str = "") -> list[str]:
    hints = get_type_hints(cls)
    names: list[str] = []
    for one in fields(cls):
        if "doc" in one.metadata:
            names.append(prefix + one.name)
        else:
            names.extend(_names(hints[one.name], f"{prefix}{one.name}."))
    return names


def _flatten(tree: Mapping[str, Any], source: str, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(_flatten(value, source, f"{name}."))
        else:
            flat[name] = value
    return flat


def _build(
    cls: type[S], prefix: str, given: Mapping[str, tuple[Any, str]], rows: list[SettingRow]
) -> S:
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for one in fields(cls):  # type: ignore[arg-type]
        name = prefix + one.name
        if "doc" not in one.metadata:
            values[one.name] = _build(hints[one.name], f"{name}.", given, rows)
            continue
        raw, source = given.get(name, (one.default, "default"))
        secret = one.metadata["secret"]
        if source == "default":
            value = raw
        else:
            value = _parse(name, raw, hints[one.name], source, shown="***" if secret else repr(raw))
        _check_bounds(name, value, one.metadata, source)
        values[one.name] = value
        rows.append(
            SettingRow(
                name,
                value,
                source,
                environment_name(name),
                one.metadata["doc"],
                secret,
            )
        )
    return cls(**values)


def _parse(name: str, raw: Any, kind: Any, source: str, *, shown: str) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(k for k in get_args(kind) if k is not type(None))
    try:
        if kind is bool:
            return _parse_bool(raw)
        if kind is int and (isinstance(raw, bool) or (isinstance(raw, float) and raw != int(raw))):
            raise ValueError
        if kind is str and not isinstance(raw, str):
            raise ValueError
        return kind(raw)
    except (TypeError, ValueError, OverflowError):
        wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        raise BadSetting(
            f"{name} = {shown} (from {source}) is not {wanted.get(kind, kind)}", param=name
        ) from None


def _parse_bool(raw: Any) -> bool:
    text = str(raw).lower()
    if text in ("1", "true", "yes", "on"):
        return True
    if text in ("0", "false", "no", "off"):
        return False
    raise ValueError(raw)


def _check_bounds(name: str, value: Any, metadata: Mapping[str, Any], source: str) -> None:
    low, high, choices = metadata["low"], metadata["high"], metadata["choices"]
    if choices and value not in choices:
        raise BadSetting(
            f"{name} = {value!r} (from {source}) is not one of {', '.join(choices)}", param=name
        )
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    too_low = low is not None and value < low
    too_high = high is not None and value > high
    if not math.isfinite(value) or too_low or too_high:
        span = f"a number of at least {low}" if high is None else f"from {low} to {high}"
        raise BadSetting(f"{name} = {value!r} (from {source}) must be {span}", param=name)
