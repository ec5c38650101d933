"""Which versions a revision runs: fixed when it first runs, whatever its addresses come to mean.

Remembers what is fixed, writes it through ``releases``. Must not choose between revisions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from cloudlm.control.observe import SeenGroup
from cloudlm.control.plan import group_name
from cloudlm.control.registry import ModelRegistry
from cloudlm.control.releases import Releases, Versions
from cloudlm.core.deployment import Deployment
from cloudlm.core.model import parse_ref


class FixedVersions:
    """The versions of every deployment's newest revision, by its group."""

    def __init__(self, registry: ModelRegistry, releases: Releases) -> None:
        self._registry = registry
        self._releases = releases
        self._known: dict[str, Versions] = {}

    def known(self, deployment: Deployment) -> str:
        """The model's fixed version if it is known by now, else an empty text."""
        found = self._known.get(group_name(deployment.spec.name, deployment.revision))
        return "" if found is None else found[0]

    async def of(self, deployment: Deployment, groups: Sequence[SeenGroup]) -> Versions:
        """The fixed versions of the revision and its adapters: what its group runs; for a new
        revision what the addresses mean now. Moving an alias later changes nothing. Raises
        CloudlmError if an address means nothing."""
        group = group_name(deployment.spec.name, deployment.revision)
        running: Versions | None = None
        for one in groups:
            spec = one.observation.spec
            if spec is not None and spec.name == group:
                running = spec.model, dict(spec.adapters)
        if deployment.spec.endpoints:
            return deployment.spec.model, {}  # the name of others, who say what it means
        known = self._known.get(group)
        if known is None or (running is not None and running != known):
            name, number = deployment.spec.name, deployment.revision
            known = running or await self._releases.versions(name, number)
            known = known or await self._meant_now(deployment)
            await self._releases.fix(name, number, known)
            self._known[group] = known
        return known

    def forget(self, name: str) -> None:
        """The deployment is gone."""
        for group in [one for one in self._known if one.rpartition("-r")[0] == name]:
            del self._known[group]

    async def _meant_now(self, deployment: Deployment) -> Versions:
        model = await self._fixed(deployment.spec.model)
        wanted = deployment.spec.adapters.items()
        return model, {name: await self._fixed(address) for name, address in wanted}

    async def _fixed(self, address: str) -> str:
        return (await asyncio.to_thread(self._registry.resolve, parse_ref(address))).ref
