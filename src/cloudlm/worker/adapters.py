"""LoRA adapters at the worker: bodies as vLLM has them, and addresses to folders.

What an adapter's files must hold is the engine's to judge.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cloudlm.core.errors import BrokenModel, InvalidRequest, NotSupported
from cloudlm.core.model import AddressKind, address_kind, parse_ref
from cloudlm.worker.config import WorkerConfig
from cloudlm.worker.daemon import in_daemon_thread
from cloudlm.worker.serving import Served

_LONGEST_NAME = 256
_LONGEST_ADDRESS = 4096


def parse_load(body: Mapping[str, Any]) -> tuple[str, str]:
    """``lora_name`` and ``lora_path`` (an address). Raises InvalidRequest and NotSupported."""
    if body.get("load_inplace"):
        raise NotSupported(
            "load_inplace is not supported: unload the adapter first", param="load_inplace"
        )
    return _text(body, "lora_name", _LONGEST_NAME), _text(body, "lora_path", _LONGEST_ADDRESS)


def parse_unload(body: Mapping[str, Any]) -> str:
    """``lora_name``. Raises InvalidRequest."""
    return _text(body, "lora_name", _LONGEST_NAME)


def _text(body: Mapping[str, Any], name: str, longest: int) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value or len(value) > longest or "\0" in value:
        raise InvalidRequest(f"{name} must be a text of 1 to {longest} characters", param=name)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"{name} is not valid Unicode text", param=name) from None
    return value


async def add_adapter(config: WorkerConfig, serving: Served, name: str, address: str) -> None:
    """Load the adapter at ``address`` under ``name``. Raises InvalidRequest, NotFound, BrokenModel
    and its kinds."""
    if name == serving.name:
        raise InvalidRequest(f"{name[:120]!r} is the model's own name", param="lora_name")
    folder = await in_daemon_thread(lambda: adapter_folder(config, address))
    await serving.engine.load_adapter(name, folder, address)


def adapter_folder(config: WorkerConfig, address: str) -> Path:
    """The local folder of an adapter: a folder, or a version of the registry, verified."""
    kind = address_kind(address)
    if kind is AddressKind.FOLDER:
        folder = Path(address.removeprefix("file://")).expanduser()
        if not folder.is_dir():
            raise BrokenModel(f"{address[:200]} is not a folder", param="lora_path")
        return folder.resolve()
    if kind is not AddressKind.REGISTRY:
        raise InvalidRequest(
            f"{address[:200]!r} cannot be loaded: give a folder or models:/name/3",
            param="lora_path",
        )
    from cloudlm.registry.registry import open_registry

    settings = config.settings.registry
    registry = open_registry(config.registry_url, home=config.home, settings=settings)
    return registry.fetch(parse_ref(registry.resolve(parse_ref(address)).ref))
