"""From a model's address to a loaded engine: fetch or inspect, load in a thread, wrap up."""

from __future__ import annotations

from collections.abc import Callable
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


async def load_model(config: WorkerConfig, tell: Tell) -> Serving:
    """Everything that serving needs. Raises errors of ``core.errors`` that name the fault."""
    folder, root = await in_daemon_thread(lambda: find_folder(config, tell))
    engine = await in_daemon_thread(lambda: load_folder(folder, config, tell))
    tokenizer = engine.tokenizer
    renderer: Renderer = NoTemplate()
    if tokenizer.chat_template is not None:
        process = TemplateProcess(tokenizer.chat_template, tokenizer.special_tokens)
        await process.start()  # a template that is broken answers each chat request with its fault
        renderer = process
    serving = Serving(
        name=config.served_model_name,
        root=root,
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


def find_folder(config: WorkerConfig, tell: Tell) -> tuple[Path, str]:
    """The local folder of the model, inspected or verified, and the address to show for it."""
    kind = address_kind(config.model)
    if kind is AddressKind.FOLDER:
        from cloudlm.registry.importer import find_gguf
        from cloudlm.registry.inspect import inspect_folder

        folder = Path(config.model.removeprefix("file://")).expanduser()
        tell(0.0, f"inspecting {folder}")
        if find_gguf(folder) is None:  # such a file has to be made a version first
            inspect_folder(folder)
            return folder, folder.resolve().name
    registry = _registry(config)
    if kind is AddressKind.REGISTRY:
        tell(0.0, f"fetching {config.model}")
        manifest = registry.resolve(parse_ref(config.model))
        return registry.fetch(parse_ref(manifest.ref)), manifest.ref
    tell(0.0, f"importing {config.model}")
    from cloudlm.registry.importer import import_address

    manifest = import_address(registry, config.model)
    return registry.fetch(parse_ref(manifest.ref)), config.model


def _registry(config: WorkerConfig) -> Registry:
    from cloudlm.registry.registry import open_registry

    settings = config.settings.registry
    return open_registry(config.registry_url, home=config.home, settings=settings)


def load_folder(folder: Path, config: WorkerConfig, tell: Tell) -> LocalEngine:
    """The engine of a folder with the settings of ``config``. Raises errors of ``core.errors``."""
    tell(0.0, "starting the engine")
    try:
        from cloudlm.engine.load import load_engine
    except ImportError as error:
        if error.name is not None and error.name.startswith("cloudlm"):
            raise
        raise MissingExtra("engine", "serving a model") from error
    return load_engine(
        folder,
        config.engine,
        max_waiting=config.settings.worker.max_waiting_requests,
        progress=tell,
    )
