"""From a model's address to a vLLM that answers: fetch and verify, start, wait."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cloudlm.core.clock import SystemClock
from cloudlm.core.errors import BadSetting, BrokenModel, UnsupportedModel
from cloudlm.core.vllm import read_vllm_options
from cloudlm.engine.api import EngineInfo
from cloudlm.engine.scratch import Scratch
from cloudlm.registry.inspect import inspect_folder
from cloudlm.worker.adapters import add_adapter
from cloudlm.worker.config import WorkerConfig
from cloudlm.worker.daemon import in_daemon_thread
from cloudlm.worker.loading import find_model
from cloudlm.worker.vllm.child import Child
from cloudlm.worker.vllm.command import child_environment, find_python, server_command
from cloudlm.worker.vllm.engine import VllmEngine

_LOOK_INTERVAL_S = 0.5
_UNKNOWN_VOCABULARY = 1 << 24

Tell = Callable[[float, str], None]


@dataclass(frozen=True)
class VllmServing:
    """A model that vLLM serves."""

    name: str
    root: str
    engine: VllmEngine
    created: int = 0

    @property
    def fingerprint(self) -> str:
        """Changes when anything changes that could change an answer."""
        engine = self.engine
        facts = (self.root, engine.version, sorted(engine.options.items()), engine.info.dtype)
        return "fp_" + hashlib.sha256(repr(facts).encode()).hexdigest()[:12]

    async def close(self) -> None:
        await self.engine.close()


async def load_vllm(config: WorkerConfig, tell: Tell) -> VllmServing:
    """Everything that the front needs. Raises BadSetting (no vLLM), BrokenModel and its kinds (the
    model is refused, by us or by vLLM), and what fetching raises."""
    options = read_vllm_options(config.options)
    if config.adapters:
        options.setdefault("enable_lora", "true")
    settings = config.settings
    python = await in_daemon_thread(lambda: find_python(settings.vllm.python))
    found = await in_daemon_thread(lambda: find_model(config, tell))
    info = await in_daemon_thread(lambda: facts_of(found.folder))
    clock = SystemClock()
    scratch = Scratch("cloudlm-vllm-")
    command = server_command(
        python, found.folder, config.served_model_name, scratch.path / "socket", options
    )
    child = Child(command, child_environment(python, options, os.environ))
    engine = VllmEngine(
        child,
        scratch,
        options,
        clock,
        max_waiting=settings.worker.max_waiting_requests,
    )
    try:
        await _start(child, engine, settings.vllm.start_timeout_s, tell)
        await engine.begin(info)
        serving = VllmServing(config.served_model_name, found.root, engine, int(clock.now()))
        for name, address in config.adapters:
            tell(1.0, f"loading the adapter {name}")
            await add_adapter(config, serving, name, address)
    except BaseException:
        await engine.close()
        raise
    return serving


async def _start(child: Child, engine: VllmEngine, timeout_s: float, tell: Tell) -> None:
    clock = SystemClock()
    began = clock.monotonic()
    try:
        await child.start()
    except OSError as error:
        raise BadSetting(f"vLLM cannot be started: {error}", param="vllm.python") from None
    while not await engine.is_up():
        waited_s = clock.monotonic() - began
        if waited_s > timeout_s:
            raise BrokenModel(
                f"vLLM was not ready after {timeout_s:g} s (vllm.start_timeout_s); its output is "
                "in this replica's log"
            )
        tell(0.0, f"vLLM is loading the model ({waited_s:.0f} s)")
        await clock.sleep(_LOOK_INTERVAL_S)


def facts_of(folder: Path) -> EngineInfo:
    """What is known of a verified folder without loading it. Raises UnsupportedModel (GGUF)."""
    facts = inspect_folder(folder).facts
    if facts.storage.format != "safetensors":
        raise UnsupportedModel(
            f"the engine vllm reads safetensors only, and this version is {facts.storage.format}; "
            "deploy it with engine: cloudlm, or import the model's safetensors"
        )
    vocabulary = json.loads((folder / "config.json").read_bytes()).get("vocab_size")
    return EngineInfo(
        architecture=facts.architecture,
        parameters=facts.storage.parameters,
        dtype=facts.storage.precision,
        device="vllm",
        vocab_size=vocabulary if type(vocabulary) is int else _UNKNOWN_VOCABULARY,
        max_model_len=facts.context_length,
        block_size=0,
        blocks_total=0,
        eos_token_ids=(),
    )
