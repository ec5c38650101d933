"""The memory budget of this machine: how large it is, what each replica needs of it, and whether a
deployment can ever be loaded.

Asks the registry for versions' figures and keeps them. Must not decide who stays in memory
(``residency``) or touch replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cloudlm.control.drivers import Drivers
from cloudlm.control.footprint import MIB, PROCESS_BYTES, amount_text, replica_bytes
from cloudlm.control.registry import ModelRegistry
from cloudlm.control.residency import Claim, too_large
from cloudlm.core.deployment import Deployment, DeploymentSpec, GroupSpec
from cloudlm.core.errors import BrokenModel, CloudlmError, UnprocessableRequest
from cloudlm.core.model import parse_ref
from cloudlm.core.settings import EngineSettings
from cloudlm.drivers.base import Ability

_KEPT = 4096
_Key = tuple[str, str, tuple[tuple[str, str], ...]]


class MemoryBudget:
    """``size_bytes`` for all replicas on this machine; 0: there is no budget. ``min_residency_s``
    as in ``residency``, ``engine`` the settings that replicas begin with."""

    def __init__(
        self,
        registry: ModelRegistry,
        size_bytes: int = 0,
        min_residency_s: float = 5.0,
        engine: EngineSettings | None = None,
    ) -> None:
        self.size_bytes = size_bytes
        self.min_residency_s = min_residency_s
        self._registry = registry
        self._engine = engine or EngineSettings()
        self._known: dict[_Key, int] = {}

    def concerns(self, drivers: Drivers, driver: str) -> bool:
        """Whether replicas of this driver take memory of the budget."""
        if not self.size_bytes:
            return False
        try:
            return Ability.THIS_MACHINE in drivers.get(driver).abilities
        except CloudlmError:
            return False  # it is not installed, and runs nothing

    async def need(self, running: DeploymentSpec | GroupSpec, memory_mb: int = 0) -> int:
        """Bytes for one replica of what runs: as said (``memory_mb``), else estimated. For what the
        registry does not hold (any more), that of a process alone."""
        if memory_mb:
            return memory_mb * MIB
        options = tuple(sorted((name, repr(value)) for name, value in running.options.items()))
        key = (running.model, running.engine, options)
        if key not in self._known:
            try:
                found = await asyncio.to_thread(self._estimated, running)
            except CloudlmError:
                return PROCESS_BYTES
            if len(self._known) >= _KEPT:
                self._known.clear()
            self._known[key] = found
        return self._known[key]

    async def check(
        self, spec: DeploymentSpec, others: Iterable[Deployment], drivers: Drivers
    ) -> None:
        """Raise UnprocessableRequest if a replica of ``spec`` could never be loaded beside what is
        pinned, or ``spec``, pinned, would leave another no room."""
        if not self.concerns(drivers, spec.driver):
            return
        beside = [
            one.spec
            for one in others
            if one.spec.name != spec.name
            and not one.deleting
            and self.concerns(drivers, one.spec.driver)
        ]
        newest = await self._claim(spec)
        claims = [newest, *[await self._claim(one) for one in beside]]
        without = too_large(claims[1:], self.size_bytes)
        shut_out = sorted(too_large(claims, self.size_bytes) - without)
        if not shut_out:
            return
        pinned_bytes = sum(one.need_bytes * one.least for one in claims[1:] if one.pinned)
        size = f"the memory budget of {amount_text(self.size_bytes)} (control.memory_budget)"
        if spec.name in shut_out:
            kept = f", of which pinned deployments keep {amount_text(pinned_bytes)}"
            raise UnprocessableRequest(
                f"{spec.name!r} needs {amount_text(newest.need_bytes * newest.least)} of memory, "
                f"more than {size} has{kept if pinned_bytes else ''}: raise the budget, unpin "
                "another, or make it smaller (precision, kv_cache_mb); memory_mb says it where "
                "the estimate is wrong",
                param="memory_mb" if spec.memory_mb else "model",
            )
        raise UnprocessableRequest(
            f"{spec.name!r}, pinned, would leave too little of {size} for {shut_out[0]!r} ever to "
            "be loaded: raise the budget, or do not pin it",
            param="pinned",
        )

    async def _claim(self, spec: DeploymentSpec) -> Claim:
        least = max(spec.min_replicas, 1) if spec.pinned else 1
        need = await self.need(spec, spec.memory_mb)
        return Claim(spec.name, need, 1, pinned=spec.pinned, least=least)

    def _estimated(self, running: DeploymentSpec | GroupSpec) -> int:
        manifest = self._registry.resolve(parse_ref(running.model))
        config: Mapping[str, Any] = {}
        with contextlib.suppress(BrokenModel):  # GGUF files have none
            config = self._registry.configuration(parse_ref(manifest.ref))
        return replica_bytes(running, manifest, config, self._engine)


def machine_bytes() -> int:
    """The memory that this machine has, or that its control group allows if that is less."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # the file says "max", or is not there
        found = min(found, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return found


def fixed(spec: DeploymentSpec, version: str) -> DeploymentSpec:
    """``spec`` with the version that its replicas run."""
    return replace(spec, model=version) if version else spec
