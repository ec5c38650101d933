"""What the handlers are given: a loaded engine with its tokenizer, and the facts of this server.

Ports and plain data; no HTTP, no PyTorch. ``Served`` is what every kind of replica has, whichever
engine answers; ``Serving`` is what the handlers of our own engine need besides.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from cloudlm import __version__
from cloudlm.core.errors import ModelNotFound
from cloudlm.engine.api import Engine, EngineInfo, EngineStats
from cloudlm.engine.tokens import Detokenizer
from cloudlm.worker.dialect import Dialect
from cloudlm.worker.template import Renderer


class Tokenizer(Protocol):
    """The model's tokenizer as the worker needs it."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]: ...

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str: ...

    def token_text(self, token_id: int) -> str: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def visible_bytes(self, token_id: int, shown: frozenset[int] = frozenset()) -> bytes: ...

    def detokenizer(
        self, prompt_ids: Iterable[int], shown: frozenset[int] = frozenset()
    ) -> Detokenizer: ...


class Minded(Protocol):
    """The part of an engine (``engine.api.Engine``) that a replica minds, whoever generates."""

    @property
    def info(self) -> EngineInfo: ...

    def cancel(self, request_id: str) -> None: ...

    def adapters(self) -> Mapping[str, str]: ...

    async def load_adapter(self, name: str, folder: Path, address: str) -> None: ...

    async def unload_adapter(self, name: str) -> None: ...

    async def sleep(self, level: int) -> None: ...

    async def wake(self) -> None: ...

    def stats(self) -> EngineStats: ...

    async def close(self) -> None: ...


class Served(Protocol):
    """A model that is ready to answer: its name here, the address to show for it (``root``), the
    Unix time of loading (``created``, seconds) and what generates."""

    @property
    def name(self) -> str: ...

    @property
    def root(self) -> str: ...

    @property
    def created(self) -> int: ...

    @property
    def engine(self) -> Minded: ...

    async def close(self) -> None:
        """Free everything; running requests end."""
        ...


@dataclass(frozen=True)
class Serving:
    """A model that our own engine serves. ``control`` finds what the tokenizer would read as
    control tokens (None if there are none); ``dialect`` is how the model writes reasoning and tool
    calls."""

    name: str
    root: str
    engine: Engine
    tokenizer: Tokenizer
    renderer: Renderer
    control: re.Pattern[str] | None = None
    created: int = 0
    dialect: Dialect = field(default_factory=Dialect)

    @property
    def info(self) -> EngineInfo:
        return self.engine.info

    @property
    def fingerprint(self) -> str:
        """Changes when anything changes that could change an answer. What computes is part of it
        where answers are to be the same to the bit; else replicas on unlike machines may go on
        with each other's streams."""
        info = self.info
        ranks = (info.tensor_parallel, info.pipeline_parallel)
        held = (info.parameters, info.dtype, info.weights)
        kernels = info.kernels if info.deterministic else ""
        facts = (__version__, self.root, info.architecture, *held, ranks, kernels)
        return "fp_" + hashlib.sha256(repr(facts).encode()).hexdigest()[:12]

    def check_model(self, asked: str) -> str:
        """As the function ``check_model``."""
        return check_model(self, asked)

    async def close(self) -> None:
        """Free everything; running sequences end."""
        await asyncio.gather(self.engine.close(), self.renderer.close(), return_exceptions=True)


def check_model(served: Served, asked: str) -> str:
    """The adapter that ``asked`` names, empty for the model itself. Raises ModelNotFound."""
    if asked == served.name:
        return ""
    adapters = served.engine.adapters()
    if asked in adapters:
        return asked
    known = ", ".join(repr(name) for name in [served.name, *sorted(adapters)[:8]])
    raise ModelNotFound(
        f"the model {asked[:120]!r} does not exist here; this server has {known}",
        param="model",
    )


def new_id(prefix: str) -> str:
    """A fresh id such as ``chatcmpl-…``; also the engine's request id, so nobody can choose it."""
    return f"{prefix}-{uuid.uuid4().hex}"
