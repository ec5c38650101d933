"""From a model's address to a loaded engine: fetch or inspect, load in a thread, wrap up.

The thread is a daemon, because nobody can interrupt it and a stopping worker must not wait for it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cloudlm.core.clock import SystemClock
from cloudlm.core.errors import MissingExtra
from cloudlm.core.model import AddressKind, address_kind, parse_ref
from cloudlm.worker.config import WorkerConfig
from cloudlm.worker.dialect import find_dialect
from cloudlm.worker.serving import Serving
from cloudlm.worker.template import NoTemplate, Renderer, TemplateProcess
from cloudlm.worker.tokenise import control_pattern

if TYPE_CHECKING:
    from cloudlm.engine.engine import LocalEngine
    from cloudlm.registry.registry import Registry

T = TypeVar("T")
Tell = Callable[[float, str], None]


async def load_model(config: WorkerConfig, tell: Tell) -> Serving:
    """Everything that serving needs. Raises errors of ``core.errors`` that name the fault."""
    folder, root = await in_daemon_thread(lambda: find_folder(config, tell))
    engine = await in_daemon_thread(lambda: _load(folder, config, tell))
    tokenizer = engine.tokenizer
    renderer: Renderer = NoTemplate()
    if tokenizer.chat_template is not None:
        process = TemplateProcess(tokenizer.chat_template, tokenizer.special_tokens)
        await process.start()  # a template that is broken answers each chat request with its fault
        renderer = process
    return Serving(
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


def find_folder(config: WorkerConfig, tell: Tell) -> tuple[Path, str]:
    """The local folder of the model, inspected or verified, and the address to show for it."""
    kind = address_kind(config.model)
    if kind is AddressKind.FOLDER:
        from cloudlm.registry.inspect import inspect_folder

        folder = Path(config.model.removeprefix("file://")).expanduser()
        tell(0.0, f"inspecting {folder}")
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


def _load(folder: Path, config: WorkerConfig, tell: Tell) -> LocalEngine:
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


async def in_daemon_thread(work: Callable[[], T]) -> T:
    """The result of ``work``, done in a thread of its own that the process's end does not wait
    for."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if outcome.done():
            return
        if error is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result: T | None = None
        error: BaseException | None = None
        try:
            result = work()
        except Exception as caught:
            error = caught
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="cloudlm-load", daemon=True).start()
    return await outcome
