"""Settings: read once into frozen dataclasses, file < environment < flag.

Every value knows its source. A value that cannot be read refuses to start the process with an
error that names the value, what was expected, and where it came from. One file per process or
room declares its settings (``gateway``, ``control``, ``worker``, ``engine``, ``external``,
``ground``), ``whole`` joins them, ``reading`` parses.
"""

from cloudlm.core.settings.control import ControlSettings
from cloudlm.core.settings.engine import (
    FLOATS,
    PRECISIONS,
    EngineSettings,
    VllmSettings,
    check_precision,
)
from cloudlm.core.settings.external import ExternalSettings
from cloudlm.core.settings.gateway import GatewaySettings
from cloudlm.core.settings.ground import (
    AccessSettings,
    LogSettings,
    OidcSettings,
    RegistrySettings,
    StateSettings,
)
from cloudlm.core.settings.reading import SettingRow, environment_name, read_settings
from cloudlm.core.settings.whole import Settings
from cloudlm.core.settings.worker import WorkerSettings

__all__ = [
    "FLOATS",
    "PRECISIONS",
    "AccessSettings",
    "ControlSettings",
    "EngineSettings",
    "ExternalSettings",
    "GatewaySettings",
    "LogSettings",
    "OidcSettings",
    "RegistrySettings",
    "SettingRow",
    "Settings",
    "StateSettings",
    "VllmSettings",
    "WorkerSettings",
    "check_precision",
    "environment_name",
    "read_settings",
]
