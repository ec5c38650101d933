"""All settings in one tree: a name, a section of it. Declarations alone."""

from __future__ import annotations

from dataclasses import dataclass, field

from cloudlm.core.settings.control import ControlSettings
from cloudlm.core.settings.declare import setting
from cloudlm.core.settings.engine import EngineSettings, VllmSettings
from cloudlm.core.settings.external import ExternalSettings
from cloudlm.core.settings.gateway import GatewaySettings
from cloudlm.core.settings.ground import (
    AccessSettings,
    LogSettings,
    OidcSettings,
    RegistrySettings,
    StateSettings,
)
from cloudlm.core.settings.worker import WorkerSettings


@dataclass(frozen=True)
class Settings:
    """All settings. ``home`` is the folder that holds everything of this installation."""

    home: str = setting("~/.cloudlm", "Folder of state, registry, logs and secrets.")
    gateway: GatewaySettings = field(default_factory=GatewaySettings)
    control: ControlSettings = field(default_factory=ControlSettings)
    worker: WorkerSettings = field(default_factory=WorkerSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    vllm: VllmSettings = field(default_factory=VllmSettings)
    external: ExternalSettings = field(default_factory=ExternalSettings)
    registry: RegistrySettings = field(default_factory=RegistrySettings)
    access: AccessSettings = field(default_factory=AccessSettings)
    oidc: OidcSettings = field(default_factory=OidcSettings)
    state: StateSettings = field(default_factory=StateSettings)
    log: LogSettings = field(default_factory=LogSettings)
