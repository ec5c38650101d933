"""From a model's address to a loaded engine: fetch or inspect, load in a thread, wrap up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cloudlm.core.clock import SystemClock
from cloudlm.core.errors import MissingExtra
from cloudlm.core.model import AddressKind, address_kind, parse_ref
from cloudlm.worker.adapters import add_adapter
from cloudlm.worker.config import WorkerConfig
from cloudlm.worker.daemon import in_daemon_thread
from cloudlm.worker.dialect import find_dialect
from cloudlm.worker.options import named_adapters
from cloudlm.worker.serving import Serving
from cloudlm.worker.template import NoTemplate, Renderer, TemplateProcess
from cloudlm.worker.tokenise import control_pattern

if TYPE_CHECKING:
    from cloudlm.engine.engine import LocalEngine
    from cloudlm.registry.registry import Registry

Tell = Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class Found:
    """A model on this machine: its folder, inspected or verified, the address to show for it
    (``root``), and in what numbers most of its weights are stored (``precision``), in the words of
    the version's manifest."""

    folder: Path
    root: str
    precision: str


async def load_model(config: WorkerConfig, tell: Tell) -> Serving:
    """Everything that serving needs. Raises errors of ``core.errors`` that name the fault."""
    found = await in_daemon_thread(lambda: find_model(config, tell))
    engine = await in_daemon_thread(lambda: load_found(found, config, tell))
    tokenizer = engine.tokenizer
    renderer: Renderer = NoTemplate()
    if tokenizer.chat_template is not None:
        process = TemplateProcess(tokenizer.chat_template, tokenizer.special_tokens)
        await process.start()  # a template that is broken answers each chat request with its fault
        renderer = process
    serving = Serving(
        name=config.served_model_name,
        root=found.root,
        engine=engine,
        tokenizer=tokenizer,
        renderer=renderer,
        control=control_pattern(tokenizer.control_tokens),
        created=int(SystemClock().now()),
        dialect=find_dialect(
            tokenizer.chat_template,
            config.engine.tool_parser,
            config.engine.reasoning_parser,
            tokenizer.special_token_id,
        ),
    )
    try:
        for name, address in (*named_adapters(config.engine.adapters), *config.adapters):
            tell(1.0, f"loading the adapter {name}")
            await add_adapter(config, serving, name, address)
    except BaseException:
        await engine.close()
        await renderer.close()
        raise
    return serving


def find_model(config: WorkerConfig, tell: Tell) -> Found:
    """Fetch or inspect the model that ``config`` names."""
    kind = address_kind(config.model)
    if kind is AddressKind.FOLDER:
        from cloudlm.registry.importer import find_gguf
        from cloudlm.registry.inspect import inspect_folder

        folder = Path(config.model.removeprefix("file://")).expanduser()
        tell(0.0, f"inspecting {folder}")
        if find_gguf(folder) is None:  # such a file has to be made a version first
            storage = inspect_folder(folder).facts.storage
            return Found(folder, folder.resolve().name, storage.precision)
    registry = _registry(config)
    if kind is AddressKind.REGISTRY:
        tell(0.0, f"fetching {config.model}")
        manifest = registry.resolve(parse_ref(config.model))
        return Found(registry.fetch(parse_ref(manifest.ref)), manifest.ref, manifest.precision)
    tell(0.0, f"importing {config.model}")
    from cloudlm.registry.importer import import_address

    manifest = import_address(registry, config.model)
    return Found(registry.fetch(parse_ref(manifest.ref)), config.model, manifest.precision)


def _registry(config: WorkerConfig) -> Registry:
    from cloudlm.registry.registry import open_registry

    settings = config.settings.registry
    return open_registry(config.registry_url, home=config.home, settings=settings)


def load_found(found: Found, config: WorkerConfig, tell: Tell) -> LocalEngine:
    """The engine of a model with the settings of ``config``. Raises errors of ``core.errors``."""
    tell(0.0, "starting the engine")
    from cloudlm.engine.importing import unsearched

    try:
        with unsearched("cloudlm.engine.load"):
            from cloudlm.engine.load import load_engine
    except ImportError as error:
        if error.name is not None and error.name.startswith("cloudlm"):
            raise
        raise MissingExtra("engine", "serving a model") from error
    return load_engine(
        found.folder,
        config.engine,
        max_waiting=config.settings.worker.max_waiting_requests,
        stored_precision=found.precision,
        progress=tell,
    )
