"""What one worker is told at its start. Plain data and the rules that refuse a bad start."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cloudlm.core.errors import BadSetting
from cloudlm.core.settings import EngineSettings, Settings
from cloudlm.core.spec import CLOUDLM, ENGINES, VLLM
from cloudlm.core.vllm import read_vllm_options
from cloudlm.worker.options import engine_settings, named_adapters

GRACE_S = 20.0
_LONGEST_NAME = 256
_TOKEN = re.compile(r"[\x21-\x7e]+", re.ASCII)


@dataclass(frozen=True)
class WorkerConfig:
    """``model`` is an address (``models:/name/3``, a folder, a hub id), ``token`` the Bearer token
    that every route but the probes demands (None: none), ``registry_url`` empty the registry in
    ``home``, ``options`` settings of the engine ``engine_name`` that override those of
    ``settings``, ``adapters`` names and addresses of LoRA adapters to load at start. ``on_ready``
    gets the server's address when the model is loaded, ``on_progress`` the share done (0 to 1) and
    what is being done. ``grace_s`` is the time that running requests get at a stop, seconds."""

    model: str
    served_model_name: str
    home: Path
    host: str = "127.0.0.1"
    port: int = 8100
    token: str | None = field(default=None, repr=False)
    registry_url: str = field(default="", repr=False)
    engine_name: str = CLOUDLM
    options: Mapping[str, Any] = field(default_factory=dict)
    adapters: Sequence[tuple[str, str]] = ()
    settings: Settings = field(default_factory=Settings)
    on_ready: Callable[[str], None] | None = field(default=None, repr=False)
    on_progress: Callable[[float, str], None] | None = field(default=None, repr=False)
    grace_s: float = GRACE_S

    @property
    def engine(self) -> EngineSettings:
        """Our own engine's settings with the options applied. Raises BadSetting."""
        return engine_settings(self.options, self.settings.engine)


def check(config: WorkerConfig) -> WorkerConfig:
    """Return ``config`` if a worker may start with it. Raises BadSetting."""
    if not config.model:
        raise BadSetting("the model's address is empty", param="model")
    if not 0 < len(config.served_model_name) <= _LONGEST_NAME:
        raise BadSetting(
            f"the served model name must have 1 to {_LONGEST_NAME} characters",
            param="served_model_name",
        )
    if not 0 <= config.port <= 65535:
        raise BadSetting(f"port {config.port} is not from 0 to 65535", param="port")
    if not config.token and not is_loopback(config.host):
        raise BadSetting(
            f"a worker on {config.host} can be reached by other machines and needs a token: set "
            "CLOUDLM_WORKER_TOKEN or --api-key, or listen on 127.0.0.1",
            param="host",
        )
    if config.token and not _TOKEN.fullmatch(config.token):
        raise BadSetting(
            "the worker's token must be of printable ASCII characters without blanks: no other "
            "can be sent in a header",
            param="token",
        )
    if config.engine_name not in ENGINES:
        raise BadSetting(
            f"unknown engine {config.engine_name[:40]!r}; there is: {', '.join(ENGINES)}",
            param="engine",
        )
    if config.engine_name == VLLM:
        read_vllm_options(config.options)
    else:
        named_adapters(config.engine.adapters)  # a bad option refuses to start
    return config


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``; a name other than localhost counts as open."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
