"""What control needs of the model registry. Synchronous: called in threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from cloudlm.core.model import Manifest, ModelRef

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all (0: unknown) and what is being done."""

Importer = Callable[[str, str | None, str | None, Progress], Manifest]
"""Imports ``(source, name, alias, progress)``; the same source twice is one version."""


class ModelRegistry(Protocol):
    """Model versions by name, number and alias. Raises errors of ``core.errors`` only."""

    def list_models(self) -> Sequence[str]: ...

    def list_versions(self, name: str) -> Sequence[Manifest]:
        """Oldest first."""
        ...

    def list_aliases(self, name: str) -> Mapping[str, int]: ...

    def resolve(self, ref: ModelRef) -> Manifest:
        """Raises ModelNotFound naming the models that exist."""
        ...

    def configuration(self, ref: ModelRef) -> Mapping[str, Any]:
        """A version's ``config.json``. Raises BrokenModel, CorruptModel, ModelNotFound."""
        ...

    def set_alias(self, name: str, alias: str, version: int) -> object: ...

    def remove_alias(self, name: str, alias: str) -> None: ...

    def remove(self, ref: ModelRef) -> object: ...
