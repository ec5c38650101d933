"""The memory budget of this machine: how large it is, what each replica needs of it, and whether a
deployment can ever be loaded.

Asks the registry for versions' figures and keeps them; what it could not tell is not asked again
for a while. Must not decide who stays in memory (``residency``) or touch replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cloudlm.control.drivers import Drivers
from cloudlm.control.footprint import MIB, PROCESS_BYTES, amount_text, replica_bytes
from cloudlm.control.registry import ModelRegistry
from cloudlm.control.residency import Claim, too_large
from cloudlm.core.clock import Clock, SystemClock
from cloudlm.core.deployment import Deployment, DeploymentSpec, GroupSpec
from cloudlm.core.errors import (
    BrokenModel,
    CloudlmError,
    CorruptModel,
    ModelNotFound,
    UnprocessableRequest,
)
from cloudlm.core.model import parse_ref
from cloudlm.core.settings import EngineSettings
from cloudlm.drivers.base import Ability

KNOWN_S = 10.0
"""For how long an alias is taken to mean the same, and what failed is not tried again."""
_KEPT = 4096
_Key = tuple[str, str, tuple[tuple[str, str], ...]]
_Answer = str | int | CloudlmError


class MemoryBudget:
    """``size_bytes`` for all replicas on this machine; 0: there is no budget. ``min_residency_s``
    as in ``residency``, ``engine`` the settings that replicas begin with."""

    def __init__(
        self,
        registry: ModelRegistry,
        size_bytes: int = 0,
        min_residency_s: float = 5.0,
        engine: EngineSettings | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.size_bytes = size_bytes
        self.min_residency_s = min_residency_s
        self._registry = registry
        self._engine = engine or EngineSettings()
        self._clock = clock or SystemClock()
        self._known: dict[_Key, int] = {}
        self._meanings: dict[str, str] = {}
        self._lately: dict[_Key | str, tuple[float, _Answer]] = {}

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
        registry does not hold (any more), that of a process alone. Raises CloudlmError if the
        registry cannot tell now, and never told before."""
        if memory_mb:
            return memory_mb * MIB
        try:
            ref = await self._meant(running.model)
            options = tuple(sorted((name, repr(value)) for name, value in running.options.items()))
            key = (ref, running.engine, options)
            if key not in self._known:
                found = await self._asked(key, self._estimated, running, ref)
                if len(self._known) >= _KEPT:
                    self._known.clear()
                self._known[key] = int(found)
        except ModelNotFound:
            return PROCESS_BYTES
        return self._known[key]

    async def _meant(self, address: str) -> str:
        """The version (``models:/name/3``) that an address means now, or as it did last if the
        registry cannot tell."""
        if parse_ref(address).version is not None:
            return address
        try:
            return str(await self._asked(address, self._resolved, address))
        except ModelNotFound:
            raise
        except CloudlmError:
            if address not in self._meanings:
                raise
            return self._meanings[address]

    async def _asked(
        self, key: _Key | str, ask: Callable[..., str | int], *arguments: object
    ) -> str | int:
        """What the registry answers, or has answered lately. Raises CloudlmError."""
        now = self._clock.monotonic()
        until, answer = self._lately.get(key, (now, 0))
        if until <= now:
            try:
                answer = await asyncio.to_thread(ask, *arguments)
            except CloudlmError as error:
                answer = error
            self._lately = {one: kept for one, kept in self._lately.items() if kept[0] > now}
            self._lately[key] = now + KNOWN_S, answer
        if isinstance(answer, CloudlmError):
            raise answer
        return answer

    async def check(
        self, spec: DeploymentSpec, others: Iterable[Deployment], drivers: Drivers
    ) -> None:
        """Raise UnprocessableRequest if a replica of ``spec`` could never be loaded beside what is
        pinned, or ``spec``, pinned, would leave another no room. ``others`` are all deployments;
        what already stands as ``spec`` and keeps no less is not judged again."""
        if not self.concerns(drivers, spec.driver):
            return
        here = [
            one.spec
            for one in others
            if not one.deleting and self.concerns(drivers, one.spec.driver)
        ]
        self._lately.pop(spec.model, None)  # an alias may have been moved for this very wish
        newest = await self._claim(spec)
        for one in here:
            if one.name == spec.name and not _grows(await self._claim(one), newest):
                return
        beside = [one for one in here if one.name != spec.name]
        claims = [newest, *await self._claims(beside)]
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
        own = {one.name for one in beside if one.tenant == spec.tenant}
        named = next((repr(one) for one in shut_out if one in own), "another deployment")
        raise UnprocessableRequest(
            f"{spec.name!r}, pinned, would leave too little of {size} for {named} ever to "
            "be loaded: raise the budget, or do not pin it",
            param="pinned",
        )

    async def _claims(self, specs: Iterable[DeploymentSpec]) -> list[Claim]:
        """Those of the deployments whose need is known."""
        found = []
        for spec in specs:
            with contextlib.suppress(CloudlmError):
                found.append(await self._claim(spec))
        return found

    async def _claim(self, spec: DeploymentSpec) -> Claim:
        least = max(spec.min_replicas, 1) if spec.pinned else 1
        need = await self.need(spec, spec.memory_mb)
        return Claim(spec.name, need, 1, pinned=spec.pinned, least=least)

    def _resolved(self, address: str) -> str:
        self._meanings[address] = meant = self._registry.resolve(parse_ref(address)).ref
        return meant

    def _estimated(self, running: DeploymentSpec | GroupSpec, ref: str) -> int:
        manifest = self._registry.resolve(parse_ref(ref))
        config: Mapping[str, Any] = {}
        try:
            config = self._registry.configuration(parse_ref(ref))
        except CorruptModel:
            raise
        except BrokenModel:  # GGUF files have none
            pass
        return replica_bytes(running, manifest, config, self._engine)


def _grows(before: Claim, newest: Claim) -> bool:
    """Whether it would take more of the memory, or keep more of it, than it does."""
    kept_before, kept = before.need_bytes * before.least, newest.need_bytes * newest.least
    pinned = newest.pinned and not before.pinned
    return pinned or kept > kept_before or newest.need_bytes > before.need_bytes


def machine_bytes() -> int:
    """The memory that this machine has, or that its control group allows if that is less."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # the file says "max", or is not there
        found = min(found, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return found


def fixed(spec: DeploymentSpec, version: str) -> DeploymentSpec:
    """``spec`` with the version that its replicas run."""
    return replace(spec, model=version) if version else spec
