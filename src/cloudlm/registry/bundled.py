"""The starter model that comes with the package, so that a fresh machine can answer at once.

Must not treat it differently from any other folder.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from cloudlm.core.errors import ModelNotFound
from cloudlm.registry.publish import ImportedManifest
from cloudlm.registry.registry import Registry
from cloudlm.registry.verify import Progress

BUNDLED = "bank-helper"
BUNDLED_ALIAS = "champion"


def bundled_folder() -> Path:
    """The folder of the starter model. Raises ModelNotFound if the package came without it."""
    folder = Path(str(files("cloudlm.registry"))) / "bundled" / BUNDLED
    if not (folder / "config.json").is_file():
        raise ModelNotFound(
            f"the starter model is missing from this installation ({folder}); install cloudlm "
            "again, or train it with 'make starter'"
        )
    return folder


def ensure_bundled(registry: Registry, progress: Progress | None = None) -> ImportedManifest:
    """Register the starter model unless these bytes are registered already.

    The alias ``champion`` is set only if the model has none: where it was moved to is the
    operator's decision.
    """
    manifest = registry.import_folder(
        bundled_folder(),
        BUNDLED,
        lineage={"source": "bundled with cloudlm"},
        progress=progress,
    )
    if BUNDLED_ALIAS not in registry.list_aliases(BUNDLED):
        registry.set_alias(BUNDLED, BUNDLED_ALIAS, manifest.version)
    return manifest
