"""Reads the JSON files of a model folder within hard limits, and finds code hidden in them.

Must not read anything else than the file it is given.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloudlm.core.architectures import own_architecture
from cloudlm.core.errors import BrokenModel, UnsafeModel
from cloudlm.registry.stores.failures import storage_failures

MAX_JSON_BYTES = 16 << 20
MAX_LARGE_JSON_BYTES = 256 << 20
_LARGE = {"tokenizer.json", "vocab.json"}
MAX_NESTING = 64
_CODE_KEYS = ("auto_map", "custom_pipelines", "custom_generate")


def size_limit(name: str) -> int:
    """The largest size in bytes that is read for a JSON or text file of this name."""
    return MAX_LARGE_JSON_BYTES if name in _LARGE else MAX_JSON_BYTES


def read_json(path: Path, name: str) -> Any:
    """The JSON in ``path``. Raises BrokenModel naming ``name`` and the fault."""
    limit = size_limit(name.rpartition("/")[2])
    with storage_failures(path, "read"):
        size = path.stat().st_size
        if size > limit:
            raise BrokenModel(f"{name}: {size} bytes are more than the {limit} accepted")
        raw = path.read_bytes()
    return parsed(raw, name)


def parsed(raw: bytes, name: str) -> Any:
    """The JSON in ``raw``. Raises BrokenModel naming ``name`` and the fault."""
    try:
        return json.loads(raw.decode())
    except UnicodeDecodeError:
        raise BrokenModel(f"{name}: is not UTF-8 text") from None
    except ValueError as error:
        raise BrokenModel(f"{name}: is not JSON ({str(error)[:160]}); is it truncated?") from None
    except RecursionError:
        raise BrokenModel(f"{name}: is nested too deeply") from None


def read_object(path: Path, name: str) -> dict[str, Any]:
    """As ``read_json``, and it must be an object."""
    return check_object(read_json(path, name), name)


def check_object(found: Any, name: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise BrokenModel(f"{name}: expected a JSON object, found {type(found).__name__}")
    return found


def brings_own_network(body: dict[str, Any]) -> bool:
    """Whether config.json names code for a network that the engine has of its own: that code is
    neither kept nor run, so it does not matter."""
    return bool(body.get("auto_map")) and own_architecture(body.get("architectures")) is not None


def refuse_code(body: dict[str, Any], name: str) -> None:
    """Raise UnsafeModel if a configuration asks for code of the model's own that would be needed.

    ``auto_map`` of config.json is no such thing if the engine has the architecture itself.
    """
    if name == "config.json" and brings_own_network(body):
        body = {key: value for key, value in body.items() if key != "auto_map"}
    for key, value in _entries(body, name):
        if key in _CODE_KEYS and value:
            raise UnsafeModel(
                f"{name}: names code of its own ({key}); such models are refused before they "
                "are read. Ask for a version in a standard architecture"
            )
        if key == "trust_remote_code" and value:
            raise UnsafeModel(f"{name}: asks for {key}; refused before the model is read")


def _entries(body: dict[str, Any], name: str) -> Iterator[tuple[str, Any]]:
    waiting: list[tuple[Any, int]] = [(body, 0)]
    while waiting:
        value, depth = waiting.pop()
        if depth > MAX_NESTING:
            raise BrokenModel(f"{name}: is nested deeper than {MAX_NESTING}")
        if isinstance(value, dict):
            for key, inner in value.items():
                yield key, inner
                waiting.append((inner, depth + 1))
        elif isinstance(value, list):
            waiting.extend((inner, depth + 1) for inner in value)
