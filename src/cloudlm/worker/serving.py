"""What the handlers are given: a loaded engine with its tokenizer, and the facts of this server.

Ports and plain data; no HTTP, no PyTorch.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from cloudlm import __version__
from cloudlm.core.errors import ModelNotFound
from cloudlm.engine.api import Engine, EngineInfo
from cloudlm.engine.tokens import Detokenizer
from cloudlm.worker.dialect import Dialect
from cloudlm.worker.template import Renderer


class Tokenizer(Protocol):
    """The model's tokenizer as the worker needs it."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]: ...

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str: ...

    def token_text(self, token_id: int) -> str: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def visible_bytes(self, token_id: int) -> bytes: ...

    def detokenizer(
        self, prompt_ids: Iterable[int], shown: frozenset[int] = frozenset()
    ) -> Detokenizer: ...


@dataclass(frozen=True)
class Serving:
    """A model that is ready to answer. ``control`` finds what the tokenizer would read as control
    tokens (None if there are none); ``created`` is the Unix time of loading, seconds; ``dialect``
    is how the model writes reasoning and tool calls."""

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
        """Changes when anything changes that could change an answer."""
        info = self.info
        ranks = (info.tensor_parallel, info.pipeline_parallel)
        facts = (__version__, self.root, info.architecture, info.parameters, info.dtype, ranks)
        return "fp_" + hashlib.sha256(repr(facts).encode()).hexdigest()[:12]

    def check_model(self, asked: str) -> str:
        """The adapter that ``asked`` names, empty for the model itself. Raises ModelNotFound."""
        if asked == self.name:
            return ""
        adapters = self.engine.adapters()
        if asked in adapters:
            return asked
        known = ", ".join(repr(name) for name in [self.name, *sorted(adapters)[:8]])
        raise ModelNotFound(
            f"the model {asked[:120]!r} does not exist here; this server has {known}",
            param="model",
        )


def new_id(prefix: str) -> str:
    """A fresh id such as ``chatcmpl-…``; also the engine's request id, so nobody can choose it."""
    return f"{prefix}-{uuid.uuid4().hex}"
